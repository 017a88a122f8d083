-- works with code from: 15
-- then: statuses
-- The baseline, part one: adopts the application's table where it stands, or creates it where it
-- is missing, and creates the tables of recall-worker. 0011 to 0015 complete it. Together they are
-- version 15, and stand for the migrations 0001 to 0015 from before the first release.
--
-- Nothing here reads or rewrites a row: columns come with constant defaults (no rewrite since
-- PostgreSQL 11) and the constraint NOT VALID, so the exclusive lock is held for milliseconds.
-- The foreign key to sessions is not created here but checked by each `migrate`, as the table
-- sessions may appear later.

-- The table as the application creates it, for the case that the worker is installed first.
do $$
begin
    if to_regclass('session_recalls') is null then
        create table session_recalls (
            id text primary key,
            session_id text not null,
            call_type text not null check (call_type in ('once', 'recurring', 'immediate')),
            trigger_at timestamptz not null,
            interval_seconds integer,
            internal_comment text,
            additional_context_message text not null,
            status text not null default 'pending'
                check (status in ('pending', 'fired', 'cancelled')),
            created_at timestamptz not null,
            updated_at timestamptz not null
        );
        create index idx_recalls_trigger_at_status on session_recalls (trigger_at, status);
        create index idx_recalls_session_status on session_recalls (session_id, status);
        create unique index idx_recalls_active_pending on session_recalls (session_id)
            where status = 'pending';
    end if;
end
$$;

-- The strongest lock first: it is waited for only once, and before anything else is locked.
lock table session_recalls in access exclusive mode;

alter table session_recalls
    -- The lease, and where the recall stands.
    add column lease uuid,
    add column lease_until timestamptz,
    add column leased_at timestamptz,
    add column leased_by text,
    add column occurrence integer not null default 1,
    add column rekey integer not null default 0,
    add column attempt integer not null default 0,
    add column deferrals integer not null default 0,
    add column scheduled_for timestamptz,
    add column planned_at timestamptz,
    add column begun_at timestamptz,
    add column missed integer not null default 0,
    add column last_outcome text,
    add column reason text,
    add column ended_at timestamptz,
    add column paused_at timestamptz,
    -- Runs that the API accepts and ends later, and keys that stand for one body.
    add column run_reference text,
    add column delivered_at timestamptz,
    add column body_hash text,
    -- How a recurring recall recurs, and how it ends. The defaults are the application's own rule:
    -- an interval after each run, for ever.
    add column cadence text not null default 'interval',
    add column cron text,
    add column time_zone text,
    add column until_at timestamptz,
    add column times integer,
    add column failures integer not null default 0,
    add column failures_most integer,
    add column grace_seconds integer,
    add column jitter_seconds integer;

-- A comment that is changed here must be changed by a later migration as well, for the databases
-- that have it.
comment on column session_recalls.lease is
    'the right to settle: a fresh uuid for each claim, null while nobody runs this recall';
comment on column session_recalls.lease_until is
    'when another worker may take a leased row up; while leased, the row is due at this instant';
comment on column session_recalls.leased_at is 'when the lease was taken';
comment on column session_recalls.leased_by is
    'the worker that holds (or last held) the lease';
comment on column session_recalls.occurrence is
    'number of the occurrence that waits or runs, from 1';
comment on column session_recalls.rekey is
    'how many times this occurrence was given a new idempotency key';
comment on column session_recalls.attempt is
    'attempts of this occurrence so far; '
    'one is counted at each claim and given back on defer and release';
comment on column session_recalls.deferrals is
    'calls of this occurrence that cost no attempt (busy, unavailable, misconfigured)';
comment on column session_recalls.scheduled_for is
    'nominal time of this occurrence, from its first claim on; null before, when it is trigger_at';
comment on column session_recalls.planned_at is
    'trigger_at as the insert or the worker last wrote it; '
    'another trigger_at means that the application moved it';
comment on column session_recalls.begun_at is
    'when this occurrence was first called; null before';
comment on column session_recalls.missed is
    'due moments that this occurrence stands for besides its own, fixed at its first claim';
comment on column session_recalls.last_outcome is 'how the last call ended';
comment on column session_recalls.reason is
    'why the recall waits, or why it ended, in a sentence';
comment on column session_recalls.ended_at is 'when the worker settled the recall for good';
comment on column session_recalls.paused_at is 'since when an operator holds this recall back';
comment on column session_recalls.run_reference is
    'how the API calls the run that it accepted, while that run goes on';
comment on column session_recalls.delivered_at is 'when the API accepted that run';
comment on column session_recalls.body_hash is
    'what the last claim was to send: '
    'its occurrence, and a hash of what the application may change';
