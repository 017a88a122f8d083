-- works with code from: 1
-- Whether a worker is rung, or has to look at the table every now and then: for people (`workers`, `doctor`).
alter table recall_workers add column bell text not null default 'listening';
comment on column recall_workers.bell is 'listening; lost: it has no connection; unheard: what is rung does not reach it, as behind a transaction pooler';
