-- What people read. Nothing here decides anything, and nothing here takes a lock.

-- name: show
select * from session_recalls where id = %(id)s;

-- name: calls
-- The calls of one recall, oldest first.
select * from recall_attempts
where recall_id = %(id)s
order by occurrence, coalesce(called_at, ended_at), rekey, attempt;

-- name: list
-- Newest trigger first, as the application lists. One status is compared by itself: before
-- PostgreSQL 17 an ordered index can't filter by many.
select * from session_recalls
where (
        %(statuses)s::text[] is null or cardinality(%(statuses)s::text[]) = 1
        or status = any (%(statuses)s::text[])
    )
    and (
        %(statuses)s::text[] is null or cardinality(%(statuses)s::text[]) > 1
        or status = (%(statuses)s::text[])[1]
    )
order by trigger_at desc, id
limit %(limit)s offset %(offset)s;

-- name: list_session
-- Ids and times first: otherwise the planner may walk the whole table by time until the session has
-- filled a page.
with mine as materialized (
    select id, trigger_at from session_recalls
    where session_id = %(session_id)s
        and (%(statuses)s::text[] is null or status = any (%(statuses)s::text[]))
),
page as materialized (
    select id from mine order by trigger_at desc, id limit %(limit)s offset %(offset)s
)
select * from session_recalls
where id = any (array(select id from page))
order by trigger_at desc, id;

-- name: list_user
-- The owner is the application's: its table sessions says which user a session belongs to. (An
-- index on sessions (user_id) is worth having there.)
with mine as materialized (
    select id, trigger_at from session_recalls
    where session_id = any (array(
            select s.id from sessions s
            where s.user_id = %(user_id)s
                and (%(session_id)s::text is null or s.id = %(session_id)s)
        ))
        and (%(statuses)s::text[] is null or status = any (%(statuses)s::text[]))
),
page as materialized (
    select id from mine order by trigger_at desc, id limit %(limit)s offset %(offset)s
)
select * from session_recalls
where id = any (array(select id from page))
order by trigger_at desc, id;

-- name: why
-- All evidence on one recall, in one statement.
select r.*, now() as now, coalesce(r.lease_until, r.trigger_at) as due_at,
    coalesce(r.planned_at, r.trigger_at) <> r.trigger_at as moved,
    o.id as ahead, o.status as ahead_status, o.leased_by as ahead_leased_by,
    o.leased_at as ahead_leased_at,
    o.lease_until as ahead_lease_until, o.paused_at as ahead_paused_at,
    w.alive, w.breakers, w.slots, l.leases, h.seen_at as holder_seen_at,
    a.outcomes as deferred_as, a.calls as deferred_calls, a.called_at as deferred_since,
    a.last_called_at as deferred_last
from session_recalls r
left join lateral (
    -- What must end first in this recall's session: a recall that is being run, one whose aborted
    -- call is open, or one that has been due for longer.
    select * from (
        select * from session_recalls x
        where x.session_id = r.session_id and x.lease is not null
            and x.status in ('pending', 'running')
        union all
        select * from session_recalls x
        where x.session_id = r.session_id and x.lease is not null
            and x.status not in ('pending', 'running') and x.lease_until > now()
        union all
        select * from session_recalls x
        where x.session_id = r.session_id and x.status = 'pending' and x.lease is null
            and x.paused_at is null
            and x.trigger_at <= now() and (x.trigger_at, x.id) < (r.trigger_at, r.id)
        union all
        select * from session_recalls x
        where x.session_id = r.session_id and x.status = 'running' and x.lease is null
            and x.paused_at is null
            and x.trigger_at <= now() and (x.trigger_at, x.id) < (r.trigger_at, r.id)
    ) y
    where y.id <> r.id
    limit 1
) o on true
cross join (
    select count(*) as alive, count(*) filter (where breaker = 'open') as breakers,
        coalesce(sum(slots), 0) as slots
    from recall_workers
    where seen_at > now() - %(silence)s * interval '1 second'
) w
cross join (
    select count(*) as leases from session_recalls
    where lease is not null and status in ('pending', 'running')
) l
left join recall_workers h on h.worker = r.leased_by
left join lateral (
    -- Where no connection was established nothing was called: the occurrence's beginning stands for
    -- that.
    select jsonb_object_agg(m.outcome, m.calls) as outcomes, sum(m.calls) as calls,
        min(coalesce(m.called_at, r.begun_at, m.ended_at)) as called_at,
        max(coalesce(m.last_called_at, m.ended_at)) as last_called_at
    from recall_attempts m
    where m.recall_id = r.id and m.occurrence = r.occurrence and m.rekey = r.rekey
        -- A deferral gives its attempt back.
        and m.attempt = r.attempt + case when r.lease is null then 1 else 0 end
        and m.outcome in ('busy', 'unavailable', 'misconfigured')
) a on true
where r.id = %(id)s;

