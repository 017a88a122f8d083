-- The worker's statements: claim, take up, write moves, renew, settle. Each is one round trip in
-- its own transaction. now() is the start of that transaction: PostgreSQL's clock decides what is
-- due, the worker's clock measures durations only.
-- Ids come and go as text; recall_id_type is the type of session_recalls.id, whichever it is.

-- name: session_setup
-- The first statement on a connection. Is it the server's own, or a pooler's? A pooler announces a
-- backend of its own making and passes each transaction to another one. On the server's own
-- connection these settings then hold, whatever the database or the account sets for others: a
-- bound on waiting for locks, as an insert that the application keeps open can hold up an index
-- entry; the deadlines that our statements are made for; and bounds on waiting for us, as the locks
-- of a worker that was cut off in the middle of a transaction must not outlive its lease. What the
-- statements' meaning depends on is set apart: `settings` in setup.sql.
-- Our plans are all by index and do not depend on the values; to plan a claim of ten rows each time
-- would triple its cost. And a plan that was made while a table was empty must not go on reading
-- the whole table. Before PostgreSQL 18 a sequential scan that is disabled, and can't be avoided,
-- looks expensive enough to be compiled, at a few hundred milliseconds each time.
select d.direct,
    case when d.direct then set_config('lock_timeout', %(lock)s, false) end,
    -- Through a pooler for what is asked together with this.
    set_config('statement_timeout', %(statement)s, not d.direct),
    case when d.direct
        then set_config('idle_in_transaction_session_timeout', %(statement)s, false) end,
    case when d.direct then set_config('tcp_keepalives_idle', %(idle)s, false) end,
    case when d.direct then set_config('tcp_keepalives_interval', %(interval)s, false) end,
    case when d.direct then set_config('tcp_keepalives_count', '3', false) end,
    case when d.direct then set_config('tcp_user_timeout', %(unheard)s, false) end,
    case when d.direct then set_config('idle_session_timeout', '0', false) end,
    case when d.direct then set_config('plan_cache_mode', 'force_generic_plan', false) end,
    case when d.direct then set_config('enable_seqscan', 'off', false) end,
    case when d.direct then set_config('jit', 'off', false) end
from (select pg_backend_pid() = %(pid)s as direct) d;

-- name: transaction_setup
-- The same for one transaction, where a pooler shares the connection: nothing may stay behind on
-- it.
select set_config('lock_timeout', %(lock)s, true),
    set_config('statement_timeout', %(statement)s, true),
    set_config('idle_in_transaction_session_timeout', %(statement)s, true);

-- name: end_given_up
-- Connections of this worker that it hung up on while PostgreSQL was busy with them. A commit that
-- waits for a standby, and a peer that the network has cut off, keep a backend for as long as they
-- like: it is ended here, and those that are still there count as connections of this worker. By
-- name, too, as another program may have the number by now. A backend of an account that we may not
-- signal is only counted.
select g.pid
from (
    select a.pid,
        case
            when pg_has_role(a.usesysid, 'member') then pg_terminate_backend(a.pid, 100)
        end as gone
    from pg_stat_activity a
    join unnest(%(pids)s::integer[], %(names)s::text[]) as t (pid, name)
        on t.pid = a.pid and t.name = a.application_name
    where a.pid <> pg_backend_pid()
) g
where g.gone is not true;

-- name: claim
-- The oldest due rows that nobody holds, with no more than their calls need to know: what comes
-- next is asked after those calls were sent (`next_due`). Leases that have expired are taken up by
-- `take_up`: PostgreSQL would prepare for that at each claim, at a tenth of what a claim costs an
-- idle worker.
-- The limit is inside a materialized CTE, as a planner may otherwise rerun it and claim more than
-- asked.
-- A session with a leased row is passed over, and of a session's due rows only the oldest is a
-- candidate: two claimers then compete for one row, which `skip locked` decides
-- (idx_recalls_one_run guards the rest: a row inserted in between).
-- A queue at a time, each by idx_recalls_queue_due and to the limit, so that what is due in queues
-- of others, or waits in one of our own, costs nothing; then the oldest of all. `any (array[...])`,
-- here and in what follows: with `=` the planner may read all queues in idx_recalls_due, where its
-- statistics know of no rows in ours; and where queue and time are compared as one, PostgreSQL
-- before 18 does not stop at now(), and reads all that waits. Nothing of a queue that is paused. A
-- row of another queue is no reason to pass over one of the same session that is younger: perhaps
-- nobody serves that queue.
-- The fleet's cap counts leases in the queues of this worker: one that expired longer than
-- `held_for` ago is no longer anybody's run. Not while PostgreSQL has just started, as living
-- owners then renew first. A long message is not loaded here: a batch of them would not fit into a
-- worker. The worker that calls it reads it alone (`message`). Other texts without a bound are not
-- loaded whole either: what is cut off here is too long to be used.
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
),
most as materialized (
    select least(%(slots)s::bigint, case
        when %(fleet)s::integer is not null then greatest(0, %(fleet)s - (
        select count(*) from session_recalls f
        where f.lease is not null and f.status in ('pending', 'running')
            and f.queue = any (%(queues)s::text[])
            and (f.lease_until > now() - %(held_for)s * interval '1 second'
                or pg_postmaster_start_time() > now() - %(grace)s * interval '1 second')
    )) end) as rows
),
candidate as materialized (
    select d.id, d.due_at, d.waited
    from served s
    cross join lateral (
        select r.id, coalesce(r.lease_until, r.trigger_at) as due_at,
            r.lease_until is not null as waited
        from session_recalls r
        where r.queue = any (array[s.queue]) and coalesce(r.lease_until, r.trigger_at) <= now()
            and r.status in ('pending', 'running') and r.paused_at is null
            and r.lease is null
            -- Rows that PostgreSQL refuses to have claimed are tried alone.
            and r.id <> all (%(aside)s::recall_id_type[])
            -- Looked up session by session: of a `not exists` the planner may make a join that
            -- compares each candidate with every live row, and the plan stays. Of `is null` it would
            -- believe that hardly a row passes, and sort all that is due.
            and (
                select true from session_recalls o
                where o.session_id = r.session_id and o.status in ('pending', 'running')
                    and o.id <> r.id
                    -- num_nulls() and not `is null`: the planner must not believe that
                    -- idx_recalls_due, read from end to end, helps to find the rows of one session.
                    -- It would where its statistics know of no live rows.
                    and (o.lease is not null
                        or (num_nulls(o.paused_at) = 1
                            and o.queue = any (array(select queue from served))
                            and (coalesce(o.lease_until, o.trigger_at), o.id)
                                < (coalesce(r.lease_until, r.trigger_at), r.id)))
                limit 1
            ) is not true
            and (
                select true from session_recalls o
                where o.session_id = r.session_id and o.lease is not null
                    and o.status not in ('pending', 'running')
                    -- A lease that ends later than any worker's can is no worker's.
                    and o.lease_until > now()
                    and o.lease_until < now() + %(lease_end_most)s * interval '1 second'
                limit 1
            ) is not true
        order by r.queue, coalesce(r.lease_until, r.trigger_at)
        limit (select rows from most)
        for update of r skip locked
    ) d
    order by d.due_at
    limit (select rows from most)
),
waited as materialized (
    -- Extra runs that waited to be called again: the update overwrites when they were due. Hardly
    -- ever any.
    select c.id, c.due_at from candidate c where c.waited
)
update session_recalls r
set lease = gen_random_uuid(),
    lease_until = now() + %(lease)s * interval '1 second',
    leased_at = now(),
    leased_by = %(worker)s,
    sent_at = null,
    -- Counters and dates that no worker wrote (an old row, a hostile one) must not stop the claim
    -- of all the others. A run that the API accepted is polled, not called again.
    attempt = least(greatest(r.attempt, 0), 2147483646) + (r.run_reference is null)::integer,
    -- A key stands for one body: what the application changed between two calls of one occurrence
    -- is sent under a new key.
    rekey = least(r.rekey, 2147483646) + coalesce(
        r.run_reference is null and r.begun_at is not null and r.fired_at is null
        and split_part(r.body_hash, ':', 1) = r.occurrence::text
        and octet_length(r.additional_context_message) <= %(message_limit)s
        and split_part(r.body_hash, ':', 2)
            <> hashtextextended(
                row(r.session_id, r.call_type, r.additional_context_message)::text, 0
            )::text,
        false)::integer,
    -- An extra run's key is numbered by `fires`. A worker of an earlier version may have left
    -- fired_at behind: an extra run is due by lease_until.
    fired_at = case when r.lease_until is not null then r.fired_at end,
    fires = case
        when r.fired_at is null then r.fires
        else least(r.fires, 2147483646) + coalesce(
            r.run_reference is null and r.begun_at is not null
            and octet_length(r.additional_context_message) <= %(message_limit)s
            and split_part(r.body_hash, ':', 1) = r.occurrence::text
            and split_part(r.body_hash, ':', 2)
                <> hashtextextended(
                    row(r.session_id, r.call_type, r.additional_context_message)::text, 0
                )::text,
            false)::integer
    end,
    body_hash = case
        when r.run_reference is null
            and octet_length(r.additional_context_message) <= %(message_limit)s
        then r.occurrence || ':' || hashtextextended(
            row(r.session_id, r.call_type, r.additional_context_message)::text, 0
        )
        else r.body_hash
    end,
    scheduled_for = coalesce(r.scheduled_for, r.planned_at, r.trigger_at),
    planned_at = coalesce(r.planned_at, r.trigger_at),
    begun_at = case when r.begun_at is null then null else least(r.begun_at, now()) end,
    -- For cron the worker counts, once the distance to the next moment has passed.
    missed = case
        when r.call_type = 'recurring' and r.interval_seconds > 0 and r.begun_at is null
            and r.cadence <> 'cron'
        then least(2147483647, greatest(0, floor(extract(epoch from
            -- None after the recall's end.
            greatest(least(now(), r.until_at), '0001-01-02'::timestamptz)
            - greatest(coalesce(r.scheduled_for, r.trigger_at), '0001-01-02'::timestamptz))
                / r.interval_seconds)
            -- None before the rule was edited.
            - greatest(0, floor(extract(epoch from coalesce(r.edited_at, '0001-01-02'::timestamptz)
                - greatest(coalesce(r.scheduled_for, r.trigger_at), '0001-01-02'::timestamptz))
                / r.interval_seconds))))::integer
        -- None by a schedule that it no longer has.
        when r.begun_at is null then 0
        else r.missed
    end
