-- Which recalls are meant: by what people ask for, or by an id of which they gave the beginning.
-- `list`, and the commands that act on all that they find, ask by the same statement.
--
-- What is not asked for comes as null, and is gone before the statement is planned: each is planned
-- for its values. So what is left are the conditions that were asked for, which the indexes serve.

-- name: find
-- A page of recalls, and how many there are in all, counted to `count_most`. Always at least one
-- row: without a recall (its id is null) where the page is empty.
--
-- `states` are what people mean, whatever the status: in-run has a lease that holds, due waits for nobody but a
-- worker (an ended lease counts: nobody has that recall in hand), overdue has done so for over a
-- minute. `session_like` comes with a session that has a `*`: a session of exactly this name goes
-- before the pattern. `sessions`: those of a user. `among`: only these ids. `since`: seconds, by
-- what last happened to the recall; a claim writes leased_at alone.
--
-- One order is asked for; the other key is null and sorts nothing. `gathered`: what is asked for is
-- a few sessions, so all of it is read and sorted. The planner would otherwise walk the whole table
-- by time until the session has filled a page, so an order that no index has keeps it from that.
--
-- `rows` false: the ids alone, as `ids` in the first row, for what acts on all of them.
with matching as not materialized (
    select r.id, r.trigger_at, coalesce(r.lease_until, r.trigger_at) as due_at
    from session_recalls r
    where (
            %(states)s::text[] is null
            or ('live' = any (%(states)s::text[]) and r.status in ('pending', 'running'))
            or ('waiting' = any (%(states)s::text[])
                and r.status in ('pending', 'running') and r.paused_at is null and r.lease is null)
            or ('due' = any (%(states)s::text[])
                and r.status in ('pending', 'running') and r.paused_at is null
                and coalesce(r.lease_until, r.trigger_at) <= now())
            or ('overdue' = any (%(states)s::text[])
                and r.status in ('pending', 'running') and r.paused_at is null
                and coalesce(r.lease_until, r.trigger_at) <= now() - interval '1 minute')
            or ('deferred' = any (%(states)s::text[])
                and r.status in ('pending', 'running') and r.paused_at is null
                and r.lease is null and r.deferrals > 0)
            or ('paused' = any (%(states)s::text[])
                and r.status in ('pending', 'running') and r.paused_at is not null)
            or ('in-run' = any (%(states)s::text[])
                and r.status in ('pending', 'running') and r.lease is not null
                and r.lease_until > now())
            or ('ended' = any (%(states)s::text[])
                and r.status in ('fired', 'cancelled', 'failed'))
            or ('fired' = any (%(states)s::text[]) and r.status = 'fired')
            or ('cancelled' = any (%(states)s::text[]) and r.status = 'cancelled')
            or ('failed' = any (%(states)s::text[]) and r.status = 'failed')
        )
        -- One status is compared by itself: before PostgreSQL 17 an ordered index can't filter by
        -- many.
        and (
            %(statuses)s::text[] is null or cardinality(%(statuses)s::text[]) = 1
            or r.status = any (%(statuses)s::text[])
        )
        and (
            %(statuses)s::text[] is null or cardinality(%(statuses)s::text[]) > 1
            or r.status = (%(statuses)s::text[])[1]
        )
        and (%(queue)s::text is null or r.queue = %(queue)s)
        and (%(outcome)s::text is null or r.last_outcome = %(outcome)s)
        and (
            %(since)s::float8 is null
            or greatest(r.updated_at, r.leased_at, r.ended_at)
                >= now() - %(since)s::float8 * interval '1 second'
        )
        and (
            %(session)s::text is null
            or r.session_id = recall_session(%(session)s::text)
            or (
                %(session_like)s::text is not null
                and r.session_id::text like %(session_like)s::text
                and not exists (
                    select from session_recalls e
                    where e.session_id = recall_session(%(session)s::text)
                )
            )
        )
        and (
            %(sessions)s::text[] is null
            or r.session_id = any (array(
                select recall_session(given) from unnest(%(sessions)s::text[]) as t (given)
            ))
        )
        and (
            %(among)s::text[] is null
            or r.id = any (array(
                select recall_id(given) from unnest(%(among)s::text[]) as t (given)
            ))
        )
),
page as materialized (
    select m.id from matching m
    order by
        case when not %(gathered)s::boolean and %(sort)s::text = 'due' then m.due_at end,
        case when not %(gathered)s::boolean and %(sort)s::text = 'newest'
            then m.trigger_at end desc,
        case when %(gathered)s::boolean and %(sort)s::text = 'due'
            then m.due_at + interval '0 s' end,
        case when %(gathered)s::boolean and %(sort)s::text = 'newest'
            then m.trigger_at + interval '0 s' end desc,
        m.id
    limit %(limit)s offset %(offset)s
),
total as (
    select count(*) as recalls, case when %(rows)s::boolean then null
        else array(select id::text from page) end as ids
    from (select from matching limit %(count_most)s) counted
)
select r.*, r.id::text as id, r.session_id::text as session_id,
    t.recalls as find_total, t.ids as find_ids, now() as find_now
from total t
left join session_recalls r on %(rows)s::boolean and r.id = any (array(select id from page))
order by
    case when %(sort)s::text = 'due' then coalesce(r.lease_until, r.trigger_at) end,
    case when %(sort)s::text = 'newest' then r.trigger_at end desc,
    r.id;

-- name: named
-- Recalls by their ids, as they are now.
select r.*, r.id::text as id, r.session_id::text as session_id
from session_recalls r
where r.id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)));

-- name: lock
-- Held until they are acted on, so that no worker and nobody else changes in between what was found
-- about them. What somebody else has locked is left out, and tried again later: nothing is waited
-- for here.
select r.id::text as id from session_recalls r
where r.id = any (array(select recall_id(given) from unnest(%(ids)s::text[]) as t (given)))
for update skip locked;

-- name: sessions_of_user
-- The owner is the application's: its table sessions says which user a session belongs to. (An
-- index on sessions (user_id) is worth having there.)
select s.id::text as id from sessions s where s.user_id = %(user)s;

-- name: existing
-- Which of these are ids of recalls, as they were given.
select t.given
from unnest(%(ids)s::text[]) as t (given)
where exists (select from session_recalls r where r.id = recall_id(t.given));

-- name: beginning
-- The recalls whose id begins so; of a column of type uuid, those between the lowest and the
-- highest id that does, by its index.
select r.id::text as id, count(*) over () as recalls
from session_recalls r
where (
        %(low)s::text is null
        or r.id between recall_id(%(low)s::text) and recall_id(%(high)s::text)
    )
    and r.id::text like %(pattern)s::text
order by r.id::text
limit %(most)s;

-- name: alike
-- Ids that begin as one of these: what the beginning of an id has to tell apart.
select r.id::text as id from session_recalls r
where left(r.id::text, %(length)s) = any (%(heads)s::text[])
limit %(most)s;
