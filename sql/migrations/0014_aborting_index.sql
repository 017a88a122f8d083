-- works with code from: 15
-- transaction: none
-- Recalls that somebody ended while they were leased: the call may still be open, so the session
-- is not free yet.
create index concurrently if not exists idx_recalls_aborting on session_recalls (session_id)
    where lease is not null and status not in ('pending', 'running');
