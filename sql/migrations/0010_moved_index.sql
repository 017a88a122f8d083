-- works with code from: 1
-- transaction: none
-- Cron recalls that no worker has put on a moment of theirs yet, since an insert or a move by plain SQL: as good as always empty.
create index concurrently if not exists idx_recalls_moved on session_recalls (id)
    where cadence = 'cron' and call_type = 'recurring' and (planned_at <> trigger_at or interval_seconds is null)
        and lease is null and status in ('pending', 'running');
