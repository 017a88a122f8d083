-- The worker's statements: claim, place, renew, settle. Every one is a single round trip in its own transaction.
-- now() is the start of that transaction: PostgreSQL's clock decides what is due, the worker's is for durations only.

-- name: claim
-- "These rows are yours" and "the next is due in s seconds", from one snapshot, so that there is no gap between the two.
-- Oldest due first; the limit is inside a materialized CTE, as a planner may otherwise rerun it and claim more than asked.
-- A session with a leased row is passed over, and of a session's due rows only the oldest is a candidate: two claimers then
-- contend for one row, which `skip locked` decides (idx_recalls_one_run guards what is left: a row inserted in between).
with candidate as materialized (
    select r.id, r.session_id, r.occurrence, r.rekey, r.attempt, r.lease, r.leased_by, r.leased_at, r.scheduled_for,
        r.trigger_at, coalesce(r.lease_until, r.trigger_at) as due_at
    from session_recalls r
    where r.status in ('pending', 'running') and r.paused_at is null
        and coalesce(r.lease_until, r.trigger_at) <= now()
        -- After an outage living owners come first: for a third of a lease nobody takes an expired one.
        and (r.lease is null or (%(take_expired)s and pg_postmaster_start_time() < now() - %(lease)s / 3 * interval '1 second'))
        and (r.lease is not null or not exists (
            select from session_recalls o
            where o.session_id = r.session_id and o.status in ('pending', 'running') and o.id <> r.id
                and (o.lease is not null
                    or (o.paused_at is null and (o.trigger_at, o.id) < (r.trigger_at, r.id)))
        ))
        and not exists (
            select from session_recalls o
            where o.session_id = r.session_id and o.lease is not null and o.status not in ('pending', 'running')
                and o.lease_until > now()
        )
    order by coalesce(r.lease_until, r.trigger_at)
    limit %(slots)s
    for update of r skip locked
),
claimed as (
    update session_recalls r
    set lease = gen_random_uuid(),
        lease_until = now() + %(lease)s * interval '1 second',
        leased_at = now(),
        leased_by = %(worker)s,
        attempt = r.attempt + 1,
        scheduled_for = coalesce(r.scheduled_for, r.trigger_at),
        planned_at = coalesce(r.planned_at, r.trigger_at),
        -- A lease that ended on its own was a call that may have been made.
        begun_at = case when r.lease is null then r.begun_at else coalesce(r.begun_at, r.leased_at) end,
        missed = case
            when r.call_type = 'recurring' and r.interval_seconds > 0 and r.begun_at is null and r.lease is null
            then least(2147483647, greatest(0, floor(
                extract(epoch from now() - greatest(r.trigger_at, '0001-01-02'::timestamptz)) / r.interval_seconds)))::integer
            else r.missed
        end
    where r.id = any (array(select id from candidate))
    returning r.*
),
taken as (
    -- The dead worker can't leave its call's mark; whoever takes the row up does it in its place.
    insert into recall_attempts as a
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for, called_at, last_called_at,
        ended_at, reason, settled)
    select c.id, c.occurrence, c.rekey, c.attempt, 'unknown', c.session_id, c.leased_by, c.lease,
        coalesce(c.scheduled_for, c.trigger_at), c.leased_at, c.leased_at,
        c.due_at, 'the worker was not heard of again: its lease ended', 'taken'
    from candidate c
    where c.lease is not null
    on conflict (recall_id, occurrence, rekey, attempt, outcome) do update
        set calls = a.calls + (a.lease <> excluded.lease)::integer, lease = excluded.lease, worker = excluded.worker,
            last_called_at = excluded.last_called_at, ended_at = excluded.ended_at
),
ahead as (
    select (
            select extract(epoch from least(coalesce(r.lease_until, r.trigger_at), now() + interval '1 day') - now())::float8
            from session_recalls r
            where r.status in ('pending', 'running') and r.paused_at is null and coalesce(r.lease_until, r.trigger_at) > now()
            order by coalesce(r.lease_until, r.trigger_at)
            limit 1
        ) as next_in,
        -- Due and not ours to claim: locked by the application, or behind a run of its session. The worker comes back for it.
        (select count(*) from candidate) < %(slots)s and exists (
            select from session_recalls r
            where r.status in ('pending', 'running') and r.paused_at is null and coalesce(r.lease_until, r.trigger_at) <= now()
                and r.id <> all (array(select id from candidate))
        ) as waiting
)
select ahead.next_in, ahead.waiting,
    c.id, c.session_id, c.call_type, c.additional_context_message as message, c.interval_seconds as interval, c.occurrence, c.rekey,
    c.attempt, c.deferrals,
    least(greatest(c.scheduled_for, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz) as scheduled_for,
    c.missed,
    extract(epoch from now() - c.begun_at)::float8 as begun_age,
    extract(epoch from now() - greatest(k.due_at, '0001-01-02'::timestamptz))::float8 as lag,
    extract(epoch from now()
        - least(greatest(c.scheduled_for, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz))::float8 as lateness,
    c.lease, c.trigger_at::text as trigger,
    least(greatest(c.trigger_at, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz) as trigger_at,
    least(greatest(c.planned_at, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz) as planned_at,
    c.trigger_at <= now() as due,
    case when k.lease is not null then k.leased_by end as taken_from
from ahead
left join (claimed c join candidate k on k.id = c.id) on true
order by k.due_at;

-- name: place
-- The application moved trigger_at: the occurrence that follows from it is written before it is called, so that whoever comes
-- after a crash calls it under the same key. Guarded by the lease and by the very trigger_at that was judged.
with told as (
    select *
    from unnest(%(ids)s::text[], %(leases)s::uuid[], %(triggers)s::text[], %(occurrences)s::integer[])
        as t (id, lease, trigger, occurrence)
)
update session_recalls r
set occurrence = t.occurrence, rekey = 0, attempt = 1, deferrals = 0, begun_at = null,
    scheduled_for = r.trigger_at, planned_at = r.trigger_at,
    missed = case
        when r.call_type = 'recurring' and r.interval_seconds > 0
        then least(2147483647, greatest(0, floor(
            extract(epoch from now() - least(greatest(r.trigger_at, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz))
            / r.interval_seconds)))::integer
        else 0
    end
from told t
where r.id = t.id and r.id = any (%(ids)s::text[]) and r.lease = t.lease and r.trigger_at = t.trigger::timestamptz
    and r.status in ('pending', 'running')
returning r.id, r.missed;

-- name: renew
-- For all runs at once. A row that the application holds locked is passed over and asked for again soon (nobody else can take
-- it meanwhile either); one that is no longer ours, or no longer live, says why.
with told as (
    select * from unnest(%(ids)s::text[], %(leases)s::uuid[]) as t (id, lease)
),
held as materialized (
    select r.id
    from session_recalls r
    join told t on t.id = r.id
    where r.id = any (%(ids)s::text[]) and r.lease = t.lease and r.status in ('pending', 'running')
    for update of r skip locked
),
renewed as (
    update session_recalls r
    set lease_until = now() + %(lease)s * interval '1 second'
    where r.id = any (array(select id from held))
    returning r.id
)
select t.id,
    case
        when n.id is not null then 'renewed'
        when r.id is null then 'deleted'
        when r.lease is distinct from t.lease then 'lost'
        when r.status not in ('pending', 'running') then r.status
        else 'locked'
    end as state
from told t
left join renewed n on n.id = t.id
left join session_recalls r on r.id = t.id and r.id = any (%(ids)s::text[]);

-- name: look
-- Of the runs in hand, those that are no longer ours to finish: asked when the bell rings, as a cancel rings it.
select t.id,
    case when r.id is null then 'deleted' when r.lease is distinct from t.lease then 'lost' else r.status end as state
from unnest(%(ids)s::text[], %(leases)s::uuid[]) as t (id, lease)
left join session_recalls r on r.id = t.id and r.id = any (%(ids)s::text[])
where r.id is null or r.lease is distinct from t.lease or r.status not in ('pending', 'running');

-- name: settle
-- A batch of verdicts, each guarded by its lease, by the row being live, and by trigger_at standing where the judge saw it.
-- What is locked by the application is passed over and asked for again, so that it strands nobody. The call's mark is left in
-- the same transaction, also where the lease is gone; not where the settle will be asked for again.
with told as (
    select *
    from unnest(
        %(ids)s::text[], %(leases)s::uuid[], %(triggers)s::text[], %(statuses)s::text[], %(occurrences)s::integer[],
        %(rekeys)s::integer[], %(attempts)s::integer[], %(deferrals)s::integer[], %(delays)s::float8[], %(fresh)s::boolean[],
        %(outcomes)s::text[], %(reasons)s::text[], %(called_ago)s::float8[], %(ended_ago)s::float8[], %(http_statuses)s::integer[],
        %(call_occurrences)s::integer[], %(call_rekeys)s::integer[], %(call_attempts)s::integer[],
        %(sessions)s::text[], %(scheduled)s::timestamptz[]
    ) as t (id, lease, trigger, status, occurrence, rekey, attempt, deferrals, delay, fresh, outcome, reason, called_ago, ended_ago,
        http_status, call_occurrence, call_rekey, call_attempt, session_id, scheduled_for)
),
held as materialized (
    select r.id, r.session_id, r.lease, r.status, r.trigger_at
    from session_recalls r
    where r.id = any (%(ids)s::text[])
    for update of r skip locked
),
state as materialized (
    select t.id, h.status as status_before, h.trigger_at,
        case
            when h.id is null and exists (select from session_recalls r where r.id = t.id) then 'locked'
            -- Written before, by a settle whose answer was lost with the connection.
            when h.lease is distinct from t.lease and exists (
                select from recall_attempts a
                where a.recall_id = t.id and a.occurrence = t.call_occurrence and a.rekey = t.call_rekey
                    and a.attempt = t.call_attempt and a.outcome = t.outcome and a.lease = t.lease and a.settled <> 'taken'
            ) then 'again'
            when h.id is null then 'deleted'
            when h.lease is distinct from t.lease then 'lost'
            when h.status not in ('pending', 'running') then 'ended'
            when h.trigger_at <> t.trigger::timestamptz then 'moved'
            else 'settled'
        end as state
    from told t
    left join held h on h.id = t.id
),
written as (
    update session_recalls r
    set status = case
            -- Moved out of its session's slot and put back: only where no newer recall has taken the slot.
            when r.status = 'running' and t.status = 'pending' and exists (
                select from session_recalls o
                where o.session_id = r.session_id and o.status = 'pending' and o.id <> r.id
            ) then 'running'
            else t.status
        end,
        lease = null, lease_until = null, leased_at = null,
        leased_by = case when t.status in ('pending', 'running') then null else r.leased_by end,
        occurrence = t.occurrence, rekey = t.rekey, attempt = t.attempt, deferrals = t.deferrals,
        trigger_at = case when t.delay is null then r.trigger_at
            else now() + (t.delay - t.ended_ago) * interval '1 second' end,
        planned_at = case when t.delay is null then r.trigger_at
            else now() + (t.delay - t.ended_ago) * interval '1 second' end,
        scheduled_for = case when t.fresh then null else r.scheduled_for end,
        begun_at = case when t.fresh then null
            else coalesce(r.begun_at, now() - t.called_ago * interval '1 second') end,
        missed = case when t.fresh then 0 else r.missed end,
        last_outcome = coalesce(t.outcome, r.last_outcome),
        reason = t.reason,
        ended_at = case when t.status in ('pending', 'running') then null else now() end,
        updated_at = now()
    from told t
    where r.id = t.id and r.id = any (array(select id from state where state = 'settled'))
    returning r.id, r.status
),
freed as (
    -- Ended by somebody else in mid-run: nothing changes but that the session is free again.
    update session_recalls r
    set lease = null, lease_until = null
    where r.id = any (array(select id from state where state = 'ended'))
),
marked as (
    insert into recall_attempts as a
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for, called_at, last_called_at,
        ended_at, http_status, reason, settled)
    select t.id, t.call_occurrence, t.call_rekey, t.call_attempt, t.outcome, t.session_id, %(worker)s, t.lease, t.scheduled_for,
        now() - t.called_ago * interval '1 second', now() - t.called_ago * interval '1 second',
        now() - t.ended_ago * interval '1 second', t.http_status, t.reason, coalesce(w.status, s.state)
    from told t
    join state s on s.id = t.id
    left join written w on w.id = t.id
    where s.state not in ('moved', 'locked', 'again') and t.outcome is not null and t.called_ago is not null
    on conflict (recall_id, occurrence, rekey, attempt, outcome) do update
        -- The same lease is the same call: its mark may have been left already by whoever took the row up.
        set calls = a.calls + (a.lease <> excluded.lease)::integer, last_called_at = excluded.last_called_at,
            ended_at = excluded.ended_at, worker = excluded.worker, lease = excluded.lease, http_status = excluded.http_status,
            reason = excluded.reason, settled = excluded.settled
)
select s.id, s.state, coalesce(w.status, s.status_before) as status, s.trigger_at::text as trigger,
    least(greatest(s.trigger_at, '0001-01-02'::timestamptz), '9998-01-01'::timestamptz) as trigger_at
from state s
left join written w on w.id = s.id;

-- name: beat
-- That this worker is about, for people to read.
insert into recall_workers (worker, host, pid, version, slots, running, breaker, settings)
values (%(worker)s, %(host)s, %(pid)s, %(version)s, %(slots)s, %(running)s, %(breaker)s, %(settings)s::jsonb)
on conflict (worker) do update
    set seen_at = now(), slots = excluded.slots, running = excluded.running, breaker = excluded.breaker;

-- name: leave
-- This worker has stopped in good order. The bell lets the others look at what it put back.
with gone as (
    delete from recall_workers where worker = %(worker)s
)
select pg_notify('session_recalls', '');

-- name: schema
-- What the schema is, and the oldest code that can work with it.
select coalesce(max(version), 0) as version, coalesce(max(oldest_code), 0) as oldest_code from recall_schema;
