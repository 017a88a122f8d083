-- works with code from: 15
-- transaction: none
-- When a live row is due: at lease_until while it is leased, else at trigger_at. First due time,
-- deferral, retry and expired lease are all this one number, and its minimum is the next time to
-- wake.
create index concurrently if not exists idx_recalls_due
    on session_recalls (coalesce(lease_until, trigger_at))
    where status in ('pending', 'running') and paused_at is null;
