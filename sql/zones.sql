-- Time zones: what others know of them where this worker's tzdata is old, and what to plan anew
-- where it is newer.

-- name: known_elsewhere
-- Which of these zones, that a worker's tzdata lacks, others know: PostgreSQL, whose own tzdata may
-- be newer, or perhaps a live worker that says that it has a newer one. PostgreSQL's view reads
-- each zone's file: tenths of a second, so it is asked only about names that are missing. Names
-- that only a host's files have are none of IANA's.
with given as (
    select distinct name from unnest(%(names)s::text[]) as t (name)
)
select g.name
from given g
where lower(g.name) in (
        select lower(z.name) from pg_timezone_names z
        where z.name !~ '^(posix|right)/' and z.name not in ('localtime', 'posixrules')
    )
    or exists (
        select from recall_workers w
        where w.seen_at > now() - %(silence)s * interval '1 second'
            and coalesce(w.system_identifier = %(system_identifier)s, true)
            and coalesce(w.database_oid = %(database_oid)s, true)
            -- One that serves other queues could not run the recall.
            and coalesce(w.queues && %(queues)s::text[], true)
            and w.settings ->> 'tzdata' > %(tzdata)s
    );

-- name: stale
-- Cron recalls whose moment was computed by older time zone data, or by a worker that did not say
-- by which, and how each is to be planned anew: `waits` where it waits, uncalled, for a moment of
-- its cadence. Another one's moment stands: chosen by a person or the application, due, or called
-- before. What is in a run is left to its settle. By the index idx_recalls_zone_data.
select r.id::text as id, substring(r.cron for 1001) as cron,
    substring(r.time_zone for 1001) as time_zone,
    least(
        greatest(coalesce(r.scheduled_for, r.trigger_at), '0001-01-02'::timestamptz),
        '9998-01-01'::timestamptz
    ) as nominal,
    r.trigger_at::text as trigger, r.edits,
    r.call_type = 'recurring' and r.trigger_at = r.planned_at and r.trigger_at > now()
        and r.named_at is null and r.fired_at is null and r.begun_at is null and r.skips = 0
        and r.edit_of is distinct from r.occurrence and r.interval_seconds is not null as waits
from session_recalls r
where r.cadence = 'cron' and r.time_zone is not null and r.status in ('pending', 'running')
    and (r.zone_data is null or r.zone_data < %(tzdata)s)
    and r.lease is null and r.id <> all (%(left)s::recall_id_type[])
limit %(most)s;

-- name: replan
-- Put them on their moments by the new data, each with the delay that it had (jitter) and the
-- distance to what follows; `at` null: the moment stands. Guarded by what was read. The workers are
-- notified where a row may now be due sooner.
with given as (
    select *
    from unnest(
        %(ids)s::recall_id_type[], %(triggers)s::text[], %(edits)s::integer[],
        %(ats)s::timestamptz[], %(distances)s::integer[]
    ) as t (id, trigger, edits, at, distance)
),
held as materialized (
    select r.id
    from session_recalls r
    join given t on t.id = r.id
    where r.id = any (%(ids)s::recall_id_type[]) and r.lease is null
        and r.status in ('pending', 'running')
        and r.trigger_at = t.trigger::timestamptz and r.edits = t.edits
    for update of r skip locked
),
written as (
    update session_recalls r
    set zone_data = %(tzdata)s,
        trigger_at = coalesce(
            t.at + (r.trigger_at - coalesce(r.scheduled_for, r.trigger_at)), r.trigger_at
        ),
        planned_at = coalesce(
            t.at + (r.trigger_at - coalesce(r.scheduled_for, r.trigger_at)), r.planned_at
        ),
        scheduled_for = coalesce(t.at, r.scheduled_for),
        interval_seconds = coalesce(t.distance, r.interval_seconds),
        -- What we write is no edit: see recall_before_edit.
        edits = case
            when t.distance is null then r.edits
            when r.edits between 0 and 2147483646 then r.edits + 1
            else 0
        end,
        updated_at = case when t.at is null then r.updated_at else now() end
    from given t
    where r.id = t.id and r.id = any (array(select id from held))
    returning r.id, t.at is not null as moved
),
notified as (
    select pg_notify('session_recalls', '') where exists (select from written where moved)
)
select w.id::text as id, w.moved, (select count(*) from notified) as notified from written w;
