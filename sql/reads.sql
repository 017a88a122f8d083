-- What people read. Nothing here decides anything, and nothing here takes a lock.
--
-- A recall's row is read whole, as the application may have columns of its own. Its ids are behind
-- it once more, as text: of two columns of one name, a row by name has the last.

-- name: show
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.id = recall_id(%(id)s);

-- name: calls
-- The calls of one recall, the last ones first. They may be of ids from before the column had its
-- type. `most` null: all.
select * from recall_attempts
where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
order by ended_at desc, occurrence desc, coalesce(called_at, ended_at) desc, rekey desc,
    attempt desc
limit %(most)s::bigint;

-- name: actions
-- What people and agents did, the last first: of one recall, or to all. `actor`: as it stands, or
-- the name before the host.
select * from recall_actions
where (
        %(id)s::text is null
        or recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    )
    and (%(since)s::timestamptz is null or at >= %(since)s)
    and (%(actor)s::text is null or %(actor)s in (actor, split_part(actor, '@', 1)))
    and (%(actions)s::text[] is null or action = any (%(actions)s::text[]))
order by id desc
limit %(most)s::bigint;

-- name: on_record
-- How many calls and actions of one recall are on record; and whether these tell who made it, and
-- who cancelled it.
select (
        select count(*) from recall_attempts
        where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    ) as calls,
    (
        select count(*) from recall_actions
        where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    ) as actions,
    exists (
        select from recall_actions
        where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text) and action = 'schedule'
    ) as made_by,
    exists (
        select from recall_actions
        where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text) and action = 'cancel'
    ) as cancelled_by;

-- name: ending
-- Of a recall that has ended: its last call, when that occurrence was first called, and the last
-- action, which may be what ended it. Of one that is paused: by whom.
select c.occurrence as call_occurrence, c.rekey as call_rekey, c.attempt as call_attempt,
    c.outcome as call_outcome, c.calls as call_calls, c.http_status as call_status,
    c.last_called_at as call_sent_at, c.ended_at as call_ended_at,
    case when isfinite(f.called_at) and isfinite(c.scheduled_for) then extract(
        epoch from f.called_at - greatest(c.scheduled_for, '0001-01-02'::timestamptz)
    )::float8 end as call_late,
    a.action, a.actor as action_by, a.via as action_via, a.at as action_at, p.paused_by
from (values (true)) as one (row)
left join lateral (
    select * from recall_attempts
    where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    order by ended_at desc, occurrence desc, attempt desc
    limit 1
) c on true
left join lateral (
    select min(m.called_at) as called_at from recall_attempts m
    where m.recall_id = c.recall_id and m.occurrence = c.occurrence and m.rekey = c.rekey
) f on true
left join lateral (
    select * from recall_actions
    where recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    order by id desc
    limit 1
) a on true
left join lateral (
    -- Who has paused it, where that is on record: written in the same transaction.
    select h.actor as paused_by from recall_actions h
    where h.recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text) and h.action = 'pause'
        and h.at = (select r.paused_at from session_recalls r where r.id = recall_id(%(id)s))
    order by h.id desc
    limit 1
) p on true;

-- name: events
-- Calls and actions as one stream: calls that ended after `since`, actions that began after it or,
-- where `after` is given, were written after the one of that id. To follow it: ids are given in the
-- order of writing, but a transaction may commit after later ones did. `oldest`: every transaction
-- below it has ended, and what it wrote is seen here; `next`: no transaction from it on has begun.
-- `decided`: at the first look, the last thousand actions count as undecided. The row without a
-- kind is that of the snapshot.
with last as materialized (
    select coalesce((select max(id) from recall_actions), 0) as last_action
)
select null as kind, now() as at, null as recall_id, null as session_id, null as id, null as actor,
    null as via, null as action, null::jsonb as detail, null as worker, null::integer as occurrence,
    null::integer as rekey, null::integer as attempt, null as outcome, null::integer as calls,
    null::integer as missed, null::timestamptz as scheduled_for, null::timestamptz as called_at,
    null::timestamptz as last_called_at, null::integer as http_status, null as reason,
    null as settled, l.last_action, l.last_action - 1000 as decided,
    pg_snapshot_xmin(pg_current_snapshot())::text::bigint as oldest,
    pg_snapshot_xmax(pg_current_snapshot())::text::bigint as next
