-- works with code from: 1
-- How a recurring recall recurs, and how it ends. The defaults are the application's own rule: an interval after each run, for ever.
lock table session_recalls in access exclusive mode;
alter table session_recalls
    add column cadence text not null default 'interval',
    add column cron text,
    add column time_zone text,
    add column until_at timestamptz,
    add column times integer,
    add column failures integer not null default 0,
    add column failures_most integer,
    add column grace_seconds integer,
    add column jitter_seconds integer;
alter table recall_attempts add column missed integer not null default 0;
comment on column session_recalls.cadence is
    'interval: interval_seconds after the run ended; grid: every interval_seconds from the first trigger_at; cron: by `cron` in `time_zone`';
comment on column session_recalls.cron is 'five fields: minute, hour, day of month, month, day of week';
comment on column session_recalls.time_zone is 'an IANA name, such as Europe/Berlin; null: UTC';
comment on column session_recalls.until_at is 'no occurrence after this; the recall then ends as its last occurrence did';
comment on column session_recalls.times is 'so many occurrences in all, skipped ones too; the recall then ends as its last occurrence did';
comment on column session_recalls.failures is 'occurrences that failed in a row so far';
comment on column session_recalls.failures_most is 'so many failed occurrences in a row end the recall as failed; null: never';
comment on column session_recalls.grace_seconds is 'an occurrence that is later than this is not run, but recorded as misfired; null: it is run however late';
comment on column session_recalls.jitter_seconds is 'each occurrence after the first is due a random part of this later than its time; null: none';

-- What nobody could keep is refused at insert, as before; whether cron and time_zone make sense is the worker's to say, which fails the
-- row with its reason. A cron recall may leave interval_seconds out: the worker then finds its first moment from trigger_at on.
create or replace function recall_before_insert() returns trigger language plpgsql set search_path from current as $$
begin
    if new.cadence not in ('interval', 'grid', 'cron') then
        raise exception 'session_recalls: cadence is %, but there are interval, grid and cron', quote_literal(new.cadence)
            using errcode = 'check_violation';
    end if;
    if new.call_type = 'recurring' and new.cadence = 'cron' then
        if new.cron is null then
            raise exception 'session_recalls: a recurring recall with cadence ''cron'' needs cron'
                using errcode = 'check_violation', hint = 'Set cron to five fields, minute hour day month weekday, and time_zone to an IANA name.';
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

-- A cron recall that the application moved is put on a moment of its own by the worker, which is rung for that.
create trigger recall_ring_moved after update of trigger_at on session_recalls for each row
    when (
        new.cadence = 'cron' and new.lease is null and new.status in ('pending', 'running')
        and new.trigger_at is distinct from old.trigger_at and new.trigger_at is distinct from new.planned_at
    )
    execute function recall_ring();
