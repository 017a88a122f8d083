CREATE DOMAIN public.recall_id_type AS text;

COMMENT ON DOMAIN public.recall_id_type IS 'the type of session_recalls.id';

CREATE DOMAIN public.recall_session_type AS text;

COMMENT ON DOMAIN public.recall_session_type IS 'the type of session_recalls.session_id';

CREATE FUNCTION public.recall_admit_queue() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
    -- The session's search_path, by which recall_before_insert knows a dump besides, is not seen
    -- here.
    if pg_catalog.current_setting('check_function_bodies') = 'off' then
        return new;
    end if;
    if new.queue in ('', '*') or pg_catalog.char_length(new.queue) > 63
        or new.queue ~ '[[:cntrl:][:space:],]'
    then
        raise exception 'session_recalls: this can''t be the name of a queue'
            using errcode = 'check_violation',
                hint = 'A name has 1 to 63 characters, without blanks, commas and control '
                    'characters; * stands for all queues.';
    end if;
    if exists (
        select from public.recall_workers w
        where w.queues is null and w.seen_at > pg_catalog.now() - interval '180 seconds'
    ) then
        raise exception
            'session_recalls: other queues than default can''t be used yet: a worker that runs '
            'knows none'
            using errcode = 'object_not_in_prerequisite_state',
                hint = 'It is of an earlier version, and would claim the recall. Upgrade all '
                    'workers first (recall-worker workers shows them), or use queue default.';
    end if;
    return new;
end
$$;

CREATE FUNCTION public.recall_admit_slot() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
declare
    most constant integer := tg_argv[0];
    locks integer := coalesce(
        substring(current_setting('recall_worker.slot_locks', true) from '^[0-9]{1,6}$')::integer, 0
    );
    taken integer[];
    waits_for integer;
    number integer;
begin
    select coalesce(array_agg(t.slot), '{}') into taken
    from public.session_recalls t
    where t.session_id = new.session_id and t.status = 'pending'
        and t.id is distinct from new.id and t.tableoid = tg_relid;
    if cardinality(taken) < most then
        for number in
            select g from generate_series(1, most) g
            where g <> all (taken)
            order by g <> new.slot, g
        loop
            if locks >= 64 then
                waits_for := coalesce(waits_for, number);
                exit;
            end if;
            if not pg_try_advisory_xact_lock(hashtextextended(
                concat_ws(' ', 'recall-worker slot', tg_relid::bigint, number, new.session_id), 0
            )) then
                waits_for := coalesce(waits_for, number);
                continue;
            end if;
            locks := locks + 1;
            perform set_config('recall_worker.slot_locks', locks::text, true);
            if not exists (
                select from public.session_recalls t
                where t.session_id = new.session_id and t.status = 'pending' and t.slot = number
                    and t.id is distinct from new.id and t.tableoid = tg_relid
            ) then
                new.slot := number;
                return new;
            end if;
            taken := taken || number;
        end loop;
        if waits_for is not null then
            new.slot := waits_for;
            return new;
        end if;
    end if;
    if tg_op = 'UPDATE' then
        if old.status = 'running' and old.lease is not null then
            new.status := 'running';
        else
            new.slot := taken[1];
        end if;
        return new;
    end if;
    new.slot := coalesce((
        select t.slot from public.session_recalls t
        where t.session_id = new.session_id and t.status = 'pending' and t.tableoid = tg_relid
            and t.call_type <> 'recurring'
            and not exists (select from public.session_recalls o where o.id = new.id)
            and (
                t.lease is not null or t.may_still_run
                or t.last_outcome = 'unknown' or t.attempt > t.rekey
            )
        order by t.lease is null, t.slot
        limit 1
    ), taken[1]);
    return new;
end
$_$;

CREATE FUNCTION public.recall_before_edit() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
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

