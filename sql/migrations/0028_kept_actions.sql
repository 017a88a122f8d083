-- works with code from: 15
-- Actions on record can be added and read, and nothing else, by every role but their owner: whoever
-- did something can't take it back from the record, whatever rights were granted. What is older
-- than a day can be deleted by who may delete: the worker prunes.
create function recall_keep_actions() returns trigger language plpgsql as $$
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
create trigger recall_keep_actions before update or delete on recall_actions
    for each row execute function recall_keep_actions();
create trigger recall_keep_all_actions before truncate on recall_actions
    for each statement execute function recall_keep_actions();
