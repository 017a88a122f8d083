CREATE FUNCTION public.recall_before_insert() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
begin
    if new.call_type = 'recurring' or new.cadence <> 'interval' then
        if new.cadence not in ('interval', 'grid', 'cron') then
            raise exception 'session_recalls: cadence is %, but there are interval, grid and cron',
                pg_catalog.quote_literal(new.cadence)
                using errcode = 'check_violation';
        end if;
        if new.call_type = 'recurring' and new.cadence = 'cron' then
            if new.cron is null then
                raise exception
                    'session_recalls: a recurring recall with cadence ''cron'' needs cron'
                    using errcode = 'check_violation',
                        hint = 'Set cron to five fields, minute hour day month weekday, '
                            'and time_zone to an IANA name.';
            end if;
            if new.interval_seconds < 1 then
                new.interval_seconds := null;
            end if;
        elsif new.call_type = 'recurring' and coalesce(new.interval_seconds, 0) < 1 then
            raise exception
                'session_recalls: a recurring recall needs interval_seconds of at least 1, not %',
                coalesce(new.interval_seconds::text, 'null')
                using errcode = 'check_violation',
                    hint = 'Set interval_seconds to the distance between two occurrences '
                        'in seconds, or use call_type ''once''.';
        end if;
        -- Skips and moves are recognized by it. A one-shot that was never called has no interval
        -- to skip: its trigger_at is simply when it is due.
        new.planned_at := new.trigger_at;
    end if;
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on: may_still_run says so.
        -- Where a worker of an earlier version wrote the row: a failed run, which is over, counts
        -- an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        if exists (select from public.session_recalls where session_id = new.session_id and status = 'pending') then
            update public.session_recalls
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and (
                    lease is not null or may_still_run
                    or last_outcome = 'unknown' or attempt > rekey
                );
        end if;
        -- Applications that insert very many rows at once may do without notifications, and leave
        -- them to the workers' next poll: set recall_worker.rings = 'off'.
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
    sent_at timestamp with time zone,
    taken_lease uuid,
    takeovers integer DEFAULT 0 NOT NULL,
    may_still_run boolean DEFAULT false NOT NULL,
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

COMMENT ON COLUMN public.session_recalls.sent_at IS 'when the request under this lease was sent, where that is on record; a time before leased_at is of an earlier lease';

COMMENT ON COLUMN public.session_recalls.taken_lease IS 'the lease of a row that was taken up from a dead worker: under it nothing is sent before sent_at is written';

COMMENT ON COLUMN public.session_recalls.takeovers IS 'how many workers in a row took it up from a dead one, and are not known to have sent anything';

COMMENT ON COLUMN public.session_recalls.may_still_run IS 'whether a run of it may still go on at the API, as a call ended as unknown: its session''s slot is free for the next recall';

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

CREATE TRIGGER recall_ring_earlier AFTER UPDATE OF trigger_at, status, paused_at ON public.session_recalls FOR EACH ROW WHEN (((new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.paused_at IS NULL) AND (COALESCE(new.lease_until, new.trigger_at) <= (now() + '00:01:00'::interval)) AND (((new.lease IS NULL) AND (old.lease IS NULL) AND (new.trigger_at < old.trigger_at)) OR (old.status <> ALL (ARRAY['pending'::text, 'running'::text])) OR (old.paused_at IS NOT NULL)))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_ended AFTER UPDATE OF status ON public.session_recalls FOR EACH ROW WHEN (((new.lease IS NOT NULL) AND (new.lease = old.lease) AND (old.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.status <> ALL (ARRAY['pending'::text, 'running'::text])))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_moved AFTER UPDATE OF trigger_at ON public.session_recalls FOR EACH ROW WHEN (((new.cadence = 'cron'::text) AND (new.lease IS NULL) AND (new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.trigger_at IS DISTINCT FROM old.trigger_at) AND (new.trigger_at IS DISTINCT FROM new.planned_at))) EXECUTE FUNCTION public.recall_ring();

ALTER TABLE ONLY public.session_recalls
    ADD CONSTRAINT session_recalls_session_id_fkey FOREIGN KEY (session_id) REFERENCES public.sessions(id) ON DELETE CASCADE;
