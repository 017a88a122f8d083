-- works with code from: 15
-- The endpoint kit (recall_worker.endpoint): keys and sessions that several processes of an API
-- agree on. Empty for everybody who does not use it; workers never read these tables.

-- A row for each idempotency key. It goes on while its session is held under its lease; else,
-- where it has not ended, its process has died. The key is bounded by the code that writes it.
create table recall_runs (
    key text primary key,
    session_id text not null,
    fingerprint text not null,
    lease uuid not null,
    starts integer not null default 1,
    started_at timestamptz not null default now(),
    stored_at timestamptz,
    accepted_at timestamptz,
    ended_at timestamptz,
    status text,
    answer text,
    check ((ended_at is null) = (answer is null))
);
comment on table recall_runs is
    'the endpoint kit: runs of the agent by their idempotency keys, and their answers';
comment on column recall_runs.key is 'Idempotency-Key, as it came';
comment on column recall_runs.session_id is
    'the session, as text; no foreign key, as the application may keep its sessions elsewhere';
comment on column recall_runs.fingerprint is 'SHA-256 of the request''s body, in hexadecimal: a key has one body';
comment on column recall_runs.lease is
    'under which the session was taken for it, a fresh uuid for each start';
comment on column recall_runs.starts is
    'how often it was started: more than once where a process died in mid-run';
comment on column recall_runs.started_at is 'when it was started last';
comment on column recall_runs.stored_at is
    'when the application had stored the system message of this key';
comment on column recall_runs.accepted_at is
    'when its caller was told 202 and an address: from then on it is polled, and not called again';
comment on column recall_runs.ended_at is 'when its answer was kept; null: it goes on, or is lost';
comment on column recall_runs.status is 'how it ended: completed, failed, cancelled';
comment on column recall_runs.answer is 'the JSON text by which the same request is answered again';

-- What is to be pruned, by its age.
create index idx_recall_runs_started on recall_runs (started_at);

-- A row for each session that is held, by a run or by a chat. No row, or a lease that has ended: the
-- session is free. Rows come and go with each run.
create table recall_session_locks (
    session_id text primary key,
    lease uuid not null,
    key text,
    taken_at timestamptz not null default now(),
    until timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0.05);
comment on table recall_session_locks is
    'the endpoint kit: sessions in which a run, or a chat, is just now';
comment on column recall_session_locks.lease is
    'the right to renew and to free it, a fresh uuid each time it is taken';
comment on column recall_session_locks.key is 'of the run that has it; null: a chat';
comment on column recall_session_locks.until is
    'when the lease ends, if it is not renewed: then others may take the session';
