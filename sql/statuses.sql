-- The statuses that a recall can have: those of the application's own checks, `running` and
-- `failed`. The checks that read status alone are replaced by one, which allows what they allowed
-- and these two; checks that read other columns, too, are left alone (`migrate` has tried them),
-- and so are checks that allow the two: what a check says counts, not its name.
-- Without any such check the application may write what it likes, and goes on doing so.
-- Executed as a whole, in the transaction of the migration that names this file, and again where
-- somebody has put a check back that refuses the two. NOT VALID: 0011 validates.
do $$
declare
    known constant name := 'session_recalls_status_known';
    allowed text;
    olds name[] := '{}';
    old record;
    allows boolean;
begin
    for old in
        select c.conname, pg_get_expr(c.conbin, c.conrelid) as expression
        from pg_constraint c
        join pg_attribute a on a.attrelid = c.conrelid and a.attname = 'status'
        where c.conrelid = 'session_recalls'::regclass and c.contype = 'c'
            and c.conkey = array[a.attnum]
            and coalesce((to_jsonb(c) ->> 'conenforced')::boolean, true)
        order by c.conname
    loop
        execute format(
            'select bool_and((%s) is not false) from (values (''running''::text), (''failed'')) '
            't (status)', old.expression
        ) into allows;
        if not allows then
            allowed := concat_ws(' and ', allowed, format('(%s)', old.expression));
            olds := olds || old.conname;
        elsif old.conname = known then
            -- An earlier one of ours, beside a narrower one that somebody has put back.
            olds := olds || old.conname;
        end if;
    end loop;
    if allowed is null then
        return;
    end if;
    for old in select unnest(olds) as conname loop
        execute format('alter table session_recalls drop constraint %I', old.conname);
    end loop;
    -- The three statuses alone, as nearly everybody has them: then one plain list.
    if allowed ~ '^\(+status\)*(::text)? = ANY \(+ARRAY\[[^]]*\]\)*(::text\[\])?\)*$'
        and (
            select array_agg(distinct m[1] order by m[1])
            from regexp_matches(allowed, '''([^'']*)''', 'g') m
        ) = array['cancelled', 'fired', 'pending']
    then
        alter table session_recalls
            add constraint session_recalls_status_known
            check (status in ('pending', 'running', 'fired', 'cancelled', 'failed')) not valid;
    else
        execute format(
            'alter table session_recalls add constraint session_recalls_status_known '
            'check ((%s) or status in (''running'', ''failed'')) not valid', allowed
        );
    end if;
end
$$;