-- Without a join with the candidates: its plan may sort all their ids once for each of them.
where r.id = any (array(select id from candidate))
returning
    r.id::text as id, r.session_id::text as session_id, r.call_type,
    case
        when octet_length(r.additional_context_message) <= %(batch_message_most)s
        then r.additional_context_message
    end as message,
    r.interval_seconds as interval, r.occurrence, r.rekey,
    r.attempt, r.deferrals, coalesce(r.fired_at, r.scheduled_for) as scheduled_for,
    case when r.fired_at is null then r.missed else 0 end as missed, r.begun_at,
    coalesce((select w.due_at from waited w where w.id = r.id), r.trigger_at) as due_at, r.lease,
    r.trigger_at::text as trigger, r.trigger_at, r.planned_at, null::text as taken_from,
    octet_length(r.additional_context_message) as octets, false as called_before, 0 as takeovers,
    substring(r.run_reference for 4001) as reference, r.delivered_at, now() as claimed_at,
    substring(r.cadence for 100) as cadence, substring(r.cron for 1001) as cron,
    substring(r.time_zone for 1001) as time_zone, r.until_at as until, r.times, r.failures,
    r.failures_most, r.grace_seconds as grace, r.jitter_seconds as jitter,
    substring(r.last_outcome for 100) as last_outcome,
    r.edits, r.edited_at, r.edit_of, r.skips, r.named_at,
    case when r.fired_at is null then 0 else r.fires end as extra, r.uncounted;

-- name: ended_leases
-- Leases of our queues that have expired and may be taken up, oldest first, and which of those that
-- are left to their owners are still locked. By the index of leases: there are as many as there are
-- runs.
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
),
unlocked as materialized (
    -- Leases that expired while the application held their rows locked: has it released them? Only
    -- locking tells.
    select r.id from session_recalls r
    where r.id = any (%(left)s::recall_id_type[])
    for share of r skip locked
),
ended as materialized (
    select r.id, r.lease_until, r.run_reference is not null as accepted
    from session_recalls r
    where r.lease is not null and r.status in ('pending', 'running') and r.lease_until <= now()
        and r.queue = any (array(select queue from served))
        -- num_nulls(), so that idx_recalls_due, which a backlog fills, is not taken for an index of
        -- leases.
        and num_nulls(r.paused_at) = 1
        -- After an outage living owners come first: during the grace nobody takes an expired lease.
        and pg_postmaster_start_time() < now() - %(grace)s * interval '1 second'
        -- Runs in hand are being renewed or settled. Of our own leases that leaves those whose
        -- claim's answer was lost. They wait for one grace longer: this statement may itself have
        -- been delayed, by a process that was suspended after it listed what is in hand.
        and r.id <> all (%(in_hand)s::recall_id_type[])
        and (r.leased_by is distinct from %(worker)s
            or r.lease_until < now() - %(grace)s * interval '1 second')
        -- Their owners could not renew what was locked: during the grace it is left to them.
        and r.id <> all (%(left)s::recall_id_type[])
        and r.id <> all (%(aside)s::recall_id_type[])
    order by r.session_id
    limit %(most)s
)
select case when %(fleet)s::integer is not null then %(fleet)s - (
        select count(*) from session_recalls f
        where f.lease is not null and f.status in ('pending', 'running') and f.lease_until > now()
            and f.queue = any (%(queues)s::text[])
    ) end as room,
    array(select e.id::text from ended e order by e.lease_until, e.id) as ids,
    array(select accepted from ended order by lease_until, id) as accepted,
    -- How long this statement waited for a lock of the table.
    extract(epoch from clock_timestamp() - now())::float8 as waited,
    array(
        select l.id::text from unnest(%(left)s::recall_id_type[]) as l (id)
        where l.id <> all (array(select u.id from unlocked u))
    ) as locked;

