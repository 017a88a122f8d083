-- works with code from: 15
-- A final failure is told (RECALL_FAILURE_URL): who wants to hear of failures, and what is to be
-- told. An entry is written by a trigger, in the transaction in which a recall becomes `failed`,
-- whichever program wrote that: a settle, a worker of an earlier version, the application's own
-- SQL. Workers that have the setting deliver it, and write down here what became of it.

-- Only workers know whether anybody is to be told, and the trigger can't ask them. So a worker that
-- has the setting says so here, and again each hour. It stands for days, so that nothing is lost
-- while all workers are down; then it has lapsed, and the table of entries does not grow for
-- nobody.
create table recall_subscriptions (
    queue text primary key,
    until timestamptz not null
);
comment on table recall_subscriptions is
    'queues whose failed recalls are told to somebody, as workers with RECALL_FAILURE_URL say';
comment on column recall_subscriptions.queue is 'the queue of the recalls';
comment on column recall_subscriptions.until is
    'before this instant entries are written to recall_outbox; renewed by the workers';
-- As with recall_workers: a dump of the data brings rows that may be there already.
create trigger recall_before_restore before insert on recall_subscriptions
    for each row when (
        current_setting('check_function_bodies') = 'off'
        and current_setting('search_path') in ('', '""')
    )
    execute function recall_before_restore('queue');

-- No foreign key: with a session its recalls are deleted, but a failure is told all the same.
create table recall_outbox (
    id uuid primary key default gen_random_uuid(),
    queue text not null,
    recall_id text not null,
    occurrence integer not null,
    body text not null,
    written_at timestamptz not null default now(),
    due_at timestamptz not null default now(),
    lease uuid,
    tries integer not null default 0,
    http_status integer,
    reason text,
    delivered_at timestamptz,
    given_up_at timestamptz
) with (autovacuum_vacuum_scale_factor = 0.05);
comment on table recall_outbox is
    'failed recalls that are to be told to RECALL_FAILURE_URL, and what became of that';
comment on column recall_outbox.id is
    'the webhook-id of every try: the receiver tells repeats by it';
comment on column recall_outbox.recall_id is 'the recall; it may be deleted meanwhile';
comment on column recall_outbox.body is 'what is sent, the same octets at every try';
comment on column recall_outbox.written_at is
    'when the transaction began in which the recall became failed';
comment on column recall_outbox.due_at is
    'when it is sent next; while it is leased, when another worker may send it';
comment on column recall_outbox.lease is
    'the right to write down how the try ended, a fresh uuid for each try';
comment on column recall_outbox.tries is 'tries so far, counted when they begin';
comment on column recall_outbox.http_status is 'of the last try that was answered';
comment on column recall_outbox.reason is 'why the last try did not deliver it';
comment on column recall_outbox.delivered_at is 'when it was answered with 2xx';
comment on column recall_outbox.given_up_at is 'since when nobody tries any more';

-- What is to be sent, in the order in which it is due.
create index idx_recall_outbox_due on recall_outbox (due_at)
    where delivered_at is null and given_up_at is null;
-- Of one recall. A hash, as an id may be longer than an entry of a btree.
create index idx_recall_outbox_recall on recall_outbox using hash (recall_id);

-- The entry. Its tables are those in the schema of the recalls, whatever that is called now. The
-- message and internal_comment stay here: they may be private, and a receiver that needs them finds
-- them by the id. Dates that JSON's readers can't take (infinity, far ones) are null. An id or a
-- session's name that is longer than the worker would ever send is cut: the body is bounded.
-- Where the recalls have queues, the queue is the recall's.
do $migration$
begin
    execute replace($definition$
create function recall_on_failure() returns trigger language plpgsql as $$
declare
    queue text := @queue@;
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
$$
    $definition$, '@queue@', case
        when exists (
            select from pg_attribute a
            where a.attrelid = 'session_recalls'::regclass and a.attname = 'queue'
                and not a.attisdropped
        ) then 'new.queue'
        else '''default'''
    end);
end
$migration$;
create trigger recall_on_failure after update of status on session_recalls
    for each row when (new.status = 'failed' and old.status <> 'failed')
    execute function recall_on_failure();

-- Whoever may write recalls writes entries, with no further right to ask for; whoever writes, reads
-- or prunes calls does the same here. Accounts outside of sql/roles.sql would otherwise be refused
-- from here on.
do $$
declare
    given record;
begin
    for given in
        select case when a.grantee = 0 then 'public' else quote_ident(r.rolname) end as grantee,
            bool_or(a.of_recalls and a.privilege_type in ('INSERT', 'UPDATE')) as fails,
            bool_or(not a.of_recalls and a.privilege_type = 'INSERT') as sends,
            bool_or(not a.of_recalls and a.privilege_type = 'SELECT') as reads,
            bool_or(not a.of_recalls and a.privilege_type = 'DELETE') as prunes
        from (
            select x.grantee, x.privilege_type, c.oid = 'session_recalls'::regclass as of_recalls
            from pg_class c
            cross join lateral aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
            where c.oid in ('session_recalls'::regclass, 'recall_attempts'::regclass)
            union all
            select x.grantee, x.privilege_type, t.attrelid = 'session_recalls'::regclass
            from pg_attribute t
            cross join lateral aclexplode(t.attacl) x
            where t.attrelid in ('session_recalls'::regclass, 'recall_attempts'::regclass)
                and not t.attisdropped
        ) a
        left join pg_roles r on r.oid = a.grantee
        where (a.grantee = 0 or r.oid is not null)
            and a.grantee <> (
                select relowner from pg_class where oid = 'recall_outbox'::regclass
            )
        group by a.grantee, r.rolname
    loop
        if given.fails then
            execute format('grant select on recall_subscriptions to %s', given.grantee);
            execute format('grant insert on recall_outbox to %s', given.grantee);
        end if;
        if given.sends then
            execute format('grant select, insert, update on recall_subscriptions to %s',
                given.grantee);
            execute format('grant select, insert, update on recall_outbox to %s', given.grantee);
        end if;
        if given.reads then
            execute format('grant select on recall_outbox, recall_subscriptions to %s',
                given.grantee);
        end if;
        if given.prunes then
            execute format('grant delete on recall_outbox to %s', given.grantee);
        end if;
    end loop;
end
$$;
