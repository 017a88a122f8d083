-- works with code from: 1
-- One trigger on insert and not two, as most inserts are due later and should cost their application as little as can be. A condition in
-- `when` is parsed and planned anew for each statement; a setting of the function's own (its search_path) is set and put back at each call,
-- so it names its table in full; an update that finds nothing costs more than a look; and a row that is changed is made anew. What it refuses
-- and what it frees is as before.
drop trigger recall_ring_insert on session_recalls;
do $migration$
begin
    execute format($definition$
create or replace function recall_before_insert() returns trigger language plpgsql as $$
begin
    if new.call_type = 'recurring' or new.cadence <> 'interval' then
        if new.cadence not in ('interval', 'grid', 'cron') then
            raise exception 'session_recalls: cadence is %%, but there are interval, grid and cron', pg_catalog.quote_literal(new.cadence)
                using errcode = 'check_violation';
        end if;
        if new.call_type = 'recurring' and new.cadence = 'cron' then
            if new.cron is null then
                raise exception 'session_recalls: a recurring recall with cadence ''cron'' needs cron' using errcode = 'check_violation',
                    hint = 'Set cron to five fields, minute hour day month weekday, and time_zone to an IANA name.';
            end if;
            if new.interval_seconds < 1 then
                new.interval_seconds := null;
            end if;
        elsif new.call_type = 'recurring' and coalesce(new.interval_seconds, 0) < 1 then
            raise exception 'session_recalls: a recurring recall needs interval_seconds of at least 1, not %%',
                coalesce(new.interval_seconds::text, 'null')
                using errcode = 'check_violation',
                    hint = 'Set interval_seconds to the distance between two occurrences in seconds, or use call_type ''once''.';
        end if;
        -- What its skips and moves are told apart by. A one-shot that was never called has no distance to skip, and simply stands where it is put.
        new.planned_at := new.trigger_at;
    end if;
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on. (A failed run, which is over, counts an attempt and begins a new
        -- key; an unknown one counts an attempt and keeps the key.)
        if exists (select from %1$s where session_id = new.session_id and status = 'pending') then
            update %1$s
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and (lease is not null or last_outcome = 'unknown' or attempt > rekey);
        end if;
        -- Who inserts very many at once may do without, and has the workers find them at their next look: set recall_worker.rings = 'off'.
        if new.trigger_at <= pg_catalog.now() + interval '60 seconds' and new.paused_at is null
            and pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
            perform pg_catalog.pg_notify('session_recalls', '');
        end if;
    end if;
    return new;
end
$$
    $definition$, (select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = 'session_recalls'::regclass));
end
$migration$;
alter function recall_before_insert() reset all;
