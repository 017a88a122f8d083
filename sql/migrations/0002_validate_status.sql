-- works with code from: 1
-- Reads every row once, under a lock that lets readers and writers pass.
alter table session_recalls validate constraint session_recalls_status_known;
