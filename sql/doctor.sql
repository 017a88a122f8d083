-- What `doctor` asks. Catalogues and settings first, then the rows. Nothing here changes anything,
-- and nothing here takes a lock.

-- name: server
-- Which database and role this is, and how the server is set for this account.
select current_setting('server_version') as version,
    current_setting('server_version_num')::integer as number,
    current_database() as database, current_user as role, r.rolsuper as superuser,
    pg_is_in_recovery() as standby, current_setting('transaction_read_only') = 'on' as read_only,
    row_security_active(to_regclass('session_recalls')) as row_security,
    current_setting('fsync') as fsync, current_setting('full_page_writes') as full_page_writes,
    current_setting('synchronous_commit') as synchronous_commit,
    current_setting('autovacuum') as autovacuum,
    extract(epoch from current_setting('statement_timeout')::interval)::float8 as statement_timeout,
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

-- name: read_only
-- On the connection for LISTEN: a standby does not accept LISTEN.
select pg_is_in_recovery() as standby;

-- name: indexes
-- Indexes that are missing or invalid: those that the statements were written for, and any that an
-- interrupted build has left behind.
select w.name, x.indexrelid is not null as there
from (
    select unnest(%(names)s::text[])
    union
    select c.relname::text from pg_index i join pg_class c on c.oid = i.indexrelid
    where i.indrelid in (to_regclass('session_recalls'), to_regclass('recall_attempts'))
) w (name)
left join pg_class t on t.oid = to_regclass('session_recalls')
left join pg_class c on c.relname = w.name and c.relnamespace = t.relnamespace
left join pg_index x on x.indexrelid = c.oid
where x.indexrelid is null or not x.indisvalid
order by w.name;

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

-- name: triggers
-- Triggers that are missing, or that don't fire in ordinary sessions.
select w.name, t.tgenabled::text as enabled
from unnest(%(names)s::text[]) w (name)
left join pg_trigger t on t.tgrelid = to_regclass('session_recalls') and t.tgname = w.name
where t.tgenabled is null or t.tgenabled not in ('O', 'A')
order by w.name;

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
-- those that wait for their own session's run.
with due as materialized (
    select id, session_id, lease is not null as leased, coalesce(lease_until, trigger_at) as due_at
    from session_recalls
    where status in ('pending', 'running') and paused_at is null
        and coalesce(lease_until, trigger_at) <= now() - %(late)s * interval '1 second'
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
    (select id from waiting order by due_at, id limit 1) as oldest
from waiting;

-- name: settled_by_others
-- What was marked fired without the workers since they started, instead of them or after them: the
-- application does so by hand, an old scheduler beside the workers with every recall. By the index
-- on trigger_at, and so of what was due within two hours.
select count(*) as recalls, (array_agg(r.id order by r.updated_at desc))[1] as last
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
