-- works with code from: 1
-- The slot of a one-shot is free for the next recall as long as a run of it may still go on: since a call under its key ended as unknown,
-- also where a later call has found the session busy or the endpoint away, which says nothing about that run.
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
        -- A failed run, which is over, counts an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        update session_recalls
        set status = 'running'
        where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
            and (lease is not null or last_outcome = 'unknown' or attempt > rekey);
    end if;
    return new;
end
$$;
