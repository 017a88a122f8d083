-- works with code from: 15
-- Schedules as people edit them, in every state: what was edited, what a person named, and runs
-- that are asked for besides the schedule.
lock table session_recalls in access exclusive mode;
alter table session_recalls
    add column edits integer not null default 0,
    add column edited_at timestamptz,
    add column edit_of integer,
    add column skips integer not null default 0,
    add column named_at timestamptz,
    add column fired_at timestamptz,
    add column fires integer not null default 0,
    add column zone_data text;
comment on column session_recalls.edits is
    'how often its schedule was edited: a settle that judged by an earlier schedule judges again';
comment on column session_recalls.edited_at is
    'when its rule was last edited: the moments of the new rule count from there';
comment on column session_recalls.edit_of is
    'the occurrence whose moment a worker is to compute anew, as cron, time_zone or cadence was '
    'edited; of no meaning where it is not `occurrence`';
comment on column session_recalls.skips is
    'occurrences that were skipped before an edit, and are not left out yet';
comment on column session_recalls.named_at is
    'trigger_at as a person named it, which consumes no occurrence: by reschedule, '
    'or in the statement that edited the rule';
comment on column session_recalls.fired_at is
    'since when an extra run is asked for (fire); it is due at lease_until';
comment on column session_recalls.fires is
    'extra runs that were asked for so far: the n of the key <id>:<occurrence>.f<n>';
comment on column session_recalls.zone_data is
    'the version of the time zone data by which a moment of cron was computed';

-- An edit of the schedule, by anybody's SQL. A worker's own writes change the lease, or `edits`,
-- and cost no call. The application's ten columns are not named in the trigger's definition, as
-- PostgreSQL would then refuse to let the application change their types.
-- What was skipped by the old distance is counted by it, and kept in `skips`; so the application's
-- skip means one occurrence before an edit and after it.
create function recall_before_edit() returns trigger language plpgsql as $$
declare
    -- Where trigger_at is what was planned, a name is one that an earlier version did not erase.
    base timestamptz := case
        when old.trigger_at = old.planned_at then old.planned_at
        else coalesce(old.named_at, old.planned_at)
    end;
    rule boolean;
    renamed boolean := new.named_at is distinct from old.named_at;
    named boolean := old.named_at is not null and old.named_at is distinct from old.planned_at;
    -- Whether its occurrence is called, or was: not of an extra run.
    called boolean := old.fired_at is null and (old.lease is not null or old.begun_at is not null);
    skipped numeric;
