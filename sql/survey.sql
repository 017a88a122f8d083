-- What `migrate` looks at before it changes anything, and what `migrate --check` and `doctor` look
-- at with it. Catalogs only, and the statuses of rows. Nothing here changes anything.

-- name: place
-- The schema that has the table, or that it would be created in, and what this role may do there.
-- RECALL_SCHEMA names it; else it is found as the connection's search_path finds it.
select n.nspname::text as schema, c.oid is not null as there, c.relkind::text as kind,
    c.relpersistence = 't' as temporary,
    pg_get_userbyid(c.relowner)::text as owner, current_user::text as role,
    (c.oid is null or pg_has_role(c.relowner, 'usage')) as owns,
    has_schema_privilege(n.oid, 'create') as creates,
    (n.oid is not null and to_regclass(quote_ident(n.nspname) || '.recall_schema') is not null)
        as recorded,
    (c.oid is not null and has_table_privilege(c.oid, 'select')) as reads,
    current_setting('server_version_num')::integer as number,
    current_setting('server_version') as version,
    (c.oid is not null and row_security_active(c.oid)) as row_security,
    c.relpersistence = 'u' as unlogged, c.reloftype <> 0 as typed,
    exists (
        select from pg_inherits i where c.oid in (i.inhrelid, i.inhparent)
    ) as inherits,
    exists (
        select from pg_class r
        where r.relnamespace = n.oid and r.relname = 'recall_schema'
            and (r.relkind <> 'r' or 4 <> (
                select count(*) from pg_attribute a
                where a.attrelid = r.oid and not a.attisdropped
                    and a.attname in ('version', 'name', 'oldest_code', 'applied_at')
            ))
    ) as other_record
from (
    select case when %(schema)s::text is not null
        then to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
        else to_regclass('session_recalls')
    end as oid
) t
left join pg_class c on c.oid = t.oid
left join pg_namespace n
    on n.oid = coalesce(
        c.relnamespace,
        (select oid from pg_namespace where nspname = coalesce(%(schema)s::text, current_schema()))
    );

-- name: renamed
-- Adopted tables that have another name now: the trigger of recall-worker stays with them.
select n.nspname::text as schema, c.relname::text as name
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where c.relname <> 'session_recalls' and c.relkind in ('r', 'p')
    and exists (
        select from pg_trigger t
        join pg_proc p on p.oid = t.tgfoid
        where t.tgrelid = c.oid and p.proname = 'recall_before_insert'
    )
order by n.nspname, c.relname;

-- name: columns
-- The table's columns, with the type below a domain, and as `declared`. `null`: whether the column
-- can be null; `filled`: whether PostgreSQL fills it in where an insert leaves it out;
-- `expression`: by what.
with recursive below (attnum, type, typmod) as (
    select a.attnum, a.atttypid, a.atttypmod
    from pg_attribute a
    where a.attrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
        and a.attnum > 0 and not a.attisdropped
    union all
    select b.attnum, t.typbasetype, t.typtypmod
    from below b join pg_type t on t.oid = b.type
    where t.typtype = 'd'
)
select a.attname::text as name, format_type(b.type, b.typmod) as type,
    format_type(a.atttypid, a.atttypmod) as declared,
    (t.typtype = 'e') as enum, not (a.attnotnull or o.typnotnull) as null,
    a.attgenerated <> '' as generated,
    (a.atthasdef or a.attidentity <> '' or a.attgenerated <> '') as filled,
    (a.attidentity <> '') as identity, pg_get_expr(d.adbin, d.adrelid) as expression
from below b
join pg_type t on t.oid = b.type and t.typtype <> 'd'
join pg_attribute a on a.attrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
    and a.attnum = b.attnum
join pg_type o on o.oid = a.atttypid
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
order by a.attnum;

-- name: rules
-- Rules that PostgreSQL puts in the place of statements, or beside them.
select r.rulename::text as name
from pg_rewrite r
where r.ev_class = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
order by r.rulename;

-- name: users_of_rows
-- Columns of other relations that hold whole rows of the table: then PostgreSQL lets nobody add a
-- column that has a default.
select u.oid::regclass::text as relation, a.attname::text as name
from pg_class c
join pg_type t on t.oid = c.reltype
join pg_attribute a on a.atttypid in (t.oid, t.typarray) and not a.attisdropped
join pg_class u on u.oid = a.attrelid and u.relkind in ('r', 'p', 'm', 'f', 'c')
where c.oid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
order by 1, 2;