-- name: take_up
-- These rows, by their ids: leases that have expired, whose workers were not heard of again; or due
-- rows that are tried alone, as a batch with them was refused. A row that is locked, or was renewed
-- or settled meanwhile, is left out.
-- Of a row that was taken up from a dead worker it is recorded when its request is about to be sent
-- (`sent`): should this worker die as well, a call that was never made costs no attempt
-- (`takeovers` counts these).
-- The session's rules and the fleet's cap are those of `claim`. A lease that has expired does not
-- count where it is the one that is taken up: `held_for` is 0 then.
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
),
candidate as materialized (
    select r.id, r.lease, r.leased_by, coalesce(r.lease_until, r.trigger_at) as due_at,
        r.session_id, r.occurrence, r.rekey, r.attempt, r.leased_at, r.scheduled_for, r.missed,
        r.run_reference, r.trigger_at, r.takeovers, r.fired_at, r.fires,
        gen_random_uuid() as new_lease,
        -- When its request was sent, where that is recorded; only what was written under this lease
        -- counts.
        case when r.sent_at >= r.leased_at then r.sent_at end as sent_at,
        -- Known not to have been sent: sending would have been recorded.
        r.lease is not null and r.taken_lease is not distinct from r.lease
            and r.run_reference is null
            and (r.sent_at >= r.leased_at) is not true as unsent
    from session_recalls r
    where r.id = any (%(ids)s::recall_id_type[])
        and r.status in ('pending', 'running') and r.paused_at is null
        and r.queue = any (array(select queue from served))
        and coalesce(r.lease_until, r.trigger_at) <= now()
        and (r.lease is null or (
            %(ended)s
            and pg_postmaster_start_time() < now() - %(grace)s * interval '1 second'
            -- This statement waited for a lock of the whole table: so did the owners' renewals, and
            -- they come first.
            and (select clock_timestamp() < now() + interval '0.25 seconds')
            and r.id <> all (%(in_hand)s::recall_id_type[])
            and (r.leased_by is distinct from %(worker)s
                or r.lease_until < now() - %(grace)s * interval '1 second')
        ))
        and (r.lease is not null or not exists (
            select from session_recalls o
            where o.session_id = r.session_id and o.status in ('pending', 'running')
                and o.id <> r.id
                and (o.lease is not null
                    or (num_nulls(o.paused_at) = 1
                        and o.queue = any (array(select queue from served))
                        and (coalesce(o.lease_until, o.trigger_at), o.id)
                            < (coalesce(r.lease_until, r.trigger_at), r.id)))
        ))
        and not exists (
            select from session_recalls o
            where o.session_id = r.session_id and o.lease is not null
                and o.status not in ('pending', 'running')
                and o.lease_until > now()
                and o.lease_until < now() + %(lease_end_most)s * interval '1 second'
        )
    order by coalesce(r.lease_until, r.trigger_at), r.id
    limit least(%(slots)s::bigint, case
        when %(fleet)s::integer is not null then greatest(0, %(fleet)s - (
        select count(*) from session_recalls f
        where f.lease is not null and f.status in ('pending', 'running')
            and f.queue = any (%(queues)s::text[])
            and f.lease_until > now() - %(held_for)s * interval '1 second'
    )) end)
    for update of r skip locked
),
taken as (
    -- The dead worker can't record its call; the worker that takes the row up does so in its place.
    -- Where it is not known whether the request was sent the record has no time of a call; where it
    -- is known that it was not, there is no record.
    insert into recall_attempts as a
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        missed, called_at, last_called_at, ended_at, reason, settled)
    select c.id::text, c.occurrence, case when c.fired_at is null then c.rekey else -c.fires end,
        c.attempt, 'unknown', c.session_id::text, coalesce(c.leased_by, 'unknown'), c.lease,
        coalesce(c.fired_at, c.scheduled_for, c.trigger_at),
        c.missed, c.sent_at, c.sent_at, c.due_at,
        'the worker was not heard of again: its lease ended'
            || case when c.sent_at is null then ', and perhaps nothing was called' else '' end,
        'taken'
    from candidate c
    -- An id that is too long for an index is never called: see judge.
    where c.lease is not null and c.run_reference is null and not c.unsent
        and octet_length(c.id::text) <= 2000
    on conflict (recall_id, occurrence, rekey, attempt, outcome) do update
        set calls = a.calls + (a.lease <> excluded.lease)::integer, lease = excluded.lease,
            worker = excluded.worker, called_at = coalesce(a.called_at, excluded.called_at),
            last_called_at = coalesce(excluded.last_called_at, a.last_called_at),
            ended_at = excluded.ended_at
)
update session_recalls r
set lease = k.new_lease,
    taken_lease = case when k.lease is not null then k.new_lease end,
    lease_until = now() + %(lease)s * interval '1 second',
    leased_at = now(),
    leased_by = %(worker)s,
    attempt = least(greatest(r.attempt, 0), 2147483646)
        + (r.run_reference is null and not k.unsent)::integer,
    takeovers = case
        when k.lease is null then 0
        when k.unsent then least(k.takeovers, 2147483646) + 1
        else 1
    end,
    sent_at = null,
    may_still_run = r.may_still_run or (k.lease is not null and not k.unsent),
    rekey = least(r.rekey, 2147483646) + coalesce(
        r.run_reference is null and (r.begun_at is not null or r.lease is not null)
        and r.fired_at is null
        and split_part(r.body_hash, ':', 1) = r.occurrence::text
        and octet_length(r.additional_context_message) <= %(message_limit)s
        and split_part(r.body_hash, ':', 2)
            <> hashtextextended(
                row(r.session_id, r.call_type, r.additional_context_message)::text, 0
            )::text,
        false)::integer,
    -- As in `claim`.
    fired_at = case when r.lease_until is not null then r.fired_at end,
    fires = case
        when r.fired_at is null then r.fires
        else least(r.fires, 2147483646) + coalesce(
            r.run_reference is null and (r.begun_at is not null or r.lease is not null)
            and octet_length(r.additional_context_message) <= %(message_limit)s
            and split_part(r.body_hash, ':', 1) = r.occurrence::text
            and split_part(r.body_hash, ':', 2)
                <> hashtextextended(
                    row(r.session_id, r.call_type, r.additional_context_message)::text, 0
                )::text,
            false)::integer
    end,
    body_hash = case
        when r.run_reference is null
            and octet_length(r.additional_context_message) <= %(message_limit)s
        then r.occurrence || ':' || hashtextextended(
            row(r.session_id, r.call_type, r.additional_context_message)::text, 0
        )
        else r.body_hash
    end,
    scheduled_for = coalesce(r.scheduled_for, r.planned_at, r.trigger_at),
    planned_at = coalesce(r.planned_at, r.trigger_at),
    -- A lease that expired stands for a call that may have been made.
    begun_at = case when r.lease is null and r.begun_at is null then null
        else least(coalesce(r.begun_at, r.leased_at), now()) end,
    missed = case
        when r.call_type = 'recurring' and r.interval_seconds > 0 and r.begun_at is null
            and r.lease is null
            and r.cadence <> 'cron'
        then least(2147483647, greatest(0, floor(extract(epoch from
            -- None after the recall's end.
            greatest(least(now(), r.until_at), '0001-01-02'::timestamptz)
            - greatest(coalesce(r.scheduled_for, r.trigger_at), '0001-01-02'::timestamptz))
                / r.interval_seconds)
            -- None before the rule was edited.
            - greatest(0, floor(extract(epoch from coalesce(r.edited_at, '0001-01-02'::timestamptz)
                - greatest(coalesce(r.scheduled_for, r.trigger_at), '0001-01-02'::timestamptz))
                / r.interval_seconds))))::integer
        when r.begun_at is null and r.lease is null then 0
        else r.missed
    end
from candidate k
where k.id = r.id and r.id = any (array(select id from candidate))
returning
    r.id::text as id, r.session_id::text as session_id, r.call_type,
    case
        when octet_length(r.additional_context_message) <= %(batch_message_most)s
        then r.additional_context_message
    end as message,
    r.interval_seconds as interval, r.occurrence, r.rekey,
    r.attempt, r.deferrals, coalesce(r.fired_at, r.scheduled_for) as scheduled_for,
    case when r.fired_at is null then r.missed else 0 end as missed, r.begun_at, k.due_at, r.lease,
    r.trigger_at::text as trigger,
    r.trigger_at, r.planned_at,
    case
        when k.lease is not null then coalesce(substring(k.leased_by for 500), 'unknown')
    end as taken_from,
    octet_length(r.additional_context_message) as octets, k.sent_at is not null as called_before,
    r.takeovers,
    substring(r.run_reference for 4001) as reference, r.delivered_at, now() as claimed_at,
    substring(r.cadence for 100) as cadence, substring(r.cron for 1001) as cron,
    substring(r.time_zone for 1001) as time_zone, r.until_at as until, r.times, r.failures,
    r.failures_most, r.grace_seconds as grace, r.jitter_seconds as jitter,
    substring(r.last_outcome for 100) as last_outcome,
    r.edits, r.edited_at, r.edit_of, r.skips, r.named_at,
    case when r.fired_at is null then 0 else r.fires end as extra, r.uncounted;

-- name: message
-- A message that is too long to be claimed in a batch, for the one call that needs it. Guarded by
-- the lease and by the hash that the claim wrote: a change by the application since then begins
-- another key.
select r.additional_context_message as message
from session_recalls r
where r.id = %(id)s::recall_id_type and r.lease = %(lease)s
    and r.status in ('pending', 'running')
    and split_part(r.body_hash, ':', 2)
        = hashtextextended(
            row(r.session_id, r.call_type, r.additional_context_message)::text, 0
        )::text;

-- name: sent
-- The request of a row that was taken up from a dead worker is about to be sent; this is recorded
-- before. No row: the lease is no longer ours, or the application holds the row locked (renewals
-- must not wait behind it), and nothing may be sent. `taken_lease` says that this is recorded for
-- this very lease, as workers of an earlier version do not do it.
with held as materialized (
    select r.id from session_recalls r
    where r.id = %(id)s::recall_id_type
    for update of r skip locked
)
update session_recalls r
set sent_at = greatest(now(), r.leased_at)
where r.id = %(id)s::recall_id_type and r.id = any (array(select id from held))
    and r.lease = %(lease)s and r.status in ('pending', 'running')
returning r.id::text as id;

