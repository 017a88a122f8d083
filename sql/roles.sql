-- Who may do what: four roles that own nothing and can't log in. Apply this file after
-- `recall-worker migrate`, and again after each upgrade (`recall-worker migrate --roles` does both,
-- and `migrate` renews the grants of roles that exist):
--
--     psql -v ON_ERROR_STOP=1 -f roles.sql "postgresql://owner@host/database"
--
-- as a superuser, or as the owner of the tables with CREATEROLE. Then grant a role to accounts of
-- your own; nothing else is needed:
--
--     create role worker_1 login password '...' in role recall_worker;
--
--   recall_worker       the daemon and the operator's commands
--   recall_application  what the application does to session_recalls: its own columns. Grant it the
--                       application's own tables besides
--   recall_agent        the MCP server (`recall-worker mcp`): what an agent does to recalls, and no
--                       call, no worker, no session
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
        'jitter_seconds', 'queue'
    ];
    -- What a recall keeps for ever: no worker sends it to another session, or changes its message.
    -- What an agent's reschedule, skip and cancel write, and how a recall recurs and ends; never
    -- who runs it, or what a run became.
    acted constant text[] := array[
        'trigger_at', 'named_at', 'edit_of', 'status', 'reason', 'ended_at', 'updated_at',
        'interval_seconds', 'cadence', 'cron', 'time_zone', 'until_at', 'times', 'failures_most',
        'grace_seconds', 'jitter_seconds', 'queue'
    ];
    fixed constant text[] := array['id', 'session_id', 'call_type', 'internal_comment',
        'additional_context_message', 'created_at'];
    roles constant text[] := array[
        'recall_worker', 'recall_application', 'recall_agent', 'recall_reader'
    ];
    role text;
    recalls constant regclass := to_regclass('session_recalls');
    sessions constant regclass := to_regclass('sessions');
    place name;
    own text;
    given text;
    changed text;
    sequence regclass;
    sequences regclass[] := '{}';
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
            exception
                when duplicate_object or unique_violation then
                    null; -- The same is being done in another database of this cluster.
                when insufficient_privilege then
                    -- It came later than the others: an owner without CREATEROLE, for whom somebody
                    -- else had created those, goes on renewing their grants.
                    if role <> 'recall_agent' then
                        raise;
                    end if;
                    raise warning 'there is no role recall_agent, and this account may create none'
                        using hint = 'For the MCP server, as a superuser: create role recall_agent '
                            'nologin; then apply this again.';
                    continue;
            end;
        end if;
        if exists (select from pg_class c where c.oid in (recalls, sessions)
            and c.relowner = role::regrole) then
            raise exception 'role % owns a table that it is to be held back from', role
                using hint = 'Give the table to another role: alter table ... owner to ...';
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
            'revoke all on %s, recall_attempts, recall_actions, recall_workers, recall_endpoints, '
            'recall_chores, recall_queues, recall_subscriptions, recall_outbox, recall_runs, '
            'recall_session_locks, recall_schema, recall_identity from %I',
            recalls, role);
        execute format('grant select on %s to %I', recalls, role);
        -- Everybody has it, unless the owner's default privileges say otherwise.
        if to_regprocedure('recall_id(text)') is not null then
            execute format('grant execute on function recall_id(text), recall_session(text) to %I',
                role);
        end if;
    end loop;

    -- The application: its own columns, and no others. It deletes sessions, and the foreign key
    -- then deletes their recalls with the owner's rights.
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into given
    from pg_attribute a
    where a.attrelid = recalls and a.attnum > 0 and not a.attisdropped
        and a.attname = any (written);
    execute format('grant insert (%s), update (%s) on %s to recall_application', given, given,
        recalls);
    -- Where ids come from a sequence, who inserts draws from it. (An identity needs no right.)
    for sequence in
        select distinct d.refobjid::regclass
        from pg_attrdef f
        join pg_attribute a on a.attrelid = f.adrelid and a.attnum = f.adnum and a.attname = 'id'
        join pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid
            and d.refclassid = 'pg_class'::regclass
        join pg_class s on s.oid = d.refobjid and s.relkind = 'S'
        where f.adrelid = recalls and pg_has_role(s.relowner, 'usage')
    loop
        execute format('grant usage on sequence %s to recall_application, recall_worker', sequence);
        sequences := sequences || sequence;
    end loop;
    -- What it reschedules by `Recalls` is named by a person: the worker takes it for no skip.
    execute format('grant update (named_at, edit_of) on %s to recall_application', recalls);
    -- Where jitter delays the first occurrence, the one who schedules writes its nominal time, and
    -- on cron by which time zone data it was computed; afterwards the worker does.
    execute format(
        'grant insert (scheduled_for, zone_data) on %s to recall_application, recall_worker',
        recalls);

    -- The agent's process: it schedules as the application does, and changes when a recall comes
    -- and whether it does. Its sessions are kept apart by the process, not by PostgreSQL.
    if exists (select from pg_roles r where r.rolname = 'recall_agent') then
        execute format('grant insert (%s, scheduled_for, zone_data) on %s to recall_agent', given,
            recalls);
        select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into changed
        from pg_attribute a
        where a.attrelid = recalls and a.attnum > 0 and not a.attisdropped
            and a.attname = any (acted);
        execute format('grant update (%s) on %s to recall_agent', changed, recalls);
        grant insert on recall_actions to recall_agent;
        for sequence in select unnest(sequences) loop
            execute format('grant usage on sequence %s to recall_agent', sequence);
        end loop;
    end if;

    -- The worker: it schedules as the application does, writes what is not fixed, and prunes.
    execute format('grant insert (%s), delete on %s to recall_worker', given, recalls);
    select string_agg(quote_ident(a.attname), ', ' order by a.attnum) into given
    from pg_attribute a
    where a.attrelid = recalls and a.attnum > 0 and not a.attisdropped and a.attname <> all (fixed);
    execute format('grant update (%s) on %s to recall_worker', given, recalls);
    grant select, insert, update, delete on recall_attempts, recall_workers to recall_worker;
    grant select, insert, update on recall_endpoints, recall_chores to recall_worker;
    grant select, insert, update, delete on recall_queues to recall_worker;

    -- Who writes recalls records what is done to them: actions are added and read, pruned by the
    -- worker when they are old (recall_keep_actions), and changed by nobody.
    grant select, insert on recall_actions to recall_worker, recall_application;
    grant delete on recall_actions to recall_worker;

    -- Who makes a recall failed writes the entry by which that is told (a trigger does); the worker
    -- tells it.
    grant select on recall_subscriptions to recall_application;
    grant insert on recall_outbox to recall_application;
    grant select, insert, update on recall_subscriptions to recall_worker;
    grant select, insert, update, delete on recall_outbox to recall_worker;

    -- The endpoint kit runs in the application: its keys and its sessions' locks. No worker reads
    -- them; whoever reads recalls may see what runs.
    grant select, insert, update, delete on recall_runs, recall_session_locks
        to recall_application;
    grant select on recall_runs, recall_session_locks to recall_reader;

    grant select on recall_schema, recall_identity to recall_worker, recall_reader;
    grant select on recall_attempts, recall_actions, recall_workers, recall_endpoints,
        recall_chores, recall_queues, recall_subscriptions, recall_outbox to recall_reader;

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
