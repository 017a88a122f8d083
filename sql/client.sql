-- The application's side of the table, as `Recalls` and the command line use it: plain SQL that any
-- application may write. What `Recalls` does by session acts on the pending recall, as the
-- application's own SQL does; the command line acts by id, and also on the one that runs outside
-- its session's slot.
--
-- Each statement that changes recalls records it in recall_actions, a row for each that it changed:
-- `recorded`. `actor` is who does it (null: the role of the database session), `via` the way: cli,
-- console, mcp, python. In `detail` each column that was changed has its value before and after,
-- {"from": ..., "to": ...}; the rest are facts. Of a recall's texts nothing is recorded, as they go
-- when the recall is deleted. `held`: the rows as they were, and locked, as an update returns the
-- new ones.
--
-- Ids are given as text, and read by recall_id and recall_session: what the column's type can't
-- hold is the id of nothing. They are returned as text, behind the row that is read whole, as in
-- reads.sql.

-- name: keys
-- What the columns of the keys take: `most` characters, a `default` or none, no value at all where
-- it is `generated`. Of a domain, the type below it. (On a connection of the application's with
-- quote_all_identifiers, PostgreSQL would quote the types' names.)
with recursive below (name, type, typmod) as (
    select a.attname, a.atttypid, a.atttypmod
    from pg_attribute a
    where a.attrelid = to_regclass('session_recalls') and a.attname in ('id', 'session_id')
    union all
    select b.name, t.typbasetype, case when b.typmod = -1 then t.typtypmod else b.typmod end
    from below b join pg_type t on t.oid = b.type and t.typtype = 'd'
)
select replace(format_type(i.type, i.typmod), '"', '') as id_type,
    case when i.type = 'varchar'::regtype and i.typmod > 4 then i.typmod - 4 end as most,
    a.atthasdef or a.attidentity <> ''
        or exists (select from pg_type t where t.oid = a.atttypid and t.typdefault is not null)
        as has_default,
    a.attidentity = 'a' or a.attgenerated <> '' as generated,
    replace(format_type(s.type, s.typmod), '"', '') as session_type
from below i
join pg_type it on it.oid = i.type and it.typtype <> 'd'
join below s on s.name = 'session_id'
join pg_type st on st.oid = s.type and st.typtype <> 'd'
join pg_attribute a on a.attrelid = to_regclass('session_recalls') and a.attname = 'id'
where i.name = 'id';

-- name: violated
-- Whether a unique index of session_recalls is the one that holds a session to its pending recalls,
-- whatever its name is: its one column is the session, or it is the session and the slot. And how
-- many a session may have.
select i.indkey[0] = a.attnum
        and (i.indnkeyatts = 1 or (i.indnkeyatts = 2 and i.indkey[1] = s.attnum)) as of_session,
    case when i.indnkeyatts = 2 then (
        select substring(pg_get_triggerdef(t.oid) from 'recall_admit_slot\(''(\d{1,4})''\)$')::integer
        from pg_trigger t
        where t.tgrelid = i.indrelid and t.tgname = 'recall_admit_slot'
    ) else 1 end as most
from pg_index i
join pg_attribute a on a.attrelid = i.indrelid and a.attname = 'session_id'
left join pg_attribute s on s.attrelid = i.indrelid and s.attname = 'slot'
join pg_class c on c.oid = i.indexrelid
join pg_namespace n on n.oid = c.relnamespace
where i.indrelid = to_regclass('session_recalls')
    and c.relname = %(name)s and n.nspname = %(schema)s;

-- name: schedule
-- The ten columns of the contract, and how it recurs and ends. The trigger frees the session's slot
-- where the recall in it is a one-shot that is being run, and refuses an interval that could only
-- loop. Jitter delays the due time, not the nominal one. A time in the past means now, so that
-- lateness is not counted from it; on a grid and cron what was missed since then counts. One within
-- the last minute stands. An id that its column can't hold comes as null, which the column refuses.
-- Where interval_seconds or internal_comment may not be null, 0 or the empty text stands there.
with changed as (
    insert into session_recalls
        (id, session_id, call_type, trigger_at, interval_seconds, internal_comment,
        additional_context_message, status, created_at, updated_at, cadence, cron, time_zone,
        until_at, times, failures_most, grace_seconds, jitter_seconds, zone_data,
        scheduled_for, queue)
    select recall_id(%(id)s), recall_session(%(session_id)s), %(call_type)s,
        first.nominal + %(put_off)s * interval '1 second', coalesce(%(interval)s, (
            select 0 from pg_attribute a
            where a.attrelid = to_regclass('session_recalls') and a.attname = 'interval_seconds'
                and a.attnotnull
        )),
        coalesce(%(comment)s, (
            select '' from pg_attribute a
            where a.attrelid = to_regclass('session_recalls') and a.attname = 'internal_comment'
                and a.attnotnull
        )),
        %(message)s, 'pending', now(), now(), %(cadence)s, %(cron)s, %(time_zone)s,
        %(until)s::timestamptz, %(times)s, %(failures)s, %(grace)s, %(jitter)s, %(zone_data)s,
        case when %(put_off)s > 0 then first.nominal end, %(queue)s
    from (
        select coalesce(
            case
                when %(cadence)s = 'interval' and %(at)s::timestamptz < now() - interval '1 minute'
                then now()
                else %(at)s::timestamptz
            end,
            now() + coalesce(%(after)s::float8, 0) * interval '1 second'
        ) as nominal
    ) first
    returning *
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'schedule', c.id::text,
        jsonb_build_object('session_id', c.session_id::text) || (
            select jsonb_object_agg(a.name, jsonb_build_object('from', null, 'to', a.value))
            from (values
                ('status', to_jsonb(c.status)), ('call_type', to_jsonb(c.call_type)),
                ('trigger_at', to_jsonb(c.trigger_at)),
                ('interval_seconds', to_jsonb(c.interval_seconds)),
                ('cadence', to_jsonb(c.cadence)), ('cron', to_jsonb(c.cron)),
                ('time_zone', to_jsonb(c.time_zone)), ('until_at', to_jsonb(c.until_at)),
                ('times', to_jsonb(c.times)), ('failures_most', to_jsonb(c.failures_most)),
                ('grace_seconds', to_jsonb(c.grace_seconds)),
                ('jitter_seconds', to_jsonb(c.jitter_seconds)), ('queue', to_jsonb(c.queue))
            ) a (name, value)
            where a.value is not null
        )
    from changed c
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: schedule_by_default
-- The same where the column's own default (an identity, a sequence) gives the id.
with changed as (
    insert into session_recalls
        (session_id, call_type, trigger_at, interval_seconds, internal_comment,
        additional_context_message, status, created_at, updated_at, cadence, cron, time_zone,
        until_at, times, failures_most, grace_seconds, jitter_seconds, zone_data,
        scheduled_for, queue)
    select recall_session(%(session_id)s), %(call_type)s,
        first.nominal + %(put_off)s * interval '1 second', coalesce(%(interval)s, (
            select 0 from pg_attribute a
            where a.attrelid = to_regclass('session_recalls') and a.attname = 'interval_seconds'
                and a.attnotnull
        )),
        coalesce(%(comment)s, (
            select '' from pg_attribute a
            where a.attrelid = to_regclass('session_recalls') and a.attname = 'internal_comment'
                and a.attnotnull
        )),
        %(message)s, 'pending', now(), now(), %(cadence)s, %(cron)s, %(time_zone)s,
        %(until)s::timestamptz, %(times)s, %(failures)s, %(grace)s, %(jitter)s, %(zone_data)s,
        case when %(put_off)s > 0 then first.nominal end, %(queue)s
    from (
        select coalesce(
            case
                when %(cadence)s = 'interval' and %(at)s::timestamptz < now() - interval '1 minute'
                then now()
                else %(at)s::timestamptz
            end,
            now() + coalesce(%(after)s::float8, 0) * interval '1 second'
        ) as nominal
    ) first
    returning *
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'schedule', c.id::text,
        jsonb_build_object('session_id', c.session_id::text) || (
            select jsonb_object_agg(a.name, jsonb_build_object('from', null, 'to', a.value))
            from (values
                ('status', to_jsonb(c.status)), ('call_type', to_jsonb(c.call_type)),
                ('trigger_at', to_jsonb(c.trigger_at)),
                ('interval_seconds', to_jsonb(c.interval_seconds)),
                ('cadence', to_jsonb(c.cadence)), ('cron', to_jsonb(c.cron)),
                ('time_zone', to_jsonb(c.time_zone)), ('until_at', to_jsonb(c.until_at)),
                ('times', to_jsonb(c.times)), ('failures_most', to_jsonb(c.failures_most)),
                ('grace_seconds', to_jsonb(c.grace_seconds)),
                ('jitter_seconds', to_jsonb(c.jitter_seconds)), ('queue', to_jsonb(c.queue))
            ) a (name, value)
            where a.value is not null
        )
    from changed c
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: clock
-- PostgreSQL's time, for times that are computed outside of it, as cron's are.
select now() as now;

-- name: cancel_pending
with held as materialized (
    select id, status from session_recalls
    where session_id = recall_session(%(session_id)s) and status = 'pending'
    for no key update
),
changed as (
    update session_recalls r
    set status = 'cancelled', updated_at = now()
    where r.id = any (array(select id from held))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'cancel', c.id::text,
        jsonb_build_object(
            'status', jsonb_build_object('from', h.status, 'to', c.status),
            'occurrence', c.occurrence, 'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select id::text as id from changed;

-- name: skip_pending
with held as materialized (
    select id, trigger_at from session_recalls
    where session_id = recall_session(%(session_id)s) and status = 'pending'
        and call_type = 'recurring' and interval_seconds > 0
    for no key update
),
changed as (
    update session_recalls r
    set trigger_at = r.trigger_at + r.interval_seconds * interval '1 second', updated_at = now()
    where r.id = any (array(select id from held))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'skip', c.id::text,
        jsonb_build_object(
            'trigger_at', jsonb_build_object('from', h.trigger_at, 'to', c.trigger_at),
            'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: due
-- What is due and waits: neither leased nor paused. Oldest first.
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.status in ('pending', 'running') and r.paused_at is null and r.lease is null
    and coalesce(r.lease_until, r.trigger_at) <= now()
order by coalesce(r.lease_until, r.trigger_at)
limit %(limit)s;

-- name: next_trigger
-- The nearest time at which anything that waits is due, even if it is past; no row where nothing
-- waits.
select trigger_at as next_trigger from session_recalls
where status in ('pending', 'running') and paused_at is null and lease is null
order by coalesce(lease_until, trigger_at)
limit 1;

-- name: mark
with held as materialized (
    select id, status from session_recalls
    where id = recall_id(%(id)s) and status in ('pending', 'running')
    for no key update
),
changed as (
    update session_recalls r
    set status = %(status)s, updated_at = now()
    where r.id = any (array(select id from held))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, %(action)s::text, c.id::text,
        jsonb_build_object(
            'status', jsonb_build_object('from', h.status, 'to', c.status),
            'occurrence', c.occurrence, 'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select id::text as id from changed;

-- name: sessions_with_pending
select distinct session_id::text as session_id from session_recalls
where session_id = any (
        array(select recall_session(given) from unnest(%(session_ids)s::text[]) as t (given))
    )
    and status = 'pending';

-- name: cancel
-- In any live state. Its call is aborted at once.
with held as materialized (
    select id, status from session_recalls
    where id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and status in ('pending', 'running')
    for no key update
),
changed as (
    update session_recalls r
    set status = 'cancelled', reason = %(reason)s, ended_at = now(), updated_at = now()
    where r.id = any (array(select id from held))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'cancel', c.id::text,
        jsonb_build_object(
            'status', jsonb_build_object('from', h.status, 'to', c.status),
            'occurrence', c.occurrence, 'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: cancel_session
with held as materialized (
    select id, status from session_recalls
    where session_id = recall_session(%(session_id)s) and status in ('pending', 'running')
    for no key update
),
changed as (
    update session_recalls r
    set status = 'cancelled', reason = %(reason)s, ended_at = now(), updated_at = now()
    where r.id = any (array(select id from held))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'cancel', c.id::text,
        jsonb_build_object(
            'status', jsonb_build_object('from', h.status, 'to', c.status),
            'occurrence', c.occurrence, 'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: skip
with held as materialized (
    select id, trigger_at from session_recalls
    where id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and status in ('pending', 'running')
        and call_type = 'recurring' and interval_seconds > 0
    for no key update
),
changed as (
    update session_recalls r
    set trigger_at = r.trigger_at + r.interval_seconds * interval '1 second', updated_at = now()
    where r.id = any (array(select id from held))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'skip', c.id::text,
        jsonb_build_object(
            'trigger_at', jsonb_build_object('from', h.trigger_at, 'to', c.trigger_at),
            'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: reschedule
-- The time that a person names, on every cadence: `named_at` says that it skips no occurrence. In
-- mid-run it applies to what comes after the run; not where that run is the last one, and not after
-- the recall's end. An extra run (fired_at) is no occurrence.
with given as (
    select coalesce(
        %(at)s::timestamptz, now() + coalesce(%(after)s::float8, 0) * interval '1 second'
    ) as at
),
held as materialized (
    select id, trigger_at from session_recalls
    where id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and status in ('pending', 'running')
    for no key update
),
changed as (
    update session_recalls r
    set trigger_at = g.at, edit_of = null, updated_at = now(),
        -- A one-shot that was never claimed stands wherever it is put.
        named_at = case when r.planned_at is not null then g.at end
    from given g
    where r.id = any (array(select id from held))
        and (r.call_type <> 'recurring' or r.until_at is null or g.at <= r.until_at)
        and (
            r.lease is null or r.fired_at is not null
            or (r.call_type = 'recurring' and (
                r.times is null
                or r.times - r.occurrence - r.skips > case
                    when r.interval_seconds > 0 and isfinite(r.trigger_at)
                        and isfinite(r.planned_at)
                        -- Whole intervals are skips; any other move is a time of its own.
                        and mod(
                            extract(epoch from r.trigger_at)
                                - extract(epoch from coalesce(r.named_at, r.planned_at)),
                            r.interval_seconds
                        ) = 0
                    then greatest(0,
                        (extract(epoch from r.trigger_at)
                            - extract(epoch from coalesce(r.named_at, r.planned_at)))
                        / r.interval_seconds
                    )
                    else 0
                end
            ))
        )
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'reschedule', c.id::text,
        jsonb_build_object(
            'trigger_at', jsonb_build_object('from', h.trigger_at, 'to', c.trigger_at),
            'in_run', c.lease is not null
        )
    from changed c join held h on h.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: pause
-- The current run is not interrupted; what follows waits. Pausing again changes nothing.
with held as materialized (
    select * from session_recalls
    where id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and status in ('pending', 'running')
    for update
),
changed as (
    update session_recalls r
    set paused_at = now(), updated_at = now()
    where r.id = any (array(select id from held where paused_at is null))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'pause', c.id::text,
        jsonb_build_object(
            'paused_at', jsonb_build_object('from', null, 'to', c.paused_at),
            'in_run', c.lease is not null
        )
    from changed c
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c
union all
select h.*, h.id::text, h.session_id::text from held h where h.paused_at is not null;

-- name: resume
-- A recall that is not paused stays as it is; `resumed` says which were.
with held as materialized (
    select * from session_recalls
    where id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and status in ('pending', 'running')
    for update
),
changed as (
    update session_recalls r
    set paused_at = null, updated_at = now()
    where r.id = any (array(select id from held where paused_at is not null))
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'resume', c.id::text,
        jsonb_build_object('paused_at', jsonb_build_object('from', h.paused_at, 'to', null))
    from changed c join held h on h.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id, true as resumed from changed c
union all
select h.*, h.id::text, h.session_id::text, false from held h where h.paused_at is null;

-- name: fire
-- Run it now. A recurring recall that waits: an extra run besides its schedule, due at once by
-- lease_until; what is planned stays as it is. Where an extra run waits to be called again, it is
-- due now.
-- Otherwise its occurrence, now: of a one-shot, or one that was called already. That keeps its key
-- and its nominal time; one that is early has its own time moved to now, and no worker takes that
-- for a move by the application. A move that was made before (a skip, or another time) stays one:
-- planned_at moves by the same distance, and the claim sees it. A recall that is due already stays
-- as it is: `already` says so, and nothing is recorded.
with held as materialized (
    select id, trigger_at, case
            when fired_at is not null and lease_until is not null then 'again'
            when call_type = 'recurring' and begun_at is null and trigger_at > now() then 'extra'
            else 'occurrence'
        end as run,
        coalesce(lease_until, trigger_at) <= now() as already
    from session_recalls
    where id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and status in ('pending', 'running') and lease is null
        and paused_at is null
    for update
),
extra as (
    update session_recalls r
    set lease_until = now(),
        fired_at = case h.run when 'again' then r.fired_at else now() end,
        fires = case h.run
            when 'again' then r.fires
            else case when r.fires between 0 and 2147483646 then r.fires + 1 else 1 end
        end,
        attempt = case h.run when 'again' then r.attempt else 0 end,
        deferrals = case h.run when 'again' then r.deferrals else 0 end,
        updated_at = now()
    from held h
    where h.id = r.id and r.id = any (array(select id from held where run <> 'occurrence'))
    returning r.*
),
occurrence as (
    update session_recalls r
    set trigger_at = least(r.trigger_at, now()),
        planned_at = case
            when r.trigger_at <= now() or r.named_at is not null then r.planned_at
            when coalesce(r.planned_at, r.trigger_at) = r.trigger_at then now()
            when greatest(r.trigger_at, r.planned_at) < '4000-01-01' and r.planned_at > '0001-01-01'
            then (now() at time zone 'UTC' - (r.trigger_at - r.planned_at)) at time zone 'UTC'
            else now() - interval '1 microsecond'
        end,
        -- A time that a person named is not moved by anybody: it is now.
        named_at = case
            when r.trigger_at <= now() then r.named_at
            when r.named_at is not null then now()
        end,
        -- On grid and cron the nominal time stays, as the next one follows from it.
        scheduled_for = case
            when r.cadence = 'interval' then least(coalesce(r.scheduled_for, r.trigger_at), now())
            else coalesce(r.scheduled_for, r.trigger_at) end,
        updated_at = now()
    where r.id = any (array(select id from held where run = 'occurrence'))
    returning r.*
),
notified as materialized (
    select pg_notify('session_recalls', '') where exists (select from extra)
),
changed as (
    select e.* from extra e where (select count(*) from notified) is not null
    union all
    select o.* from occurrence o
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'fire', c.id::text,
        jsonb_build_object(
            'occurrence', c.occurrence,
            'extra', case when c.fired_at is not null then c.fires end
        ) || case
            when c.trigger_at is not distinct from h.trigger_at then '{}'
            else jsonb_build_object(
                'trigger_at', jsonb_build_object('from', h.trigger_at, 'to', c.trigger_at)
            )
        end
    from changed c
    join held h on h.id = c.id and not h.already
)
select c.*, c.id::text as id, c.session_id::text as session_id, h.already
from changed c join held h on h.id = c.id;

-- name: retry
-- Run the occurrence that failed or was cancelled again, under a new key and with all its attempts;
-- not while an aborted call is still open. What the application had moved before stays moved, as
-- with fire. Where it was ended in mid-run and its worker then died, that call is recorded here, as
-- the worker can't.
with before as materialized (
    select r.id, r.session_id, r.status, r.occurrence, r.rekey, r.attempt, r.lease, r.lease_until,
        r.leased_by, r.leased_at, r.scheduled_for, r.missed, r.trigger_at, r.run_reference,
        r.fired_at, r.fires,
        case when r.sent_at >= r.leased_at then r.sent_at end as sent_at, r.taken_lease
    from session_recalls r
    where r.id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
        and r.status in ('failed', 'cancelled')
        and (r.lease is null or r.lease_until < now())
    for update of r
),
call_recorded as (
    insert into recall_attempts
        (recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, scheduled_for,
        missed, called_at, last_called_at, ended_at, reason, settled)
    select b.id::text, b.occurrence, case when b.fired_at is null then b.rekey else -b.fires end,
        b.attempt, 'unknown', b.session_id::text, coalesce(b.leased_by, 'unknown'), b.lease,
        coalesce(b.fired_at, b.scheduled_for, b.trigger_at), b.missed,
        b.sent_at, b.sent_at, b.lease_until,
        'the worker was not heard of again: its lease ended'
            || case when b.sent_at is null then ', and perhaps nothing was called' else '' end,
        'ended'
    from before b
    where b.lease is not null and b.run_reference is null and octet_length(b.id::text) <= 2000
        and not (b.taken_lease is not distinct from b.lease and b.sent_at is null)
    on conflict do nothing
),
changed as (
    update session_recalls r
    set status = 'pending', lease = null, lease_until = null, leased_at = null, leased_by = null,
        trigger_at = now(),
        planned_at = case
            when r.trigger_at = coalesce(r.named_at, r.planned_at, r.trigger_at) then now()
            when greatest(r.trigger_at, r.named_at, r.planned_at) < '4000-01-01'
                and least(r.trigger_at, r.named_at, r.planned_at) > '0001-01-01'
            then (now() at time zone 'UTC' - (r.trigger_at - coalesce(r.named_at, r.planned_at)))
                at time zone 'UTC'
            else now() - interval '1 microsecond'
        end,
        scheduled_for = case
            when r.cadence = 'interval' then least(coalesce(r.scheduled_for, r.trigger_at), now())
            -- A time that was named is its nominal time, also where it was never claimed since.
            when r.named_at <> r.planned_at and r.trigger_at = r.named_at then r.trigger_at
            else coalesce(r.scheduled_for, r.trigger_at)
        end,
        named_at = null, fired_at = null,
        -- What we write is no edit: see recall_before_edit.
        edits = case when r.edits between 0 and 2147483646 then r.edits + 1 else 0 end,
        rekey = r.rekey + 1, attempt = 0, deferrals = 0, failures = 0, begun_at = null,
        run_reference = null, delivered_at = null, reason = null, ended_at = null, paused_at = null,
        updated_at = now()
    from before b
    where r.id = b.id
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'retry', c.id::text,
        jsonb_build_object(
            'status', jsonb_build_object('from', b.status, 'to', c.status),
            'trigger_at', jsonb_build_object('from', b.trigger_at, 'to', c.trigger_at)
        ) || case
            -- Of one that was skipped or moved, the claim decides which occurrence it is.
            when c.planned_at is not distinct from c.trigger_at and c.skips = 0
            then jsonb_build_object('occurrence', c.occurrence, 'rekey', c.rekey)
            else '{}'
        end
    from changed c join before b on b.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: hold
-- A live recall as it stands, held until its edit is written.
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.id = recall_id(%(id)s) and r.status in ('pending', 'running')
for update;

-- name: edit
-- How a recall recurs and ends: `changes` holds the columns that differ, with their new values; the
-- others stay as they are, whatever stands there. What follows for the occurrence that waits is
-- done by the table's trigger.
with before as materialized (
    select id, call_type, trigger_at, interval_seconds, cadence, cron, time_zone, until_at, times,
        failures_most, grace_seconds, jitter_seconds, queue
    from session_recalls
    where id = recall_id(%(id)s) and status in ('pending', 'running')
),
changed as (
    update session_recalls r
    set (
            interval_seconds, cadence, cron, time_zone, until_at, times, failures_most,
            grace_seconds, jitter_seconds, queue
        ) = (
            select e.interval_seconds, e.cadence, e.cron, e.time_zone, e.until_at, e.times,
                e.failures_most, e.grace_seconds, e.jitter_seconds, e.queue
            from jsonb_populate_record(r, %(changes)s::jsonb) e
        ),
        updated_at = now()
    where r.id = recall_id(%(id)s) and r.status in ('pending', 'running')
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'edit', c.id::text,
        (
            select jsonb_object_agg(
                e.key,
                case
                    when e.key in ('additional_context_message', 'internal_comment')
                    then '"changed"'
                    else jsonb_build_object('from', to_jsonb(b) -> e.key, 'to', e.value)
                end
            )
            from jsonb_each(%(changes)s::jsonb) e
        ) || case
            when c.trigger_at = b.trigger_at then '{}'
            else jsonb_build_object(
                'trigger_at', jsonb_build_object('from', b.trigger_at, 'to', c.trigger_at)
            )
        end
    from changed c join before b on b.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: edit_content
-- The same where its message, its comment or its type changes as well, which the worker's role may
-- not write.
with before as materialized (
    select id, call_type, trigger_at, interval_seconds, cadence, cron, time_zone, until_at, times,
        failures_most, grace_seconds, jitter_seconds, queue
    from session_recalls
    where id = recall_id(%(id)s) and status in ('pending', 'running')
),
changed as (
    update session_recalls r
    set (
            call_type, additional_context_message, internal_comment, interval_seconds, cadence,
            cron, time_zone, until_at, times, failures_most, grace_seconds, jitter_seconds, queue
        ) = (
            select e.call_type, e.additional_context_message, e.internal_comment,
                e.interval_seconds, e.cadence, e.cron, e.time_zone, e.until_at, e.times,
                e.failures_most, e.grace_seconds, e.jitter_seconds, e.queue
            from jsonb_populate_record(r, %(changes)s::jsonb) e
        ),
        updated_at = now()
    where r.id = recall_id(%(id)s) and r.status in ('pending', 'running')
    returning r.*
),
recorded as (
    insert into recall_actions (actor, via, action, recall_id, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'edit', c.id::text,
        (
            select jsonb_object_agg(
                e.key,
                case
                    when e.key in ('additional_context_message', 'internal_comment')
                    then '"changed"'
                    else jsonb_build_object('from', to_jsonb(b) -> e.key, 'to', e.value)
                end
            )
            from jsonb_each(%(changes)s::jsonb) e
        ) || case
            when c.trigger_at = b.trigger_at then '{}'
            else jsonb_build_object(
                'trigger_at', jsonb_build_object('from', b.trigger_at, 'to', c.trigger_at)
            )
        end
    from changed c join before b on b.id = c.id
)
select c.*, c.id::text as id, c.session_id::text as session_id from changed c;

-- name: states
-- Why an operation on these recalls was not possible. `given`: the id as it was given, of which
-- there may be several spellings.
select t.given, r.id::text as id, r.session_id::text as session_id, r.status, r.call_type,
    r.interval_seconds, r.paused_at, r.lease is not null as leased, r.leased_by, r.fired_at,
    r.times, r.occurrence, r.until_at
from unnest(%(ids)s::text[]) as t (given)
join session_recalls r on r.id = recall_id(t.given);

-- name: pause_queues
-- Of these queues (* stands for all) nothing is claimed or taken up from here on: each claim asks
-- for it. The workers are notified, so that they say it. Pausing again changes nothing.
with changed as (
    insert into recall_queues (queue, paused_by, reason)
    select q.queue, coalesce(%(actor)s::text, session_user), %(reason)s::text
    from unnest(%(queues)s::text[]) as q (queue)
    on conflict (queue) do nothing
    returning *
),
recorded as (
    insert into recall_actions (actor, via, action, detail)
    select c.paused_by, %(via)s::text, 'pause_queue',
        jsonb_build_object(
            'paused_at', jsonb_build_object('from', null, 'to', c.paused_at),
            'queue', c.queue, 'reason', c.reason
        )
    from changed c
),
notified as (
    select pg_notify('session_recalls', '') where exists (select from changed)
)
select c.queue, c.paused_at, c.paused_by, c.reason, true as changed,
    (select count(*) from notified) as notified
from changed c
union all
select p.queue, p.paused_at, p.paused_by, p.reason, false, 0
from recall_queues p where p.queue = any (%(queues)s::text[]);

-- name: resume_queues
-- These queues, or whatever is paused. The workers are notified, and claim at once. One that is not
-- paused stays as it is.
with changed as (
    delete from recall_queues
    where %(every)s::boolean or queue = any (%(queues)s::text[])
    returning *
),
recorded as (
    insert into recall_actions (actor, via, action, detail)
    select coalesce(%(actor)s::text, session_user), %(via)s::text, 'resume_queue',
        jsonb_build_object(
            'paused_at', jsonb_build_object('from', c.paused_at, 'to', null), 'queue', c.queue
        )
    from changed c
),
notified as (
    select pg_notify('session_recalls', '') where exists (select from changed)
)
select c.queue, c.paused_at, c.paused_by, c.reason, (select count(*) from notified) as notified
from changed c
order by c.queue;
