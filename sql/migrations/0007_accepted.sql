-- works with code from: 1
-- Runs that the API accepts and ends later, caps, keys that stand for one body, and what the workers tell each other about the endpoint.
lock table session_recalls in access exclusive mode;
alter table session_recalls
    add column run_reference text,
    add column delivered_at timestamptz,
    add column body_hash text;
comment on column session_recalls.run_reference is 'how the API calls the run that it accepted, while that run goes on';
comment on column session_recalls.delivered_at is 'when the API accepted that run';
comment on column session_recalls.body_hash is 'what the last claim was to send: its occurrence, and a hash of what the application may change';

alter table recall_attempts
    add column delivered_at timestamptz,
    add column completed_at timestamptz;
comment on column recall_attempts.delivered_at is 'when the API took the run: answered at once, or accepted to be ended later';
comment on column recall_attempts.completed_at is 'when the run was known to have ended, well or badly';

-- One row an endpoint: replicas share the probes while it is down, and its first answer.
create table recall_endpoints (
    endpoint text primary key,
    probed_at timestamptz,
    probes integer not null default 0,
    answered_at timestamptz
);
