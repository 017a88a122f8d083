-- What `top` shows. One look is all of these statements (and `workers` of reads.sql), in one round
-- trip and one snapshot, at most once a second, for as long as somebody watches. So each reads a
-- bounded number of rows by an index, however large the tables are: a count that reaches `most` is
-- shown as "and more". Nothing here takes a lock or writes.
--
-- `needle`: a part of a recall's id, of its session's id, or of its queue's name, in lower case;
-- null: all. It is compared with the rows that were read, and bounds nothing.

-- name: moment
-- PostgreSQL's clock, and where this is.
select now() as now, current_database()::text as database;

-- name: counts
-- By queue: what is due (and of that overdue, for more than `late` seconds), what is in a run, what
-- waits (and of that what was deferred), what is paused. `more`: which of them were not counted to
-- the end. The paused ones are found among those that hold their session's slot: no index has them,
-- and a paused one without the slot is very rare.
with due as materialized (
    select r.id, r.session_id, r.queue, coalesce(r.lease_until, r.trigger_at) as due_at
    from session_recalls r
    where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
        and coalesce(r.lease_until, r.trigger_at) <= now()
    order by coalesce(r.lease_until, r.trigger_at)
    limit %(most)s
),
ahead as materialized (
    select r.id, r.session_id, r.queue, r.deferrals
    from session_recalls r
    where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
        and coalesce(r.lease_until, r.trigger_at) > now()
    order by coalesce(r.lease_until, r.trigger_at)
    limit %(most)s
),
leased as materialized (
    select r.id, r.session_id, r.queue
    from session_recalls r
    where r.lease is not null and r.status in ('pending', 'running')
    order by r.session_id
    limit %(most)s
),
holding as materialized (
    select r.id, r.session_id, r.queue, r.lease, r.paused_at
    from session_recalls r
    where r.status = 'pending'
    order by r.session_id
    limit %(most)s
)
select c.queue,
    count(*) filter (where c.kind in ('due', 'overdue')) as due,
    count(*) filter (where c.kind = 'overdue') as overdue,
    count(*) filter (where c.kind = 'leased') as in_run,
    count(*) filter (where c.kind in ('waiting', 'deferred')) as waiting,
    count(*) filter (where c.kind = 'deferred') as deferred,
    count(*) filter (where c.kind = 'paused') as paused,
    array_remove(array[
        case when (select count(*) from due) >= %(most)s then 'due' end,
        case when (select count(*) from ahead) >= %(most)s then 'waiting' end,
        case when (select count(*) from leased) >= %(most)s then 'in_run' end,
        case when (select count(*) from holding) >= %(most)s then 'paused' end
    ], null) as more
from (
    select id, session_id, queue,
        case when due_at < now() - %(late)s * interval '1 second' then 'overdue' else 'due' end
            as kind
    from due
    union all
    select id, session_id, queue, case when deferrals > 0 then 'deferred' else 'waiting' end
    from ahead
    union all
    select id, session_id, queue, 'leased' from leased
    union all
    select id, session_id, queue, 'paused'
    from holding where paused_at is not null and lease is null
) c
where %(needle)s::text is null
    or strpos(lower(c.id::text), %(needle)s) > 0
    or strpos(lower(c.session_id::text), %(needle)s) > 0
    or strpos(lower(c.queue), %(needle)s) > 0
group by c.queue
order by c.queue <> 'default', c.queue;

-- name: next
-- What is due next, in the order in which it is: first what is due already. `depth`: so many rows
-- are looked through on each side of now.
with near as materialized (
    (
        select r.id, r.session_id, r.queue, r.call_type, r.cadence, r.cron, r.interval_seconds,
            r.occurrence, r.attempt, r.deferrals, r.last_outcome, r.reason,
            coalesce(r.lease_until, r.trigger_at) as due_at
        from session_recalls r
        where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
            and coalesce(r.lease_until, r.trigger_at) <= now()
        order by coalesce(r.lease_until, r.trigger_at)
        limit %(depth)s
    )
    union all
    (
        select r.id, r.session_id, r.queue, r.call_type, r.cadence, r.cron, r.interval_seconds,
            r.occurrence, r.attempt, r.deferrals, r.last_outcome, r.reason,
            coalesce(r.lease_until, r.trigger_at)
        from session_recalls r
        where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
            and coalesce(r.lease_until, r.trigger_at) > now()
        order by coalesce(r.lease_until, r.trigger_at)
        limit %(depth)s
    )
)
select n.id::text as id, n.session_id::text as session_id, n.queue, n.call_type, n.cadence, n.cron,
    n.interval_seconds, n.occurrence, n.attempt, n.deferrals, n.last_outcome,
    left(n.reason, 300) as reason, n.due_at
