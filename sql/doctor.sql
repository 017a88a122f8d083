-- What `doctor` asks. Catalogues and settings first, then the rows. Nothing here changes anything,
-- and nothing here takes a lock.

-- name: server
-- Which database and role this is, and how the server is set for this account.
select current_setting('server_version') as version,
    current_setting('server_version_num')::integer as number,
    current_database() as database, current_user as role, r.rolsuper as superuser,
    pg_is_in_recovery() as standby, current_setting('transaction_read_only') = 'on' as read_only,
    current_setting('fsync') as fsync, current_setting('full_page_writes') as full_page_writes,
    current_setting('synchronous_commit') as synchronous_commit,
    current_setting('autovacuum') as autovacuum,
    -- Connections for ordinary accounts: those reserved for superusers, and since PostgreSQL 16 for
    -- a role, are not.
    least(
        current_setting('max_connections')::integer
            - current_setting('superuser_reserved_connections')::integer
            - coalesce(current_setting('reserved_connections', true)::integer, 0),
        nullif(r.rolconnlimit, -1), nullif(d.datconnlimit, -1)
    ) as places,
    current_setting('max_connections')::integer as max_connections,
    nullif(r.rolconnlimit, -1) as role_limit, nullif(d.datconnlimit, -1) as database_limit,
    (select sum(numbackends) from pg_stat_database)::integer as connections,
    pg_notification_queue_usage() as queue
from pg_roles r, pg_database d
where r.rolname = current_user and d.datname = current_database();

-- name: row_security
-- Of our tables, those on which row security applies to this account, and whether its policies let
-- it do to every row what a worker does. It applies to an owner under FORCE, and never to a
-- superuser or a role with BYPASSRLS. Of policies that are joined by `or` one that is always true
-- is enough; those that are joined by `and` must all be.
with guarded as (
    select c.oid, c.relname, c.relforcerowsecurity as forced,
        pg_has_role(c.relowner, 'usage') as owned
    from unnest(%(tables)s::text[]) n (name)
    join pg_class c on c.oid = to_regclass(quote_ident(n.name))
    where row_security_active(c.oid)
),
policy as (
    select p.polrelid, p.polpermissive as permissive, p.polcmd as command,
        pg_get_expr(p.polqual, p.polrelid) = 'true' as shows,
        coalesce(pg_get_expr(p.polwithcheck, p.polrelid), pg_get_expr(p.polqual, p.polrelid))
            = 'true' as accepts
    from pg_policy p
    where p.polroles = '{0}' or exists (
        select from unnest(p.polroles) g (role) where g.role <> 0 and pg_has_role(g.role, 'usage')
    )
),
judged as (
    select g.oid, k.command,
        bool_or(p.permissive and (k.command = 'a' or p.shows) and (k.command = 'r' or p.accepts))
            is true
        and bool_and(
            p.permissive or ((k.command = 'a' or p.shows) and (k.command = 'r' or p.accepts))
        ) is true as whole
    from guarded g
    cross join (values ('r'::"char"), ('a'), ('w')) k (command)
    left join policy p on p.polrelid = g.oid and p.command in ('*', k.command)
    group by g.oid, k.command
)
select g.relname as table, g.forced, g.owned,
    (select whole from judged j where j.oid = g.oid and j.command = 'r') as sees,
    (select bool_and(whole) from judged j where j.oid = g.oid) as writes
from guarded g
order by g.relname;

-- name: read_only
-- On the connection for LISTEN: a standby does not accept LISTEN.
select pg_is_in_recovery() as standby;

-- name: invalid_indexes
-- Indexes that an interrupted build has left behind, whoever began it.
select i.relname as name
from pg_index x
join pg_class i on i.oid = x.indexrelid
join pg_class c on c.oid = x.indrelid
join pg_class t on t.oid = to_regclass('session_recalls') and t.relnamespace = c.relnamespace
where c.relname = any (%(tables)s::text[]) and not x.indisvalid
order by i.relname;

-- name: constraints
-- Constraints that hold for new rows only.
select c.conrelid::regclass::text as table, c.conname as name, c.contype = 'f' as foreign_key
from pg_constraint c
where c.conrelid in (
        to_regclass('session_recalls'), to_regclass('recall_attempts'),
        to_regclass('recall_workers')
    )
    and not c.convalidated
order by c.conname;

-- name: open_transaction
-- The transaction that has been open for longest: vacuum and locks wait for it. Of other accounts'
-- sessions, what this account may see.
select pid, usename as role, application_name as application, state,
    extract(epoch from now() - xact_start)::float8 as seconds