-- name: taken
-- What has a name that recall-worker needs: relations of any kind, types that are not a relation's,
-- functions with any parameters, triggers and constraints of the table. `relations`: tables of ours
-- and their indexes; `domains`: types of ours. A constraint that reads status alone is replaced.
select n.nspname::text as schema, k.kind, k.name
from pg_namespace n
cross join lateral (
    select case c.relkind
            when 'r' then 'table' when 'p' then 'table' when 'v' then 'view'
            when 'S' then 'sequence'
            when 'm' then 'materialized view' when 'f' then 'foreign table'
            when 'c' then 'type' else 'index'
        end as kind, c.relname::text as name
    from pg_class c
    where c.relnamespace = n.oid
        and c.relname = any (%(relations)s::text[] || %(domains)s::text[])
    union all
    select 'function', p.oid::regprocedure::text from pg_proc p
    where p.pronamespace = n.oid and p.proname = any (%(functions)s::text[])
    union all
    select 'type', t.typname::text from pg_type t
    where t.typnamespace = n.oid and t.typrelid = 0 and (
        t.typname = any (%(domains)s::text[]) or t.typname = any (%(relations)s::text[])
    )
    union all
    select 'trigger', t.tgname::text from pg_trigger t
    where t.tgrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
        and not t.tgisinternal and t.tgname = any (%(triggers)s::text[])
    union all
    select 'constraint', k.conname::text from pg_constraint k
    where k.conrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
        and k.conname = 'session_recalls_status_known' and not (k.contype = 'c' and k.conkey = (
            select array[a.attnum] from pg_attribute a
            where a.attrelid = k.conrelid and a.attname = 'status'
        ))
) k
where n.nspname = %(schema)s::text
order by k.kind desc, k.name;

-- name: overloads
-- Functions beside ours with the same names and other parameters: PostgreSQL may not know which of
-- the two a statement means.
select p.oid::regprocedure::text as name
from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname = %(schema)s::text and (
    p.proname = any (%(functions)s::text[]) and p.pronargs > 0
    or p.proname = any (%(readers)s::text[])
        and not (p.pronargs = 1 and p.proargtypes[0] = 'text'::regtype)
)
order by 1;

-- name: unique_id
-- Whether a row can be found by its id alone.
select exists (
    select from pg_index i
    join pg_attribute a on a.attrelid = i.indrelid and a.attname = 'id'
    where i.indrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
        and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
        and i.indnkeyatts = 1 and i.indkey[0] = a.attnum and i.indimmediate
) as there;

-- name: one_pending
-- Whether a session has one pending recall at most, by an index of whatever name.
select exists (
    select from pg_index i
    join pg_attribute a on a.attrelid = i.indrelid and a.attname = 'session_id'
    where i.indrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
        and i.indisunique and i.indisvalid and i.indexprs is null
        and i.indnkeyatts = 1 and i.indkey[0] = a.attnum
        and pg_get_expr(i.indpred, i.indrelid) ~ '^\(+status\)?(::text)? = ''pending''::'
) as there;

-- name: crowded
-- How many sessions have more pending recalls than that. Rows, as `migrate --slots` alone asks it.
select count(*) as sessions, coalesce(max(s.pending), 0) as most
from (
    select count(*) as pending from session_recalls
    where status = 'pending'
    group by session_id
    having count(*) > %(most)s
) s;

-- name: misplaced
-- Pending recalls that have no slot of their own in their session: one with the same slot as an
-- older one, as from before there were several, or one with more than the highest.
select m.id::text as id
from (
    select id, slot, row_number() over (partition by session_id, slot order by created_at, id) as n
    from session_recalls
    where status = 'pending'
) m
where m.n > 1 or m.slot not between 1 and %(most)s
limit %(limit)s;

-- name: place_again
-- Give one of them the lowest slot that is free. Null, which the column refuses: there is none.
update session_recalls r
set slot = (
    select min(g) from generate_series(1, %(most)s) g
    where not exists (
        select from session_recalls o
        where o.session_id = r.session_id and o.status = 'pending' and o.slot = g
    )
)
where r.id = %(id)s::recall_id_type and r.status = 'pending';

-- name: checks
-- The check constraints that read status: `alone` is one that reads nothing else. (PostgreSQL 18
-- has constraints that are not enforced.)
select c.conname::text as name, pg_get_constraintdef(c.oid) as definition,
    pg_get_expr(c.conbin, c.conrelid) as expression, c.conkey = array[a.attnum] as alone
