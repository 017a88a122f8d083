-- The application's side of the table, as `Recalls` and the command line use it: plain SQL that any
-- application may write. What `Recalls` does by session acts on the pending recall, as the
-- application's own SQL does; the command line acts by id, and also on the one that runs outside
-- its session's slot.

-- name: schedule
-- The ten columns of the contract, and how it recurs and ends. The trigger frees the session's slot
-- where the recall in it is a one-shot that is being run, and refuses an interval that could only
-- loop. Jitter delays the due time, not the nominal one.
insert into session_recalls
    (id, session_id, call_type, trigger_at, interval_seconds, internal_comment,
    additional_context_message, status, created_at, updated_at, cadence, cron, time_zone, until_at,
    times, failures_most, grace_seconds, jitter_seconds, scheduled_for)
select %(id)s, %(session_id)s, %(call_type)s, first.nominal + %(put_off)s * interval '1 second',
    %(interval)s, %(comment)s, %(message)s, 'pending', now(), now(),
    %(cadence)s, %(cron)s, %(time_zone)s, %(until)s::timestamptz,
    %(times)s, %(failures)s, %(grace)s, %(jitter)s,
    case when %(put_off)s > 0 then first.nominal end
from (
    select coalesce(
        %(at)s::timestamptz, now() + coalesce(%(after)s::float8, 0) * interval '1 second'
    ) as nominal
) first
returning *;

-- name: clock
-- PostgreSQL's time, for times that are computed outside of it, as cron's are.
select now() as now;

-- name: cancel_pending
update session_recalls
set status = 'cancelled', updated_at = now()
where session_id = %(session_id)s and status = 'pending'
returning id;

-- name: skip_pending
update session_recalls
set trigger_at = trigger_at + interval_seconds * interval '1 second', updated_at = now()
where session_id = %(session_id)s and status = 'pending' and call_type = 'recurring'
    and interval_seconds > 0
returning *;

-- name: due
-- What is due and waits: neither leased nor paused. Oldest first.
select * from session_recalls
where status in ('pending', 'running') and paused_at is null and lease is null
    and coalesce(lease_until, trigger_at) <= now()
order by coalesce(lease_until, trigger_at)
limit %(limit)s;

-- name: next_trigger
-- The nearest time at which anything that waits is due, even if it is past; no row where nothing
-- waits.
select trigger_at as next_trigger from session_recalls
where status in ('pending', 'running') and paused_at is null and lease is null
order by coalesce(lease_until, trigger_at)
limit 1;

-- name: mark
update session_recalls
set status = %(status)s, updated_at = now()
where id = %(id)s and status in ('pending', 'running')
returning id;

-- name: sessions_with_pending
select distinct session_id from session_recalls
where session_id = any (%(session_ids)s::text[]) and status = 'pending';

-- name: cancel
-- In any live state. Its call is aborted at once.
update session_recalls
set status = 'cancelled', reason = %(reason)s, ended_at = now(), updated_at = now()
where id = any (%(ids)s::text[]) and status in ('pending', 'running')
returning *;

-- name: cancel_session
update session_recalls
set status = 'cancelled', reason = %(reason)s, ended_at = now(), updated_at = now()
where session_id = %(session_id)s and status in ('pending', 'running')
returning *;

-- name: skip
update session_recalls
set trigger_at = trigger_at + interval_seconds * interval '1 second', updated_at = now()
where id = any (%(ids)s::text[]) and status in ('pending', 'running') and call_type = 'recurring'
    and interval_seconds > 0
returning *;

-- name: reschedule
-- In mid-run the new time applies to what comes after the run.
update session_recalls
set trigger_at = coalesce(
        %(at)s::timestamptz, now() + coalesce(%(after)s::float8, 0) * interval '1 second'
    ),
    updated_at = now()
where id = any (%(ids)s::text[]) and status in ('pending', 'running')
returning *;

-- name: pause
-- The current run is not interrupted; what follows waits. Pausing again changes nothing.
update session_recalls
set paused_at = coalesce(paused_at, now()), updated_at = now()
where id = any (%(ids)s::text[]) and status in ('pending', 'running')
returning *;