-- name: next_due
-- When the next row of our queues is due, and what is due and was not claimed: locked by the
-- application, behind a run of its session, or under a lease that has expired. Of queues that are
-- paused nothing is due: `paused` names them. Also for how long it has been due: the
-- last claim could not see what fell due after it.
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
),
passed as materialized (
    -- Ordered, as PostgreSQL keeps no statistics of a partial index's expression, believes that a
    -- third of all rows is due, and would read the whole table for an `exists`.
    select d.leased, d.due_for
    from served s
    cross join lateral (
        select r.lease is not null as leased,
            extract(
                epoch from now()
                    - greatest(coalesce(r.lease_until, r.trigger_at), '0001-01-02'::timestamptz)
            )::float8 as due_for
        from session_recalls r
        where r.queue = any (array[s.queue]) and coalesce(r.lease_until, r.trigger_at) <= now()
            and r.status in ('pending', 'running') and r.paused_at is null
            and r.id <> all (%(aside)s::recall_id_type[])
        order by r.queue, coalesce(r.lease_until, r.trigger_at)
        limit %(passed_most)s
    ) d
    order by d.due_for desc
    limit %(passed_most)s
)
select (
        select min(n.next_in)
        from served s
        cross join lateral (
            select extract(
                epoch from least(coalesce(r.lease_until, r.trigger_at), now() + interval '1 day')
                    - now()
            )::float8 as next_in
            from session_recalls r
            where (r.queue, coalesce(r.lease_until, r.trigger_at)) > (s.queue, now())
                and (r.queue, coalesce(r.lease_until, r.trigger_at))
                    <= (s.queue, 'infinity')
                and r.status in ('pending', 'running') and r.paused_at is null
            order by r.queue, coalesce(r.lease_until, r.trigger_at)
            limit 1
        ) n
    ) as next_in,
    (select count(*) from passed)::integer as passed_over,
    coalesce((select bool_or(leased) from passed), false) as ended,
    case
        when (select count(*) from passed) < %(passed_most)s
        then (select min(due_for) from passed)
        else (
            select min(y.due_for)
            from served s
            cross join lateral (
                select extract(
                    epoch from now()
                        - greatest(coalesce(r.lease_until, r.trigger_at), '0001-01-02'::timestamptz)
                )::float8 as due_for
                from session_recalls r
                where (r.queue, coalesce(r.lease_until, r.trigger_at))
                        >= (s.queue, '-infinity')
                    and (r.queue, coalesce(r.lease_until, r.trigger_at)) <= (s.queue, now())
                    and r.status in ('pending', 'running') and r.paused_at is null
                    and r.id <> all (%(aside)s::recall_id_type[])
                order by r.queue desc, coalesce(r.lease_until, r.trigger_at) desc
                limit 1
            ) y
        )
    end as youngest,
    array(
        select q.queue from unnest(%(queues)s::text[]) as q (queue)
        where q.queue <> all (array(select queue from served))
    ) as paused,
    exists (
        select from session_recalls r
        where r.cadence = 'cron' and r.call_type = 'recurring'
            and (r.planned_at <> r.trigger_at or r.interval_seconds is null
                or r.edit_of = r.occurrence or r.skips > 0)
            and r.lease is null and r.status in ('pending', 'running')
            and (r.fired_at is null or r.lease_until is null)
            and r.id <> all (%(aside)s::recall_id_type[])
    ) as moved;

-- name: due_ids
-- Where PostgreSQL refuses a claim because of one row: what is due, oldest first, to be claimed one
-- by one.
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
)
select d.id
from served s
cross join lateral (
    select r.id::text as id, coalesce(r.lease_until, r.trigger_at) as due_at
    from session_recalls r
    where r.queue = any (array[s.queue]) and coalesce(r.lease_until, r.trigger_at) <= now()
        and r.status in ('pending', 'running') and r.paused_at is null
        and r.lease is null and r.id <> all (%(aside)s::recall_id_type[])
    order by r.queue, coalesce(r.lease_until, r.trigger_at)
    limit %(most)s
) d
order by d.due_at
limit %(most)s;

-- name: write_moves
-- The application moved trigger_at, or cron moments were missed: the occurrence that follows is
-- written before it is called, so that after a crash another worker calls it under the same key.
-- Guarded by the lease, and by the very trigger_at and schedule that were judged.
with given as (
    select *
    from unnest(
        %(ids)s::recall_id_type[], %(leases)s::uuid[], %(triggers)s::text[],
        %(occurrences)s::integer[], %(ats)s::timestamptz[], %(distances)s::integer[],
        %(missed)s::integer[],
        %(rekeys)s::integer[], %(edits)s::integer[]
    ) as t (id, lease, trigger, occurrence, at, distance, missed, rekey, edits)
)
update session_recalls r
set occurrence = t.occurrence, rekey = t.rekey,
    attempt = 1, deferrals = 0, begun_at = null,
    -- It is another occurrence than the one that was taken up: that its request is about to be sent
    -- is not recorded, and so it can't be known not to have been sent (see `take_up`).
    taken_lease = null, takeovers = 0,
    body_hash = t.occurrence || ':' || split_part(r.body_hash, ':', 2),
    scheduled_for = coalesce(t.at, r.trigger_at), planned_at = r.trigger_at,
    interval_seconds = coalesce(t.distance, r.interval_seconds),
    zone_data = case
        when t.distance is not null and r.cadence = 'cron' and r.time_zone is not null
        then %(tzdata)s
        else r.zone_data
    end,
    missed = t.missed, skips = 0, edit_of = null, named_at = null,
    -- What we write is no edit: see recall_before_edit.
    edits = case when r.edits between 0 and 2147483646 then r.edits + 1 else 0 end
from given t
where r.id = t.id and r.id = any (%(ids)s::recall_id_type[]) and r.lease = t.lease
    and r.trigger_at = t.trigger::timestamptz and r.edits = t.edits
    and r.status in ('pending', 'running')
returning r.id::text as id, r.edits;

-- name: moved
-- Waiting cron recalls that were moved or whose rule was edited, or that plain SQL wrote without
-- the distance to the next moment: the same columns as a claim's, of rows that nobody leases.
select r.id::text as id, r.session_id::text as session_id, r.call_type, null::text as message,
    r.interval_seconds as interval, r.occurrence, r.rekey, r.attempt, r.deferrals,
    coalesce(r.scheduled_for, r.planned_at, r.trigger_at) as scheduled_for, r.missed,
    r.begun_at, now() as due_at,
    '00000000-0000-0000-0000-000000000000'::uuid as lease, r.trigger_at::text as trigger,
    r.trigger_at, coalesce(r.planned_at, r.trigger_at) as planned_at, null::text as taken_from,
    0 as octets, false as called_before, 0 as takeovers, null::text as reference,
    null::timestamptz as delivered_at, now() as claimed_at,
    substring(r.cadence for 100) as cadence, substring(r.cron for 1001) as cron,
    substring(r.time_zone for 1001) as time_zone, r.until_at as until, r.times, r.failures,
    r.failures_most, r.grace_seconds as grace, r.jitter_seconds as jitter,
    substring(r.last_outcome for 100) as last_outcome,
    r.edits, r.edited_at, r.edit_of, r.skips, r.named_at, 0 as extra, r.uncounted
from session_recalls r
where r.cadence = 'cron' and r.call_type = 'recurring'
    and (r.planned_at <> r.trigger_at or r.interval_seconds is null
        or r.edit_of = r.occurrence or r.skips > 0)
    and r.lease is null and r.status in ('pending', 'running')
    and r.id <> all (%(aside)s::recall_id_type[])
    -- An extra run has its key by the occurrence that waits, which stays while it lasts.
    and (r.fired_at is null or r.lease_until is null)
limit %(most)s;

-- name: settle_moved
-- Put them on the moment that follows from the move, with the distance from there: the
-- application's next skip adds that. Or end them.
with given as (
    select *
    from unnest(
        %(ids)s::recall_id_type[], %(triggers)s::text[], %(statuses)s::text[],
        %(reasons)s::text[],
        %(occurrences)s::integer[], %(ats)s::timestamptz[], %(jitters)s::float8[],
        %(distances)s::integer[], %(rekeys)s::integer[], %(edits)s::integer[]
    ) as t (id, trigger, status, reason, occurrence, at, jitter, distance, rekey, edits)
),
held as materialized (
    select r.id
    from session_recalls r
    join given t on t.id = r.id
    where r.id = any (%(ids)s::recall_id_type[]) and r.lease is null
        and r.status in ('pending', 'running')
        and r.trigger_at = t.trigger::timestamptz and r.edits = t.edits
        and (r.fired_at is null or r.lease_until is null)
    for update of r skip locked
)
update session_recalls r
set status = coalesce(t.status, r.status), ended_at = case when t.status is not null then now() end,
    reason = case when t.status is not null then t.reason else r.reason end,
    occurrence = coalesce(t.occurrence, r.occurrence), rekey = coalesce(t.rekey, r.rekey),
    attempt = 0, deferrals = 0, begun_at = null, missed = 0, skips = 0, edit_of = null,
    edited_at = null,
    -- A time that was chosen stands, also when time zone data changes.
    named_at = case
        when t.status is null and t.at is null and r.cadence = 'cron' then r.trigger_at
    end,
    edits = case when r.edits between 0 and 2147483646 then r.edits + 1 else 0 end,
    scheduled_for = coalesce(
        t.at, case when t.status is null then r.trigger_at else r.scheduled_for end
    ),
    trigger_at = coalesce(t.at + t.jitter * interval '1 second', r.trigger_at),
    planned_at = coalesce(t.at + t.jitter * interval '1 second', r.trigger_at),
    interval_seconds = coalesce(t.distance, r.interval_seconds),
    zone_data = case
        when t.distance is not null and r.cadence = 'cron' and r.time_zone is not null
        then %(tzdata)s
        else r.zone_data
    end,
    updated_at = now()
