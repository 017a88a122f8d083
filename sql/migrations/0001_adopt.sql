-- works with code from: 1
-- Adopts the application's table where it stands, or creates it where it is missing. Nothing here reads or rewrites rows:
-- columns come with constant defaults (no rewrite since PostgreSQL 11), constraints NOT VALID, so the exclusive lock is held
-- for milliseconds. The foreign key to sessions is `migrate`'s standing duty, as a sessions table may appear later.

-- The table as the application creates it, for the case that the worker is first.
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
            status text not null default 'pending' check (status in ('pending', 'fired', 'cancelled')),
            created_at timestamptz not null,
            updated_at timestamptz not null
        );
        create index idx_recalls_trigger_at_status on session_recalls (trigger_at, status);
        create index idx_recalls_session_status on session_recalls (session_id, status);
        create unique index idx_recalls_active_pending on session_recalls (session_id) where status = 'pending';
    end if;
end
$$;

-- The strongest lock first, so that it is waited for once and with nothing else in hand.
lock table session_recalls in access exclusive mode;

alter table session_recalls
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
    add column paused_at timestamptz;

comment on column session_recalls.lease is 'the right to settle: a fresh uuid for each claim, null while nobody runs this recall';
comment on column session_recalls.lease_until is 'when another worker may take a leased row up; while leased, the row is due at this instant';
comment on column session_recalls.leased_at is 'when the lease was taken';
comment on column session_recalls.leased_by is 'the worker that holds (or last held) the lease';
comment on column session_recalls.occurrence is 'number of the occurrence that waits or runs, from 1';
comment on column session_recalls.rekey is 'how many times this occurrence was given a new idempotency key';
comment on column session_recalls.attempt is 'attempts of this occurrence so far; one is counted at each claim and given back on defer and release';
comment on column session_recalls.deferrals is 'calls of this occurrence that cost no attempt (busy, unavailable, misconfigured)';
comment on column session_recalls.scheduled_for is 'nominal time of this occurrence, from its first claim on; null before, when it is trigger_at';
comment on column session_recalls.planned_at is 'trigger_at as the insert or the worker last wrote it; another trigger_at means that the application moved it';
comment on column session_recalls.begun_at is 'when this occurrence was first called; null before';
comment on column session_recalls.missed is 'due moments that this occurrence stands for besides its own, fixed at its first claim';
comment on column session_recalls.last_outcome is 'how the last call ended';
comment on column session_recalls.reason is 'why the recall waits, or why it ended, in a sentence';
comment on column session_recalls.ended_at is 'when the worker settled the recall for good';
comment on column session_recalls.paused_at is 'since when an operator holds this recall back';

-- Two more statuses. The application's own check goes by whatever name it has: it is the one that reads `status` alone.
do $$
declare
    old record;
begin
    for old in
        select c.conname
        from pg_constraint c
        join pg_attribute a on a.attrelid = c.conrelid and a.attname = 'status'
        where c.conrelid = 'session_recalls'::regclass and c.contype = 'c' and c.conkey = array[a.attnum]
    loop
        execute format('alter table session_recalls drop constraint %I', old.conname);
    end loop;
end
$$;
alter table session_recalls
    add constraint session_recalls_status_known
    check (status in ('pending', 'running', 'fired', 'cancelled', 'failed')) not valid;

-- Every call's mark. No foreign key: a deleted session takes its recalls, but what was called stays on record.
-- Repeated endings of one attempt (deferrals, which cost none) fold into one row that counts them.
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
    primary key (recall_id, occurrence, rekey, attempt, outcome)
);
comment on column recall_attempts.calls is 'how many calls this row stands for';
comment on column recall_attempts.called_at is 'when the first of them was sent';
comment on column recall_attempts.last_called_at is 'when the last of them was sent';
comment on column recall_attempts.ended_at is 'when the last of them ended';
comment on column recall_attempts.settled is
    'what the ending did to the row: the status it was settled to, or why it changed nothing (ended, lost, deleted), or taken where the worker died';

-- Which workers are about, and with which settings: for people (`workers`, `why`), never for deciding.
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
    settings jsonb not null
);

-- On insert: refuse what could only loop, remember the planned time, and free the session's slot where the recall in it is a
-- one-shot that is being run (or may still be running: its last outcome is unknown), so that an agent schedules its next
-- recall from inside the run. A trigger and not a check constraint for the interval, as a check would also refuse the
-- application's own cancel of an old row. The application reads "unique" and "duplicate" as "has one already": no other
-- message may contain these words.
create function recall_before_insert() returns trigger language plpgsql set search_path from current as $$
begin
    if new.call_type = 'recurring' and coalesce(new.interval_seconds, 0) < 1 then
        raise exception 'session_recalls: a recurring recall needs interval_seconds of at least 1, not %',
            coalesce(new.interval_seconds::text, 'null')
            using errcode = 'check_violation',
                hint = 'Set interval_seconds to the distance between two occurrences in seconds, or use call_type ''once''.';
    end if;
    new.planned_at := new.trigger_at;
    if new.status = 'pending' then
        update session_recalls
        set status = 'running'
        where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
            and (lease is not null or last_outcome = 'unknown');
    end if;
    return new;
end
$$;
create trigger recall_before_insert before insert on session_recalls for each row execute function recall_before_insert();

-- The doorbell: an empty payload, as the row is the truth. It rings only for what a sleeping worker could otherwise miss:
-- rows due within the horizon of 60 s (later ones are found by the regular look and cost the inserter nothing), and leased
-- rows that somebody else ended. The worker's own claims, renewals and settles never ring: NOTIFY takes a lock at commit
-- that spans the database.
create function recall_ring() returns trigger language plpgsql as $$
begin
    perform pg_notify('session_recalls', '');
    return null;
end
$$;
create trigger recall_ring_insert after insert on session_recalls for each row
    when (new.status in ('pending', 'running') and new.paused_at is null and new.trigger_at <= now() + interval '60 seconds')
    execute function recall_ring();
create trigger recall_ring_earlier after update of trigger_at, status, paused_at on session_recalls for each row
    when (
        new.status in ('pending', 'running') and new.paused_at is null and new.lease is null and old.lease is null
        and new.trigger_at <= now() + interval '60 seconds'
        and (new.trigger_at < old.trigger_at or old.status not in ('pending', 'running') or old.paused_at is not null)
    )
    execute function recall_ring();
create trigger recall_ring_ended after update of status on session_recalls for each row
    when (
        new.lease is not null and new.lease = old.lease
        and old.status in ('pending', 'running') and new.status not in ('pending', 'running')
    )
    execute function recall_ring();
create trigger recall_ring_deleted after delete on session_recalls for each row
    when (old.lease is not null)
    execute function recall_ring();
