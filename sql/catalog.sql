-- The schema as it is: what `doctor`, `migrate --check` and `migrate` compare with the schema as
-- released (released.json). Catalogues only: nothing here reads a row or needs a right, so that it
-- works for a role that only reads, and on a standby. PostgreSQL prints the definitions itself, and
-- for that takes the lock that a reader takes. What depends on its version, on the schema's name
-- and on the types that the application chose is taken out of them by
-- recall_worker/schema/released.py.

-- name: place
-- The schema of session_recalls, by the search_path; where the table is missing that of the record
-- of migrations. `record`: whether that stands there, too. `quoted`: as SQL has to write it.
select t.oid is not null as adopted, n.nspname as schema, quote_ident(n.nspname) as quoted,
    pg_get_userbyid(t.relowner)::text as owner,
    exists (
        select from pg_class c where c.relnamespace = n.oid and c.relname = 'recall_schema'
    ) as record
from (
    select to_regclass('session_recalls') as recalls, to_regclass('recall_schema') as record
) f
left join pg_class t on t.oid = f.recalls
left join pg_class s on s.oid = f.record
join pg_namespace n on n.oid = coalesce(t.relnamespace, s.relnamespace);

-- name: columns
-- Columns, and what holds for their table, which may have none left. A type with a collation of its
-- own is another type. An owner is strange who can change the object, while the owner of
-- session_recalls can't: such a role could change what the application's inserts run, and `migrate`
-- by the owner would be refused.
select c.relname as table, c.relkind::text as kind, c.relpersistence::text as persistence,
    c.reloptions as options, pg_get_userbyid(c.relowner)::text as owner,
    not (pg_has_role(t.relowner, c.relowner, 'member') or pg_has_role(c.relowner, t.relowner,
        'member')) as strange,
    a.attname as name,
    format_type(a.atttypid, a.atttypmod) || coalesce((
        select ' collate ' || quote_ident(l.collname)
        from pg_collation l join pg_type y on y.oid = a.atttypid
        where l.oid = a.attcollation and a.attcollation <> y.typcollation
    ), '') as type,
    pg_get_expr(d.adbin, d.adrelid) as default, a.attnotnull as not_null,
    a.attidentity::text as identity, a.attgenerated::text as generated,
    col_description(c.oid, a.attnum) as comment, obj_description(c.oid, 'pg_class') as about
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
left join pg_class t on t.relnamespace = n.oid and t.relname = 'session_recalls'
where n.nspname = %(schema)s and c.relname = any (%(tables)s::text[])
    and c.relkind in ('r', 'p', 'v', 'm', 'f')
order by c.relname, a.attnum;

-- name: constraints
-- Primary keys, unique and check constraints. What PostgreSQL 18 stores of columns that are not
-- null is a property of the column here, as it always was.
select c.relname as table, k.conname as name, k.contype::text as kind,
    pg_get_constraintdef(k.oid) as definition, k.convalidated as validated,
    array(
        select a.attname::text from pg_attribute a
        where a.attrelid = k.conrelid and a.attnum = any (k.conkey)
        order by a.attname
    ) as columns
from pg_constraint k
join pg_class c on c.oid = k.conrelid
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s and c.relname = any (%(tables)s::text[])
    and k.contype in ('p', 'u', 'c')
order by c.relname, k.conname;

-- name: indexes
-- Indexes with their definitions: the name alone proves nothing. One that is being built, or whose
-- build was interrupted, serves nobody.
select c.relname as table, i.relname as name, x.indisunique as unique,
    x.indisvalid and x.indisready and x.indislive and x.indimmediate as serves,
    pg_get_indexdef(i.oid) as definition
from pg_index x
join pg_class i on i.oid = x.indexrelid
join pg_class c on c.oid = x.indrelid
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s and c.relname = any (%(tables)s::text[])
order by c.relname, i.relname;

-- name: triggers
-- Triggers, whether they fire in ordinary sessions, and the function that each calls.
select c.relname as table, t.tgname as name, quote_ident(t.tgname) as quoted,
    t.tgenabled::text as enabled, pg_get_triggerdef(t.oid) as definition,
    p.proname as function, f.nspname as place
from pg_trigger t
join pg_class c on c.oid = t.tgrelid
join pg_namespace n on n.oid = c.relnamespace
join pg_proc p on p.oid = t.tgfoid
join pg_namespace f on f.oid = p.pronamespace
where n.nspname = %(schema)s and c.relname = any (%(tables)s::text[]) and not t.tgisinternal
order by c.relname, t.tgname;