CREATE FUNCTION public.recall_before_insert() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
begin
    -- First, as what is written into a new row below looks like a row that is put back.
    if new.status = 'pending' then
        -- The slot of a one-shot that is run, or whose run may still go on: may_still_run says so.
        -- Where a worker of an earlier version wrote the row: a failed run, which is over, counts
        -- an attempt and begins a new key; an unknown one counts an attempt and keeps the key.
        -- For an account that may not do this, recall_free_slot has done it.
        if pg_catalog.has_table_privilege(tg_relid, 'select')
            and pg_catalog.has_column_privilege(tg_relid, 'status', 'update')
        then
            if exists (
                    select from public.session_recalls
                    where session_id = new.session_id and status = 'pending' and slot = new.slot
                )
                and not (
            new.planned_at is not null or new.leased_at is not null or new.named_at is not null
            or new.edited_at is not null or new.ended_at is not null
            or new.last_outcome is not null or new.edits <> 0 or new.occurrence <> 1
            or (pg_catalog.current_setting('check_function_bodies') = 'off'
                and pg_catalog.current_setting('search_path') in ('', '""'))
        )
            then
                update public.session_recalls
                set status = 'running'
                where session_id = new.session_id and status = 'pending' and slot = new.slot
                    and call_type <> 'recurring'
                    and not exists (select from public.session_recalls where id = new.id)
                    and (
                        lease is not null or may_still_run
                        or last_outcome = 'unknown' or attempt > rekey
                    );
            end if;
        end if;
    end if;
    if (new.call_type = 'recurring' or new.cadence <> 'interval')
        and new.status in ('pending', 'running')
        and not (
            new.planned_at is not null or new.leased_at is not null or new.named_at is not null
            or new.edited_at is not null or new.ended_at is not null
            or new.last_outcome is not null or new.edits <> 0 or new.occurrence <> 1
            or (pg_catalog.current_setting('check_function_bodies') = 'off'
                and pg_catalog.current_setting('search_path') in ('', '""'))
        )
    then
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
        -- Applications that insert very many rows at once may do without notifications, and leave
        -- them to the workers' next poll: set recall_worker.rings = 'off'.
        if new.trigger_at <= pg_catalog.now() + interval '60 seconds' and new.paused_at is null
            and pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
            perform pg_catalog.pg_notify(
                'session_recalls', case new.queue when 'default' then '' else new.queue end
            );
        end if;
    end if;
    return new;
end
$$;

CREATE FUNCTION public.recall_before_restore() RETURNS trigger
    LANGUAGE plpgsql
    AS $_$
declare
    -- The primary key's column, given as the trigger's argument.
    key text := tg_argv[0];
    there boolean;
begin
    execute pg_catalog.format(
        'select exists (select from %I.%I t where t.%I::text = $1)',
        tg_table_schema, tg_table_name, key
    ) using pg_catalog.to_jsonb(new) ->> key into there;
    return case when there then null else new end;
end
$_$;

CREATE FUNCTION public.recall_free_slot() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
begin
    if new.status operator(pg_catalog.=) 'pending'
        and new.planned_at is null and new.leased_at is null and new.named_at is null
        and new.edited_at is null and new.ended_at is null and new.last_outcome is null
        and new.edits operator(pg_catalog.=) 0 and new.occurrence operator(pg_catalog.=) 1
        and exists (
            select from public.session_recalls t
            where t.session_id operator(pg_catalog.=) new.session_id
                and t.status operator(pg_catalog.=) 'pending'
                and t.slot operator(pg_catalog.=) new.slot
                and t.tableoid operator(pg_catalog.=) tg_relid
        )
    then
        -- Until this function returns, as it has a search_path of its own.
        perform pg_catalog.set_config(
            'search_path', pg_catalog.format('%I, pg_temp', tg_table_schema), true
        );
        update public.session_recalls t
        set status = 'running'
        where t.session_id operator(pg_catalog.=) new.session_id
            and t.status operator(pg_catalog.=) 'pending'
            and t.slot operator(pg_catalog.=) new.slot
            and t.call_type operator(pg_catalog.<>) 'recurring'
            and not exists (select from public.session_recalls o where o.id operator(pg_catalog.=) new.id)
            and (
                t.lease is not null or t.may_still_run
                or t.last_outcome operator(pg_catalog.=) 'unknown'
                or t.attempt operator(pg_catalog.>) t.rekey
            );
    end if;
    return new;
end
$$;

CREATE FUNCTION public.recall_id(given text, OUT held public.recall_id_type) RETURNS public.recall_id_type
    LANGUAGE plpgsql IMMUTABLE STRICT
    AS $$
begin
    -- Not by return: that converts the value when the block is over, and its errors are nobody's.
    held := given;
exception when data_exception then
    held := null;
end
$$;

COMMENT ON FUNCTION public.recall_id(given text, OUT held public.recall_id_type) IS 'an id as session_recalls.id holds it; null where its type can''t';

