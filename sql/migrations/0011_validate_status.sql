-- works with code from: 15
-- The baseline, part two. Reads every row once, under a lock that lets readers and writers pass:
-- apart from 0010, whose exclusive lock would stop them meanwhile.
alter table session_recalls validate constraint session_recalls_status_known;
