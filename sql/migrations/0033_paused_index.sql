-- works with code from: 15
-- transaction: none
-- Paused recalls by when they would be due, which no other index has: `list --state paused`, the
-- console's agenda. A recall that nobody pauses is not in it.
create index concurrently if not exists idx_recalls_paused
    on session_recalls (trigger_at)
    where status in ('pending', 'running') and paused_at is not null;
