-- works with code from: 15
-- Dumps, restores and copies.

-- Which database this is, as `migrate` records it. Rows that name another one came with a dump, or
-- with a copy of the files: workers then claim nothing until `migrate --here`. No primary key, so
-- that a dump of the data, restored into a migrated database, adds its row to the one that is here.
create table recall_identity (
    system_identifier bigint not null,
    database_oid bigint not null,
    recorded_at timestamptz not null default now()
);
comment on table recall_identity is
    'the database whose recalls are called, written by migrate; '
    'a row of another database means that this one is a copy';
comment on column recall_identity.system_identifier is
    'of its cluster, as pg_control_system() tells it: a standby has that of its primary';
comment on column recall_identity.database_oid is 'of the database in that cluster';

-- Whoever may read recalls may read whose they are. Accounts outside of sql/roles.sql could not
-- find out otherwise.
do $$
declare
    given record;
begin
    for given in
        select distinct case when a.grantee = 0 then 'public' else quote_ident(r.rolname) end
            as grantee
        from (
            select x.grantee
            from pg_class c
            cross join lateral aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
            where c.oid = 'session_recalls'::regclass and x.privilege_type = 'SELECT'
            union all
            select x.grantee
            from pg_attribute t
            cross join lateral aclexplode(t.attacl) x
            where t.attrelid = 'session_recalls'::regclass and not t.attisdropped
                and x.privilege_type = 'SELECT'
        ) a
        left join pg_roles r on r.oid = a.grantee
        where (a.grantee = 0 or r.oid is not null)
            and a.grantee <> (
                select relowner from pg_class where oid = 'recall_identity'::regclass
            )
    loop
        execute format('grant select on recall_identity to %s', given.grantee);
    end loop;
end
$$;

-- Where a worker runs that wrote its row, and whether it claims. A row that came with a dump is of
-- a worker that runs elsewhere, however fresh its heartbeat looks.
alter table recall_workers
    add column held text,
    add column system_identifier bigint,
    add column database_oid bigint;
comment on column recall_workers.held is
    'why this worker claims nothing: copy (the database is one), paused (it was started so); '
    'null: it claims';
comment on column recall_workers.system_identifier is
    'of the cluster in which the worker wrote this row; null: not known';
comment on column recall_workers.database_oid is
    'of the database in which the worker wrote this row; null: not known';

-- A dump of the data that is restored into a migrated database brings rows of these tables that are
-- there already: the versions, as `migrate` has recorded them, the rows of workers that have run
-- here meanwhile. The row that is there stays. In a session that restores a dump only (see
-- recall_before_insert below): the workers' own upserts must not pass here.
create function recall_before_restore() returns trigger language plpgsql as $$
declare
    -- The primary key's column, given as the trigger's argument.
    key text := tg_argv[0];
    there boolean;
begin
    execute pg_catalog.format(
        'select exists (select from %I.%I t where t.%I::text = $1)',
        tg_table_schema, tg_table_name, key
    ) using pg_catalog.to_jsonb(new) ->> key into there;
    return case when there then null else new end;
end
$$;
create trigger recall_before_restore before insert on recall_schema
    for each row when (
        current_setting('check_function_bodies') = 'off'
        and current_setting('search_path') in ('', '""')
    )
    execute function recall_before_restore('version');
create trigger recall_before_restore before insert on recall_workers
    for each row when (
        current_setting('check_function_bodies') = 'off'
        and current_setting('search_path') in ('', '""')
    )
    execute function recall_before_restore('worker');
create trigger recall_before_restore before insert on recall_endpoints
    for each row when (
        current_setting('check_function_bodies') = 'off'
        and current_setting('search_path') in ('', '""')
    )
    execute function recall_before_restore('endpoint');
create trigger recall_before_restore before insert on recall_chores
    for each row when (
        current_setting('check_function_bodies') = 'off'
        and current_setting('search_path') in ('', '""')
    )
    execute function recall_before_restore('chore');

-- As in 0017, but only a row that is live is judged, and a row that is put back is kept as it is
-- given: it may have been valid when it was written, as the worker, which fails it with its reason,
-- would find it. Nothing else is moved for it either. What tells a row that is put back from a new
-- one: it brings columns that only workers, commands and the trigger on updates write; or the
-- session is one that restores a dump. pg_dump's scripts and pg_restore empty search_path and
-- switch check_function_bodies off, both, and nobody else does: a row that the worker has never
-- touched, adopted with an interval of 0, has no other mark. Neither costs an ordinary insert of a
-- one-shot anything, as both are asked only where something would be refused, written or moved.
-- The application reads "unique" and "duplicate" as "this session has one already": no message here
-- may contain these words.
do $migration$
begin
    execute format($definition$
create or replace function recall_before_insert() returns trigger language plpgsql as $$
begin
    -- First, as what is written into a new row below looks like a row that is put back.
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on: may_still_run says so.
        -- Where a worker of an earlier version wrote the row: a failed run, which is over, counts
        -- an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        if exists (select from %1$s where session_id = new.session_id and status = 'pending')
            and not (%2$s)
        then
            update %1$s
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and not exists (select from %1$s where id = new.id)
                and (
                    lease is not null or may_still_run
                    or last_outcome = 'unknown' or attempt > rekey
                );
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
    ), $restored$
            new.planned_at is not null or new.leased_at is not null or new.named_at is not null
            or new.edited_at is not null or new.ended_at is not null
            or new.last_outcome is not null or new.edits <> 0 or new.occurrence <> 1
            or (pg_catalog.current_setting('check_function_bodies') = 'off'
                and pg_catalog.current_setting('search_path') in ('', '""'))
        $restored$);
end
$migration$;