-- name: one_pending
-- Whether the table was seen with the index over one pending recall a session: the trigger's
-- comment says so. Null: there is no such trigger.
select (
    select coalesce(obj_description(t.oid, 'pg_trigger') = %(note)s::text, false)
    from pg_trigger t
    join pg_class c on c.oid = t.tgrelid
    join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = %(schema)s and c.relname = 'session_recalls'
        and t.tgname = 'recall_before_insert' and not t.tgisinternal
) as noted;

-- name: slots
-- How many pending recalls a session is to have, as `migrate --slots` has noted it in the comment of
-- that trigger; and as the two triggers do it, whose argument it is. Null: neither is there.
select (
        select substring(obj_description(t.oid, 'pg_trigger') from %(note)s::text)::integer
        from pg_trigger t
        where t.tgrelid = c.oid and t.tgname = 'recall_before_insert' and not t.tgisinternal
    ) as noted,
    (
        select max(substring(
            pg_get_triggerdef(t.oid) from 'recall_admit_slot\(''(\d{1,4})''\)$'
        )::integer)
        from pg_trigger t
        where t.tgrelid = c.oid and not t.tgisinternal
            and t.tgname in ('recall_admit_slot', 'recall_admit_slot_again')
    ) as done
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s and c.relname = 'session_recalls';

-- name: functions
-- Functions without parameters, as functions of triggers are, with all that decides what they do.
select p.proname as name, p.prosrc as body, l.lanname as language,
    format_type(p.prorettype, null) as returns, p.prosecdef as definer, p.proisstrict as strict,
    coalesce(p.proconfig, '{}') as settings, pg_get_userbyid(p.proowner)::text as owner,
    not (pg_has_role(t.relowner, p.proowner, 'member') or pg_has_role(p.proowner, t.relowner,
        'member')) as strange
from pg_proc p
join pg_namespace n on n.oid = p.pronamespace
join pg_language l on l.oid = p.prolang
left join pg_class t on t.relnamespace = n.oid and t.relname = 'session_recalls'
where n.nspname = %(schema)s and p.proname = any (%(functions)s::text[]) and p.pronargs = 0
order by p.proname;

-- name: to_hand_over
-- What is ours and belongs to the role that works here, not to the owner of session_recalls: who
-- migrates may be a member of that role, or a superuser. The next one may be another. `sql`: as
-- ALTER names it.
select concat(o.kind, ' ', quote_ident(n.nspname), '.', quote_ident(o.name), o.parameters) as sql,
    quote_ident(pg_get_userbyid(t.relowner)) as owner
from pg_class t
join pg_namespace n on n.oid = t.relnamespace
cross join lateral (
    select 'table' as kind, c.relname::text as name, '' as parameters, c.relowner as owner
    from pg_class c
    where c.relnamespace = n.oid and c.relkind = 'r' and c.relname = any (%(tables)s::text[])
    union all
    select 'function', p.proname::text, '(' || pg_get_function_identity_arguments(p.oid) || ')',
        p.proowner
    from pg_proc p
    where p.pronamespace = n.oid and p.proname = any (%(functions)s::text[])
    union all
    select 'domain', y.typname::text, '', y.typowner
    from pg_type y
    where y.typnamespace = n.oid and y.typtype = 'd' and y.typname = any (%(domains)s::text[])
) o
where n.nspname = %(schema)s and t.relname = 'session_recalls' and t.relkind = 'r'
    and o.owner <> t.relowner and pg_get_userbyid(o.owner) = current_user
order by 1;

-- name: strays
-- Tables of ours that are not in the schema of session_recalls: somebody moved them, or that, to
-- another schema, or gave one another name. Such a table has a primary key with our name, which a
-- copy of a table has not; one that never had a key (`keyless`) is known by its own name alone. One
-- in a schema with a session_recalls of its own belongs to that.
select c.relname as name, n.nspname as schema, w.name as missing,
    array(
        select a.attname::text from pg_attribute a
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    ) as columns
from unnest(%(tables)s::text[]) as w (name)
join pg_class c on c.relkind = 'r' and (
    exists (
        select from pg_constraint k
        where k.conrelid = c.oid and k.conname = w.name || '_pkey' and k.contype = 'p'
    )
    or (w.name = any (%(keyless)s::text[]) and c.relname = w.name)
)
join pg_namespace n on n.oid = c.relnamespace
where not exists (
        select from pg_class o join pg_namespace s on s.oid = o.relnamespace
        where o.relname = w.name and s.nspname = %(schema)s
    )
    and (n.nspname = %(schema)s or (
        c.relname = w.name
        and not exists (
            select from pg_class o
            where o.relname = 'session_recalls' and o.relnamespace = n.oid
        )
    ))
