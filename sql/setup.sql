-- What a connection of ours is set to before its first statement, and where the table is.

-- name: settings
-- All that our statements, and what reads their answers, depend on, whatever the database or the
-- role sets for others; the first in the search_path is the schema that has session_recalls.
-- `local`: for this transaction only, where the connection is somebody else's afterwards (a
-- pooler's, the application's). Null: where `pid` is not that of this backend, as behind a pooler.
-- Dates come in the one style that psycopg reads, and in UTC, as Python subtracts two dates of one
-- zone by their wall clocks; intervals in the one style that it reads; fractions with all their
-- digits; `null` in an array is null; what PostgreSQL deparses is the same everywhere. Where
-- standard_conforming_strings is off, a backslash would mean something else.
-- `schema`: RECALL_SCHEMA. Where that has no table, no other schema is looked through: its table
-- would not be the one that was meant. Without it, the table is the one that the role's search_path
-- finds. What the role had follows, as triggers and tables of the application may be there, and
-- pg_temp is last: no temporary table stands for one of ours. `alone`: that schema alone, for
-- `migrate`, which must not take a table in another schema for its own.
with place as materialized (
    select case
            when %(schema)s::text is null
            then (
                select n.nspname::text
                from pg_class c join pg_namespace n on n.oid = c.relnamespace
                where c.oid = to_regclass('session_recalls')
            )
            else (
                -- By the catalog: to_regclass() raises where the role may not use the schema.
                select n.nspname::text
                from pg_namespace n
                join pg_class c on c.relnamespace = n.oid and c.relname = 'session_recalls'
                where n.nspname::text = %(schema)s::text and has_schema_privilege(n.oid, 'usage')
            )
        end as schema,
        current_setting('search_path') as path,
        coalesce(%(local)s::boolean, pg_backend_pid() <> %(pid)s::integer) as local
)
select p.schema as place,
    set_config('search_path', case
            when p.schema is not null and %(alone)s::boolean
            then concat_ws(', ', quote_ident(p.schema), 'pg_temp')
            when p.schema is not null
            then concat_ws(', ', quote_ident(p.schema), nullif(p.path, ''), 'pg_temp')
            when %(schema)s::text is not null
            then concat_ws(', ', quote_ident(%(schema)s::text), 'pg_temp')
            else p.path
        end, p.local),
    set_config('datestyle', 'ISO, MDY', p.local),
    set_config('timezone', 'UTC', p.local),
    set_config('intervalstyle', 'postgres', p.local),
    set_config('extra_float_digits', '1', p.local),
    set_config('array_nulls', 'on', p.local),
    set_config('standard_conforming_strings', 'on', p.local),
    set_config('quote_all_identifiers', 'off', p.local),
    set_config('client_min_messages', 'notice', p.local),
    -- Of the transactions that follow; that of a pooled connection begins with its own.
    set_config('default_transaction_isolation', 'read committed', p.local)
from place p;

-- name: patience
-- The first statement of a command's connection: how long its statements may take and wait for a
-- lock, in PostgreSQL's notation, as what the role has is made for the application's. A command may
-- also wait for the answer of a person. (transaction_timeout came with PostgreSQL 17.) `direct`:
-- whether this is the server's own connection. A pooler announces a backend of its own making:
-- there it holds for the transaction only.
select d.direct,
    set_config('statement_timeout', %(statement)s::text, not d.direct),
    set_config('lock_timeout', %(lock)s::text, not d.direct),
    -- A transaction of several statements waits for this process, which may be slow.
    set_config('idle_in_transaction_session_timeout', %(statement)s::text, not d.direct),
    case
        when current_setting('transaction_timeout', true) is not null
        then set_config('transaction_timeout', '0', not d.direct)
    end,
    set_config('idle_session_timeout', '0', not d.direct)
from (select pg_backend_pid() = %(pid)s::integer as direct) d;

-- name: borrow
-- The application's own connection, for one statement of ours in its transaction: what the answer
-- is read by, and where the table is looked for. Returns what was set before, which `give_back`
-- puts back; if our statement fails, PostgreSQL does, with the savepoint. Each column of `before`
-- is read before anything is set.
with before as materialized (
    select current_setting('search_path') as search_path,
        current_setting('datestyle') as datestyle,
        current_setting('intervalstyle') as intervalstyle,
        current_setting('client_encoding') as client_encoding
),
place as materialized (
    select n.nspname::text as schema
    from pg_namespace n
    join pg_class c on c.relnamespace = n.oid and c.relname = 'session_recalls'
    where n.nspname::text = %(schema)s::text and has_schema_privilege(n.oid, 'usage')
)
select b.search_path, b.datestyle, b.intervalstyle, b.client_encoding,
    set_config('search_path', case
            when %(schema)s::text is null then b.search_path
            when p.schema is null then concat_ws(', ', quote_ident(%(schema)s::text), 'pg_temp')
            else concat_ws(', ', quote_ident(p.schema), nullif(b.search_path, ''), 'pg_temp')
        end, true),
    set_config('datestyle', 'ISO', true),
    set_config('intervalstyle', 'postgres', true),
    set_config('client_encoding', 'UTF8', true)
from before b left join place p on true;

-- name: give_back
-- For what is left of the application's transaction. At its end PostgreSQL puts back what held
-- before that.
select set_config('search_path', %(search_path)s::text, true),
    set_config('datestyle', %(datestyle)s::text, true),
    set_config('intervalstyle', %(intervalstyle)s::text, true),
    set_config('client_encoding', %(client_encoding)s::text, true);

-- name: elsewhere
-- Where session_recalls is not found: schemas that have one, also such that the role may not use,
-- and whether RECALL_SCHEMA (`schema`) is there. The one that the search_path finds (`found`) is
-- not among them.
select current_user::text as role, to_regclass('session_recalls') is not null as found,
    exists (select from pg_namespace s where s.nspname::text = %(schema)s::text) as schema_exists,
    array(
        select n.nspname::text
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relname = 'session_recalls' and c.relkind in ('r', 'p') and n.nspname !~ '^pg_'
            and c.oid is distinct from to_regclass('session_recalls')
        order by n.nspname::text collate "C"
    ) as schemas,
    array(
        select n.nspname::text
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relname = 'session_recalls' and c.relkind in ('r', 'p') and n.nspname !~ '^pg_'
            and not has_schema_privilege(n.oid, 'usage')
    ) as forbidden;
