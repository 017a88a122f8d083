-- Test data, never a migration: a database at version 15 as the migrations 0001 to 0015 left it,
-- before they became the baseline. The schema is what `tests.schema.dump` printed of a database
-- with the application's tables that commit 6bdc742 had migrated: its tests/schema/expected.sql,
-- line by line. Below it, written by hand: what recall_schema had recorded, and rows in every state.

CREATE FUNCTION public.recall_before_insert() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
begin
    if new.call_type = 'recurring' or new.cadence <> 'interval' then
        if new.cadence not in ('interval', 'grid', 'cron') then
            raise exception 'session_recalls: cadence is %, but there are interval, grid and cron', pg_catalog.quote_literal(new.cadence)
                using errcode = 'check_violation';
        end if;
        if new.call_type = 'recurring' and new.cadence = 'cron' then
            if new.cron is null then
                raise exception 'session_recalls: a recurring recall with cadence ''cron'' needs cron' using errcode = 'check_violation',
                    hint = 'Set cron to five fields, minute hour day month weekday, and time_zone to an IANA name.';
            end if;
            if new.interval_seconds < 1 then
                new.interval_seconds := null;
            end if;
        elsif new.call_type = 'recurring' and coalesce(new.interval_seconds, 0) < 1 then
            raise exception 'session_recalls: a recurring recall needs interval_seconds of at least 1, not %',
                coalesce(new.interval_seconds::text, 'null')
                using errcode = 'check_violation',
                    hint = 'Set interval_seconds to the distance between two occurrences in seconds, or use call_type ''once''.';
        end if;
        -- What its skips and moves are told apart by. A one-shot that was never called has no distance to skip, and simply stands where it is put.
        new.planned_at := new.trigger_at;
    end if;
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on. (A failed run, which is over, counts an attempt and begins a new
        -- key; an unknown one counts an attempt and keeps the key.)
        if exists (select from public.session_recalls where session_id = new.session_id and status = 'pending') then
            update public.session_recalls
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and (lease is not null or last_outcome = 'unknown' or attempt > rekey);
        end if;
        -- Who inserts very many at once may do without, and has the workers find them at their next look: set recall_worker.rings = 'off'.
        if new.trigger_at <= pg_catalog.now() + interval '60 seconds' and new.paused_at is null
            and pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
            perform pg_catalog.pg_notify('session_recalls', '');
        end if;
    end if;
    return new;
end
$$;

CREATE FUNCTION public.recall_ring() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
begin
    perform pg_catalog.pg_notify('session_recalls', '');
    return null;
end
$$;