from last l
union all
select 'call', c.ended_at, c.recall_id, c.session_id, null, null, null, null, null, c.worker,
    c.occurrence, c.rekey, c.attempt, c.outcome, c.calls, c.missed, c.scheduled_for, c.called_at,
    c.last_called_at, c.http_status, c.reason, c.settled, null, null, null, null
from recall_attempts c
where c.ended_at > %(since)s
    and (
        %(id)s::text is null
        or c.recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    )
union all
select 'action', a.at, a.recall_id, null, a.id::text, a.actor, a.via, a.action, a.detail, null,
    null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null
from recall_actions a
where (
        %(id)s::text is null
        or a.recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
    )
    and case
        when %(after)s::bigint is not null then a.id > %(after)s
        else a.at > %(since)s or a.id > (select l.last_action - 1000 from last l)
    end;

-- name: list
-- Newest trigger first, as the application lists. One status is compared by itself: before
-- PostgreSQL 17 an ordered index can't filter by many.
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where (
        %(statuses)s::text[] is null or cardinality(%(statuses)s::text[]) = 1
        or status = any (%(statuses)s::text[])
    )
    and (
        %(statuses)s::text[] is null or cardinality(%(statuses)s::text[]) > 1
        or status = (%(statuses)s::text[])[1]
    )
    and (%(queue)s::text is null or queue = %(queue)s)
order by r.trigger_at desc, r.id
limit %(limit)s offset %(offset)s;

-- name: list_session
-- Ids and times first: otherwise the planner may walk the whole table by time until the session has
-- filled a page.
with mine as materialized (
    select id, trigger_at from session_recalls
    where session_id = recall_session(%(session_id)s)
        and (%(statuses)s::text[] is null or status = any (%(statuses)s::text[]))
        and (%(queue)s::text is null or queue = %(queue)s)
),
page as materialized (
    select id from mine order by trigger_at desc, id limit %(limit)s offset %(offset)s
)
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.id = any (array(select id from page))
order by r.trigger_at desc, r.id;

-- name: list_user
-- The owner is the application's: its table sessions says which user a session belongs to. (An
-- index on sessions (user_id) is worth having there.)
with mine as materialized (
    select id, trigger_at from session_recalls
    where session_id = any (array(
            select recall_session(s.id::text) from sessions s
            where s.user_id = %(user_id)s
        ))
        and (%(session_id)s::text is null or session_id = recall_session(%(session_id)s))
        and (%(statuses)s::text[] is null or status = any (%(statuses)s::text[]))
        and (%(queue)s::text is null or queue = %(queue)s)
),
page as materialized (
    select id from mine order by trigger_at desc, id limit %(limit)s offset %(offset)s
)
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.id = any (array(select id from page))
order by r.trigger_at desc, r.id;

-- name: complete_ids
-- Ids that begin so, for a shell: of the recalls that are due next, and of the latest ones. Both
-- are found by an index, so that a table of millions is no slower.
with near as (
    (
        select r.id::text as id from session_recalls r
        where r.status in ('pending', 'running')
        order by coalesce(r.lease_until, r.trigger_at)
        limit 2000
    )
    union
    (select r.id::text as id from session_recalls r order by r.trigger_at desc limit 2000)
)
select id as found from near
where starts_with(id, %(beginning)s)
order by id
limit 200;

-- name: complete_queues
-- Queues that begin so: of the recalls that are due next, of workers, and those that are paused.
with known as (
    (
        select r.queue from session_recalls r
        where r.status in ('pending', 'running')
        order by coalesce(r.lease_until, r.trigger_at)
        limit 2000
    )
    union select unnest(w.queues) from recall_workers w
    union select q.queue from recall_queues q where q.queue <> '*'
    union select 'default'
)
select queue as found from known
where starts_with(queue, %(beginning)s)
order by queue
limit 200;

-- name: why
-- All evidence on one recall, in one statement.
select r.*, r.id::text as id, r.session_id::text as session_id, now() as now,
    coalesce(r.lease_until, r.trigger_at) as due_at,
    coalesce(r.planned_at, r.trigger_at) <> r.trigger_at as moved,
    r.edit_of = r.occurrence and r.cadence = 'cron' as to_replan,
    o.id::text as ahead, o.status as ahead_status, o.leased_by as ahead_leased_by,
    o.leased_at as ahead_leased_at,
    o.lease_until as ahead_lease_until, o.paused_at as ahead_paused_at,
    w.alive, w.breakers, w.slots, w.held, w.alive_in_all, l.leases, h.seen_at as holder_seen_at,
    coalesce(h.alive, false) as holder_alive,
    p.paused_at as queue_paused_at, p.paused_by as queue_paused_by,
    p.reason as queue_paused_reason, p.queue = '*' as all_paused,
    a.outcomes as deferred_as, a.calls as deferred_calls, a.called_at as deferred_since,
    a.last_called_at as deferred_last