from given t
where r.id = t.id and r.id = any (array(select id from held));

-- name: accept
-- The API accepted the run and will say later how it ended: its reference is recorded before it is
-- polled. Delivered and completed are two facts; the call's record has both.
-- A row that the application holds locked is passed over and tried again: renewals must not wait
-- behind it.
with held as materialized (
    select r.id from session_recalls r
    where r.id = %(id)s::recall_id_type
    for update of r skip locked
),
accepted as (
    update session_recalls r
    set run_reference = %(reference)s, delivered_at = now(), last_outcome = 'accepted',
        begun_at = coalesce(r.begun_at, least(
            now() - %(called_ago)s * interval '1 second',
            -- The claim counted what was missed: an edit that came between it and the request came
            -- after the occurrence had begun.
            case when r.edited_at >= r.leased_at then r.leased_at end
        ))
    where r.id = %(id)s::recall_id_type and r.id = any (array(select id from held))
        and r.lease = %(lease)s and r.status in ('pending', 'running')
    returning r.*
),
recorded as (
    insert into recall_attempts as a
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        missed, called_at, last_called_at, ended_at, http_status, settled, delivered_at)
    select r.id::text, r.occurrence, case when r.fired_at is null then r.rekey else -r.fires end,
        r.attempt, 'accepted', r.session_id::text, %(worker)s, r.lease,
        coalesce(r.fired_at, r.scheduled_for),
        case when r.fired_at is null then r.missed else 0 end,
        now() - %(called_ago)s * interval '1 second', now() - %(called_ago)s * interval '1 second',
        now(), %(http_status)s, 'polled', now()
    from accepted r
    on conflict (recall_id, occurrence, rekey, attempt, outcome) do update
        -- The same lease is the same call, whose answer was lost.
        set calls = a.calls + (a.lease <> excluded.lease)::integer,
            last_called_at = excluded.last_called_at, ended_at = excluded.ended_at,
            lease = excluded.lease, worker = excluded.worker, delivered_at = excluded.delivered_at
)
select exists (select from accepted) as accepted,
    not exists (select from held)
        and exists (
            select from session_recalls r where r.id = %(id)s::recall_id_type
        ) as locked;

-- name: count_session_runs
-- How many runs a session had in each window, and when the oldest of them leaves it. Asked under
-- the session's lease: its runs are one after the other, each recorded before the next can be
-- claimed, so another worker can't be about to add one.
select w.span, w.most, r.runs, r.frees_in
from unnest(%(spans)s::float8[], %(mosts)s::integer[]) as w (span, most)
cross join lateral (
    select count(*) as runs,
        -- The window has room again when enough runs have left it for one more to fit.
        (select extract(epoch from coalesce(a.last_called_at, a.ended_at) - now())::float8 + w.span
            from recall_attempts a
         where a.session_id = %(session_id)s
            and (a.last_called_at > now() - w.span * interval '1 second'
                or (a.last_called_at is null and a.ended_at > now() - w.span * interval '1 second'))
            and a.outcome in ('answered', 'accepted', 'failed', 'unknown')
         order by coalesce(a.last_called_at, a.ended_at) desc offset w.most - 1 limit 1) as frees_in
    from recall_attempts a
    where a.session_id = %(session_id)s
        -- Of a worker that died it may not be known whether it called: that counts.
        and (a.last_called_at > now() - w.span * interval '1 second'
            or (a.last_called_at is null and a.ended_at > now() - w.span * interval '1 second'))
        and a.outcome in ('answered', 'accepted', 'failed', 'unknown')
) r;

-- name: fleet_lock
-- Claims under a cap on the whole fleet go one at a time; the lock ends with the transaction, and
-- the count that follows sees all that was claimed before.
select pg_advisory_xact_lock(hashtext('recall-worker fleet'), hashtext(current_schema()));

-- name: probe
-- While the endpoint is in trouble: has any worker found it answering since, and, where `wanted`,
-- which row is the next probe, if that is ours to make? All replicas share the probes, so that
-- twenty of them send no more than one would: 1 s doubling to `pause_most` apart.
-- Sessions that are not known as bad come first, and of these such as were answered before; then
-- the newest or the oldest, by chance, as many that are overdue may all be bad. `fresh`: no others.
-- Rows are looked at from both ends, as there may be any number.
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
),
due as materialized (
    (
        select r.id, r.session_id, coalesce(r.lease_until, r.trigger_at) as due_at, false as bad
        from session_recalls r
        where %(wanted)s and r.status in ('pending', 'running') and r.paused_at is null
            and coalesce(r.lease_until, r.trigger_at) <= now() and r.lease is null
            and r.queue = any (array(select queue from served))
            and r.id <> all (%(aside)s::recall_id_type[])
            and (r.last_outcome in ('misconfigured', 'unavailable')
                or (r.last_outcome = 'unknown' and r.deferrals + r.attempt > 0)) is not true
        order by coalesce(r.lease_until, r.trigger_at)
        limit 100
    )
    union
    (
        select r.id, r.session_id, coalesce(r.lease_until, r.trigger_at) as due_at, false as bad
        from session_recalls r
        where %(wanted)s and r.status in ('pending', 'running') and r.paused_at is null
            and coalesce(r.lease_until, r.trigger_at) <= now() and r.lease is null
            and r.queue = any (array(select queue from served))
            and r.id <> all (%(aside)s::recall_id_type[])
            and (r.last_outcome in ('misconfigured', 'unavailable')
                or (r.last_outcome = 'unknown' and r.deferrals + r.attempt > 0)) is not true
        order by coalesce(r.lease_until, r.trigger_at) desc
        limit 100
    )
    union all
    (
        select r.id, r.session_id, coalesce(r.lease_until, r.trigger_at) as due_at, true as bad
        from session_recalls r
        where %(wanted)s and not %(fresh)s and r.status in ('pending', 'running')
            and r.paused_at is null
            and coalesce(r.lease_until, r.trigger_at) <= now() and r.lease is null
            and r.queue = any (array(select queue from served))
            and r.id <> all (%(aside)s::recall_id_type[])
            and (r.last_outcome in ('misconfigured', 'unavailable')
                or (r.last_outcome = 'unknown' and r.deferrals + r.attempt > 0))
        order by coalesce(r.lease_until, r.trigger_at)
        limit 20
    )
),
candidate as materialized (
    select d.id
    from due d
    cross join (select random() < 0.5 as newest) c
    -- The session's rules are those of `claim`: what breaks them is not claimed, and another row is
    -- the probe.
    where not exists (
        select from session_recalls o
        where o.session_id = d.session_id and o.id <> d.id
            and o.lease is not null
            and (o.status in ('pending', 'running')
                or (o.lease_until > now()
                    and o.lease_until < now() + %(lease_end_most)s * interval '1 second'))
    )
    order by d.bad, exists (
        select from recall_attempts a
        where a.session_id = d.session_id::text and a.outcome = 'answered'
    ) desc, case when c.newest and not d.bad then d.due_at end desc nulls last, d.due_at
    limit 1
),
turn as (
    insert into recall_endpoints as e (endpoint, probed_at, probes)
    select %(endpoint)s, now(), 1
    where exists (select from candidate)
    on conflict (endpoint) do update set probed_at = now(), probes = least(e.probes + 1, 10)
    where e.probed_at is null
        or e.probed_at <= now() - least(%(pause_most)s, 2 ^ e.probes) * interval '1 second'
    returning endpoint
),
known as (
    select e.answered_at > now() - %(open_for)s * interval '1 second' as answered,
        greatest(0, extract(epoch from e.probed_at - now())
            + least(%(pause_most)s, 2 ^ e.probes))::float8 as next_in
    from recall_endpoints e
    where e.endpoint = %(endpoint)s
)
select case when exists (select from turn) then (select id::text from candidate) end as id,
    coalesce((select answered from known), false) as answered,
    -- Null where no row could be the probe.
    case when exists (select from candidate) then (select next_in from known) end as next_in;

-- name: endpoint_answers
-- The endpoint answers again: recorded, and the other workers are notified.
with given as (
    insert into recall_endpoints as e (endpoint, answered_at) values (%(endpoint)s, now())
    on conflict (endpoint) do update set answered_at = now(), probes = 0
)
select pg_notify('session_recalls', '');

