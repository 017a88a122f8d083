-- What the agent's tools read and hold, besides the statements of client.sql. Each is bound to one
-- session: the one that the process was started for, or that the token names. An id of another
-- session finds nothing here, as an id that does not exist.

-- name: alone
-- One call at a time counts what a session has scheduled, and schedules one more: to the end of the
-- transaction. Others of the session wait.
select pg_advisory_xact_lock(
    hashtextextended(concat_ws(' ', 'recall-worker agent', %(session_id)s::text), 0)
) is not null as alone;

-- name: own
-- Recalls of the session, held until the end of the transaction, so that what is then done by id is
-- done to a recall of this session. `id` null: its live ones. In the order of ids, as two calls at
-- once must not wait for each other.
select r.*, r.id::text as id, r.session_id::text as session_id, now() as now
from session_recalls r
where r.session_id = recall_session(%(session_id)s)
    and case
        when %(id)s::text is null then r.status in ('pending', 'running')
        else r.id = recall_id(%(id)s::text)
    end
order by r.id
for no key update;

-- name: own_live
-- What the session has promised, next first. Reads only.
select r.*, r.id::text as id, r.session_id::text as session_id, now() as now
from session_recalls r
where r.session_id = recall_session(%(session_id)s) and r.status in ('pending', 'running')
order by r.trigger_at, r.id
limit %(most)s::bigint;

-- name: own_ended
-- What of it is over, the last first. Reads only.
select r.*, r.id::text as id, r.session_id::text as session_id, now() as now
from session_recalls r
where r.session_id = recall_session(%(session_id)s)
    and r.status in ('fired', 'cancelled', 'failed')
order by r.updated_at desc, r.id
limit %(most)s::bigint;

-- name: scheduled_since
-- How many recalls the session has scheduled in the last so many seconds, one row for each of them:
-- by the rows that there are. An agent that calls itself in a loop makes one for each turn.
select (
        select count(*) from session_recalls r
        where r.session_id = recall_session(%(session_id)s)
            and r.created_at > now() - t.span * interval '1 second'
    ) as count
from unnest(%(spans)s::float8[]) with ordinality as t (span, number)
order by t.number;