from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
    and xact_start < now() - %(longest)s * interval '1 second'
order by xact_start
limit 1;

-- name: notify
-- Both channels in one transaction: what arrives on the doctor's own proves that this very
-- notification came, and not another one.
select pg_notify('session_recalls', ''), pg_notify(%(channel)s, '');

-- name: notify_own
-- The doctor's own channel alone: no worker is woken.
select pg_notify(%(channel)s, '');

-- name: clock
select clock_timestamp() as now;

-- name: overdue
-- Recalls that have been due for so long that no worker can have polled, or had a slot; without
-- those that wait for their own session's run, and those of a queue that is paused. `queue`: of the
-- oldest.
with due as materialized (
    select id, session_id, queue, lease is not null as leased,
        coalesce(lease_until, trigger_at) as due_at
    from session_recalls
    where status in ('pending', 'running') and paused_at is null
        and coalesce(lease_until, trigger_at) <= now() - %(late)s * interval '1 second'
        and queue <> all (array(select p.queue from recall_queues p))
        and not exists (select from recall_queues p where p.queue = '*')
),
waiting as (
    select d.* from due d
    where not exists (
        select from session_recalls o
        where o.session_id = d.session_id and o.lease is not null
            and o.status in ('pending', 'running') and o.id <> d.id
            and o.lease_until > now()
    )
)
select count(*) as recalls, count(*) filter (where leased) as leased, min(due_at) as since,
    now() as now,
    (select w.id::text from waiting w order by w.due_at, w.id limit 1) as oldest,
    (select w.queue from waiting w order by w.due_at, w.id limit 1) as queue
from waiting;

-- name: settled_by_others
-- What was marked fired without the workers since they started, instead of them or after them: the
-- application does so by hand, an old scheduler beside the workers with every recall. By the index
-- on trigger_at, and so of what was due within two hours.
select count(*) as recalls, (array_agg(r.id::text order by r.updated_at desc))[1] as last
from session_recalls r
where r.status = 'fired' and r.trigger_at between now() - interval '2 hours' and now()
    and r.updated_at > greatest(%(since)s, now() - interval '1 hour')
    and (r.ended_at is null or r.updated_at > r.ended_at);

-- name: held
-- Recalls that are held back, by what, and one reason of each.
select h.by, count(*) as recalls, min(h.since) as since,
    (array_agg(h.reason order by h.updated_at desc))[1] as reason, now() as now
from (
    select case
            when paused_at is not null then 'paused'
            when deferrals > 0 then coalesce(last_outcome, 'held back')
            else 'retried'
        end as by,
        coalesce(paused_at, begun_at, updated_at) as since, reason, updated_at
    from session_recalls
    where status in ('pending', 'running') and lease is null
        and (paused_at is not null or deferrals > 0 or attempt > 0)
) h
group by h.by
order by recalls desc, h.by;

-- name: failed
-- What was given up within a day.
select count(*) as recalls, (array_agg(reason order by ended_at desc))[1] as reason
from session_recalls
where status = 'failed' and ended_at > now() - interval '1 day';

-- name: last_call
-- How the endpoint last answered, within the hour.
select outcome, http_status, reason, ended_at, now() as now
from recall_attempts
where ended_at > now() - interval '1 hour' and called_at is not null
order by ended_at desc
limit 1;

-- name: waiting
-- Whether a worker would have anything to do.
select count(*) as recalls from session_recalls
where status in ('pending', 'running') and paused_at is null;

-- name: untold
-- Failures that wait to be told to RECALL_FAILURE_URL, for how long, and why one of them was not
-- delivered; and whether entries are written at all.
select count(*) as failures, min(o.written_at) as since, max(o.tries) as tries,
    (array_agg(o.reason order by o.due_at desc) filter (where o.reason is not null))[1] as reason,
    exists (select from recall_subscriptions where until > now()) as wanted, now() as now
from recall_outbox o
where o.delivered_at is null and o.given_up_at is null;

-- name: may_tell
-- Whether this account sees what waits to be told, and whether what it makes failed is told: the
-- trigger writes no entry for an account that may not.
select coalesce(
        has_table_privilege(to_regclass('recall_outbox'), 'select')
        and has_table_privilege(to_regclass('recall_subscriptions'), 'select'), false
    ) as may_read,
    coalesce(
        has_table_privilege(to_regclass('recall_outbox'), 'insert')
        and has_table_privilege(to_regclass('recall_subscriptions'), 'select'), false
    ) as may_write;
