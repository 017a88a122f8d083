-- works with code from: 15
-- transaction: none
-- Deferred recalls by when they are called again, among however many that wait: `list --state
-- deferred`. A recall that is called once is never in it.
create index concurrently if not exists idx_recalls_deferred
    on session_recalls (coalesce(lease_until, trigger_at))
    where status in ('pending', 'running') and paused_at is null and lease is null
        and deferrals > 0;
