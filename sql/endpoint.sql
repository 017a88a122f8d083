-- The endpoint kit: keys and sessions that all processes of an API agree on (recall_runs,
-- recall_session_locks). Apart from all others, as workers send none of these, and the application
-- needs rights to these two tables only.
--
-- A session is held while its row has a lease that has not ended. A run goes on while its session is
-- held under its lease; one that has not ended and does not go on is lost. So one row decides, and
-- whoever takes it has both.

-- name: start
-- The key's part of a beginning: a new row, or the row of a lost run, which is started once more.
-- No row: the key is known otherwise (`look`). Two callers at once: the second waits here for the
-- first one's transaction, and then sees its row. Whether the lost run's lease has really ended,
-- `take` decides in the same transaction.
insert into recall_runs as r (key, session_id, fingerprint, lease)
values (%(key)s, %(session_id)s, %(fingerprint)s, %(lease)s::uuid)
on conflict (key) do update
set lease = excluded.lease, starts = r.starts + 1, started_at = now(), accepted_at = null
where r.ended_at is null and r.starts < %(starts_most)s
    and r.session_id = excluded.session_id and r.fingerprint = excluded.fingerprint
    and not exists (
        select from recall_session_locks l
        where l.session_id = r.session_id and l.lease = r.lease and l.until >= now()
    )
returning r.starts, r.stored_at is not null as is_stored;

-- name: take
-- The session's part, and all of it for a chat (then `key` is null). No row: somebody has it. The
-- dead are not robbed while it is `doubtful` who is dead (this process has just met an outage), nor
-- just after PostgreSQL has started: the living need a moment to renew.
insert into recall_session_locks as l (session_id, lease, key, until)
values (%(session_id)s, %(lease)s::uuid, %(key)s::text,
    now() + %(seconds)s::float8 * interval '1 second')
on conflict (session_id) do update
set lease = excluded.lease, key = excluded.key, taken_at = now(), until = excluded.until
where l.until < now() and not %(doubtful)s::boolean
    and pg_postmaster_start_time() < now() - %(grace)s::float8 * interval '1 second'
returning 1 as taken;

-- name: look
-- How the run of a key stands.
select r.session_id, r.fingerprint, r.starts, r.answer,
    r.accepted_at is not null as is_accepted,
    exists (
        select from recall_session_locks l
        where l.session_id = r.session_id and l.lease = r.lease and l.until >= now()
    ) as goes_on
from recall_runs r
where r.key = %(key)s;

-- name: stored
-- The application has stored the system message of this key.
update recall_runs
set stored_at = now()
where key = %(key)s and lease = %(lease)s::uuid
returning 1 as stored;

-- name: accepted
-- Its caller is told that it is accepted, and polls it from now on.
update recall_runs
set accepted_at = coalesce(accepted_at, now())
where key = %(key)s and lease = %(lease)s::uuid
returning 1 as accepted;

-- name: finish
-- The answer is kept and the session freed, each if it is still ours. In one statement: nobody sees
-- a free session whose run has no answer, and takes it for lost.
with ended as (
    update recall_runs
    set ended_at = now(), status = %(status)s, answer = %(answer)s
    where key = %(key)s and lease = %(lease)s::uuid and ended_at is null
    returning 1
),
freed as (
    delete from recall_session_locks
    where session_id = %(session_id)s and lease = %(lease)s::uuid
    returning 1
)
select exists (select from ended) as ended, exists (select from freed) as freed;

-- name: undo
-- Nothing was run: the start does not count, and the session is free.
with forgotten as (
    delete from recall_runs
    where key = %(key)s and lease = %(lease)s::uuid and ended_at is null and starts <= 1
),
uncounted as (
    update recall_runs
    set starts = starts - 1
    where key = %(key)s and lease = %(lease)s::uuid and ended_at is null and starts > 1
)
delete from recall_session_locks
where session_id = %(session_id)s and lease = %(lease)s::uuid
returning 1 as freed;

-- name: cancel
-- Somebody wants the run to end. Its answer is that it was cancelled; the process that runs it finds
-- that out (`ended`), stops the agent, and frees the session then.
update recall_runs
set ended_at = now(), status = 'cancelled', answer = %(answer)s
where key = %(key)s and session_id = %(session_id)s and ended_at is null
returning 1 as ended;

-- name: give_up
-- A lost run ends as failed: it was accepted, so its caller only asks how it ends, or it was lost
-- too often. Nothing happens where its lease has not ended, or only a moment ago (`grace`): its
-- process may be late.
update recall_runs r
set ended_at = now(), status = 'failed', answer = %(answer)s
where r.key = %(key)s and r.session_id = %(session_id)s and r.ended_at is null
    and not exists (
        select from recall_session_locks l
        where l.session_id = r.session_id and l.lease = r.lease
            and l.until >= now() - %(grace)s::float8 * interval '1 second'
    )
returning 1 as ended;

-- name: free
-- A session is given back, if it is still held under this lease.
delete from recall_session_locks
where session_id = %(session_id)s and lease = %(lease)s::uuid
returning 1 as freed;

-- name: renew
-- All sessions of a process at once; which of them are still its own. One that ended and was taken
-- by nobody is its own again.
update recall_session_locks l
set until = now() + %(seconds)s::float8 * interval '1 second'
from unnest(%(session_ids)s::text[], %(leases)s::uuid[]) h (session_id, lease)
where l.session_id = h.session_id and l.lease = h.lease
returning l.lease;

-- name: ended
-- Which of a process's runs another one has ended.
select r.key
from recall_runs r
where r.key = any (%(keys)s::text[]) and r.ended_at is not null;

-- name: prune
-- Answers that nobody asks for any more, runs that were lost as long ago, and locks that dead
-- processes left behind. In batches; what others hold locked is left for the next time.
with old as materialized (
    select r.key
    from recall_runs r
    where r.started_at < now() - %(keep)s::float8 * interval '1 second'
        and coalesce(r.ended_at, r.started_at) < now() - %(keep)s::float8 * interval '1 second'
        and not exists (
            select from recall_session_locks l
            where l.session_id = r.session_id and l.lease = r.lease and l.until >= now()
        )
    order by r.started_at
    limit %(most)s
    for update of r skip locked
),
gone as (
    delete from recall_runs r
    where r.key = any (array(select key from old))
    returning 1
),
left_behind as (
    delete from recall_session_locks l
    where l.session_id = any (array(
            select d.session_id
            from recall_session_locks d
            where d.until < now() - interval '1 day'
            limit %(most)s
            for update skip locked
        ))
    returning 1
)
select count(*) as pruned from gone;
