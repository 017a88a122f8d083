-- works with code from: 15
-- The types of the keys. An application's ids may be text, varchar, uuid, bigint or integer;
-- outside of SQL they are text. These domains are the names by which statements know the columns'
-- types, so that a statement's text is the same for all of them and each comparison uses the
-- column's index. The functions read an id that somebody typed: null where the type can't hold it,
-- which is then the id of nothing.
--
-- No column has one of these as its type; of a column that has a domain of the application's it is
-- the type below that counts. Where the application gives a column another type, `migrate` runs
-- this file again: see schema/keys.py.
do $migration$
declare
    key record;
begin
    for key in
        select k.*, n.nspname as place, c.relnamespace as namespace, format_type((
                with recursive below (type) as (
                    select a.atttypid
                    union all
                    select t.typbasetype from below b
                    join pg_type t on t.oid = b.type and t.typtype = 'd'
                )
                select b.type from below b join pg_type t on t.oid = b.type and t.typtype <> 'd'
            ), null) as type
        from (
            values ('id', 'recall_id_type', 'recall_id'),
                ('session_id', 'recall_session_type', 'recall_session')
        ) k (name, domain, reader)
        join pg_attribute a
            on a.attrelid = 'session_recalls'::regclass and a.attname = k.name
        join pg_class c on c.oid = a.attrelid
        join pg_namespace n on n.oid = c.relnamespace
    loop
        if exists (
            select from pg_proc p join pg_type t on t.oid = p.prorettype
            where p.pronamespace = key.namespace and p.proname = key.reader and p.pronargs = 1
                and p.proargtypes[0] = 'text'::regtype
                and (t.typname, t.typnamespace) is distinct from (key.domain, key.namespace)
        ) then
            raise exception 'there is a function %.%(text) that is not recall-worker''s',
                key.place, key.reader
                using hint = 'Rename it, or drop it: recall-worker needs this name.';
        end if;
        execute format('drop function if exists %I.%I(text)', key.place, key.reader);
        execute format('drop domain if exists %I.%I', key.place, key.domain);
        execute format('create domain %I.%I as %s', key.place, key.domain, key.type);
        execute format('comment on domain %I.%I is %L', key.place, key.domain,
            'the type of session_recalls.' || key.name);
        execute format($definition$
create function %1$I.%2$I(given text, out held %1$I.%3$I) language plpgsql immutable strict as $$
begin
    -- Not by return: that converts the value when the block is over, and its errors are nobody's.
    held := given;
exception when data_exception then
    held := null;
end
$$
        $definition$, key.place, key.reader, key.domain);
        execute format('comment on function %I.%I(text) is %L', key.place, key.reader,
            'an id as session_recalls.' || key.name || ' holds it; null where its type can''t');
    end loop;
end
$migration$;
