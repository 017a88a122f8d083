-- works with code from: 15
-- What is known of a call whose worker died, and whether a run may still go on at the API.
lock table session_recalls in access exclusive mode;
alter table session_recalls
    add column sent_at timestamptz,
    add column taken_lease uuid,
    add column takeovers integer not null default 0,
    add column may_still_run boolean not null default false;
comment on column session_recalls.sent_at is
    'when the request under this lease was sent, where that is on record; '
    'a time before leased_at is of an earlier lease';
comment on column session_recalls.taken_lease is
    'the lease of a row that was taken up from a dead worker: '
    'under it nothing is sent before sent_at is written';
comment on column session_recalls.takeovers is
    'how many workers in a row took it up from a dead one, and are not known to have sent anything';
comment on column session_recalls.may_still_run is
    'whether a run of it may still go on at the API, as a call ended as unknown: '
    'its session''s slot is free for the next recall';

-- A row that becomes live again notifies the workers, also where its worker died during the run: a
-- retry of a recall that was cancelled in mid-run, a resume of one that was paused in mid-run. The
-- worker's own writes still never notify: it changes leases of rows that are live and not paused.
drop trigger recall_ring_earlier on session_recalls;
create trigger recall_ring_earlier after update of trigger_at, status, paused_at on session_recalls
    for each row when (
        new.status in ('pending', 'running') and new.paused_at is null
        and coalesce(new.lease_until, new.trigger_at) <= now() + interval '60 seconds'
        and (
            (new.lease is null and old.lease is null and new.trigger_at < old.trigger_at)
            or old.status not in ('pending', 'running') or old.paused_at is not null
        )
    )
    execute function recall_ring();

-- As in 0010, with may_still_run.
do $migration$
begin
    execute format($definition$
create or replace function recall_before_insert() returns trigger language plpgsql as $$
begin
    if new.call_type = 'recurring' or new.cadence <> 'interval' then
        if new.cadence not in ('interval', 'grid', 'cron') then
            raise exception 'session_recalls: cadence is %%, but there are interval, grid and cron',
                pg_catalog.quote_literal(new.cadence)
                using errcode = 'check_violation';
        end if;
        if new.call_type = 'recurring' and new.cadence = 'cron' then
            if new.cron is null then
                raise exception
                    'session_recalls: a recurring recall with cadence ''cron'' needs cron'
                    using errcode = 'check_violation',
                        hint = 'Set cron to five fields, minute hour day month weekday, '
                            'and time_zone to an IANA name.';
            end if;
            if new.interval_seconds < 1 then
                new.interval_seconds := null;
            end if;
        elsif new.call_type = 'recurring' and coalesce(new.interval_seconds, 0) < 1 then
            raise exception
                'session_recalls: a recurring recall needs interval_seconds of at least 1, not %%',
                coalesce(new.interval_seconds::text, 'null')
                using errcode = 'check_violation',
                    hint = 'Set interval_seconds to the distance between two occurrences '
                        'in seconds, or use call_type ''once''.';
        end if;
        -- Skips and moves are recognized by it. A one-shot that was never called has no interval
        -- to skip: its trigger_at is simply when it is due.
        new.planned_at := new.trigger_at;
    end if;
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on: may_still_run says so.
        -- Where a worker of an earlier version wrote the row: a failed run, which is over, counts
        -- an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        if exists (select from %1$s where session_id = new.session_id and status = 'pending') then
            update %1$s
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and (
                    lease is not null or may_still_run
                    or last_outcome = 'unknown' or attempt > rekey
                );
        end if;
        -- Applications that insert very many rows at once may do without notifications, and leave
        -- them to the workers' next poll: set recall_worker.rings = 'off'.
        if new.trigger_at <= pg_catalog.now() + interval '60 seconds' and new.paused_at is null
            and pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
            perform pg_catalog.pg_notify('session_recalls', '');
        end if;
    end if;
    return new;
end
$$
    $definition$, (
        select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    ));
end
$migration$;
