-- works with code from: 15
-- transaction: none
-- The last part of the baseline. Cron recalls that were inserted or moved by plain SQL, and that no
-- worker has put on a moment of their cron expression yet: almost always none.
create index concurrently if not exists idx_recalls_moved on session_recalls (id)
    where cadence = 'cron' and call_type = 'recurring'
        and (planned_at <> trigger_at or interval_seconds is null)
        and lease is null and status in ('pending', 'running');