-- name: fleet
-- Whether RECALL_FLEET_CONCURRENCY holds back what is due: the cap, the leases that a claim counts
-- against it, and whose they are. A lease that has expired counts during the grace (a part of a
-- lease), as its owner may be alive. There is a cap where all live workers have one; of several the
-- highest decides. Settings may have been written by hand: what is no number of at least 1 is no
-- cap.
with live as materialized (
    select w.worker,
        case when jsonb_typeof(w.settings -> 'fleet_concurrency') = 'number'
            then nullif(
                floor(least(
                    greatest((w.settings ->> 'fleet_concurrency')::numeric, 0), 2147483647
                )),
                0
            )::integer
        end as cap,
        -- Rounded, as a double has no number as small as numeric has.
        case when jsonb_typeof(w.settings -> 'lease') = 'number'
            then round(
                least(greatest((w.settings ->> 'lease')::numeric, 0), %(lease_most)s), 3
            )::float8
        end as lease
    from recall_workers w
    where w.seen_at > now() - %(silence)s * interval '1 second'
),
fleet as (
    select case when count(*) = count(cap) then max(cap) end as cap,
        coalesce(max(lease), %(lease)s) as lease from live
)
select f.cap as fleet_cap, f.lease as fleet_lease, c.leases as fleet_leases,
    c.of_live as fleet_of_live,
    c.leases - c.of_live - c.ended as fleet_of_silent, c.ended as fleet_ended
from fleet f cross join lateral (
    select count(*) as leases, count(*) filter (where r.lease_until <= now()) as ended,
        count(*) filter (where r.lease_until > now() and r.leased_by in (select worker from live))
            as of_live
    from session_recalls r
    where r.lease is not null and r.status in ('pending', 'running')
        and r.lease_until > now() - f.lease * %(grace)s * interval '1 second'
) c;

-- name: workers
-- Running workers, and how many runs each has in hand: the leases say that, not the last heartbeat.
select w.*, w.seen_at > now() - %(silence)s * interval '1 second' as alive,
    coalesce(l.leases, 0) as leases, now() as now
from recall_workers w
left join (
    select leased_by, count(*) as leases from session_recalls
    where lease is not null and status in ('pending', 'running')
    group by leased_by
) l on l.leased_by = w.worker
order by w.started_at, w.worker;

-- name: stats_recalls
-- All counts in one pass.
select status, count(*) as recalls,
    count(*) filter (where lease is null and paused_at is null) as waiting,
    count(*) filter (where lease is null and paused_at is not null) as paused,
    count(*) filter (where lease is not null) as leased,
    count(*) filter (where lease is null and paused_at is null and trigger_at <= now()) as overdue,
    count(*) filter (where lease is null and paused_at is null and deferrals > 0) as deferred,
    min(trigger_at) filter (where lease is null and paused_at is null) as next_due
from session_recalls
group by status;

-- name: stats_calls
-- Outcomes of the calls within the window.
select outcome, sum(calls)::bigint as calls from recall_attempts
where ended_at > now() - %(window)s * interval '1 second'
group by outcome
order by calls desc, outcome;

-- name: stats_lateness
-- How late the occurrences within the window were, in seconds: from the nominal time to the first
-- call. Nothing can be said of a row where somebody wrote an infinite time.
select count(*) as occurrences,
    percentile_disc(0.5) within group (order by late) as p50,
    percentile_disc(0.99) within group (order by late) as p99,
    max(late) as most
from (
    select extract(
        epoch from min(called_at) - min(greatest(scheduled_for, '0001-01-02'::timestamptz))
    )::float8 as late
    from recall_attempts
    where ended_at > now() - %(window)s * interval '1 second' and isfinite(called_at)
        and scheduled_for < 'infinity'
    group by recall_id, occurrence
) first;