begin
    if (old.call_type, old.cadence) = ('recurring', 'cron')
        and (new.call_type, new.cadence) = ('recurring', 'cron')
        and old.interval_seconds > 0 and coalesce(new.interval_seconds, 0) < 1
        and new.trigger_at = old.trigger_at
    then
        -- On cron the column is the workers'. Null would be a row that was never planned, which an
        -- occurrence that was called, or whose time was named, is not.
        new.interval_seconds := old.interval_seconds;
    end if;
    rule := (new.call_type, new.interval_seconds, new.cadence, new.cron, new.time_zone)
        is distinct from
        (old.call_type, old.interval_seconds, old.cadence, old.cron, old.time_zone);
    if rule
        or (new.until_at, new.times, new.failures_most, new.grace_seconds, new.jitter_seconds)
            is distinct from
            (old.until_at, old.times, old.failures_most, old.grace_seconds, old.jitter_seconds)
    then
        new.edits := case when old.edits between 0 and 2147483646 then old.edits + 1 else 0 end;
    end if;
    if rule or renamed then
        new.planned_at := coalesce(new.planned_at, old.trigger_at);
    end if;
    if (rule or renamed) and old.call_type = 'recurring' and old.interval_seconds > 0
        and old.trigger_at > base
        and pg_catalog.isfinite(old.trigger_at) and pg_catalog.isfinite(base)
    then
        skipped := (extract(epoch from old.trigger_at) - extract(epoch from base))
            / old.interval_seconds;
        -- On cron a move by many distances is a time of its own: see cadence.py.
        if skipped = pg_catalog.trunc(skipped)
            and skipped <= (case old.cadence when 'cron' then 10 else 2147483647 - old.skips end)
        then
            new.skips := old.skips + skipped;
            if not named then
                new.planned_at := old.trigger_at;
                -- A name that had come to be what is planned.
                new.named_at := case when renamed then new.named_at end;
            elsif not renamed then
                new.named_at := old.trigger_at;
            end if;
            -- The nominal time that the next moments are counted from.
            if not called and old.cadence = 'grid'
                and old.scheduled_for <= base and old.trigger_at < '9998-01-01'
                and old.scheduled_for > '0001-01-02'
            then
                new.scheduled_for := old.scheduled_for + (old.trigger_at - base);
            elsif not called and old.cadence = 'cron' then
                new.scheduled_for := coalesce(old.scheduled_for, base);
            end if;
            base := old.trigger_at;
        end if;
    end if;
    if rule and old.trigger_at <> base and old.trigger_at > '0001-01-02' then
        -- A time that the application chose: it must not look like skips by the new distance.
        new.planned_at := old.trigger_at - interval '1 microsecond';
        new.named_at := case when renamed then new.named_at end;
    end if;
    if rule then
        -- After the claim that did not see it, whenever its transaction began.
        new.edited_at := case when called
            then greatest(pg_catalog.now(),
                greatest(old.begun_at, old.leased_at) + interval '1 microsecond')
            else pg_catalog.now()
        end;
        if new.call_type = 'recurring' and new.cadence = 'cron' and new.interval_seconds is null
            and (old.call_type, old.cadence) is distinct from ('recurring', 'cron')
        then
            -- Until a worker has planned a moment by the new rule. Null would be a row that was
            -- never planned, which an occurrence that is owed is not.
            new.interval_seconds := 86400;
        end if;
    end if;
    if rule and new.trigger_at is distinct from old.trigger_at then
        -- What the same statement wrote stands.
        new.named_at := new.trigger_at;
        new.edit_of := null;
    elsif rule and new.call_type = 'recurring'
        and (new.cadence is distinct from old.cadence
            or (new.cadence = 'cron'
                and (new.cron, new.time_zone) is distinct from (old.cron, old.time_zone)))
        and new.status in ('pending', 'running') and old.trigger_at > pg_catalog.now()
        -- Whatever had fallen due is still owed: an occurrence in its run, or called already.
        and not called
    then
        new.named_at := null;
        if new.cadence = 'cron' then
            new.edit_of := old.occurrence;
            new.planned_at := new.trigger_at;
        elsif new.interval_seconds > 0 then
            new.edit_of := null;
            new.trigger_at := pg_catalog.now()
                + least((1.0 + new.skips) * new.interval_seconds, 1e11) * interval '1 second';
            new.planned_at := new.trigger_at;
            new.scheduled_for := null;
            -- An extra run has its key by the occurrence that waited when it was asked for: what
            -- was skipped is left out after it.
            if old.fired_at is null then
                new.occurrence := old.occurrence
                    + least(new.skips, 2147483647 - old.occurrence);
                new.rekey := case when new.skips = 0 then old.rekey else 0 end;
                new.skips := 0;
            end if;
        end if;
    end if;
    if old.lease is null and old.lease_until > pg_catalog.now()
        and new.trigger_at < old.lease_until
    then
        -- An extra run that waits to be called again never holds back what is planned.
        new.lease_until := null;
        new.fired_at := null;
        new.attempt := 0;
        new.deferrals := 0;
        new.begun_at := null;
    end if;
    return new;
end
$$;
create trigger recall_before_edit before update on session_recalls
    for each row when (
        new.lease is not distinct from old.lease
        and new.lease_until is not distinct from old.lease_until
        and new.edits = old.edits
    )
    execute function recall_before_edit();
create trigger recall_ring_edited after update of cron, time_zone, cadence on session_recalls
    for each row when (
        new.status in ('pending', 'running') and new.edits <> old.edits
        and (new.lease is null or new.fired_at is not null)
    )
    execute function recall_ring();

-- As in 0016; and the row that is being inserted is never touched: an upsert of a one-shot by its
-- id, in its run, finds it where it was.
do $migration$
begin
    execute format($definition$
create or replace function recall_before_insert() returns trigger language plpgsql as $$
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
        -- The slot of a one-shot that is run, or whose run may still go on: may_still_run says so.
        -- Where a worker of an earlier version wrote the row: a failed run, which is over, counts
        -- an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        if exists (select from %1$s where session_id = new.session_id and status = 'pending') then
            update %1$s
            set status = 'running'
            where session_id = new.session_id and status = 'pending' and call_type <> 'recurring'
                and not exists (select from %1$s where id = new.id)
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
$$
    $definition$, (
        select format('%I.%I', n.nspname, c.relname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    ));
end
$migration$;