-- name: resume
-- A recall that is not paused stays as it is; `resumed` says which were.
with held as materialized (
    select id, paused_at is not null as paused from session_recalls
    where id = any (%(ids)s::text[]) and status in ('pending', 'running')
    for update
),
written as (
    update session_recalls r
    set paused_at = null, updated_at = now()
    where r.id = any (array(select id from held where paused))
    returning r.*
)
select *, true as resumed from written
union all
select *, false as resumed from session_recalls
where id = any (array(select id from held where not paused));

-- name: fire
-- Run the next occurrence now. One that was called already keeps its key and its nominal time; one
-- that is early has its own time moved to now, and no worker takes that for a move by the
-- application. A move that the application had made before (a skip, or another time) stays one:
-- planned_at moves by the same distance, and the claim sees it. A recall that is due already stays
-- as it is.
update session_recalls
set trigger_at = least(trigger_at, now()),
    planned_at = case
        when trigger_at <= now() then planned_at
        when coalesce(planned_at, trigger_at) = trigger_at then now()
        when greatest(trigger_at, planned_at) < '4000-01-01' and planned_at > '0001-01-01'
        then (now() at time zone 'UTC' - (trigger_at - planned_at)) at time zone 'UTC'
        else now() - interval '1 microsecond'
    end,
    -- On grid and cron the nominal time stays, as the next one follows from it.
    scheduled_for = case
        when cadence = 'interval' then least(coalesce(scheduled_for, trigger_at), now())
        else coalesce(scheduled_for, trigger_at) end,
    updated_at = now()
where id = any (%(ids)s::text[]) and status in ('pending', 'running') and lease is null
    and paused_at is null
returning *;

-- name: retry
-- Run the occurrence that failed or was cancelled again, under a new key and with all its attempts;
-- not while an aborted call is still open. What the application had moved before stays moved, as
-- with fire. Where it was ended in mid-run and its worker then died, that call is recorded here, as
-- the worker can't.
with before as materialized (
    select r.id, r.session_id, r.occurrence, r.rekey, r.attempt, r.lease, r.lease_until,
        r.leased_by, r.leased_at, r.scheduled_for, r.missed, r.trigger_at, r.run_reference,
        case when r.sent_at >= r.leased_at then r.sent_at end as sent_at, r.taken_lease
    from session_recalls r
    where r.id = any (%(ids)s::text[]) and r.status in ('failed', 'cancelled')
        and (r.lease is null or r.lease_until < now())
    for update of r
),
recorded as (
    insert into recall_attempts
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        missed, called_at, last_called_at, ended_at, reason, settled)
    select b.id, b.occurrence, b.rekey, b.attempt, 'unknown', b.session_id,
        coalesce(b.leased_by, 'unknown'), b.lease, coalesce(b.scheduled_for, b.trigger_at),
        b.missed, b.sent_at, b.sent_at, b.lease_until,
        'the worker was not heard of again: its lease ended'
            || case when b.sent_at is null then ', and perhaps nothing was called' else '' end,
        'ended'
    from before b
    where b.lease is not null and b.run_reference is null and octet_length(b.id) <= 2000
        and not (b.taken_lease is not distinct from b.lease and b.sent_at is null)
    on conflict do nothing
)
update session_recalls r
set status = 'pending', lease = null, lease_until = null, leased_at = null, leased_by = null,
    trigger_at = now(),
    planned_at = case
        when coalesce(r.planned_at, r.trigger_at) = r.trigger_at then now()
        when greatest(r.trigger_at, r.planned_at) < '4000-01-01'
            and least(r.trigger_at, r.planned_at) > '0001-01-01'
        then (now() at time zone 'UTC' - (r.trigger_at - r.planned_at)) at time zone 'UTC'
        else now() - interval '1 microsecond'
    end,
    scheduled_for = case
        when r.cadence = 'interval' then least(coalesce(r.scheduled_for, r.trigger_at), now())
        else coalesce(r.scheduled_for, r.trigger_at) end,
    rekey = r.rekey + 1, attempt = 0, deferrals = 0, failures = 0, begun_at = null,
    run_reference = null, delivered_at = null, reason = null, ended_at = null, paused_at = null,
    updated_at = now()
from before b
where r.id = b.id
returning r.*;

-- name: states
-- Why an operation on these recalls was not possible.
select id, session_id, status, call_type, interval_seconds, paused_at, lease is not null as leased,
    leased_by
from session_recalls
where id = any (%(ids)s::text[]);
