-- Failed recalls are told to RECALL_FAILURE_URL: the worker's statements for the table
-- recall_outbox, which a trigger fills (recall_on_failure). Apart from the worker's other
-- statements, as a worker without the setting sends none of these.

-- name: subscribe
-- That failures in these queues are to be told, for so long; and what is too old to be told any
-- more. Asked at the start and then each hour: only a row that is about to lapse is written, so
-- that replicas do not wait for each other.
with subscribed as (
    insert into recall_subscriptions as s (queue, until)
    select q.queue, now() + %(wanted_for)s * interval '1 second'
    from unnest(%(queues)s::text[]) q (queue)
    where not exists (
        select from recall_subscriptions t
        where t.queue = q.queue
            and t.until > now() + 0.9 * %(wanted_for)s * interval '1 second'
    )
    order by q.queue
    on conflict (queue) do update set until = greatest(s.until, excluded.until)
),
old as materialized (
    select o.id
    from recall_outbox o
    where o.delivered_at is null and o.given_up_at is null and o.due_at <= now()
        and o.queue = any (%(queues)s::text[])
        and o.written_at < now() - %(keep)s * interval '1 second'
    order by o.due_at
    limit %(most)s
    for update of o skip locked
)
update recall_outbox o
set given_up_at = now(), lease = null
where o.id = any (array(select id from old))
returning o.id::text as id, o.recall_id, o.tries, o.reason,
    extract(epoch from now() - o.written_at)::float8 as age;

-- name: take
-- The entries that are due, oldest first, each under a lease: another worker sends it again if this
-- one dies. The try is counted now, as it may be what kills the worker.
with due as materialized (
    select o.id
    from recall_outbox o
    where o.delivered_at is null and o.given_up_at is null and o.due_at <= now()
        and o.queue = any (%(queues)s::text[])
    order by o.due_at
    limit %(most)s
    for update of o skip locked
)
update recall_outbox o
set lease = gen_random_uuid(), due_at = now() + %(lease)s * interval '1 second',
    tries = least(greatest(o.tries, 0), 2147483646) + 1
where o.id = any (array(select id from due))
returning o.id::text as id, o.lease, o.recall_id, o.tries,
    -- A text that can't be read here must not hold up the others: it is then taken without.
    case when %(whole)s then o.body end as body,
    extract(epoch from now() - o.written_at)::float8 as age;

-- name: next
-- When the next entry is due; null where none waits.
select extract(
        epoch from least(greatest(o.due_at, now()), now() + interval '1 day') - now()
    )::float8 as next_in
from recall_outbox o
where o.delivered_at is null and o.given_up_at is null
    and o.queue = any (%(queues)s::text[])
order by o.due_at
limit 1;

-- name: record
-- How a try ended; guarded by its lease, as another worker may have taken the entry meanwhile.
-- `delay`: seconds until the next try. An entry that is delivered is so whoever holds the lease.
update recall_outbox o
set lease = null, http_status = %(http_status)s, reason = %(reason)s,
    delivered_at = case when %(delivered)s then now() end,
    given_up_at = case when %(given_up)s then now() end,
    due_at = now() + coalesce(%(delay)s, 0) * interval '1 second'
where o.id = %(id)s::uuid and (o.lease = %(lease)s::uuid or %(delivered)s)
    and o.delivered_at is null;

-- name: waiting
-- How many entries are not delivered yet, and for how long the oldest has waited: for monitoring.
-- Counted to a bound, so that it costs the same at any size.
select count(*) as untold,
    coalesce(extract(epoch from now() - min(w.written_at)), 0)::float8 as oldest
from (
    select o.written_at
    from recall_outbox o
    where o.delivered_at is null and o.given_up_at is null
        and o.queue = any (%(queues)s::text[])
    order by o.due_at
    limit %(most)s
) w;