-- name: renew
-- For all runs at once. A row that the application holds locked is passed over and tried again soon
-- (nobody else can take it meanwhile either); of one that is no longer ours, or no longer live, the
-- state says why. A request sent since the last renewal is recorded at the same time, at no cost: a
-- worker that takes the row up later then knows that it was called.
-- There may be ten thousand runs. So the rows are looked up one by one, and nothing is joined with
-- them: a join by an id and a list of all ids may be planned to sort that list anew for each id.
with given as materialized (
    select * from unnest(%(ids)s::recall_id_type[], %(leases)s::uuid[], %(sent_ago)s::float8[])
        as t (id, lease, sent_ago)
),
sent as materialized (
    select coalesce(jsonb_object_agg(t.id::text, t.sent_ago), '{}') as ago
    from given t
    where t.sent_ago is not null
),
held as materialized (
    select h.id
    from given t
    cross join lateral (
        select r.id from session_recalls r
        -- Not `=`: a lease that is there would let the planner look into idx_recalls_one_run for
        -- the id, from end to end.
        where r.id = t.id and r.lease is not distinct from t.lease
            and r.status in ('pending', 'running')
        limit 1
        for update of r skip locked
    ) h
),
renewed as materialized (
    update session_recalls r
    set lease_until = now() + %(lease)s * interval '1 second',
        sent_at = case
            when r.sent_at >= r.leased_at then r.sent_at
            when (select ago from sent) ? r.id::text
            then greatest(
                now() - ((select ago from sent) ->> r.id::text)::float8 * interval '1 second',
                r.leased_at
            )
        end
    where r.id = any (array(select id from held))
    returning r.id
)
select t.id::text as id,
    case
        when t.id in (select n.id from renewed n) then 'renewed'
        when r.id is null then 'deleted'
        when r.lease is distinct from t.lease then 'lost'
        when r.status not in ('pending', 'running') then r.status
        else 'locked'
    end as state
from given t
left join lateral (
    select o.id, o.lease, o.status from session_recalls o where o.id = t.id limit 1
) r on true;

-- name: check_leases
-- Of the runs in hand, those that are no longer ours to finish: asked when a notification arrives,
-- as a cancel sends one.
select t.id::text as id,
    case
        when r.id is null then 'deleted'
        when r.lease is distinct from t.lease then 'lost'
        else r.status
    end as state
from unnest(%(ids)s::recall_id_type[], %(leases)s::uuid[]) as t (id, lease)
left join lateral (
    select o.id, o.lease, o.status from session_recalls o where o.id = t.id limit 1
) r on true
where r.id is null or r.lease is distinct from t.lease or r.status not in ('pending', 'running');

-- name: settle
-- A batch of verdicts, each guarded by its lease, by the row being live, and by trigger_at and the
-- schedule being what the judge saw. An extra run (`fire`) leaves what is planned as it is
-- (`stays`); while it waits to be called again (`wait`) it is due at lease_until. A row that the
-- application holds locked is passed over and tried again, so that it delays no other. The call is
-- recorded in the same transaction, also where the lease is gone; not where the settle will be
-- tried again.
with given as (
    select *
    from unnest(
        %(ids)s::recall_id_type[], %(leases)s::uuid[], %(triggers)s::text[], %(statuses)s::text[],
        %(occurrences)s::integer[], %(rekeys)s::integer[], %(attempts)s::integer[],
        %(deferrals)s::integer[], %(delays)s::float8[], %(fresh)s::boolean[],
        %(outcomes)s::text[], %(reasons)s::text[], %(called_ago)s::float8[],
        %(ended_ago)s::float8[], %(http_statuses)s::integer[], %(call_occurrences)s::integer[],
        %(call_rekeys)s::integer[], %(call_attempts)s::integer[], %(sessions)s::text[],
        %(scheduled)s::timestamptz[], %(missed)s::integer[], %(keep_references)s::boolean[],
        %(references)s::boolean[], %(kept)s::text[], %(ats)s::timestamptz[],
        %(jitters)s::float8[], %(distances)s::integer[], %(failures)s::integer[],
        %(edits)s::integer[], %(stays)s::boolean[], %(waits)s::float8[], %(fires)s::integer[],
        %(replans)s::boolean[], %(uncounted)s::integer[]
    ) as t (
        id, lease, trigger, status, occurrence, rekey, attempt, deferrals, delay, fresh, outcome,
        reason, called_ago, ended_ago, http_status, call_occurrence, call_rekey, call_attempt,
        session_id, scheduled_for, missed, keep_reference, has_reference, kept, at, jitter,
        distance, failures, edits, stays, wait, fires, replan, uncounted
    )
),
held as materialized (
    select r.id, r.session_id, r.lease, r.status, r.trigger_at, r.edits, r.updated_at,
        r.interval_seconds,
        r.run_reference is null as unrecorded
    from session_recalls r
    where r.id = any (%(ids)s::recall_id_type[])
    for update of r skip locked
),
state as materialized (
    select t.id, t.lease, t.status as given, h.status as status_before, h.unrecorded,
        -- Due an interval from the moment of writing: a scheduler writes that after a run, and
        -- hardly anybody else does.
        case when isfinite(h.trigger_at) and isfinite(h.updated_at)
            then coalesce(
                abs(extract(epoch from h.trigger_at) - extract(epoch from h.updated_at)
                    - h.interval_seconds) < least(1, 0.01 * h.interval_seconds),
                false)
            else false
        end as as_settled,
        case
            -- Looked up one by one by their primary keys: PostgreSQL may answer an `exists` by
            -- hashing the whole table.
            when h.id is null and (select true from session_recalls r where r.id = t.id)
            then 'locked'
            -- Written before, by a settle whose answer was lost with the connection.
            when h.lease is distinct from t.lease and (
                select a.lease = t.lease and a.settled <> 'taken'
                from recall_attempts a
                where a.recall_id = t.id::text and a.occurrence = t.call_occurrence
                    and a.rekey = t.call_rekey
                    and a.attempt = t.call_attempt and a.outcome = t.outcome
            ) then 'again'
            when h.id is null then 'deleted'
            when h.lease is distinct from t.lease then 'lost'
            when h.status not in ('pending', 'running') then 'ended'
            when h.trigger_at <> t.trigger::timestamptz or h.edits <> t.edits then 'moved'
            else 'settled'
        end as state
    from given t
    left join held h on h.id = t.id
),
written as (
    update session_recalls r
    set status = case
            -- Moved out of its session's slot and put back: only where its session has one that
            -- is free (of one, or of as many as `migrate --slots` gave it: the trigger that is there
            -- then finds it).
            when r.status = 'running' and t.status = 'pending' and (
                select count(*) from session_recalls o
                where o.session_id = r.session_id and o.status = 'pending' and o.id <> r.id
            ) >= coalesce((
                select substring(
                    pg_get_triggerdef(g.oid) from 'recall_admit_slot\(''(\d{1,4})''\)$'
                )::integer
                from pg_trigger g
                where g.tgrelid = r.tableoid and g.tgname = 'recall_admit_slot'
                    and g.tgenabled in ('O', 'A')
            ), 1) then 'running'
            else t.status
        end,
        -- A run that goes on at the API is handed over: its lease ends now, and the worker that
        -- takes it up goes on polling.
        lease = case when t.keep_reference then r.lease end,
        lease_until = case
            when t.keep_reference then now()
            else now() + (t.wait - t.ended_ago) * interval '1 second'
        end,
        fired_at = case when t.keep_reference or t.wait is not null then r.fired_at end,
        fires = coalesce(t.fires, r.fires),
        leased_at = case when t.keep_reference then r.leased_at end,
        leased_by = case
            when t.keep_reference or t.status not in ('pending', 'running') then r.leased_by
        end,
        occurrence = t.occurrence, rekey = t.rekey, attempt = t.attempt, deferrals = t.deferrals,
        uncounted = coalesce(t.uncounted, r.uncounted),
        trigger_at = coalesce(t.at + t.jitter * interval '1 second',
            now() + (t.delay - t.ended_ago) * interval '1 second', r.trigger_at),
        planned_at = case when t.keep_reference or t.stays then r.planned_at
            else coalesce(t.at + t.jitter * interval '1 second',
                now() + (t.delay - t.ended_ago) * interval '1 second', r.trigger_at) end,
        interval_seconds = coalesce(t.distance, r.interval_seconds),
        zone_data = case
            when t.distance is not null and r.cadence = 'cron' and r.time_zone is not null
            then %(tzdata)s
            else r.zone_data
        end,
        failures = coalesce(t.failures, r.failures),
        scheduled_for = case when t.fresh and not t.stays then t.at else r.scheduled_for end,
        named_at = case
            when t.keep_reference or t.stays then r.named_at
            -- A time that was chosen stands, also when time zone data changes.
            when t.fresh and r.cadence = 'cron' and t.at is null and t.delay is null
            then r.trigger_at
        end,
        skips = case
            when t.fresh and not t.stays or t.status not in ('pending', 'running') then 0
            else r.skips
        end,
        -- Edited in mid-run to a zone that this worker's tzdata lacks: others plan it.
        edit_of = case
            when t.replan then t.occurrence
            when t.fresh and not t.stays then null
            else r.edit_of
        end,
        edited_at = case
            when t.replan then coalesce(r.edited_at, now())
            when t.fresh and not t.stays then null
            else r.edited_at
        end,
        begun_at = case when t.fresh then null
            -- A call that found no connection begins the occurrence, too: how long it waits is
            -- counted from there.
            -- As at `accept`: not after an edit that came after the claim.
            when r.begun_at is null and r.edited_at >= r.leased_at
                and coalesce(
                    t.called_ago, case t.outcome when 'unavailable' then t.ended_ago end
                ) is not null
            then r.leased_at
            else coalesce(
                r.begun_at,
                now() - coalesce(
                    t.called_ago, case t.outcome when 'unavailable' then t.ended_ago end
                ) * interval '1 second'
            )
        end,
        missed = case when t.fresh then 0 else r.missed end,
        -- A run that is not known to have ended may go on at the API: its session's slot is free
        -- for what it schedules.
        may_still_run = case
            when t.outcome = 'unknown' then true
            when t.fresh or t.outcome in ('answered', 'failed', 'refused', 'gone') then false
            else r.may_still_run
        end,
        -- A worker that is stopped during an outage knows what the API accepted, and could not
        -- record it before.
        run_reference = case when t.keep_reference then coalesce(r.run_reference, t.kept) end,
        delivered_at = case when t.keep_reference then
            coalesce(r.delivered_at,
                now() - coalesce(t.called_ago, t.ended_ago) * interval '1 second') end,
        last_outcome = coalesce(t.outcome, r.last_outcome),
        reason = t.reason,
        ended_at = case when t.status in ('pending', 'running') then null else now() end,
        updated_at = now()
    from given t
    where r.id = t.id and r.lease = t.lease
        and r.id = any (array(select id from state where state = 'settled'))
    returning r.id, r.status, r.status <> t.status as outside
),
outside as materialized (
    -- Those that were put back outside of their session's slot, hardly ever any. A join with all
    -- that was written may be planned to compare each row with all others.
    select w.id, w.status from written w where w.outside
),
freed as (
    -- Ended by the application in mid-run: nothing changes but that the session is free again.
    update session_recalls r
    set lease = null, lease_until = null
    where r.id = any (array(select id from state where state = 'ended'))
),
before as (
    -- The record of a run that was accepted and has ended: its times go into the final record. By
    -- an array of ids, mostly empty: while the table is small, a join may be planned to read all of
    -- it for records of that outcome, and that plan stays until the next analyze.
    delete from recall_attempts a
    using given t join state s on s.id = t.id
    where a.recall_id = any (array(select id::text from given where has_reference))
        and t.has_reference and t.outcome is not null
        and s.state not in ('moved', 'locked', 'again')
        and a.recall_id = t.id::text and a.occurrence = t.call_occurrence and a.rekey = t.call_rekey
        and a.attempt = t.call_attempt
        and a.outcome = 'accepted' and t.outcome <> 'accepted'
    returning a.recall_id, a.called_at, a.delivered_at
),
recorded as (
    insert into recall_attempts as a
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        missed, called_at, last_called_at, ended_at, http_status, reason, settled, delivered_at,
        completed_at)
    select t.id::text, t.call_occurrence, t.call_rekey, t.call_attempt, t.outcome, t.session_id,
        %(worker)s, t.lease, t.scheduled_for, t.missed,
        coalesce(b.called_at, now() - t.called_ago * interval '1 second'),
        coalesce(b.called_at, now() - t.called_ago * interval '1 second'),
        now() - t.ended_ago * interval '1 second', t.http_status, t.reason,
        case
            when t.outcome = 'accepted' then 'polled'
            when s.state = 'settled'
            then coalesce((select o.status from outside o where o.id = t.id), t.status)
            else s.state
        end,
        coalesce(b.delivered_at, case
            when t.outcome in ('answered', 'failed') then now() - t.ended_ago * interval '1 second'
            when t.outcome = 'accepted' then now() - t.called_ago * interval '1 second'
        end),
        case when t.outcome in ('answered', 'failed')
            then now() - t.ended_ago * interval '1 second' end
    from given t
    join state s on s.id = t.id and s.lease = t.lease
    left join before b on b.recall_id = t.id::text
    where s.state not in ('moved', 'locked', 'again')
        and (t.outcome <> 'accepted' or (s.state = 'settled' and s.unrecorded))
        and (t.called_ago is not null or t.outcome in ('unavailable', 'misfired')
            or b.recall_id is not null)
    on conflict (recall_id, occurrence, rekey, attempt, outcome) do update
        -- The same lease is the same call: the worker that took the row up may have recorded it.
        set calls = a.calls + (a.lease <> excluded.lease)::integer,
            called_at = coalesce(a.called_at, excluded.called_at),
            last_called_at = coalesce(excluded.last_called_at, a.last_called_at),
            ended_at = excluded.ended_at, worker = excluded.worker, lease = excluded.lease,
            http_status = excluded.http_status, reason = excluded.reason, settled = excluded.settled
)
select s.id::text as id, s.lease, s.state,
    case
        when s.state = 'settled'
        then coalesce((select o.status from outside o where o.id = s.id), s.given)
        else s.status_before
    end as status,
    s.as_settled
