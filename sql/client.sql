-- The application's side of the table, as `Recalls` and the command line use it: the same plain SQL that any application may write.

-- name: schedule
-- Exactly the ten columns of the contract; all else has defaults. The trigger frees the session's slot where the recall in it is
-- a one-shot that is being run, and refuses an interval that could only loop.
insert into session_recalls
    (id, session_id, call_type, trigger_at, interval_seconds, internal_comment, additional_context_message, status, created_at, updated_at)
values (
    %(id)s, %(session_id)s, %(call_type)s,
    coalesce(%(at)s::timestamptz, now() + coalesce(%(after)s::float8, 0) * interval '1 second'),
    %(interval)s, %(comment)s, %(message)s, 'pending', now(), now()
)
returning *;

-- name: cancel
-- By id, in whatever live state: also the one that runs outside its session's slot. Its call is aborted at once.
update session_recalls
set status = 'cancelled', reason = %(reason)s, ended_at = now(), updated_at = now()
where id = any (%(ids)s::text[]) and status in ('pending', 'running')
returning *;

-- name: cancel_session
update session_recalls
set status = 'cancelled', reason = %(reason)s, ended_at = now(), updated_at = now()
where session_id = %(session_id)s and status in ('pending', 'running')
returning *;

-- name: states
-- What became of these ids, for saying why nothing was done to them.
select id, status from session_recalls where id = any (%(ids)s::text[]);