order by w.name, n.nspname;

-- name: stray_functions
-- Functions of ours that triggers of session_recalls call in another schema, where its own schema
-- has none of that name: the table was moved without them.
select distinct p.proname as name, f.nspname as schema
from pg_trigger t
join pg_class c on c.oid = t.tgrelid
join pg_namespace n on n.oid = c.relnamespace
join pg_proc p on p.oid = t.tgfoid
join pg_namespace f on f.oid = p.pronamespace
where n.nspname = %(schema)s and c.relname = 'session_recalls' and not t.tgisinternal
    and p.proname = any (%(functions)s::text[]) and f.oid <> n.oid
    and not exists (
        select from pg_proc o where o.pronamespace = n.oid and o.proname = p.proname
    )
order by p.proname;

-- name: tables_elsewhere
-- Whether there is a session_recalls in any schema.
select exists (
    select from pg_class c where c.relname = 'session_recalls' and c.relkind in ('r', 'p', 'v')
) as there;

-- name: privileges
-- Rights that the roles of roles.sql lack. Only where one of them was given rights on these tables
-- before: else nobody uses them here.
with wanted as (
    select * from unnest(
        %(roles)s::text[], %(tables)s::text[], %(columns)s::text[], %(privileges)s::text[]
    ) as w (role, relation, attribute, privilege)
),
given as (
    select from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = %(schema)s and c.relname in (select relation from wanted)
        and (
            exists (
                select from aclexplode(c.relacl) x join pg_roles r on r.oid = x.grantee
                where r.rolname in (select role from wanted)
            )
            or exists (
                select from pg_attribute a
                cross join lateral aclexplode(a.attacl) x
                join pg_roles r on r.oid = x.grantee
                where a.attrelid = c.oid and not a.attisdropped
                    and r.rolname in (select role from wanted)
            )
        )
    limit 1
)
select w.role, w.relation as table, w.attribute as column, w.privilege
from wanted w
join pg_roles r on r.rolname = w.role
join pg_namespace n on n.nspname = %(schema)s
join pg_class c on c.relnamespace = n.oid and c.relname = w.relation
left join pg_attribute a on a.attrelid = c.oid and a.attname = w.attribute and not a.attisdropped
where exists (select from given)
    and case
        when w.attribute is null then not has_table_privilege(r.oid, c.oid, w.privilege)
        else not has_column_privilege(r.oid, c.oid, a.attnum, w.privilege)
    end
union all
select r.rolname::text, null, null, 'usage'
from pg_roles r
join pg_namespace n on n.nspname = %(schema)s
where exists (select from given) and r.rolname in (select role from wanted)
    and not has_schema_privilege(r.oid, n.oid, 'usage')
union all
select r.rolname::text, p.proname || '(text)', null, 'execute'
from pg_roles r
join pg_namespace n on n.nspname = %(schema)s
join pg_proc p on p.pronamespace = n.oid and p.proname in ('recall_id', 'recall_session')
    and p.pronargs = 1 and p.proargtypes[0] = 'text'::regtype
where exists (select from given) and r.rolname in (select role from wanted)
    and not has_function_privilege(r.oid, p.oid, 'execute')
order by 1, 2, 4, 3;

-- name: grantees
-- Who was given rights on a table, other than its owner: whoever works with one of our tables works
-- with one that is created anew, too.
select case when x.grantee = 0 then 'public' else quote_ident(r.rolname) end as grantee,
    lower(x.privilege_type) as privilege
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
cross join lateral aclexplode(c.relacl) x
left join pg_roles r on r.oid = x.grantee
where n.nspname = %(schema)s and c.relname = %(table)s and x.grantee <> c.relowner
    and (x.grantee = 0 or r.oid is not null)
order by 1, 2;

-- name: names
-- The names that relations of a schema have: an index needs a free one.
select c.relname::text as name from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s and c.relname like %(like)s
union all
select k.conname::text from pg_constraint k
join pg_namespace n on n.oid = k.connamespace
where n.nspname = %(schema)s and k.conname like %(like)s;