from session_recalls r
left join lateral (
    -- What must end first in this recall's session: a recall that is being run, one whose aborted
    -- call is open, or one of its queue that has been due for longer.
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
            and x.paused_at is null and x.queue = r.queue
            and coalesce(x.lease_until, x.trigger_at) <= now()
            and (coalesce(x.lease_until, x.trigger_at), x.id)
                < (coalesce(r.lease_until, r.trigger_at), r.id)
        union all
        select * from session_recalls x
        where x.session_id = r.session_id and x.status = 'running' and x.lease is null
            and x.paused_at is null and x.queue = r.queue
            and coalesce(x.lease_until, x.trigger_at) <= now()
            and (coalesce(x.lease_until, x.trigger_at), x.id)
                < (coalesce(r.lease_until, r.trigger_at), r.id)
    ) y
    where y.id <> r.id
    order by y.lease is null, coalesce(y.lease_until, y.trigger_at), y.id
    limit 1
) o on true
cross join lateral (
    -- Of the workers that serve its queue: a version without queues serves all.
    select count(*) filter (where v.serves) as alive, count(*) as alive_in_all,
        count(*) filter (where v.serves and v.breaker = 'open') as breakers,
        coalesce(sum(v.slots) filter (where v.serves), 0) as slots,
        count(*) filter (where v.serves and v.held = 'paused') as held,
        coalesce(bool_or(v.queues is null), false) as serve_all,
        array(
            select distinct unnest(m.queues) from recall_workers m
            where m.seen_at > now() - %(silence)s * interval '1 second'
                and r.queue = any (m.queues)
        ) as queues
    from (
        select *, coalesce(r.queue = any (queues), true) as serves from recall_workers
        where seen_at > now() - %(silence)s * interval '1 second'
            -- As in `workers`.
            and (
                seen_at > now() - %(cut_off)s * interval '1 second' or bell <> 'listening'
                or settings -> 'connection_seen' is distinct from 'true'
                or pg_is_in_recovery() or exists (
                    select from pg_stat_activity c
                    where c.application_name = left('recall-worker listener ' || worker, 63)
                )
            )
            and coalesce(system_identifier = %(system_identifier)s, true)
            and coalesce(database_oid = %(database_oid)s, true)
    ) v
) w
cross join lateral (
    -- What their slots hold.
    select count(*) as leases from session_recalls x
    where x.lease is not null and x.status in ('pending', 'running')
        and (w.serve_all or x.queue = any (w.queues))
) l
left join lateral (
    select * from recall_queues q
    where q.queue in (r.queue, '*')
    order by q.queue = '*' desc
    limit 1
) p on true
left join lateral (
    -- Who runs it, and whether that one is alive, as in `workers`.
    select v.seen_at, v.seen_at > now() - %(silence)s * interval '1 second' and (
            v.seen_at > now() - %(cut_off)s * interval '1 second' or v.bell <> 'listening'
            or v.settings -> 'connection_seen' is distinct from 'true'
            or pg_is_in_recovery() or exists (
                select from pg_stat_activity c
                where c.application_name = left('recall-worker listener ' || v.worker, 63)
            )
        ) as alive
    from recall_workers v
    where v.worker = r.leased_by
) h on true
left join lateral (
    -- Where no connection was established nothing was called: the occurrence's beginning stands for
    -- that.
    select jsonb_object_agg(m.outcome, m.calls) as outcomes, sum(m.calls) as calls,
        min(coalesce(m.called_at, r.begun_at, m.ended_at)) as called_at,
        max(coalesce(m.last_called_at, m.ended_at)) as last_called_at
    from recall_attempts m
    where m.recall_id = r.id::text and m.occurrence = r.occurrence
        -- Of an extra run, its number below zero.
        and m.rekey = case when r.fired_at is null then r.rekey else -r.fires end
        -- A deferral gives its attempt back.
        and m.attempt = r.attempt + case when r.lease is null then 1 else 0 end
        and m.outcome in ('busy', 'unavailable', 'misconfigured')
) a on true
where r.id = recall_id(%(id)s);

