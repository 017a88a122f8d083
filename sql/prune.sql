-- Deletes what has been over for long enough: batches of the daemon (RECALL_PRUNE) or of
-- `recall-worker prune`, and which of the daemons may prune now. Apart from the worker's other
-- statements, as a worker that does not prune needs no right to delete recalls.

-- name: turn
-- Whether this worker may prune now, and if not, in how many seconds to ask again. One replica at a
-- time, for as long as it goes on asking; when it is done, nobody for as long as it said. A turn
-- that ends later than ours ever would is left over from longer retentions.
with turn as (
    insert into recall_chores as c (chore, worker, until)
    values ('prune', %(worker)s, now() + %(patience)s * interval '1 second')
    on conflict (chore) do update
    set worker = excluded.worker, until = excluded.until, rests = false
    where c.until <= now() or (c.worker = excluded.worker and not c.rests)
        or c.until > now() + 2 * greatest(%(every)s, %(patience)s) * interval '1 second'
    returning 1
)
select exists (select from turn) as mine,
    coalesce((
        select greatest(0, extract(epoch from c.until - now()))
        from recall_chores c
        where c.chore = 'prune'
    ), 1)::float8 as next_in;

-- name: ended
-- The turn is over.
update recall_chores
set until = now() + %(again_in)s * interval '1 second', rests = true
where chore = 'prune' and worker = %(worker)s;

-- name: count
-- How many rows of each kind are past their retention, for a person who is to agree to it: what the
-- statements below would find now, but for what is locked or stays for another table's sake.
select r.fired, r.cancelled, r.failed, c.calls, a.actions, f.failures
from (
    select count(*) filter (where status = 'fired') as fired,
        count(*) filter (where status = 'cancelled') as cancelled,
        count(*) filter (where status = 'failed') as failed
    from session_recalls
    where coalesce(ended_at, updated_at) < now() - interval '1 second'
            * case status
                when 'fired' then %(fired)s::float8
                when 'cancelled' then %(cancelled)s::float8
                when 'failed' then %(failed)s::float8
            end
        and (lease_until is null or lease_until < now())
) r
cross join (
    select count(*) as calls
    from recall_attempts a
    where a.ended_at < now() - %(calls)s::float8 * interval '1 second'
        and (
            select true from session_recalls r
            where r.id = recall_id(a.recall_id) and r.status in ('pending', 'running')
                and r.occurrence = a.occurrence
        ) is not true
) c
cross join (
    select count(*) as actions
    from recall_actions
    where at < now() - greatest(%(actions)s::float8, 86400) * interval '1 second'
) a
cross join (
    select count(*) as failures
    from recall_outbox
    where coalesce(
            delivered_at, given_up_at, greatest(due_at, written_at) + interval '7 days'
        ) < now() - %(failures)s::float8 * interval '1 second'
) f;

-- name: recalls
-- One batch, a range of the table's pages, read in their order: recalls in it that have been over
-- for as long as their status is kept, at most so many. (Null keeps for ever, and so is what is not
-- final.) `skip`: recalls to leave out, as another table refers to them; `vetoed`: those that a
-- trigger of the application's kept. No index finds them, as it would cost each settle more than
-- reading every page once costs
-- in a day. What the application holds locked is left for the next time, and so is what has its
-- call open. `pages`: of the table as it is now.
with held as materialized (
    select r.ctid
    from session_recalls r
    where r.ctid >= ('(' || %(first)s::bigint || ',0)')::tid
        and r.ctid < ('(' || %(first)s::bigint + %(pages)s::bigint || ',0)')::tid
        and coalesce(r.ended_at, r.updated_at) < now() - interval '1 second'
            * case r.status
                when 'fired' then %(fired)s::float8
                when 'cancelled' then %(cancelled)s::float8
                when 'failed' then %(failed)s::float8
            end
        and (r.lease_until is null or r.lease_until < now())
    limit %(most)s offset %(skip)s
    for update of r skip locked
),
gone as (
    delete from session_recalls r
    where r.ctid = any (array(select ctid from held))
    returning r.status
)
select count(*) filter (where status = 'fired') as fired,
    count(*) filter (where status = 'cancelled') as cancelled,
    count(*) filter (where status = 'failed') as failed, 0::bigint as calls, 0::bigint as actions,
    0::bigint as failures,
    (select count(*) from held) - count(*) as vetoed,
    pg_relation_size('session_recalls') / current_setting('block_size')::bigint as pages
from gone;

-- name: calls
-- The same for the records of calls, without those of occurrences that are not over.
with held as materialized (
    select a.ctid
    from recall_attempts a
    where a.ctid >= ('(' || %(first)s::bigint || ',0)')::tid
        and a.ctid < ('(' || %(first)s::bigint + %(pages)s::bigint || ',0)')::tid
        and a.ended_at < now() - %(calls)s::float8 * interval '1 second'
        -- Looked up one by one by their primary keys: PostgreSQL may answer a `not exists` by
        -- hashing the whole table.
        and (
            select true from session_recalls r
            where r.id = recall_id(a.recall_id) and r.status in ('pending', 'running')
                and r.occurrence = a.occurrence
        ) is not true
    limit %(most)s
    for update of a skip locked
),
gone as (
    delete from recall_attempts a
    where a.ctid = any (array(select ctid from held))
    returning 1
)
select 0::bigint as fired, 0::bigint as cancelled, 0::bigint as failed, count(*) as calls,
    0::bigint as actions, 0::bigint as failures,
    pg_relation_size('recall_attempts') / current_setting('block_size')::bigint as pages
from gone;

-- name: actions
-- The same for what people and agents did: by its age alone, whatever became of the recall. Nobody
-- changes these rows, so none is locked here: that would take the right to change them. They stay
-- for a day at least: recall_keep_actions refuses to have younger ones deleted.
with held as materialized (
    select a.ctid
    from recall_actions a
    where a.ctid >= ('(' || %(first)s::bigint || ',0)')::tid
        and a.ctid < ('(' || %(first)s::bigint + %(pages)s::bigint || ',0)')::tid
        and a.at < now() - greatest(%(actions)s::float8, 86400) * interval '1 second'
    limit %(most)s
),
gone as (
    delete from recall_actions a
    where a.ctid = any (array(select ctid from held))
    returning 1
)
select 0::bigint as fired, 0::bigint as cancelled, 0::bigint as failed, 0::bigint as calls,
    count(*) as actions, 0::bigint as failures,
    pg_relation_size('recall_actions') / current_setting('block_size')::bigint as pages
from gone;

-- name: failures
-- The same for entries of the outbox: delivered ones, those that were given up, and those that
-- nobody wants to be told any more, and so nobody gives up (RECALL_FAILURE_URL was unset).
with held as materialized (
    select o.ctid
    from recall_outbox o
    where o.ctid >= ('(' || %(first)s::bigint || ',0)')::tid
        and o.ctid < ('(' || %(first)s::bigint + %(pages)s::bigint || ',0)')::tid
        and coalesce(
            o.delivered_at, o.given_up_at,
            greatest(o.due_at, o.written_at) + interval '7 days'
        ) < now() - %(failures)s::float8 * interval '1 second'
    limit %(most)s
    for update of o skip locked
),
gone as (
    delete from recall_outbox o
    where o.ctid = any (array(select ctid from held))
    returning 1
)
select 0::bigint as fired, 0::bigint as cancelled, 0::bigint as failed, 0::bigint as calls,
    0::bigint as actions, count(*) as failures,
    pg_relation_size('recall_outbox') / current_setting('block_size')::bigint as pages
from gone;
