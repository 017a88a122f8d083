-- works with code from: 15
-- More than one pending recall a session, for applications that want it: `migrate --slots N`. Here
-- is only what it needs; nothing of it is switched on, and each session has the one slot that it
-- always had. What switches it on (two triggers, and a unique index over session_id and slot in the
-- place of the application's over session_id) is in recall_worker/schema/slots.py.

-- A constant default: no row is rewritten.
lock table session_recalls in access exclusive mode;
alter table session_recalls
    add column slot integer not null default 1;
comment on column session_recalls.slot is
    'which of its session''s slots it has while it is pending, from 1; '
    'of other statuses, the last one that it had';

-- The slot of a row that becomes pending, where a session has several: `tg_argv[0]` of them. The
-- lowest one that is free, but the one that the row names comes first, as with a row that is put
-- back. Where none is free: that of a one-shot which is run, or whose run may still go on, as
-- recall_before_insert (or recall_free_slot) then moves that one out of it. Else a slot that is
-- taken, which the unique index refuses: so `on conflict do nothing` works, and the error has the
-- words that applications read. A run's end that finds no slot leaves its recall `running`.
--
-- Two transactions that insert into one session at once must not choose the same slot while
-- another is free. Each locks the slot that it chooses (an advisory lock on session and slot, to
-- the end of the transaction) and looks again, as the one that had the lock may have committed. It
-- never waits for such a lock, so no two of them can block each other. A slot that is free and
-- locked is chosen where there is no other: the index waits for the other transaction's end then.
-- After 64 locks, of an insert of very many rows, no more are taken: PostgreSQL has room for as
-- many in each connection, and for no more in all. What others insert into the same sessions
-- meanwhile waits, and may be refused though a slot is free. The same where a transaction can't see
-- what was committed after it began (repeatable read, serializable). The index decides in each of
-- these cases; a session never has more than its slots.
--
-- With the rights of its owner, as not every account that may insert recalls may read them; and
-- with the settings of the function, so that nothing is looked for in the caller's search_path. On
-- another table than session_recalls it finds nothing.
do $migration$
begin
    execute format('create function recall_admit_slot() returns trigger language plpgsql '
        'security definer set search_path = pg_catalog, pg_temp as %L', format($body$
declare
    most constant integer := tg_argv[0];
    locks integer := coalesce(
        substring(current_setting('recall_worker.slot_locks', true) from '^[0-9]{1,6}$')::integer, 0
    );
    taken integer[];
    waits_for integer;
    number integer;
begin
    select coalesce(array_agg(t.slot), '{}') into taken
    from %1$s t
    where t.session_id = new.session_id and t.status = 'pending'
        and t.id is distinct from new.id and t.tableoid = tg_relid;
    if cardinality(taken) < most then
        for number in
            select g from generate_series(1, most) g
            where g <> all (taken)
            order by g <> new.slot, g
        loop
            if locks >= 64 then
                waits_for := coalesce(waits_for, number);
                exit;
            end if;
            if not pg_try_advisory_xact_lock(hashtextextended(
                concat_ws(' ', 'recall-worker slot', tg_relid::bigint, number, new.session_id), 0
            )) then
                waits_for := coalesce(waits_for, number);
                continue;
            end if;
            locks := locks + 1;
            perform set_config('recall_worker.slot_locks', locks::text, true);
            if not exists (
                select from %1$s t
                where t.session_id = new.session_id and t.status = 'pending' and t.slot = number
                    and t.id is distinct from new.id and t.tableoid = tg_relid
            ) then
                new.slot := number;
                return new;
            end if;
            taken := taken || number;
        end loop;
        if waits_for is not null then
            new.slot := waits_for;
            return new;
        end if;
    end if;
    if tg_op = 'UPDATE' then
        if old.status = 'running' and old.lease is not null then
            new.status := 'running';
        else
            new.slot := taken[1];
        end if;
        return new;
    end if;
    new.slot := coalesce((
        select t.slot from %1$s t
        where t.session_id = new.session_id and t.status = 'pending' and t.tableoid = tg_relid
            and t.call_type <> 'recurring'
            and not exists (select from %1$s o where o.id = new.id)
            and (
                t.lease is not null or t.may_still_run
                or t.last_outcome = 'unknown' or t.attempt > t.rekey
            )
        order by t.lease is null, t.slot
        limit 1
    ), taken[1]);
    return new;
end
$body$, (
        select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    )));
end
$migration$;

-- As in 0027; and only the recall in the slot that the new one is to have is moved out of it. Where
-- a session has one slot, that is the same.
do $migration$
begin
    execute format('create or replace function recall_free_slot() returns trigger language plpgsql '
        'security definer set search_path = pg_catalog, pg_temp as %L', format($body$
begin
    if new.status operator(pg_catalog.=) 'pending'
        and new.planned_at is null and new.leased_at is null and new.named_at is null
        and new.edited_at is null and new.ended_at is null and new.last_outcome is null
        and new.edits operator(pg_catalog.=) 0 and new.occurrence operator(pg_catalog.=) 1
        and exists (
            select from %1$s t
            where t.session_id operator(pg_catalog.=) new.session_id
                and t.status operator(pg_catalog.=) 'pending'
                and t.slot operator(pg_catalog.=) new.slot
                and t.tableoid operator(pg_catalog.=) tg_relid
        )
    then
        -- Until this function returns, as it has a search_path of its own.
        perform pg_catalog.set_config(
            'search_path', pg_catalog.format('%%I, pg_temp', tg_table_schema), true
        );
        update %1$s t
        set status = 'running'
        where t.session_id operator(pg_catalog.=) new.session_id
            and t.status operator(pg_catalog.=) 'pending'
            and t.slot operator(pg_catalog.=) new.slot
            and t.call_type operator(pg_catalog.<>) 'recurring'
            and not exists (select from %1$s o where o.id operator(pg_catalog.=) new.id)
            and (
                t.lease is not null or t.may_still_run
                or t.last_outcome operator(pg_catalog.=) 'unknown'
                or t.attempt operator(pg_catalog.>) t.rekey
            );
    end if;
    return new;
end
$body$, (
        select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    )));
end
$migration$;

-- The same for accounts that have the rights it takes.
do $migration$
begin
    execute format('create or replace function recall_before_insert() returns trigger '
        'language plpgsql as %L', format($body$
begin
    -- First, as what is written into a new row below looks like a row that is put back.
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on: may_still_run says so.
        -- Where a worker of an earlier version wrote the row: a failed run, which is over, counts
        -- an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        -- For an account that may not do this, recall_free_slot has done it.
        if pg_catalog.has_table_privilege(tg_relid, 'select')
            and pg_catalog.has_column_privilege(tg_relid, 'status', 'update')
        then
            if exists (
                    select from %1$s
                    where session_id = new.session_id and status = 'pending' and slot = new.slot
                )
                and not (%2$s)
            then
                update %1$s
                set status = 'running'
                where session_id = new.session_id and status = 'pending' and slot = new.slot
                    and call_type <> 'recurring'
                    and not exists (select from %1$s where id = new.id)
                    and (
                        lease is not null or may_still_run
                        or last_outcome = 'unknown' or attempt > rekey
                    );
            end if;
        end if;
    end if;
    if (new.call_type = 'recurring' or new.cadence <> 'interval')
        and new.status in ('pending', 'running')
        and not (%2$s)
    then
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
        -- Applications that insert very many rows at once may do without notifications, and leave
        -- them to the workers' next poll: set recall_worker.rings = 'off'.
        if new.trigger_at <= pg_catalog.now() + interval '60 seconds' and new.paused_at is null
            and pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
            perform pg_catalog.pg_notify(
                'session_recalls', case new.queue when 'default' then '' else new.queue end
            );
        end if;
    end if;
    return new;
end
$body$, (
        select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    ), $restored$
            new.planned_at is not null or new.leased_at is not null or new.named_at is not null
            or new.edited_at is not null or new.ended_at is not null
            or new.last_outcome is not null or new.edits <> 0 or new.occurrence <> 1
            or (pg_catalog.current_setting('check_function_bodies') = 'off'
                and pg_catalog.current_setting('search_path') in ('', '""'))
        $restored$));
end
$migration$;
