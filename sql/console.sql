-- What the pages of `console` ask besides what the commands ask. Each statement reads a bounded
-- number of rows by an index, however large the tables are. Nothing here writes, and `held` alone
-- takes a lock.

-- name: rights
-- Whether this account may act: change recalls, and record who did. A standby, and a session that
-- is read-only, take no writes either.
select (
        has_any_column_privilege('session_recalls', 'update')
        and has_table_privilege('recall_actions', 'insert')
    ) as may_act,
    not pg_is_in_recovery() and current_setting('transaction_read_only') = 'off' as writable,
    current_user::text as role, current_database()::text as database, now() as now;

-- name: watched
-- What changes when anything about a recall does, of those whose pages are open.
select r.id::text as id, r.session_id::text as session_id, r.queue, r.status, r.trigger_at, r.lease,
    r.lease_until, r.paused_at, r.updated_at, r.ended_at, r.run_reference, r.attempt, r.deferrals,
    r.reason, r.last_outcome, r.call_type, r.cadence, r.cron, r.interval_seconds
from session_recalls r
where r.id = any (array(select recall_id(given) from unnest(%(watched)s::text[]) as t (given)));

-- name: held
-- A recall as it stands, held until it is acted on: whether it is still what a person saw.
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.id = recall_id(%(id)s)
for no key update;

-- name: agenda
-- Recalls that wait for a moment from now until `ahead` seconds from now, the first ones first; not
-- the paused ones, which another index has.
select r.*, r.id::text as id, r.session_id::text as session_id,
    coalesce(r.lease_until, r.trigger_at) as due_at, now() as now
from session_recalls r
where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
    and coalesce(r.lease_until, r.trigger_at) > now()
    and coalesce(r.lease_until, r.trigger_at) <= now() + %(ahead)s * interval '1 second'
    and (%(queue)s::text is null or r.queue = %(queue)s)
order by coalesce(r.lease_until, r.trigger_at), r.id
limit %(rows)s;

-- name: agenda_paused
-- The paused ones of that time, which will not run.
select r.*, r.id::text as id, r.session_id::text as session_id, r.trigger_at as due_at, now() as now
from session_recalls r
where r.status in ('pending', 'running') and r.paused_at is not null and r.lease is null
    and r.trigger_at > now()
    and r.trigger_at <= now() + %(ahead)s * interval '1 second'
    and (%(queue)s::text is null or r.queue = %(queue)s)
order by r.trigger_at, r.id
limit %(paused)s;

-- name: busy
-- How many wait for a moment in each span of `width` seconds, from now on: each counted to
-- `counted`.
select s.span, c.recalls
from generate_series(0, %(ahead)s::integer / %(width)s::integer - 1) as s (span)
cross join lateral (
    select count(*) as recalls
    from (
        select from session_recalls r
        where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
            and coalesce(r.lease_until, r.trigger_at)
                > now() + s.span * %(width)s::integer * interval '1 second'
            and coalesce(r.lease_until, r.trigger_at)
                <= now() + (s.span + 1) * %(width)s::integer * interval '1 second'
            and (%(queue)s::text is null or r.queue = %(queue)s)
        limit %(counted)s
    ) n
) c
order by s.span;

-- name: in_a_run
-- Of these sessions, the recalls that are in a run: no other recall of the session is claimed
-- meanwhile.
select r.session_id::text as session_id, r.id::text as id, r.leased_by as worker, r.leased_at
from session_recalls r
where r.lease is not null and r.status in ('pending', 'running')
    and r.session_id = any (array(
        select recall_session(given) from unnest(%(sessions)s::text[]) as t (given)
    ));

-- name: failures
-- Calls that ended in trouble within `window` seconds, the latest first: what a page groups by
-- reason.
select a.recall_id as id, a.session_id, a.occurrence, a.rekey, a.attempt, a.outcome, a.settled,
    a.calls, a.worker, a.http_status, left(a.reason, 300) as reason, a.ended_at, now() as now
from recall_attempts a
where a.ended_at >= now() - %(window)s * interval '1 second' and a.ended_at < 'infinity'
    and (
        a.settled = 'failed'
        or a.outcome not in ('answered', 'accepted', 'busy', 'unsent', 'capped', 'expired')
    )
order by a.ended_at desc, a.recall_id
limit %(most)s;

-- name: size
-- About how many recalls there are, as PostgreSQL's statistics have it.
select greatest(c.reltuples, 0)::bigint as recalls
from pg_class c where c.oid = 'session_recalls'::regclass;

-- name: patience
-- For this transaction: what an index does not serve is given up, and said. `read_through`: off
-- where an index has what is asked for, as the planner takes a third of the rows for due and would
-- read the table through to count them.
select set_config('statement_timeout', %(milliseconds)s::text, true),
    set_config('enable_seqscan', %(read_through)s::text, true);
