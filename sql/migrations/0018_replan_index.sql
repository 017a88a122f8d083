-- works with code from: 15
-- transaction: none
-- As idx_recalls_moved, and with it: cron recalls whose moment is to be computed by a worker, as
-- plain SQL inserted, moved or edited them. Almost always none.
create index concurrently if not exists idx_recalls_replan on session_recalls (id)
    where cadence = 'cron' and call_type = 'recurring'
        and (planned_at <> trigger_at or interval_seconds is null or edit_of = occurrence
            or skips > 0)
        and lease is null and status in ('pending', 'running');
drop index concurrently if exists idx_recalls_moved;
-- Waiting cron recalls by the time zone data of their moments: few, and looked through when a
-- worker with newer data starts.
create index concurrently if not exists idx_recalls_zone_data on session_recalls (zone_data)
    where cadence = 'cron' and time_zone is not null and status in ('pending', 'running');