CREATE FUNCTION public.recall_keep_actions() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
begin
    if pg_catalog.pg_has_role(
        (select c.relowner from pg_catalog.pg_class c where c.oid = tg_relid), 'usage'
    ) then
        return case tg_op when 'DELETE' then old when 'UPDATE' then new end;
    end if;
    if tg_op = 'DELETE' then
        if old.at < pg_catalog.now() - interval '1 day' then
            return old;
        end if;
    end if;
    raise exception 'recall_actions: actions on record can''t be changed'
        using errcode = 'insufficient_privilege',
            hint = 'They can be read and added; what is older than a day can be pruned. Only the '
                'owner of the table can do more.';
end
$$;

CREATE FUNCTION public.recall_on_failure() RETURNS trigger
    LANGUAGE plpgsql
    AS $_$
declare
    queue text := new.queue;
    wanted boolean;
    dated constant text := 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"';
    scheduled timestamptz := coalesce(new.scheduled_for, new.planned_at, new.trigger_at);
    ended timestamptz := coalesce(new.ended_at, pg_catalog.now());
begin
    -- Whoever may not write an entry, or finds no table for it, fails the recall all the same: to
    -- settle comes first. `doctor` says so.
    if not coalesce(
        pg_catalog.has_table_privilege(
            pg_catalog.to_regclass(pg_catalog.format('%I.recall_subscriptions', tg_table_schema)),
            'select'
        ) and pg_catalog.has_table_privilege(
            pg_catalog.to_regclass(pg_catalog.format('%I.recall_outbox', tg_table_schema)),
            'insert'
        ),
        false
    ) then
        return null;
    end if;
    execute pg_catalog.format(
        'select exists (select from %I.recall_subscriptions s '
        'where s.queue = $1 and s.until > pg_catalog.now())',
        tg_table_schema
    ) using queue into wanted;
    if not wanted then
        return null;
    end if;
    execute pg_catalog.format(
        'insert into %I.recall_outbox (queue, recall_id, occurrence, body) values ($1, $2, $3, $4)',
        tg_table_schema
    ) using queue, new.id::text, new.occurrence, pg_catalog.json_build_object(
        'type', 'recall.failed',
        'timestamp', pg_catalog.to_char(pg_catalog.now() at time zone 'UTC', dated),
        'data', pg_catalog.json_build_object(
            'id', pg_catalog."left"(new.id::text, 2000),
            'session_id', pg_catalog."left"(new.session_id::text, 2000),
            'queue', queue,
            'call_type', new.call_type,
            'occurrence', new.occurrence,
            'scheduled_for', case
                when scheduled between '0001-01-02 00:00+00' and '9999-12-30 00:00+00'
                then pg_catalog.to_char(scheduled at time zone 'UTC', dated)
            end,
            'status', new.status,
            'reason', pg_catalog."left"(new.reason, 500),
            'attempts', new.attempt,
            'ended_at', case
                when ended between '0001-01-02 00:00+00' and '9999-12-30 00:00+00'
                then pg_catalog.to_char(ended at time zone 'UTC', dated)
            end
        )
    )::text;
    return null;
end
$_$;

CREATE FUNCTION public.recall_ring() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
begin
    if pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
        perform pg_catalog.pg_notify('session_recalls', '');
    end if;
    return null;
end
$$;

CREATE FUNCTION public.recall_session(given text, OUT held public.recall_session_type) RETURNS public.recall_session_type
    LANGUAGE plpgsql IMMUTABLE STRICT
    AS $$
begin
    -- Not by return: that converts the value when the block is over, and its errors are nobody's.
    held := given;
exception when data_exception then
    held := null;
end
$$;

COMMENT ON FUNCTION public.recall_session(given text, OUT held public.recall_session_type) IS 'an id as session_recalls.session_id holds it; null where its type can''t';

