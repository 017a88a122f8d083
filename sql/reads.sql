-- What people ask. Nothing here decides anything, and nothing here takes a lock.

-- name: show
select * from session_recalls where id = %(id)s;

-- name: calls
-- The calls of one recall, oldest first.
select * from recall_attempts
where recall_id = %(id)s
order by occurrence, coalesce(called_at, ended_at), rekey, attempt;

-- name: list
-- Newest trigger first, as the application lists.
select * from session_recalls
where (%(statuses)s::text[] is null or status = any (%(statuses)s::text[]))
order by trigger_at desc, id
limit %(limit)s offset %(offset)s;

-- name: list_session
select * from session_recalls
where session_id = %(session_id)s and (%(statuses)s::text[] is null or status = any (%(statuses)s::text[]))
order by trigger_at desc, id
limit %(limit)s offset %(offset)s;

-- name: list_user
-- The owner is the application's: its table sessions says whose a session is.
select r.* from session_recalls r
join sessions s on s.id = r.session_id
where s.user_id = %(user_id)s and (%(statuses)s::text[] is null or r.status = any (%(statuses)s::text[]))
    and (%(session_id)s::text is null or r.session_id = %(session_id)s)
order by r.trigger_at desc, r.id
limit %(limit)s offset %(offset)s;
