-- works with code from: 15
-- What people and agents did to recalls: each row is written in the transaction of what it records,
-- by the command line and by `Recalls`. Rows are added, read, and pruned when they are old; nothing
-- changes one. Plain SQL of the application is not recorded: it does not have to know this table.
create table recall_actions (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    actor text not null,
    via text not null,
    action text not null,
    recall_id text not null,
    detail jsonb not null default '{}'
) with (autovacuum_vacuum_scale_factor = 0.05);
comment on table recall_actions is
    'what people and agents did to recalls, one row for each recall that was changed; append-only';
comment on column recall_actions.at is
    'when the transaction of the action began; rows in the order of writing: by id';
comment on column recall_actions.actor is
    'who did it, as the program was told (RECALL_ACTOR, `actor=`), '
    'else the login name and host, or the database role';
comment on column recall_actions.via is
    'the way: cli, console, mcp, python; sql: an application''s own record of what it did';
comment on column recall_actions.action is
    'schedule, cancel, skip, pause, resume, retry, fire, reschedule, edit, mark_fired';
comment on column recall_actions.recall_id is
    'the recall; no foreign key, so that what was done stays on record when the recall is deleted';
comment on column recall_actions.detail is
    'each column that was changed, {"from": ..., "to": ...}, and facts; never a text of the recall';

-- Of one recall. A hash, as an id may be longer than an entry of a btree with a second column. The
-- newest actions are found by the primary key.
create index idx_recall_actions_recall on recall_actions using hash (recall_id);
-- Of a time. Rows are written in the order of time, so a few bytes for each 32 pages are enough.
create index idx_recall_actions_at on recall_actions
    using brin (at) with (pages_per_range = 32, autosummarize = on);

-- Whoever may write recalls records what is done to them, with no further right to ask for; whoever
-- reads calls, or prunes them, reads and prunes actions. Accounts outside of sql/roles.sql would
-- otherwise be refused from here on.
do $$
declare
    given record;
begin
    for given in
        select case when a.grantee = 0 then 'public' else quote_ident(r.rolname) end as grantee,
            bool_or(a.of_recalls and a.privilege_type in ('INSERT', 'UPDATE')) as writes,
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
                select relowner from pg_class where oid = 'recall_actions'::regclass
            )
        group by a.grantee, r.rolname
    loop
        if given.writes then
            execute format('grant select, insert on recall_actions to %s', given.grantee);
        end if;
        if given.reads then
            execute format('grant select on recall_actions to %s', given.grantee);
        end if;
        if given.prunes then
            execute format('grant delete on recall_actions to %s', given.grantee);
        end if;
    end loop;
end
$$;
