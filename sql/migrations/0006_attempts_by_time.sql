-- works with code from: 1
-- For `stats` and `prune`: marks are written in the order of time, so a few bytes for each hundred pages find them by it.
create index idx_recall_attempts_ended_at on recall_attempts using brin (ended_at) with (pages_per_range = 32, autosummarize = on);