-- name: fleet
-- Whether RECALL_FLEET_CONCURRENCY holds back what is due: the cap, the leases that a claim counts
-- against it, and whose they are. A lease that has expired counts during the grace (a part of a
-- lease), as its owner may be alive. There is a cap where all live workers have one; of several the
-- highest decides. `queue`: of the workers that serve it, and of what they serve. Settings may have
-- been written by hand: what is no number of at least 1 is no cap.
with live as materialized (
    select w.worker, w.queues,
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
        and coalesce(w.system_identifier = %(system_identifier)s, true)
        and coalesce(w.database_oid = %(database_oid)s, true)
        and (%(queue)s::text is null or coalesce(%(queue)s = any (w.queues), true))
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
        and (
            r.queue = any (array(select unnest(queues) from live))
            or not exists (select from live where queues is not null)
            or exists (select from live where queues is null)
        )
        and r.lease_until > now() - f.lease * %(grace)s * interval '1 second'
) c;

-- name: clock_back
-- The latest date that was written and has not come yet: PostgreSQL's clock was put back. Dates of
-- its own count from `tolerance` seconds on; a recall's creation and change may be the
-- application's, whose clock may be ahead by more. `id`: also what stands in this recall's row.
select k.what as clock_what, k.at as clock_at, k.foreign as clock_foreign, now() as now
from (values (true)) as one (row)
left join lateral (
    select d.what, d.at, d.foreign
    from (
        select 'a worker''s heartbeat' as what, greatest(w.seen_at, w.started_at) as at,
            false as foreign
        from recall_workers w
        union all
        -- By the index on ended_at: mostly there is none.
        select 'the record of a call', max(a.ended_at), false from recall_attempts a
        where a.ended_at > now() and a.ended_at < 'infinity'
        union all
        select 'a call of this recall', greatest(r.leased_at, r.begun_at, r.delivered_at), false
        from session_recalls r where r.id = recall_id(%(id)s)
        union all
        select 'the last change of this recall', greatest(r.created_at, r.updated_at), true
        from session_recalls r where r.id = recall_id(%(id)s)
    ) d
    where d.at < 'infinity' and d.at > now() + case
        when d.foreign then 60 else %(tolerance)s end * interval '1 second'
    order by d.foreign, d.at desc
    limit 1
) k on true;

-- name: workers
-- Running workers, and how many runs each has in hand: the leases say that, not the last heartbeat.
-- A row that was written in another database came with a dump of that: its worker runs there, and
-- is not alive here, however fresh its heartbeat looks. Nor is one whose LISTEN connection is gone,
-- with no heartbeat since (`cut_off`, in seconds): a worker that was killed, long before its
-- heartbeats are missed. A standby knows no connections of the primary.
select w.*,
    not w.elsewhere and w.seen_at > now() - %(silence)s * interval '1 second' and (
        w.seen_at > now() - %(cut_off)s * interval '1 second'
        or w.bell <> 'listening'
        or w.settings -> 'connection_seen' is distinct from 'true'
        or pg_is_in_recovery()
        or exists (
            select from pg_stat_activity c
            -- PostgreSQL keeps 63 octets.
            where c.application_name = left('recall-worker listener ' || w.worker, 63)
        )
    ) as alive,
    coalesce(l.leases, 0) as leases, now() as now
from (
    select *, not (
        coalesce(system_identifier = %(system_identifier)s, true)
        and coalesce(database_oid = %(database_oid)s, true)
    ) as elsewhere
    from recall_workers
) w
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
    count(*) filter (where lease_until > now() and lease is not null) as leased,
    count(*) filter (
        where paused_at is null and coalesce(lease_until, trigger_at) <= now()
    ) as due,
    count(*) filter (
        where paused_at is null
            and coalesce(lease_until, trigger_at) <= now() - interval '1 minute'
    ) as overdue,
    count(*) filter (where lease is null and paused_at is null and deferrals > 0) as deferred,
    min(coalesce(lease_until, trigger_at))
        filter (where lease is null and paused_at is null) as next_due
from session_recalls
group by status;

