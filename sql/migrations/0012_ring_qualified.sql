-- works with code from: 1
-- A session that is deleted takes its recalls with it, and then this function runs as their table's owner, under the search_path of
-- whoever deleted the session: a pg_notify of that account's own would run with the owner's rights. So it is named in full.
create or replace function recall_ring() returns trigger language plpgsql as $$
begin
    perform pg_catalog.pg_notify('session_recalls', '');
    return null;
end
$$;
