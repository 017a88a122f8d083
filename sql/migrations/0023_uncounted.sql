-- works with code from: 15
-- Calls of an occurrence that may have run and cost no attempt, as a gateway answered them for a
-- server that was away, or a web page came back: they are bounded, too.
lock table session_recalls in access exclusive mode;
alter table session_recalls
    add column uncounted integer not null default 0;
comment on column session_recalls.uncounted is
    'calls of this occurrence that may have run and cost no attempt; '
    'of an occurrence that was not called yet (begun_at), what an earlier one left behind';