CREATE TABLE public.recall_actions (
    id bigint NOT NULL,
    at timestamp with time zone DEFAULT now() NOT NULL,
    actor text NOT NULL,
    via text NOT NULL,
    action text NOT NULL,
    recall_id text,
    detail jsonb DEFAULT '{}'::jsonb NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0.05');

COMMENT ON TABLE public.recall_actions IS 'what people and agents did to recalls, one row for each recall that was changed; append-only';

COMMENT ON COLUMN public.recall_actions.at IS 'when the transaction of the action began; rows in the order of writing: by id';

COMMENT ON COLUMN public.recall_actions.actor IS 'who did it, as the program was told (RECALL_ACTOR, `actor=`), else the login name and host, or the database role';

COMMENT ON COLUMN public.recall_actions.via IS 'the way: cli, console, mcp, python; sql: an application''s own record of what it did';

COMMENT ON COLUMN public.recall_actions.action IS 'schedule, cancel, skip, pause, resume, retry, fire, reschedule, edit, mark_fired, pause_queue, resume_queue';

COMMENT ON COLUMN public.recall_actions.recall_id IS 'the recall; no foreign key, so that what was done stays on record when the recall is deleted; null: it was done to a queue, which `detail` names';

COMMENT ON COLUMN public.recall_actions.detail IS 'each column that was changed, {"from": ..., "to": ...}, and facts; never a text of the recall';

ALTER TABLE public.recall_actions ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.recall_actions_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

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

CREATE TABLE public.recall_identity (
    system_identifier bigint NOT NULL,
    database_oid bigint NOT NULL,
    recorded_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE ONLY public.recall_identity REPLICA IDENTITY FULL;

COMMENT ON TABLE public.recall_identity IS 'the database whose recalls are called, written by migrate; a row of another database means that this one is a copy';

COMMENT ON COLUMN public.recall_identity.system_identifier IS 'of its cluster, as pg_control_system() tells it: a standby has that of its primary';

COMMENT ON COLUMN public.recall_identity.database_oid IS 'of the database in that cluster';

CREATE TABLE public.recall_outbox (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    queue text NOT NULL,
    recall_id text NOT NULL,
    occurrence integer NOT NULL,
    body text NOT NULL,
    written_at timestamp with time zone DEFAULT now() NOT NULL,
    due_at timestamp with time zone DEFAULT now() NOT NULL,
    lease uuid,
    tries integer DEFAULT 0 NOT NULL,
    http_status integer,
    reason text,
    delivered_at timestamp with time zone,
    given_up_at timestamp with time zone
)
WITH (autovacuum_vacuum_scale_factor='0.05');

COMMENT ON TABLE public.recall_outbox IS 'failed recalls that are to be told to RECALL_FAILURE_URL, and what became of that';

COMMENT ON COLUMN public.recall_outbox.id IS 'the webhook-id of every try: the receiver tells repeats by it';

COMMENT ON COLUMN public.recall_outbox.recall_id IS 'the recall; it may be deleted meanwhile';

COMMENT ON COLUMN public.recall_outbox.body IS 'what is sent, the same octets at every try';

COMMENT ON COLUMN public.recall_outbox.written_at IS 'when the transaction began in which the recall became failed';

COMMENT ON COLUMN public.recall_outbox.due_at IS 'when it is sent next; while it is leased, when another worker may send it';

COMMENT ON COLUMN public.recall_outbox.lease IS 'the right to write down how the try ended, a fresh uuid for each try';

COMMENT ON COLUMN public.recall_outbox.tries IS 'tries so far, counted when they begin';

COMMENT ON COLUMN public.recall_outbox.http_status IS 'of the last try that was answered';

COMMENT ON COLUMN public.recall_outbox.reason IS 'why the last try did not deliver it';

COMMENT ON COLUMN public.recall_outbox.delivered_at IS 'when it was answered with 2xx';

COMMENT ON COLUMN public.recall_outbox.given_up_at IS 'since when nobody tries any more';

CREATE TABLE public.recall_queues (
    queue text NOT NULL,
    paused_at timestamp with time zone DEFAULT now() NOT NULL,
    paused_by text NOT NULL,
    reason text
);

COMMENT ON TABLE public.recall_queues IS 'queues that are paused: nothing of them is claimed or taken up; * stands for all queues';

COMMENT ON COLUMN public.recall_queues.paused_by IS 'who paused it, as in recall_actions.actor';

COMMENT ON COLUMN public.recall_queues.reason IS 'why, as the person said';

CREATE TABLE public.recall_runs (
    key text NOT NULL,
    session_id text NOT NULL,
    fingerprint text NOT NULL,
    lease uuid NOT NULL,
    starts integer DEFAULT 1 NOT NULL,
    started_at timestamp with time zone DEFAULT now() NOT NULL,
    stored_at timestamp with time zone,
    accepted_at timestamp with time zone,
    ended_at timestamp with time zone,
    status text,
    answer text,
    CONSTRAINT recall_runs_check CHECK (((ended_at IS NULL) = (answer IS NULL)))
);

COMMENT ON TABLE public.recall_runs IS 'the endpoint kit: runs of the agent by their idempotency keys, and their answers';

COMMENT ON COLUMN public.recall_runs.key IS 'Idempotency-Key, as it came';

COMMENT ON COLUMN public.recall_runs.session_id IS 'the session, as text; no foreign key, as the application may keep its sessions elsewhere';

COMMENT ON COLUMN public.recall_runs.fingerprint IS 'SHA-256 of the request''s body, in hexadecimal: a key has one body';

COMMENT ON COLUMN public.recall_runs.lease IS 'under which the session was taken for it, a fresh uuid for each start';

COMMENT ON COLUMN public.recall_runs.starts IS 'how often it was started: more than once where a process died in mid-run';

COMMENT ON COLUMN public.recall_runs.started_at IS 'when it was started last';

COMMENT ON COLUMN public.recall_runs.stored_at IS 'when the application had stored the system message of this key';

COMMENT ON COLUMN public.recall_runs.accepted_at IS 'when its caller was told 202 and an address: from then on it is polled, and not called again';

COMMENT ON COLUMN public.recall_runs.ended_at IS 'when its answer was kept; null: it goes on, or is lost';

COMMENT ON COLUMN public.recall_runs.status IS 'how it ended: completed, failed, cancelled';

COMMENT ON COLUMN public.recall_runs.answer IS 'the JSON text by which the same request is answered again';

CREATE TABLE public.recall_schema (
    version integer NOT NULL,
    name text NOT NULL,
    oldest_code integer NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
);

COMMENT ON TABLE public.recall_schema IS 'the migrations that were applied, by recall-worker migrate; the same for a dump of the schema: migrations 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 32 33 34 35; works with code from: 15';

CREATE TABLE public.recall_session_locks (
    session_id text NOT NULL,
    lease uuid NOT NULL,
    key text,
    taken_at timestamp with time zone DEFAULT now() NOT NULL,
    until timestamp with time zone NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0.05');

COMMENT ON TABLE public.recall_session_locks IS 'the endpoint kit: sessions in which a run, or a chat, is just now';

COMMENT ON COLUMN public.recall_session_locks.lease IS 'the right to renew and to free it, a fresh uuid each time it is taken';

COMMENT ON COLUMN public.recall_session_locks.key IS 'of the run that has it; null: a chat';

COMMENT ON COLUMN public.recall_session_locks.until IS 'when the lease ends, if it is not renewed: then others may take the session';

CREATE TABLE public.recall_subscriptions (
    queue text NOT NULL,
    until timestamp with time zone NOT NULL
);

COMMENT ON TABLE public.recall_subscriptions IS 'queues whose failed recalls are told to somebody, as workers with RECALL_FAILURE_URL say';

COMMENT ON COLUMN public.recall_subscriptions.queue IS 'the queue of the recalls';

COMMENT ON COLUMN public.recall_subscriptions.until IS 'before this instant entries are written to recall_outbox; renewed by the workers';

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
    bell text DEFAULT 'listening'::text NOT NULL,
    held text,
    system_identifier bigint,
    database_oid bigint,
    queues text[],
    generation integer
);

COMMENT ON COLUMN public.recall_workers.bell IS 'listening; lost: it has no connection; unheard: what is rung does not reach it, as behind a transaction pooler';

COMMENT ON COLUMN public.recall_workers.held IS 'why this worker claims nothing: copy (the database is one), paused (it was started so); null: it claims';

COMMENT ON COLUMN public.recall_workers.system_identifier IS 'of the cluster in which the worker wrote this row; null: not known';

COMMENT ON COLUMN public.recall_workers.database_oid IS 'of the database in which the worker wrote this row; null: not known';

COMMENT ON COLUMN public.recall_workers.queues IS 'the queues that this worker serves; null: a version without queues, which claims everything';

COMMENT ON COLUMN public.recall_workers.generation IS 'the schema version that the worker''s code was made for; null: a version before queues';

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
    edits integer DEFAULT 0 NOT NULL,
    edited_at timestamp with time zone,
    edit_of integer,
    skips integer DEFAULT 0 NOT NULL,
    named_at timestamp with time zone,
    fired_at timestamp with time zone,
    fires integer DEFAULT 0 NOT NULL,
    zone_data text,
    uncounted integer DEFAULT 0 NOT NULL,
    queue text DEFAULT 'default'::text NOT NULL,
    slot integer DEFAULT 1 NOT NULL,
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

COMMENT ON COLUMN public.session_recalls.edits IS 'how often its schedule was edited: a settle that judged by an earlier schedule judges again';

COMMENT ON COLUMN public.session_recalls.edited_at IS 'when its rule was last edited: the moments of the new rule count from there';

COMMENT ON COLUMN public.session_recalls.edit_of IS 'the occurrence whose moment a worker is to compute anew, as cron, time_zone or cadence was edited; of no meaning where it is not `occurrence`';

COMMENT ON COLUMN public.session_recalls.skips IS 'occurrences that were skipped before an edit, and are not left out yet';

COMMENT ON COLUMN public.session_recalls.named_at IS 'trigger_at as a person named it, which consumes no occurrence: by reschedule, or in the statement that edited the rule';

COMMENT ON COLUMN public.session_recalls.fired_at IS 'since when an extra run is asked for (fire); it is due at lease_until';

COMMENT ON COLUMN public.session_recalls.fires IS 'extra runs that were asked for so far: the n of the key <id>:<occurrence>.f<n>';

COMMENT ON COLUMN public.session_recalls.zone_data IS 'the version of the time zone data by which a moment of cron was computed';

COMMENT ON COLUMN public.session_recalls.uncounted IS 'calls of this occurrence that may have run and cost no attempt; of an occurrence that was not called yet (begun_at), what an earlier one left behind';

COMMENT ON COLUMN public.session_recalls.queue IS 'which workers may claim this recall: those whose RECALL_QUEUE names it';

COMMENT ON COLUMN public.session_recalls.slot IS 'which of its session''s slots it has while it is pending, from 1; of other statuses, the last one that it had';

CREATE TABLE public.sessions (
    id text NOT NULL,
    user_id text NOT NULL
);

ALTER TABLE ONLY public.recall_actions
    ADD CONSTRAINT recall_actions_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.recall_attempts
    ADD CONSTRAINT recall_attempts_pkey PRIMARY KEY (recall_id, occurrence, rekey, attempt, outcome);

ALTER TABLE ONLY public.recall_chores
    ADD CONSTRAINT recall_chores_pkey PRIMARY KEY (chore);

ALTER TABLE ONLY public.recall_endpoints
    ADD CONSTRAINT recall_endpoints_pkey PRIMARY KEY (endpoint);

ALTER TABLE ONLY public.recall_outbox
    ADD CONSTRAINT recall_outbox_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.recall_queues
    ADD CONSTRAINT recall_queues_pkey PRIMARY KEY (queue);

ALTER TABLE ONLY public.recall_runs
    ADD CONSTRAINT recall_runs_pkey PRIMARY KEY (key);

ALTER TABLE ONLY public.recall_schema
    ADD CONSTRAINT recall_schema_pkey PRIMARY KEY (version);

ALTER TABLE ONLY public.recall_session_locks
    ADD CONSTRAINT recall_session_locks_pkey PRIMARY KEY (session_id);

ALTER TABLE ONLY public.recall_subscriptions
    ADD CONSTRAINT recall_subscriptions_pkey PRIMARY KEY (queue);

ALTER TABLE ONLY public.recall_workers
    ADD CONSTRAINT recall_workers_pkey PRIMARY KEY (worker);

ALTER TABLE ONLY public.session_recalls
    ADD CONSTRAINT session_recalls_pkey PRIMARY KEY (id);

ALTER TABLE ONLY public.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (id);

CREATE INDEX idx_recall_actions_at ON public.recall_actions USING brin (at) WITH (pages_per_range='32', autosummarize='on');

CREATE INDEX idx_recall_actions_recall ON public.recall_actions USING hash (recall_id);

CREATE INDEX idx_recall_attempts_ended_at ON public.recall_attempts USING brin (ended_at) WITH (pages_per_range='32', autosummarize='on');

CREATE INDEX idx_recall_attempts_session ON public.recall_attempts USING btree (session_id, last_called_at);

CREATE INDEX idx_recall_outbox_due ON public.recall_outbox USING btree (due_at) WHERE ((delivered_at IS NULL) AND (given_up_at IS NULL));

CREATE INDEX idx_recall_outbox_recall ON public.recall_outbox USING hash (recall_id);

CREATE INDEX idx_recall_runs_started ON public.recall_runs USING btree (started_at);

CREATE INDEX idx_recalls_aborting ON public.session_recalls USING btree (session_id) WHERE ((lease IS NOT NULL) AND (status <> ALL (ARRAY['pending'::text, 'running'::text])));

CREATE UNIQUE INDEX idx_recalls_active_pending ON public.session_recalls USING btree (session_id) WHERE (status = 'pending'::text);

CREATE INDEX idx_recalls_deferred ON public.session_recalls USING btree (COALESCE(lease_until, trigger_at)) WHERE ((status = ANY (ARRAY['pending'::text, 'running'::text])) AND (paused_at IS NULL) AND (lease IS NULL) AND (deferrals > 0));

CREATE INDEX idx_recalls_due ON public.session_recalls USING btree (COALESCE(lease_until, trigger_at)) WHERE ((status = ANY (ARRAY['pending'::text, 'running'::text])) AND (paused_at IS NULL));

CREATE UNIQUE INDEX idx_recalls_one_run ON public.session_recalls USING btree (session_id) WHERE ((lease IS NOT NULL) AND (status = ANY (ARRAY['pending'::text, 'running'::text])));

CREATE INDEX idx_recalls_paused ON public.session_recalls USING btree (trigger_at) WHERE ((status = ANY (ARRAY['pending'::text, 'running'::text])) AND (paused_at IS NOT NULL));

CREATE INDEX idx_recalls_queue_due ON public.session_recalls USING btree (queue, COALESCE(lease_until, trigger_at)) WHERE ((status = ANY (ARRAY['pending'::text, 'running'::text])) AND (paused_at IS NULL));

CREATE INDEX idx_recalls_replan ON public.session_recalls USING btree (id) WHERE ((cadence = 'cron'::text) AND (call_type = 'recurring'::text) AND ((planned_at <> trigger_at) OR (interval_seconds IS NULL) OR (edit_of = occurrence) OR (skips > 0)) AND (lease IS NULL) AND (status = ANY (ARRAY['pending'::text, 'running'::text])));

CREATE INDEX idx_recalls_session_status ON public.session_recalls USING btree (session_id, status);

CREATE INDEX idx_recalls_trigger_at_status ON public.session_recalls USING btree (trigger_at, status);

CREATE INDEX idx_recalls_trouble ON public.session_recalls USING btree (last_outcome, trigger_at) WHERE (last_outcome = ANY (ARRAY['accepted'::text, 'busy'::text, 'gone'::text, 'misconfigured'::text, 'unavailable'::text, 'unknown'::text, 'failed'::text, 'refused'::text, 'capped'::text, 'misfired'::text, 'expired'::text, 'unsent'::text, 'malformed'::text]));

CREATE INDEX idx_recalls_zone_data ON public.session_recalls USING btree (zone_data) WHERE ((cadence = 'cron'::text) AND (time_zone IS NOT NULL) AND (status = ANY (ARRAY['pending'::text, 'running'::text])));

CREATE TRIGGER recall_admit_queue BEFORE INSERT ON public.session_recalls FOR EACH ROW WHEN ((new.queue <> 'default'::text)) EXECUTE FUNCTION public.recall_admit_queue();

CREATE TRIGGER recall_admit_queue_edit BEFORE UPDATE OF queue ON public.session_recalls FOR EACH ROW WHEN (((new.queue <> old.queue) AND (new.queue <> 'default'::text))) EXECUTE FUNCTION public.recall_admit_queue();

CREATE TRIGGER recall_at_insert BEFORE INSERT ON public.session_recalls FOR EACH ROW WHEN (((NOT (has_table_privilege(('public.session_recalls'::regclass)::oid, 'select'::text) AND has_column_privilege(('public.session_recalls'::regclass)::oid, 'status'::text, 'update'::text))) AND (NOT ((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))))) EXECUTE FUNCTION public.recall_free_slot();

CREATE TRIGGER recall_before_edit BEFORE UPDATE ON public.session_recalls FOR EACH ROW WHEN (((NOT (new.lease IS DISTINCT FROM old.lease)) AND (NOT (new.lease_until IS DISTINCT FROM old.lease_until)) AND (new.edits = old.edits))) EXECUTE FUNCTION public.recall_before_edit();

CREATE TRIGGER recall_before_insert BEFORE INSERT ON public.session_recalls FOR EACH ROW EXECUTE FUNCTION public.recall_before_insert();

COMMENT ON TRIGGER recall_before_insert ON public.session_recalls IS 'a session has one pending recall: the table was seen with an index that says so';

CREATE TRIGGER recall_before_restore BEFORE INSERT ON public.recall_chores FOR EACH ROW WHEN (((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))) EXECUTE FUNCTION public.recall_before_restore('chore');

CREATE TRIGGER recall_before_restore BEFORE INSERT ON public.recall_endpoints FOR EACH ROW WHEN (((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))) EXECUTE FUNCTION public.recall_before_restore('endpoint');

CREATE TRIGGER recall_before_restore BEFORE INSERT ON public.recall_queues FOR EACH ROW WHEN (((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))) EXECUTE FUNCTION public.recall_before_restore('queue');

CREATE TRIGGER recall_before_restore BEFORE INSERT ON public.recall_schema FOR EACH ROW WHEN (((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))) EXECUTE FUNCTION public.recall_before_restore('version');

CREATE TRIGGER recall_before_restore BEFORE INSERT ON public.recall_subscriptions FOR EACH ROW WHEN (((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))) EXECUTE FUNCTION public.recall_before_restore('queue');

CREATE TRIGGER recall_before_restore BEFORE INSERT ON public.recall_workers FOR EACH ROW WHEN (((current_setting('check_function_bodies'::text) = 'off'::text) AND (current_setting('search_path'::text) = ANY (ARRAY[''::text, '""'::text])))) EXECUTE FUNCTION public.recall_before_restore('worker');

CREATE TRIGGER recall_keep_actions BEFORE DELETE OR UPDATE ON public.recall_actions FOR EACH ROW EXECUTE FUNCTION public.recall_keep_actions();

CREATE TRIGGER recall_keep_all_actions BEFORE TRUNCATE ON public.recall_actions FOR EACH STATEMENT EXECUTE FUNCTION public.recall_keep_actions();

CREATE TRIGGER recall_on_failure AFTER UPDATE OF status ON public.session_recalls FOR EACH ROW WHEN (((new.status = 'failed'::text) AND (old.status <> 'failed'::text))) EXECUTE FUNCTION public.recall_on_failure();

CREATE TRIGGER recall_ring_deleted AFTER DELETE ON public.session_recalls FOR EACH ROW WHEN ((old.lease IS NOT NULL)) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_earlier AFTER UPDATE OF trigger_at, status, paused_at ON public.session_recalls FOR EACH ROW WHEN (((new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.paused_at IS NULL) AND (COALESCE(new.lease_until, new.trigger_at) <= (now() + '00:01:00'::interval)) AND (((new.lease IS NULL) AND (old.lease IS NULL) AND (new.trigger_at < old.trigger_at)) OR (old.status <> ALL (ARRAY['pending'::text, 'running'::text])) OR (old.paused_at IS NOT NULL)))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_edited AFTER UPDATE OF cron, time_zone, cadence ON public.session_recalls FOR EACH ROW WHEN (((new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.edits <> old.edits) AND ((new.lease IS NULL) OR (new.fired_at IS NOT NULL)))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_ended AFTER UPDATE OF status ON public.session_recalls FOR EACH ROW WHEN (((new.lease IS NOT NULL) AND (new.lease = old.lease) AND (old.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.status <> ALL (ARRAY['pending'::text, 'running'::text])))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_moved AFTER UPDATE OF trigger_at ON public.session_recalls FOR EACH ROW WHEN (((new.cadence = 'cron'::text) AND (new.lease IS NULL) AND (new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.trigger_at IS DISTINCT FROM old.trigger_at) AND (new.trigger_at IS DISTINCT FROM new.planned_at))) EXECUTE FUNCTION public.recall_ring();

CREATE TRIGGER recall_ring_queue AFTER UPDATE OF queue ON public.session_recalls FOR EACH ROW WHEN (((new.queue <> old.queue) AND (new.lease IS NULL) AND (new.status = ANY (ARRAY['pending'::text, 'running'::text])) AND (new.paused_at IS NULL) AND (COALESCE(new.lease_until, new.trigger_at) <= (now() + '00:01:00'::interval)))) EXECUTE FUNCTION public.recall_ring();

ALTER TABLE ONLY public.session_recalls
    ADD CONSTRAINT session_recalls_session_id_fkey FOREIGN KEY (session_id) REFERENCES public.sessions(id) ON DELETE CASCADE;