from state s;

-- name: schedules
-- The schedules of rows that were edited or moved during their runs: their endings are judged again
-- by them, and the settle is guarded by them again.
select r.id::text as id, r.call_type, r.interval_seconds as interval,
    r.trigger_at::text as trigger, r.trigger_at, r.planned_at,
    substring(r.cadence for 100) as cadence, substring(r.cron for 1001) as cron,
    substring(r.time_zone for 1001) as time_zone,
    r.until_at as until, r.times, r.failures_most, r.grace_seconds as grace,
    r.jitter_seconds as jitter, r.edits, r.edited_at, r.edit_of, r.skips, r.named_at
from session_recalls r
where r.id = any (%(ids)s::recall_id_type[]);

-- name: wait_for
-- Wait for rows that the application holds locked, in the transaction that settles them: SKIP
-- LOCKED can miss the moment between unlock and lease expiry.
select r.id::text as id from session_recalls r
where r.id = any (%(ids)s::recall_id_type[])
for update of r;

-- name: backlog
-- By queue: how many recalls are due and not leased, and for how long the oldest; how many live
-- workers serve it (a version without queues serves all), and whether it is paused: for monitoring.
-- Counted to a bound that the queues share, oldest first, so that it costs the same at any size.
-- What waits for its own session's run does not count: no worker could do anything about that.
-- The queues are those of this worker, those with live rows (from one to the next by the index),
-- and those that are paused.
with recursive walked (queue) as (
    (
        select r.queue from session_recalls r
        where r.status in ('pending', 'running') and r.paused_at is null
        order by r.queue, coalesce(r.lease_until, r.trigger_at)
        limit 1
    )
    union all
    select (
        select r.queue from session_recalls r
        where r.status in ('pending', 'running') and r.paused_at is null and r.queue > w.queue
        order by r.queue, coalesce(r.lease_until, r.trigger_at)
        limit 1
    )
    from walked w
    where w.queue is not null
),
named as materialized (
    select q.queue, min(q.place) as place
    from (
        select queue, 1 as place from unnest(%(queues)s::text[]) as g (queue)
        union all
        (select w.queue, 2 from walked w where w.queue is not null limit %(queues_most)s)
        union all
        (select p.queue, 3 from recall_queues p where p.queue <> '*' limit %(queues_most)s)
    ) q
    group by q.queue
    order by place, q.queue
    limit %(queues_most)s
)
select n.queue, n.place = 1 as ours, d.overdue, d.oldest,
    (
        select count(*) from recall_workers v
        where v.seen_at > now() - %(silence)s * interval '1 second' and v.held is null
            and coalesce(n.queue = any (v.queues), true)
            and coalesce(v.system_identifier = %(system_identifier)s, true)
            and coalesce(v.database_oid = %(database_oid)s, true)
    ) as workers,
    exists (select from recall_queues p where p.queue in (n.queue, '*')) as paused
from named n
cross join lateral (
    select count(*) as overdue,
        -- A century stands for dates without a beginning.
        coalesce(extract(epoch from now() - min(greatest(e.due_at, now() - interval '100 years'))),
            0)::float8 as oldest
    from (
        select r.id, r.session_id, coalesce(r.lease_until, r.trigger_at) as due_at
        from session_recalls r
        where r.queue = n.queue and r.status in ('pending', 'running') and r.paused_at is null
            and coalesce(r.lease_until, r.trigger_at) <= now()
        order by coalesce(r.lease_until, r.trigger_at)
        limit (select greatest(1, %(most)s / count(*)) from named)
    ) e
    where not exists (
        select from session_recalls o
        where o.session_id = e.session_id and o.lease is not null
            and o.status in ('pending', 'running') and o.id <> e.id
            and o.lease_until > now()
    )
) d
order by n.place, n.queue;

