-- works with code from: 1
-- transaction: none
-- For the cap on a session's runs.
create index concurrently if not exists idx_recall_attempts_session on recall_attempts (session_id, last_called_at);
