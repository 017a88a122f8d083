-- Who may do what: three roles that own nothing and can't log in. Apply this file after
-- `recall-worker migrate`, and again after each upgrade (`recall-worker migrate --roles` does both,
-- and `migrate` renews the grants of roles that exist):
--
--     psql -v ON_ERROR_STOP=1 -f roles.sql "postgresql://owner@host/database"
--
-- as a superuser, or as the owner of the tables with CREATEROLE. Then grant a role to accounts of
-- your own; nothing else is needed:
--
--     create role worker_1 login password '…' in role recall_worker;
--
--   recall_worker       the daemon and the operator's commands
--   recall_application  what the application does to session_recalls: its own columns. Grant it the
--                       application's own tables besides
--   recall_reader       the commands that only read: list, show, why, stats, workers
--
-- They restrict an account that is not the tables' owner. The owner of a table can do anything to
-- it: docs/roles.md says what holds then. Applying it again gives the same grants, whatever an
-- earlier version of this file had granted. One transaction; no table is locked.

do $roles$
declare
    -- What the application writes: its own columns, and those that say how a recall recurs.
    written constant text[] := array[
        'id', 'session_id', 'call_type', 'trigger_at', 'interval_seconds', 'internal_comment',
        'additional_context_message', 'status',
        'created_at', 'updated_at',
        'cadence', 'cron', 'time_zone', 'until_at', 'times', 'failures_most', 'grace_seconds',
        'jitter_seconds'
    ];
    -- What a recall keeps for ever: no worker sends it to another session, or changes its message.
    fixed constant text[] := array['id', 'session_id', 'call_type', 'internal_comment',
        'additional_context_message', 'created_at'];
    roles constant text[] := array['recall_worker', 'recall_application', 'recall_reader'];
    role text;
    recalls constant regclass := to_regclass('session_recalls');
    sessions constant regclass := to_regclass('sessions');
    place name;
    own text;
    given text;
begin
    if recalls is null or to_regclass('recall_schema') is null then
        raise exception 'this database has no recall-worker schema' using hint
            = 'First: recall-worker migrate. Then see search_path.';
    end if;
    select n.nspname, pg_get_userbyid(c.relowner) into place, own
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = recalls;

    foreach role in array roles loop
        if not exists (select from pg_roles r where r.rolname = role) then
            begin
                execute format('create role %I nologin', role);
            exception when duplicate_object or unique_violation then
                null; -- The same is being done in another database of this cluster.
            end;
        end if;
        if exists (select from pg_class c where c.oid in (recalls, sessions)
            and c.relowner = role::regrole) then
            raise exception 'role % owns a table that it is to be held back from', role
                using hint = 'Give the table to another role: alter table … owner to ….';
        end if;
        if exists (
            select from pg_roles r
            where r.rolname = role
                and (r.rolsuper or r.rolcreaterole or r.rolcreatedb or r.rolreplication
                    or r.rolbypassrls)
        ) or pg_has_role(role, own, 'member') then
            raise warning
                'role % can do more than these grants say: it has attributes, or is a member of %',
                role, own;
        end if;
        -- Not where everybody has it: the tables' owner may not be the schema's owner.
        if not has_schema_privilege(role, place, 'usage') then
            execute format('grant usage on schema %I to %I', place, role);
        end if;
        -- The grants of single columns go with it.
        execute format(
            'revoke all on %s, recall_attempts, recall_workers, recall_endpoints, recall_chores, '
            'recall_schema from %I',
            recalls, role);
        execute format('grant select on %s to %I', recalls, role);
    end loop;

    -- The application: its own columns, and no others. It deletes sessions, and the foreign key
    -- then deletes their recalls with the owner's rights.
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into given
    from pg_attribute a
    where a.attrelid = recalls and a.attnum > 0 and not a.attisdropped
        and a.attname = any (written);
    execute format('grant insert (%s), update (%s) on %s to recall_application', given, given,
        recalls);
    -- Where jitter delays the first occurrence, the one who schedules writes its nominal time;
    -- afterwards the worker does.
    execute format('grant insert (scheduled_for) on %s to recall_application, recall_worker',
        recalls);

    -- The worker: it schedules as the application does, writes what is not fixed, and prunes.
    execute format('grant insert (%s), delete on %s to recall_worker', given, recalls);
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into given
    from pg_attribute a
    where a.attrelid = recalls and a.attnum > 0 and not a.attisdropped and a.attname <> all (fixed);
    execute format('grant update (%s) on %s to recall_worker', given, recalls);
    grant select, insert, update, delete on recall_attempts, recall_workers to recall_worker;
    grant select, insert, update on recall_endpoints, recall_chores to recall_worker;

    grant select on recall_schema to recall_worker, recall_reader;
    grant select on recall_attempts, recall_workers, recall_endpoints,
        recall_chores to recall_reader;

    -- `list --user` asks whose a session is, and nothing else of it.
    if sessions is not null
        and pg_has_role((select c.relowner from pg_class c where c.oid = sessions), 'usage') then
        execute format('revoke all on %s from recall_worker, recall_reader', sessions);
        select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into given
        from pg_attribute a
        where a.attrelid = sessions and a.attnum > 0 and not a.attisdropped
            and a.attname in ('id', 'user_id');
        if given is not null then
            execute format('grant select (%s) on %s to recall_worker, recall_reader', given,
                sessions);
        end if;
    end if;

    if exists (
        select from pg_namespace n cross join lateral aclexplode(n.nspacl) a
        where n.nspname = place and a.grantee = 0 and a.privilege_type = 'CREATE'
    ) then
        -- As PostgreSQL 14 and older set it up. Not revoked here: the application may need it.
        raise warning 'everybody may create objects in schema %', place
            using hint = format(
                'Where nothing counts on it: revoke create on schema %I from public.', place);
    end if;
end
$roles$;