CREATE TABLE public.recall_attempts (
    recall_id text NOT NULL,
    occurrence integer NOT NULL,
    rekey integer NOT NULL,
    attempt integer NOT NULL,
    outcome text NOT NULL,
    session_id text NOT NULL,
    worker text NOT NULL,
    lease uuid NOT NULL,
    calls integer DEFAULT 1 NOT NULL,
    scheduled_for timestamp with time zone NOT NULL,
    called_at timestamp with time zone,
    last_called_at timestamp with time zone,
    ended_at timestamp with time zone NOT NULL,
    http_status integer,
    reason text,
    settled text NOT NULL,
    delivered_at timestamp with time zone,
    completed_at timestamp with time zone,
    missed integer DEFAULT 0 NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0.05');

COMMENT ON COLUMN public.recall_attempts.calls IS 'how many calls this row stands for';

COMMENT ON COLUMN public.recall_attempts.called_at IS 'when the first of them was sent';

COMMENT ON COLUMN public.recall_attempts.last_called_at IS 'when the last of them was sent';

COMMENT ON COLUMN public.recall_attempts.ended_at IS 'when the last of them ended';

COMMENT ON COLUMN public.recall_attempts.settled IS 'what the ending did to the row: the status it was settled to, or why it changed nothing (ended, lost, deleted), or taken where the worker died';

COMMENT ON COLUMN public.recall_attempts.delivered_at IS 'when the API took the run: answered at once, or accepted to be ended later';

COMMENT ON COLUMN public.recall_attempts.completed_at IS 'when the run was known to have ended, well or badly';

CREATE TABLE public.recall_chores (
    chore text NOT NULL,
    worker text NOT NULL,
    until timestamp with time zone NOT NULL,
    rests boolean DEFAULT false NOT NULL
);

COMMENT ON COLUMN public.recall_chores.worker IS 'whose turn it is, or was last';

COMMENT ON COLUMN public.recall_chores.until IS 'before this instant nobody else begins: the turn is over sooner, or was left by a worker that died';

COMMENT ON COLUMN public.recall_chores.rests IS 'whether the turn is over, and until is when the next one may begin';

CREATE TABLE public.recall_endpoints (
    endpoint text NOT NULL,
    probed_at timestamp with time zone,
    probes integer DEFAULT 0 NOT NULL,
    answered_at timestamp with time zone
);

CREATE TABLE public.recall_schema (
    version integer NOT NULL,
    name text NOT NULL,
    oldest_code integer NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE public.recall_workers (
    worker text NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    version text NOT NULL,
    started_at timestamp with time zone DEFAULT now() NOT NULL,
    seen_at timestamp with time zone DEFAULT now() NOT NULL,
    slots integer NOT NULL,
    running integer DEFAULT 0 NOT NULL,
    breaker text DEFAULT 'closed'::text NOT NULL,
    settings jsonb NOT NULL,
    bell text DEFAULT 'listening'::text NOT NULL
);

COMMENT ON COLUMN public.recall_workers.bell IS 'listening; lost: it has no connection; unheard: what is rung does not reach it, as behind a transaction pooler';

CREATE TABLE public.session_recalls (
    id text NOT NULL,
    session_id text NOT NULL,
    call_type text NOT NULL,
    trigger_at timestamp with time zone NOT NULL,
    interval_seconds integer,
    internal_comment text,
    additional_context_message text NOT NULL,
    status text DEFAULT 'pending'::text NOT NULL,
    created_at timestamp with time zone NOT NULL,
    updated_at timestamp with time zone NOT NULL,
    lease uuid,
    lease_until timestamp with time zone,
    leased_at timestamp with time zone,
    leased_by text,
    occurrence integer DEFAULT 1 NOT NULL,
    rekey integer DEFAULT 0 NOT NULL,
    attempt integer DEFAULT 0 NOT NULL,
    deferrals integer DEFAULT 0 NOT NULL,
    scheduled_for timestamp with time zone,
    planned_at timestamp with time zone,
    begun_at timestamp with time zone,
    missed integer DEFAULT 0 NOT NULL,
    last_outcome text,
    reason text,
    ended_at timestamp with time zone,
    paused_at timestamp with time zone,
    run_reference text,
    delivered_at timestamp with time zone,
    body_hash text,
    cadence text DEFAULT 'interval'::text NOT NULL,
    cron text,
    time_zone text,
    until_at timestamp with time zone,
    times integer,
    failures integer DEFAULT 0 NOT NULL,
    failures_most integer,
    grace_seconds integer,
    jitter_seconds integer,
    CONSTRAINT session_recalls_call_type_check CHECK ((call_type = ANY (ARRAY['once'::text, 'recurring'::text, 'immediate'::text]))),
    CONSTRAINT session_recalls_status_known CHECK ((status = ANY (ARRAY['pending'::text, 'running'::text, 'fired'::text, 'cancelled'::text, 'failed'::text])))
)
WITH (autovacuum_vacuum_scale_factor='0.05');

COMMENT ON COLUMN public.session_recalls.lease IS 'the right to settle: a fresh uuid for each claim, null while nobody runs this recall';

COMMENT ON COLUMN public.session_recalls.lease_until IS 'when another worker may take a leased row up; while leased, the row is due at this instant';

COMMENT ON COLUMN public.session_recalls.leased_at IS 'when the lease was taken';

COMMENT ON COLUMN public.session_recalls.leased_by IS 'the worker that holds (or last held) the lease';

COMMENT ON COLUMN public.session_recalls.occurrence IS 'number of the occurrence that waits or runs, from 1';

COMMENT ON COLUMN public.session_recalls.rekey IS 'how many times this occurrence was given a new idempotency key';

COMMENT ON COLUMN public.session_recalls.attempt IS 'attempts of this occurrence so far; one is counted at each claim and given back on defer and release';

COMMENT ON COLUMN public.session_recalls.deferrals IS 'calls of this occurrence that cost no attempt (busy, unavailable, misconfigured)';

COMMENT ON COLUMN public.session_recalls.scheduled_for IS 'nominal time of this occurrence, from its first claim on; null before, when it is trigger_at';

COMMENT ON COLUMN public.session_recalls.planned_at IS 'trigger_at as the insert or the worker last wrote it; another trigger_at means that the application moved it';

COMMENT ON COLUMN public.session_recalls.begun_at IS 'when this occurrence was first called; null before';

COMMENT ON COLUMN public.session_recalls.missed IS 'due moments that this occurrence stands for besides its own, fixed at its first claim';

COMMENT ON COLUMN public.session_recalls.last_outcome IS 'how the last call ended';

COMMENT ON COLUMN public.session_recalls.reason IS 'why the recall waits, or why it ended, in a sentence';

COMMENT ON COLUMN public.session_recalls.ended_at IS 'when the worker settled the recall for good';

COMMENT ON COLUMN public.session_recalls.paused_at IS 'since when an operator holds this recall back';

COMMENT ON COLUMN public.session_recalls.run_reference IS 'how the API calls the run that it accepted, while that run goes on';

COMMENT ON COLUMN public.session_recalls.delivered_at IS 'when the API accepted that run';

COMMENT ON COLUMN public.session_recalls.body_hash IS 'what the last claim was to send: its occurrence, and a hash of what the application may change';

COMMENT ON COLUMN public.session_recalls.cadence IS 'interval: interval_seconds after the run ended; grid: every interval_seconds from the first trigger_at; cron: by `cron` in `time_zone`';

COMMENT ON COLUMN public.session_recalls.cron IS 'five fields: minute, hour, day of month, month, day of week';

COMMENT ON COLUMN public.session_recalls.time_zone IS 'an IANA name, such as Europe/Berlin; null: UTC';

COMMENT ON COLUMN public.session_recalls.until_at IS 'no occurrence after this; the recall then ends as its last occurrence did';

COMMENT ON COLUMN public.session_recalls.times IS 'so many occurrences in all, skipped ones too; the recall then ends as its last occurrence did';

COMMENT ON COLUMN public.session_recalls.failures IS 'occurrences that failed in a row so far';

COMMENT ON COLUMN public.session_recalls.failures_most IS 'so many failed occurrences in a row end the recall as failed; null: never';

COMMENT ON COLUMN public.session_recalls.grace_seconds IS 'an occurrence that is later than this is not run, but recorded as misfired; null: it is run however late';

COMMENT ON COLUMN public.session_recalls.jitter_seconds IS 'each occurrence after the first is due a random part of this later than its time; null: none';

CREATE TABLE public.sessions (
    id text NOT NULL,
    user_id text NOT NULL
);

ALTER TABLE ONLY public.recall_attempts
    ADD CONSTRAINT recall_attempts_pkey PRIMARY KEY (recall_id, occurrence, rekey, attempt, outcome);

ALTER TABLE ONLY public.recall_chores
    ADD CONSTRAINT recall_chores_pkey PRIMARY KEY (chore);

ALTER TABLE ONLY public.recall_endpoints
    ADD CONSTRAINT recall_endpoints_pkey PRIMARY KEY (endpoint);

ALTER TABLE ONLY public.recall_schema
    ADD CONSTRAINT recall_schema_pkey PRIMARY KEY (version);

ALTER TABLE ONLY public.recall_workers
    ADD CONSTRAINT recall_workers_pkey PRIMARY KEY (worker);

ALTER TABLE ONLY public.session_recalls
    ADD CONSTRAINT session_recalls_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (id);

CREATE INDEX idx_recall_attempts_ended_at ON public.recall_attempts USING brin (ended_at) WITH (pages_per_range='32', autosummarize='on');

CREATE INDEX idx_recall_attempts_session ON public.recall_attempts USING btree (session_id, last_called_at);

CREATE INDEX idx_recalls_aborting ON public.session_recalls USING btree (session_id) WHERE ((lease IS NOT NULL) AND (status <> ALL (ARRAY['pending'::text, 'running'::text])));

CREATE UNIQUE INDEX idx_recalls_active_pending ON public.session_recalls USING btree (session_id) WHERE (status = 'pending'::text);

CREATE INDEX idx_recalls_due ON public.session_recalls USING btree (COALESCE(lease_until, trigger_at)) WHERE ((status = ANY (ARRAY['pending'::text, 'running'::text])) AND (paused_at IS NULL));

CREATE INDEX idx_recalls_moved ON public.session_recalls USING btree (id) WHERE ((cadence = 'cron'::text) AND (call_type = 'recurring'::text) AND ((planned_at <> trigger_at) OR (interval_seconds IS NULL)) AND (lease IS NULL) AND (status = ANY (ARRAY['pending'::text, 'running'::text])));

CREATE UNIQUE INDEX idx_recalls_one_run ON public.session_recalls USING btree (session_id) WHERE ((lease IS NOT NULL) AND (status = ANY (ARRAY['pending'::text, 'running'::text])));

CREATE INDEX idx_recalls_session_status ON public.session_recalls USING btree (session_id, status);

CREATE INDEX idx_recalls_trigger_at_status ON public.session_recalls USING btree (trigger_at, status);

CREATE TRIGGER recall_before_insert BEFORE INSERT ON public.session_recalls FOR EACH ROW EXECUTE FUNCTION public.recall_before_insert();

CREATE TRIGGER recall_ring_deleted AFTER DELETE ON public.session_recalls FOR EACH ROW WHEN ((old.lease IS NOT NULL)) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_earlier AFTER UPDATE OF trigger_at, status, paused_at ON public.session_recalls FOR EACH ROW WHEN (((new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.paused_at IS NULL) AND (new.lease IS NULL) AND (old.lease IS NULL) AND (new.trigger_at <= (now() + '00:01:00'::interval)) AND ((new.trigger_at < old.trigger_at) OR (old.status <> ALL (ARRAY['pending'::text, 'running'::text])) OR (old.paused_at IS NOT NULL)))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_ended AFTER UPDATE OF status ON public.session_recalls FOR EACH ROW WHEN (((new.lease IS NOT NULL) AND (new.lease = old.lease) AND (old.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.status <> ALL (ARRAY['pending'::text, 'running'::text])))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_moved AFTER UPDATE OF trigger_at ON public.session_recalls FOR EACH ROW WHEN (((new.cadence = 'cron'::text) AND (new.lease IS NULL) AND (new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.trigger_at IS DISTINCT FROM old.trigger_at) AND (new.trigger_at IS DISTINCT FROM new.planned_at))) EXECUTE FUNCTION public.recall_ring();

ALTER TABLE ONLY public.session_recalls
    ADD CONSTRAINT session_recalls_session_id_fkey FOREIGN KEY (session_id) REFERENCES public.sessions(id) ON DELETE CASCADE;

-- What was recorded.

insert into public.recall_schema (version, name, oldest_code) values
    (1, 'adopt', 1),
    (2, 'validate_status', 1),
    (3, 'due_index', 1),
    (4, 'one_run_index', 1),
    (5, 'aborting_index', 1),
    (6, 'attempts_by_time', 1),
    (7, 'accepted', 1),
    (8, 'attempts_by_session', 1),
    (9, 'cadence', 1),
    (10, 'moved_index', 1),
    (11, 'bell', 1),
    (12, 'ring_qualified', 1),
    (13, 'slot_of_the_unknown', 1),
    (14, 'one_trigger_on_insert', 1),
    (15, 'prune', 1);

-- Rows in every state: first as the application inserts them, then as the worker, an operator or
-- the application left them. The id of each says which state it is.

insert into public.sessions (id, user_id)
select 's-' || state, 'ann'
from unnest(array[
    'waiting', 'odd', 'far', 'leased', 'expired', 'moved-out', 'put-back', 'accepted', 'deferred',
    'retried', 'unknown', 'paused', 'paused-in-run', 'interval', 'grid', 'cron', 'cron-moved',
    'fired', 'cancelled', 'aborting', 'failed'
]) state;

insert into public.session_recalls (
    id, session_id, call_type, trigger_at, interval_seconds, additional_context_message,
    created_at, updated_at
)
select state, 's-' || state, kind, at::timestamptz, seconds, 'it''s "100 %" — ' || state,
    '2024-01-01', '2024-06-01'
from (values
    ('waiting', 'once', '2100-01-01', null),
    ('odd', 'once', '-infinity', -5),
    ('far', 'immediate', 'infinity', null),
    ('leased', 'once', '2024-06-01', null),
    ('expired', 'once', '2024-06-01', null),
    ('moved-out', 'once', '2024-06-01', null),
    ('put-back', 'once', '2024-06-01', null),
    ('accepted', 'immediate', '2024-06-01', null),
    ('deferred', 'once', '2024-06-01', null),
    ('retried', 'once', '2024-06-01', null),
    ('unknown', 'once', '2024-06-01', null),
    ('paused', 'once', '2024-06-01', null),
    ('paused-in-run', 'once', '2024-06-01', null),
    ('interval', 'recurring', '2024-06-01', 3600),
    ('fired', 'once', '2024-06-01', null),
    ('cancelled', 'recurring', '2024-06-01', 60),
    ('aborting', 'once', '2024-06-01', null),
    ('failed', 'once', '2024-06-01', null)
) as r (state, kind, at, seconds);

insert into public.session_recalls (
    id, session_id, call_type, trigger_at, interval_seconds, additional_context_message,
    created_at, updated_at, cadence, cron, time_zone, until_at, times, failures, failures_most,
    grace_seconds, jitter_seconds
) values
    ('grid', 's-grid', 'recurring', '2024-06-01', 86400, 'on the grid', '2024-01-01', '2024-06-01',
        'grid', null, null, '2030-01-01', 100, 2, 5, 300, 30),
    ('cron', 's-cron', 'recurring', '2024-06-01', null, 'by cron', '2024-01-01', '2024-06-01',
        'cron', '0 9 * * 1-5', 'Europe/Berlin', null, null, 0, null, null, null),
    ('cron-moved', 's-cron-moved', 'recurring', '2024-06-01', 86400, 'by cron', '2024-01-01',
        '2024-06-01', 'cron', '0 9 * * *', null, null, null, 0, null, null, null);

-- In the hand of a worker: the lease goes on, has ended, or follows a run that the API accepted.
update public.session_recalls
set lease = gen_random_uuid(), leased_at = now(), leased_by = 'worker-1', attempt = 1,
    lease_until = case id when 'expired' then '2024-06-01' else now() + interval '1 hour' end,
    scheduled_for = trigger_at, begun_at = now(), body_hash = '1:abc'
where id in ('leased', 'expired', 'moved-out', 'accepted', 'aborting', 'paused-in-run', 'put-back');
update public.session_recalls
set run_reference = 'http://127.0.0.1/runs/1', delivered_at = now()
where id = 'accepted';

-- One-shots whose session has scheduled the next recall from inside the run: the trigger makes them
-- `running`. One is still leased, the other was put back to wait beside it.
insert into public.session_recalls (
    id, session_id, call_type, trigger_at, additional_context_message, created_at, updated_at
) values
    ('next-1', 's-moved-out', 'once', '2100-01-01', 'the next one', '2024-01-01', '2024-06-01'),
    ('next-2', 's-put-back', 'once', '2100-01-01', 'the next one', '2024-01-01', '2024-06-01');
update public.session_recalls
set lease = null, lease_until = null, trigger_at = '2100-01-01', planned_at = '2100-01-01',
    last_outcome = 'unavailable', deferrals = 1, attempt = 0
where id = 'put-back';

-- Waiting after a call.
update public.session_recalls
set last_outcome = 'busy', deferrals = 3, reason = 'the session is busy'
where id = 'deferred';
update public.session_recalls
set last_outcome = 'failed', attempt = 1, rekey = 1, reason = 'the run failed'
where id = 'retried';
update public.session_recalls
set last_outcome = 'unknown', attempt = 1, reason = 'the connection broke'
where id = 'unknown';
update public.session_recalls
set occurrence = 7, last_outcome = 'answered', missed = 2
where id = 'interval';

-- Held back by an operator, or moved by the application.
update public.session_recalls set paused_at = now() where id in ('paused', 'paused-in-run');
update public.session_recalls set trigger_at = '2100-01-01' where id = 'cron-moved';

-- Expired: settled by the worker, or ended by the application (one of them while it was leased).
update public.session_recalls
set status = 'fired', ended_at = now(), last_outcome = 'answered', attempt = 1
where id = 'fired';
update public.session_recalls
set status = 'failed', ended_at = now(), last_outcome = 'refused', reason = 'HTTP 422', attempt = 1
where id = 'failed';
update public.session_recalls set status = 'cancelled' where id in ('cancelled', 'aborting');

insert into public.recall_attempts (
    recall_id, occurrence, rekey, attempt, outcome, session_id, worker, lease, calls,
    scheduled_for, called_at, last_called_at, ended_at, http_status, reason, settled
) values
    ('fired', 1, 0, 1, 'answered', 's-fired', 'worker-1', gen_random_uuid(), 1,
        '2024-06-01', now(), now(), now(), 200, null, 'fired'),
    ('deferred', 1, 0, 0, 'busy', 's-deferred', 'worker-1', gen_random_uuid(), 3,
        '2024-06-01', now(), now(), now(), 409, 'the session is busy', 'pending'),
    ('deleted', 1, 0, 1, 'unknown', 's-deleted', 'worker-2', gen_random_uuid(), 1,
        '2024-06-01', now(), now(), now(), null, 'the connection broke', 'deleted');

insert into public.recall_workers (worker, host, pid, version, slots, running, settings) values
    ('worker-1', 'host-1', 4711, '0.1.0', 3, 2, '{"queue": "default"}');
insert into public.recall_endpoints (endpoint, probed_at, probes) values
    ('http://127.0.0.1/runs', now(), 1);
insert into public.recall_chores (chore, worker, until) values ('prune', 'worker-1', now());