from pg_constraint c
join pg_attribute a on a.attrelid = c.conrelid and a.attname = 'status'
where c.conrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
    and c.contype = 'c' and (
        a.attnum = any (c.conkey)
        -- Through a column that is generated from it, or a whole row.
        or 0 = any (c.conkey) or exists (
            select from pg_attribute g
            where g.attrelid = c.conrelid and g.attnum = any (c.conkey) and g.attgenerated <> ''
        )
    )
    and coalesce((to_jsonb(c) ->> 'conenforced')::boolean, true)
order by c.conname;

-- name: unique_indexes
-- Unique indexes, and such as exclude rows, which read status: with the parts that rows are
-- compared by, and the condition. Those that read a column in `others` are left out: no two recalls
-- have the same in it, or it is a column of ours.
select i.relname::text as name, pg_get_indexdef(i.oid) as definition, k.conname::text as constraint,
    array(
        select pg_get_indexdef(i.oid, n, false) from generate_series(1, x.indnkeyatts) n order by n
    ) as keys,
    pg_get_expr(x.indpred, x.indrelid) as condition
from pg_index x
join pg_class i on i.oid = x.indexrelid
left join pg_constraint k on k.conindid = i.oid and k.conrelid = x.indrelid
    and k.contype in ('p', 'u', 'x')
cross join lateral (
    select array_agg(a.attname::text) as names
    from pg_attribute a
    where a.attrelid = x.indrelid and a.attnum > 0 and (
        a.attnum = any (x.indkey)
        or exists (
            select from pg_depend d
            where d.classid = 'pg_class'::regclass and d.objid = i.oid
                and d.refclassid = 'pg_class'::regclass and d.refobjid = x.indrelid
                and d.refobjsubid = a.attnum
        )
    )
) read
where x.indrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
    and (x.indisunique or x.indisexclusion)
    and 'status' = any (read.names) and not read.names && %(others)s::text[]
order by i.relname;

-- name: keys_to_sessions
-- Foreign keys of session_id, and what they refer to.
select c.conname::text as name, c.confrelid::regclass::text as to,
    f.relname::text as table, fn.nspname::text as schema, fa.attname::text as column,
    c.confdeltype::text as on_delete, c.convalidated as validated
from pg_constraint c
join pg_class f on f.oid = c.confrelid
join pg_namespace fn on fn.oid = f.relnamespace
join pg_attribute a on a.attrelid = c.conrelid and a.attname = 'session_id'
join pg_attribute fa on fa.attrelid = c.confrelid and fa.attnum = c.confkey[1]
where c.conrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
    and c.contype = 'f' and c.conkey = array[a.attnum]
order by c.conname;

-- name: referable
-- A table that is to be referred to by session_id, beside the recalls if its schema is not given:
-- whether it is there, the type of its id, whether that is unique, and whether this role may refer
-- to it.
select t.oid::regclass::text as to, n.nspname::text as schema, c.relname::text as table,
    c.relkind::text as kind,
    format_type(a.atttypid, null) as type,
    -- Where the table is still to be created its keys will be text.
    coalesce((
        select format_type(s.atttypid, null) from pg_attribute s
        where s.attrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls')
            and s.attname = 'session_id' and not s.attisdropped
    ), 'text') as wanted,
    exists (
        select from pg_index i
        where i.indrelid = t.oid and i.indisunique and i.indisvalid and i.indpred is null
            and i.indexprs is null and i.indnkeyatts = 1 and i.indkey[0] = a.attnum
            and i.indimmediate
    ) as unique,
    has_table_privilege(t.oid, 'references') as refers, current_user::text as role
from (
    select case when strpos(%(table)s::text, '.') > 0
        then to_regclass(%(table)s::text)
        else to_regclass(quote_ident(%(schema)s::text) || '.' || %(table)s::text)
    end as oid
) t
join pg_class c on c.oid = t.oid
join pg_namespace n on n.oid = c.relnamespace
left join pg_attribute a on a.attrelid = t.oid and a.attname = 'id' and not a.attisdropped;

-- name: constraint_names
-- The names that a constraint of the table can't have.
select c.conname::text as name
from pg_constraint c
where c.conrelid = to_regclass(quote_ident(%(schema)s::text) || '.session_recalls');