-- name: heartbeat
-- That this worker is running, for people to read; and how many others are ready before it, so that
-- not all of a fleet poll at once when something falls due. A worker that died is forgotten after a
-- day (`forget_after`).
with served as materialized (
    select q.queue from unnest(%(queues)s::text[]) as q (queue)
    where not exists (select from recall_queues p where p.queue in (q.queue, '*'))
),
forgotten as (
    delete from recall_workers
    where seen_at < now() - %(forget_after)s * interval '1 second' and worker <> %(worker)s
),
endless as (
    -- A lease without an end, or with one further off than any worker's can be, would hold its
    -- session for ever: a row restored from elsewhere, a clock that was wrong for an hour, a manual
    -- update. It ends now. Ordered, so that the index of leases is read.
    update session_recalls
    set lease_until = now()
    where id = any (array(
        select id from session_recalls
        where lease is not null and status in ('pending', 'running')
            and (lease_until is null
                or lease_until > now() + %(lease_end_most)s * interval '1 second')
        order by session_id
        limit %(most)s
        for update skip locked
    ))
    returning id
),
ended_in_run as materialized (
    -- Ended by the application in mid-run, and then the worker died: nobody takes such a row up, so
    -- its lease is ended and its call recorded here. Its session has been free since the lease
    -- expired. `abandoned_after` leaves a slow owner the time to settle it.
    select r.id, r.session_id, r.occurrence, r.rekey, r.attempt, r.lease, r.lease_until,
        r.leased_by, r.leased_at, r.scheduled_for, r.missed, r.trigger_at, r.run_reference,
        r.taken_lease, r.sent_at, r.fired_at, r.fires, false as goes_on
    from session_recalls r
    where r.lease is not null and r.status not in ('pending', 'running')
        and r.lease_until < now() - %(abandoned_after)s * interval '1 second'
    order by r.session_id
    limit %(most)s
    for update of r skip locked
),
paused as materialized (
    -- Paused in mid-run, and then the worker died: nobody takes it up before it is resumed, and
    -- until then it must not block its session. Its lease is ended here; an accepted run keeps its
    -- reference, and is polled once it is resumed. The same where its queue is paused, or is not
    -- ours and perhaps nobody's, but only when its run must have ended: what is resumed before that
    -- is taken up. How long a run takes at most is said by the worker that held it.
    select r.id, r.session_id, r.occurrence, r.rekey, r.attempt, r.lease, r.lease_until,
        r.leased_by, r.leased_at, r.scheduled_for, r.missed, r.trigger_at, r.run_reference,
        r.taken_lease, r.sent_at, r.fired_at, r.fires, true as goes_on
    from session_recalls r
    left join recall_workers h on h.worker = r.leased_by
    where r.lease is not null and r.status in ('pending', 'running')
        and (r.paused_at is not null or (
            r.queue <> all (array(select queue from served))
            and coalesce(r.leased_at, r.lease_until) < now() - greatest(
                %(run_timeout)s,
                -- A row that somebody wrote by hand may hold anything.
                case when jsonb_typeof(h.settings -> 'run_timeout') = 'number'
                    then least((h.settings ->> 'run_timeout')::numeric, 1e9)::float8 end
            ) * interval '1 second'
        ))
        and r.lease_until < now() - %(grace)s * interval '1 second'
        and pg_postmaster_start_time() < now() - %(grace)s * interval '1 second'
        and r.id <> all (%(in_hand)s::recall_id_type[])
    order by r.session_id
    limit %(most)s
    for update of r skip locked
),
abandoned as (
    select * from ended_in_run union all select * from paused
),
ended as (
    update session_recalls r
    set lease = null,
        -- An extra run is due by it.
        lease_until = case when a.goes_on and r.fired_at is not null then r.lease_until end,
        -- As when another worker takes it up: a call that may have been made counts, and begins the
        -- occurrence; one that is known not to have been sent costs no attempt.
        attempt = greatest(0, r.attempt - (a.goes_on and r.run_reference is null
            and a.taken_lease is not distinct from a.lease
            and (a.sent_at >= a.leased_at) is not true)::integer),
        begun_at = case when a.goes_on then least(coalesce(r.begun_at, r.leased_at), now())
            else r.begun_at end,
        may_still_run = r.may_still_run or a.goes_on,
        last_outcome = case when a.goes_on and r.run_reference is null then 'unknown'
            else r.last_outcome end,
        scheduled_for = coalesce(r.scheduled_for, r.planned_at, r.trigger_at)
    from abandoned a
    where a.id = r.id and r.id = any (array(select id from abandoned))
    returning r.id
),
recorded as (
    insert into recall_attempts
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        missed, called_at, last_called_at, ended_at, reason, settled)
    select a.id::text, a.occurrence, case when a.fired_at is null then a.rekey else -a.fires end,
        a.attempt, 'unknown', a.session_id::text, coalesce(a.leased_by, 'unknown'), a.lease,
        coalesce(a.fired_at, a.scheduled_for, a.trigger_at), a.missed,
        case when a.sent_at >= a.leased_at then a.sent_at end,
        case when a.sent_at >= a.leased_at then a.sent_at end, a.lease_until,
        'the worker was not heard of again: its lease ended'
            || case when (a.sent_at >= a.leased_at) is not true
                then ', and perhaps nothing was called' else '' end,
        case when a.goes_on then 'taken' else 'ended' end
    from abandoned a
    where a.run_reference is null and octet_length(a.id::text) <= 2000
        -- Known not to have been sent: see take_up.
        and not (a.taken_lease is not distinct from a.lease
            and (a.sent_at >= a.leased_at) is not true)
    on conflict do nothing
),
notified as (
    -- Another recall may wait for what was freed here.
    select pg_notify('session_recalls', '')
    where exists (select from ended) or exists (select from endless)
)
insert into recall_workers (worker, host, pid, version, slots, running, breaker, bell, settings,
    held, system_identifier, database_oid, queues, generation)
values (%(worker)s, %(host)s, %(pid)s, %(version)s, %(slots)s, %(running)s, %(breaker)s, %(bell)s,
    -- Whether others can tell by its LISTEN connection that it is alive: a pooler may give it
    -- another name.
    %(settings)s::jsonb || jsonb_build_object('connection_seen', exists (
        select from pg_stat_activity c
        where c.application_name = left('recall-worker listener ' || %(worker)s::text, 63)
    )), %(held)s, %(system_identifier)s, %(database_oid)s, %(queues)s::text[],
    %(generation)s)
on conflict (worker) do update
    set seen_at = now(), slots = excluded.slots, running = excluded.running,
        breaker = excluded.breaker, bell = excluded.bell, held = excluded.held,
        system_identifier = excluded.system_identifier, database_oid = excluded.database_oid,
        queues = excluded.queues, generation = excluded.generation
returning (select count(*) from notified) as notified, (
    select count(*) from recall_workers w
    where w.worker < %(worker)s and w.seen_at > now() - %(not_ready_after)s * interval '1 second'
        and w.running < w.slots and w.breaker = 'closed' and w.bell = 'listening'
        and w.held is null
        -- One of a version without queues serves all of them.
        and coalesce(w.queues @> %(queues)s::text[], true)
        -- Rows of another database came with a dump: those workers run elsewhere.
        and coalesce(w.system_identifier = %(system_identifier)s, true)
        and coalesce(w.database_oid = %(database_oid)s, true)
) as ahead;

-- name: notify
-- Only a notification from another connection shows whether a listener still receives any. The
-- channel is that listener's own: nobody else is woken.
select pg_notify(%(channel)s, '');

-- name: deregister
-- This worker has stopped in good order. The notification lets the others poll for what it put
-- back.
with gone as (
    delete from recall_workers where worker = %(worker)s
)
select pg_notify('session_recalls', '');

-- name: schema
-- The schema's version, and the oldest code that can work with it; 0 where recall_schema stands
-- beside another session_recalls than the one that is worked on.
select coalesce(max(version), 0) as version, coalesce(max(oldest_code), 0) as oldest_code
from recall_schema
where not exists (
    select from pg_class c
    join pg_class o on o.relnamespace = c.relnamespace and o.relname = 'session_recalls'
    where c.oid = to_regclass('recall_schema') and o.oid <> to_regclass('session_recalls')
);
