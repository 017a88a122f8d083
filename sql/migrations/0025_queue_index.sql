-- works with code from: 15
-- transaction: none
-- When a live row of a queue is due. With it a claim reads its own queues only, however much is due
-- in others. idx_recalls_due stays: workers of versions without queues need it, and whatever asks
-- about all queues together.
create index concurrently if not exists idx_recalls_queue_due
    on session_recalls (queue, coalesce(lease_until, trigger_at))
    where status in ('pending', 'running') and paused_at is null;