-- name: queues
-- All counts by queue, in one pass: of each queue that has recalls, is paused, or is served by a
-- live worker. `due` could be claimed, a lease that has ended too, `overdue` of that for over a
-- minute; `oldest` in seconds. A version without queues serves all.
with counted as (
    select queue,
        count(*) filter (where live and lease is null and paused_at is null) as waiting,
        count(*) filter (where waits_since <= now()) as due,
        count(*) filter (where waits_since <= now() - interval '1 minute') as overdue,
        count(*) filter (where live and lease is not null and lease_until > now()) as leased,
        count(*) filter (where live and lease is null and paused_at is not null) as held_back,
        count(*) filter (where status = 'failed') as failed,
        min(waits_since) as next_due
    from (
        select queue, status, lease, lease_until, paused_at,
            status in ('pending', 'running') as live,
            case when status in ('pending', 'running') and paused_at is null
                    and (lease is null or lease_until <= now())
                then coalesce(lease_until, trigger_at) end as waits_since
        from session_recalls
    ) r
    group by queue
),
live as (
    select worker, queues from recall_workers
    where seen_at > now() - %(silence)s * interval '1 second'
        -- As in `workers`.
        and (
            seen_at > now() - %(cut_off)s * interval '1 second' or bell <> 'listening'
            or settings -> 'connection_seen' is distinct from 'true'
            or pg_is_in_recovery() or exists (
                select from pg_stat_activity c
                where c.application_name = left('recall-worker listener ' || worker, 63)
            )
        )
        and held is null
        and coalesce(system_identifier = %(system_identifier)s, true)
        and coalesce(database_oid = %(database_oid)s, true)
),
named as (
    select queue from counted
    union select unnest(queues) from live
    union select queue from recall_queues where queue <> '*'
    union select 'default'
)
select n.queue, coalesce(c.due, 0) as due, coalesce(c.overdue, 0) as overdue,
    coalesce(c.waiting, 0) as waiting, coalesce(c.leased, 0) as leased,
    coalesce(c.held_back, 0) as held_back, coalesce(c.failed, 0) as failed,
    case when c.next_due <= now() then extract(
        epoch from now() - greatest(c.next_due, now() - interval '100 years')
    )::float8 end as oldest,
    c.next_due,
    (select count(*) from live l where coalesce(n.queue = any (l.queues), true)) as workers,
    p.paused_at, p.paused_by, p.reason, coalesce(p.queue = '*', false) as all_paused, now() as now
from named n
left join counted c on c.queue = n.queue
left join lateral (
    select * from recall_queues q
    where q.queue in (n.queue, '*')
    order by q.queue = '*' desc
    limit 1
) p on true
order by n.queue <> 'default', n.queue;

-- name: queue
-- Whether anybody would claim from this queue: for a word of warning.
select (
        select count(*) from recall_workers w
        where w.seen_at > now() - %(silence)s * interval '1 second'
            and (
                w.seen_at > now() - %(cut_off)s * interval '1 second' or w.bell <> 'listening'
                or w.settings -> 'connection_seen' is distinct from 'true'
                or pg_is_in_recovery() or exists (
                    select from pg_stat_activity c
                    where c.application_name = left('recall-worker listener ' || w.worker, 63)
                )
            )
            and w.held is null
            and coalesce(%(queue)s::text = any (w.queues), true)
            and coalesce(w.system_identifier = %(system_identifier)s, true)
            and coalesce(w.database_oid = %(database_oid)s, true)
    ) as workers,
    exists (select from session_recalls r where r.queue = %(queue)s) as has_recalls,
    exists (select from recall_queues q where q.queue in (%(queue)s, '*')) as paused,
    exists (select from recall_queues q where q.queue = '*') as all_paused;

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
    -- An extra run is late by itself.
    group by recall_id, occurrence, case when rekey < 0 then rekey end
) first;

-- name: told
-- Whether RECALL_FAILURE_URL was told that a recall has failed: one row for each time that it did,
-- oldest first.
select o.id, o.occurrence, o.written_at, o.tries, o.http_status, o.reason, o.delivered_at,
    o.given_up_at, case when o.delivered_at is null and o.given_up_at is null then o.due_at end
        as next_try_at
from recall_outbox o
where o.recall_id = coalesce(recall_id(%(id)s)::text, %(id)s::text)
order by o.written_at, o.id;

-- name: stats_failures
-- What RECALL_FAILURE_URL was told, of the entries that are still kept; `wanted`: whether entries
-- are written now.
select count(*) filter (where delivered_at is null and given_up_at is null) as waiting,
    count(delivered_at) as delivered, count(given_up_at) as given_up,
    min(written_at) filter (where delivered_at is null and given_up_at is null) as oldest,
    exists (select from recall_subscriptions where until > now()) as wanted
from recall_outbox;