comment on column session_recalls.cadence is
    'interval: interval_seconds after the run ended; '
    'grid: every interval_seconds from the first trigger_at; '
    'cron: by `cron` in `time_zone`';
comment on column session_recalls.cron is
    'five fields: minute, hour, day of month, month, day of week';
comment on column session_recalls.time_zone is
    'an IANA name, such as Europe/Berlin; null: UTC';
comment on column session_recalls.until_at is
    'no occurrence after this; the recall then ends as its last occurrence did';
comment on column session_recalls.times is
    'so many occurrences in all, skipped ones too; '
    'the recall then ends as its last occurrence did';
comment on column session_recalls.failures is 'occurrences that failed in a row so far';
comment on column session_recalls.failures_most is
    'so many failed occurrences in a row end the recall as failed; null: never';
comment on column session_recalls.grace_seconds is
    'an occurrence that is later than this is not run, but recorded as misfired; '
    'null: it is run however late';
comment on column session_recalls.jitter_seconds is
    'each occurrence after the first is due a random part of this later than its time; '
    'null: none';

-- Two more statuses: by sql/statuses.sql, in the same transaction. Checks are validated by 0011.

-- Autovacuum starts when a twentieth of a table is dead, not a fifth: each run leaves two dead
-- rows, and the small indexes of the claim keep an entry for each until a vacuum. Measured with
-- 300,000 settled rows and a worker at full speed: at most 4,000 dead rows and not 110,000,
-- idx_recalls_due a third, idx_recalls_active_pending and idx_recalls_one_run half as large, as
-- many runs a second. A hundredth was no better: where less than two per cent of the pages have
-- dead rows, a vacuum leaves the indexes out. How fast a vacuum runs, and how often PostgreSQL
-- checks for one, is left to the server.
-- Fillfactor is left alone: it would make room for updates in place (HOT), and there are none, as
-- each claim, renewal and settle changes the columns of idx_recalls_due (0 % of updates, whatever
-- the fillfactor).
-- Where the owner has set it to something else, it stays so.
do $$
begin
    if not exists (
        select from pg_class c cross join unnest(c.reloptions) o
        where c.oid = 'session_recalls'::regclass
            and o like 'autovacuum\_vacuum\_scale\_factor=%'
    ) then
        alter table session_recalls set (autovacuum_vacuum_scale_factor = 0.05);
    end if;
end
$$;

-- The record of each call. No foreign key: with a session its recalls are deleted, but what was
-- called stays on record. Calls of one attempt that ended alike (deferrals, which cost no attempt)
-- share one row that counts them. Dead rows appear only where the table is pruned; with the same
-- setting of autovacuum as above it is then a twentieth larger than what is kept.
create table recall_attempts (
    recall_id text not null,
    occurrence integer not null,
    rekey integer not null,
    attempt integer not null,
    outcome text not null,
    session_id text not null,
    worker text not null,
    lease uuid not null,
    calls integer not null default 1,
    scheduled_for timestamptz not null,
    called_at timestamptz,
    last_called_at timestamptz,
    ended_at timestamptz not null,
    http_status integer,
    reason text,
    settled text not null,
    delivered_at timestamptz,
    completed_at timestamptz,
    missed integer not null default 0,
    primary key (recall_id, occurrence, rekey, attempt, outcome)
) with (autovacuum_vacuum_scale_factor = 0.05);
comment on column recall_attempts.calls is 'how many calls this row stands for';
comment on column recall_attempts.called_at is 'when the first of them was sent';
comment on column recall_attempts.last_called_at is 'when the last of them was sent';
comment on column recall_attempts.ended_at is 'when the last of them ended';
comment on column recall_attempts.settled is
    'what the ending did to the row: the status it was settled to, '
    'or why it changed nothing (ended, lost, deleted), or taken where the worker died';
comment on column recall_attempts.delivered_at is
    'when the API took the run: answered at once, or accepted to be ended later';
comment on column recall_attempts.completed_at is
    'when the run was known to have ended, well or badly';

-- For `stats` and `prune`: rows are written in the order of time, so a few bytes for each 32 pages
-- are enough to find them by time.
create index idx_recall_attempts_ended_at on recall_attempts
    using brin (ended_at) with (pages_per_range = 32, autosummarize = on);
-- For the limit on the runs of one session.
create index idx_recall_attempts_session on recall_attempts (session_id, last_called_at);

-- The running workers and their settings: for people (`workers`, `why`, `doctor`), never for
-- decisions. `bell`: whether notifications arrive at the worker, or it has to poll.
create table recall_workers (
    worker text primary key,
    host text not null,
    pid integer not null,
    version text not null,
    started_at timestamptz not null default now(),
    seen_at timestamptz not null default now(),
    slots integer not null,
    running integer not null default 0,
    breaker text not null default 'closed',
    settings jsonb not null,
    bell text not null default 'listening'
);
comment on column recall_workers.bell is
    'listening; lost: it has no connection; '
    'unheard: what is rung does not reach it, as behind a transaction pooler';

