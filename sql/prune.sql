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

-- name: recalls
-- One batch, a range of the table's pages, read in their order: recalls in it that have been over
-- for as long as their status is kept, at most so many. (Null keeps for ever, and so is what is not
-- final.) No index finds them, as it would cost each settle more than reading every page once costs
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
    limit %(most)s
    for update of r skip locked
),
gone as (
    delete from session_recalls r
    where r.ctid = any (array(select ctid from held))
    returning r.status
)
select count(*) filter (where status = 'fired') as fired,
    count(*) filter (where status = 'cancelled') as cancelled,
    count(*) filter (where status = 'failed') as failed, 0::bigint as calls,
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
            where r.id = a.recall_id and r.status in ('pending', 'running')
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
    pg_relation_size('recall_attempts') / current_setting('block_size')::bigint as pages
from gone;
