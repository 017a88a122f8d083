-- works with code from: 15
-- Queues: which workers may claim a row. The application's own insert, which does not name the
-- column, goes to `default`.
lock table session_recalls in access exclusive mode;
alter table session_recalls add column queue text not null default 'default';
comment on column session_recalls.queue is
    'which workers may claim this recall: those whose RECALL_QUEUE names it';

alter table recall_workers
    add column queues text[],
    add column generation integer;
comment on column recall_workers.queues is
    'the queues that this worker serves; null: a version without queues, which claims everything';
comment on column recall_workers.generation is
    'the schema version that the worker''s code was made for; null: a version before queues';

-- What was done to a queue is on record beside what was done to recalls.
alter table recall_actions alter column recall_id drop not null;
comment on column recall_actions.action is
    'schedule, cancel, skip, pause, resume, retry, fire, reschedule, edit, mark_fired, '
    'pause_queue, resume_queue';
comment on column recall_actions.recall_id is
    'the recall; no foreign key, so that what was done stays on record when the recall is deleted; '
    'null: it was done to a queue, which `detail` names';

-- A row for each queue that is paused. It lasts until it is resumed, whoever restarts.
create table recall_queues (
    queue text primary key,
    paused_at timestamptz not null default now(),
    paused_by text not null,
    reason text
);
comment on table recall_queues is
    'queues that are paused: nothing of them is claimed or taken up; * stands for all queues';
comment on column recall_queues.paused_by is 'who paused it, as in recall_actions.actor';
comment on column recall_queues.reason is 'why, as the person said';
create trigger recall_before_restore before insert on recall_queues
    for each row when (
        current_setting('check_function_bodies') = 'off'
        and current_setting('search_path') in ('', '""')
    )
    execute function recall_before_restore('queue');

-- Each claim asks whether its queue is paused. Accounts outside of sql/roles.sql would otherwise be
-- refused from here on: whoever changes leases pauses and resumes, whoever reads recalls may know,
-- and whoever says how a recall recurs says which queue it is in.
do $$
declare
    given record;
begin
    for given in
        select case when a.grantee = 0 then 'public' else quote_ident(r.rolname) end as grantee,
            bool_or(a.privilege_type = 'SELECT') as reads,
            bool_or(a.privilege_type = 'UPDATE' and a.name is distinct from 'cadence') as writes,
            bool_or(a.privilege_type = 'INSERT' and a.name = 'cadence') as inserts,
            bool_or(a.privilege_type = 'UPDATE' and a.name = 'cadence') as edits
        from (
            select x.grantee, x.privilege_type, null as name
            from pg_class c
            cross join lateral aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
            where c.oid = 'session_recalls'::regclass
            union all
            select x.grantee, x.privilege_type, t.attname
            from pg_attribute t
            cross join lateral aclexplode(t.attacl) x
            where t.attrelid = 'session_recalls'::regclass and not t.attisdropped
                and (x.privilege_type = 'SELECT' or t.attname in ('lease', 'cadence'))
        ) a
        left join pg_roles r on r.oid = a.grantee
        where (a.grantee = 0 or r.oid is not null)
            and a.privilege_type in ('SELECT', 'INSERT', 'UPDATE')
            and a.grantee <> (
                select relowner from pg_class where oid = 'recall_queues'::regclass
            )
        group by a.grantee, r.rolname
    loop
        if given.reads then
            execute format('grant select on recall_queues to %s', given.grantee);
        end if;
        if given.inserts then
            execute format('grant insert (queue) on session_recalls to %s', given.grantee);
        end if;
        if given.edits then
            execute format('grant update (queue) on session_recalls to %s', given.grantee);
        end if;
        if given.writes then
            execute format('grant insert, update, delete on recall_queues to %s', given.grantee);
        end if;
    end loop;
end
$$;

-- Whether a row may be put into a queue other than `default`. A worker of a version without queues
-- would claim it for its own endpoint, so none may be alive. Who inserts recalls need not be
-- allowed to read recall_workers, so this runs with the owner's rights, and names everything in
-- full. It is called for no row in `default`. Rows that a dump puts back stay as they are, as in
-- recall_before_insert. (Its name comes first in the alphabet, and so it is called first.)
-- The application reads "unique" and "duplicate" as "this session has one already": no message here
-- may contain these words, and so none repeats a name.
do $migration$
begin
    execute format($definition$
create function recall_admit_queue() returns trigger language plpgsql
security definer set search_path = pg_catalog, pg_temp as $$
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
        select from %1$s.recall_workers w
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
$$
    $definition$, (
        select format('%I', n.nspname)
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = 'session_recalls'::regclass
    ));
end
$migration$;
create trigger recall_admit_queue before insert on session_recalls
    for each row when (new.queue <> 'default')
    execute function recall_admit_queue();
create trigger recall_admit_queue_edit before update of queue on session_recalls
    for each row when (new.queue <> old.queue and new.queue <> 'default')
    execute function recall_admit_queue();
create trigger recall_ring_queue after update of queue on session_recalls
    for each row when (
        new.queue <> old.queue and new.lease is null
        and new.status in ('pending', 'running') and new.paused_at is null
        and coalesce(new.lease_until, new.trigger_at) <= now() + interval '60 seconds'
    )
    execute function recall_ring();