from near n
where %(needle)s::text is null
    or strpos(lower(n.id::text), %(needle)s) > 0
    or strpos(lower(n.session_id::text), %(needle)s) > 0
    or strpos(lower(n.queue), %(needle)s) > 0
order by n.due_at, n.id
limit %(rows)s;

-- name: runs
-- What is in a run, the longest first.
with leased as materialized (
    select r.id, r.session_id, r.queue, r.leased_at, r.lease_until, r.leased_by, r.occurrence,
        r.attempt, r.run_reference
    from session_recalls r
    where r.lease is not null and r.status in ('pending', 'running')
    order by r.session_id
    limit %(most)s
)
select l.id::text as id, l.session_id::text as session_id, l.queue, l.leased_by as worker,
    l.occurrence, l.attempt, l.run_reference is not null as accepted, l.leased_at, l.lease_until
from leased l
where %(needle)s::text is null
    or strpos(lower(l.id::text), %(needle)s) > 0
    or strpos(lower(l.session_id::text), %(needle)s) > 0
    or strpos(lower(l.queue), %(needle)s) > 0
order by l.leased_at, l.id
limit %(rows)s;

-- name: failures
-- Calls that ended in trouble, the latest first, of the last `window` seconds. `since`: the moment
-- of the last look, null: there was none. Only what ended since then is asked for (and `overlap`
-- seconds before, as a call is dated before its record is committed): the index on ended_at finds
-- pages, not rows.
select a.recall_id as id, a.session_id, a.occurrence, a.rekey, a.attempt, a.outcome, a.settled,
    a.calls, a.worker, a.http_status, left(a.reason, 300) as reason, a.ended_at
from recall_attempts a
where a.ended_at >= greatest(
        least(
            coalesce(%(since)s::timestamptz, '-infinity'),
            now() - %(overlap)s * interval '1 second'
        ),
        now() - %(window)s * interval '1 second'
    )
    and a.ended_at < 'infinity'
    and (
        a.settled = 'failed'
        or a.outcome not in ('answered', 'accepted', 'busy', 'unsent', 'capped', 'expired')
    )
    and (
        %(needle)s::text is null
        or strpos(lower(a.recall_id), %(needle)s) > 0
        or strpos(lower(a.session_id), %(needle)s) > 0
        or exists (
            select from session_recalls r
            where r.id = recall_id(a.recall_id) and strpos(lower(r.queue), %(needle)s) > 0
        )
    )
order by a.ended_at desc, a.recall_id
limit %(rows)s;

-- name: failed
-- How many recalls failed for good, by minutes since 1970: whole minutes, the one in which the
-- time asked for begins included, so that a count replaces an earlier one.
select floor(extract(epoch from a.ended_at) / 60)::bigint as minute, count(*) as failed
from recall_attempts a
where a.ended_at >= date_trunc('minute', greatest(
        least(
            coalesce(%(since)s::timestamptz, '-infinity'),
            now() - %(overlap)s * interval '1 second'
        ),
        now() - %(window)s * interval '1 second'
    ))
    and a.ended_at < 'infinity' and a.settled = 'failed'
    and (
        %(needle)s::text is null
        or strpos(lower(a.recall_id), %(needle)s) > 0
        or strpos(lower(a.session_id), %(needle)s) > 0
        or exists (
            select from session_recalls r
            where r.id = recall_id(a.recall_id) and strpos(lower(r.queue), %(needle)s) > 0
        )
    )
group by 1;

-- name: paused_queues
-- Queues that are paused; * stands for all.
select queue, paused_at, paused_by, reason
from recall_queues
order by queue
limit %(rows)s;

-- name: endpoints
-- What the workers share of endpoints that fail or failed: the last test call.
select endpoint, probed_at
from recall_endpoints
order by endpoint
limit %(rows)s;