-- One row for each endpoint: while it is down, the replicas share the probes and its first answer.
create table recall_endpoints (
    endpoint text primary key,
    probed_at timestamptz,
    probes integer not null default 0,
    answered_at timestamptz
);

-- Work that one replica does for all: which replica does it now, or did it last.
create table recall_chores (
    chore text primary key,
    worker text not null,
    until timestamptz not null,
    rests boolean not null default false
);
comment on column recall_chores.worker is 'whose turn it is, or was last';
comment on column recall_chores.until is
    'before this instant nobody else begins: '
    'the turn is over sooner, or was left by a worker that died';
comment on column recall_chores.rests is
    'whether the turn is over, and until is when the next one may begin';

-- On insert: refuse what could only loop, remember the planned time, free the session's slot where
-- the recall in it is a one-shot that is being run (or may still be running), so that an agent
-- schedules its next recall from inside the run, and notify the workers of what is due soon.
-- A trigger and not a check constraint for the interval, as a check would also refuse the
-- application's own cancel of an old row. Whether cron and time_zone make sense is found out by
-- the worker, which fails the row with its reason; a cron recall may leave interval_seconds out:
-- the worker then finds its first moment, from trigger_at on. The application reads "unique" and
-- "duplicate" as "this session has one already": no message here may contain these words.
--
-- One trigger for all of it, as most inserts are due later and should cost the application as
-- little as possible. A condition in `when` is parsed and planned again for each statement; a
-- setting of the function (its search_path) is set and reset at each call, so the body names its
-- table in full; an update that finds nothing costs more than a select; and a changed row is
-- copied, so planned_at is written only where it is read.
do $migration$
begin
    execute format($definition$
create function recall_before_insert() returns trigger language plpgsql as $$
begin
    if new.call_type = 'recurring' or new.cadence <> 'interval' then
        if new.cadence not in ('interval', 'grid', 'cron') then
            raise exception 'session_recalls: cadence is %%, but there are interval, grid and cron',
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
                'session_recalls: a recurring recall needs interval_seconds of at least 1, not %%',
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
        -- The slot of a one-shot that is run, or whose run may still go on. A failed run, which is
        -- over, counts an attempt and begins a new key; an unknown one counts an attempt and keeps
        -- the key, also where a later call has found the session busy or the endpoint away.
        if exists (select from %1$s where session_id = new.session_id and status = 'pending') then
            update %1$s
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and (lease is not null or last_outcome = 'unknown' or attempt > rekey);
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
$$
    $definition$, (
        select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    ));
end
$migration$;
create trigger recall_before_insert before insert on session_recalls
    for each row execute function recall_before_insert();

-- The notification: its payload is empty, as the row is the truth. It is sent only for what a
-- sleeping worker could otherwise miss: rows due within 60 s (HORIZON in settings.py; later ones
-- are found by the regular poll), and leased rows that somebody else ended. The worker's own
-- claims, renewals and settles never notify: NOTIFY takes a lock at commit that spans the database.
-- With a session that is deleted its recalls are deleted, and then this function runs as the owner
-- of their table, under the search_path of the account that deleted the session: a pg_notify
-- of that account's own would run with the owner's rights. So the function is named in full.
create function recall_ring() returns trigger language plpgsql as $$
begin
    perform pg_catalog.pg_notify('session_recalls', '');
    return null;
end
$$;
create trigger recall_ring_earlier after update of trigger_at, status, paused_at on session_recalls
    for each row when (
        new.status in ('pending', 'running') and new.paused_at is null
        and new.lease is null and old.lease is null
        and new.trigger_at <= now() + interval '60 seconds'
        and (
            new.trigger_at < old.trigger_at
            or old.status not in ('pending', 'running') or old.paused_at is not null
        )
    )
    execute function recall_ring();
create trigger recall_ring_ended after update of status on session_recalls
    for each row when (
        new.lease is not null and new.lease = old.lease
        and old.status in ('pending', 'running') and new.status not in ('pending', 'running')
    )
    execute function recall_ring();
create trigger recall_ring_deleted after delete on session_recalls
    for each row when (old.lease is not null)
    execute function recall_ring();
-- A cron recall that the application moved: the worker puts it on a moment of its cron expression.
create trigger recall_ring_moved after update of trigger_at on session_recalls
    for each row when (
        new.cadence = 'cron' and new.lease is null and new.status in ('pending', 'running')
        and new.trigger_at is distinct from old.trigger_at
        and new.trigger_at is distinct from new.planned_at
    )
    execute function recall_ring();
