-- works with code from: 15
-- Accounts with few rights, and databases whose changes are published.

-- Without a primary key PostgreSQL refuses updates and deletes of a table that a publication for
-- all tables covers, unless whole rows tell which row is meant.
alter table recall_identity replica identity full;

-- The slot of a session, freed for an account that may insert recalls but may not read or update
-- all that this takes: `grant insert` on the table, or grants of single columns, as applications
-- had them before they were adopted. Any other account frees it with its own rights, in
-- recall_before_insert, which fires after this. It runs with the rights of its owner, and so do the
-- triggers of the update that it makes, the application's own among them: so nothing is looked for
-- in the caller's search_path, but in the table's schema. On another table than session_recalls it
-- does nothing. The condition is evaluated as the caller; a session that restores a dump moves
-- nothing (see 0021).
do $migration$
begin
    execute format('create function recall_free_slot() returns trigger language plpgsql '
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
create trigger recall_at_insert before insert on session_recalls
    for each row when (
        not (
            has_table_privilege('session_recalls'::regclass, 'select')
            and has_column_privilege('session_recalls'::regclass, 'status', 'update')
        )
        and not (
            current_setting('check_function_bodies') = 'off'
            and current_setting('search_path') in ('', '""')
        )
    )
    execute function recall_free_slot();

-- As in 0021, for accounts that have the rights it takes. And the notification of a row in another
-- queue than `default` names the queue, so that many inserts into one queue do not wake the workers
-- of the others.
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
            if exists (select from %1$s where session_id = new.session_id and status = 'pending')
                and not (%2$s)
            then
                update %1$s
                set status = 'running'
                where session_id = new.session_id and status = 'pending'
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
