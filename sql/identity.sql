-- Which database this is, whether it is the one that `migrate` has recorded, and which migrations
-- have made it where their record is lost.

-- name: identity
-- The system identifier of the cluster is the same on a standby, and another one after initdb, and
-- so after pg_upgrade; the oid of the database is another one after it was created again. Both stay
-- the same over a restart and a failover. Without the right to run pg_control_system() this
-- statement is refused, whatever guards the call: then `identity_by_oid`.
select c.system_identifier, d.oid::bigint as database_oid,
    exists (select from recall_identity) as recorded,
    exists (
        select from recall_identity i
        where i.system_identifier <> c.system_identifier or i.database_oid <> d.oid::bigint
    ) as copy
from pg_control_system() c cross join pg_database d
where d.datname = current_database();

-- name: identity_by_oid
-- What can be said without pg_control_system(): another oid is another database; the same oid may
-- be one of another cluster.
select null::bigint as system_identifier, d.oid::bigint as database_oid,
    exists (select from recall_identity) as recorded,
    exists (select from recall_identity i where i.database_oid <> d.oid::bigint) as copy
from pg_database d
where d.datname = current_database();

-- name: record_identity
-- This database is the one from now on. Other rows came with a dump, or are of what it was before.
with others as (
    delete from recall_identity
    where system_identifier <> %(system_identifier)s::bigint
        or database_oid <> %(database_oid)s::bigint
)
insert into recall_identity (system_identifier, database_oid)
select %(system_identifier)s::bigint, %(database_oid)s::bigint
where not exists (
    select from recall_identity
    where system_identifier = %(system_identifier)s::bigint
        and database_oid = %(database_oid)s::bigint
);

-- name: applied
-- The record of the migrations: its rows, and the comment that says the same where a dump of the
-- schema was restored without them. Where the table is missing: null.
-- `schema`: of the table; null: what the search_path finds. Columns with these names, all of them,
-- are ours; so is a trigger function of that name with a setting of ours in it, which is left where
-- a tool has dropped all that it did not know.
with place as (
    select to_regclass(coalesce(quote_ident(%(schema)s::text) || '.', '') || 'recall_schema')
            as record,
        to_regclass(coalesce(quote_ident(%(schema)s::text) || '.', '') || 'session_recalls')
            as recalls
)
select obj_description(p.record, 'pg_class') as comment, p.record is not null as there,
    (
        select count(*) = 4 from pg_attribute a
        where a.attrelid = p.recalls and not a.attisdropped
            and a.attname in ('lease', 'rekey', 'run_reference', 'body_hash')
    ) as adopted,
    exists (
        select from pg_trigger t
        join pg_proc f on f.oid = t.tgfoid
        where t.tgrelid = p.recalls and f.proname = 'recall_before_insert'
            and strpos(f.prosrc, 'recall_worker.rings') > 0
    ) as marked
from place p;

-- name: evidence
-- What each migration up to 0019 has left behind, where neither rows nor comment tell: the versions
-- up to that one wrote no comment.
with place as (
    select c.oid as recalls, c.relnamespace as namespace
    from pg_class c
    where c.oid = to_regclass(
        coalesce(quote_ident(%(schema)s::text) || '.', '') || 'session_recalls'
    )
),
columns as (
    select a.attname as name from place p
    join pg_attribute a on a.attrelid = p.recalls and a.attnum > 0 and not a.attisdropped
),
relations as (
    select c.relname as name from place p
    join pg_class c on c.relnamespace = p.namespace
    left join pg_index i on i.indexrelid = c.oid
    where i.indisvalid is not false
),
functions as (
    select f.proname as name from place p join pg_proc f on f.pronamespace = p.namespace
)
select v.version, v.there
from (values
    (10, 'lease' in (select name from columns)
        and 'recall_attempts' in (select name from relations)
        and 'recall_workers' in (select name from relations)
        and 'recall_endpoints' in (select name from relations)
        and 'recall_chores' in (select name from relations)
        and 'recall_before_insert' in (select name from functions)),
    (11, exists (
        select from place p
        join pg_constraint k on k.conrelid = p.recalls
        where k.conname = 'session_recalls_status_known' and k.convalidated
    )),
    (12, 'idx_recalls_due' in (select name from relations)),
    (13, 'idx_recalls_one_run' in (select name from relations)),
    (14, 'idx_recalls_aborting' in (select name from relations)),
    (15, 'idx_recalls_moved' in (select name from relations)
        or 'idx_recalls_replan' in (select name from relations)),
    (16, 'may_still_run' in (select name from columns)),
    (17, 'zone_data' in (select name from columns)
        and 'recall_before_edit' in (select name from functions)),
    (18, 'idx_recalls_zone_data' in (select name from relations)
        and 'idx_recalls_moved' not in (select name from relations)),
    (19, 'recall_actions' in (select name from relations)),
    -- Made by a version that wrote a comment, which was lost: nothing is to be concluded then.
    (21, 'recall_identity' in (select name from relations))
) as v (version, there)
order by v.version;
