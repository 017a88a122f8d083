-- works with code from: 15
-- transaction: none
-- Two runs never meet in a session, whatever two claims at once have read.
create unique index concurrently if not exists idx_recalls_one_run on session_recalls (session_id)
    where lease is not null and status in ('pending', 'running');
