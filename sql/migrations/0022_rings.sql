-- works with code from: 15
-- recall_worker.rings = 'off' covers every notification of the table's triggers: of updates and
-- deletes, too. A transaction that has notified can't be prepared ("cannot PREPARE a transaction
-- that has executed LISTEN, UNLISTEN, or NOTIFY"), so an application with two-phase commits sets it
-- for those. What is changed so is found by the workers' next poll, and a cancel in mid-run by the
-- next renewal. Any other value, and none, is as on.
create or replace function recall_ring() returns trigger language plpgsql as $$
begin
    if pg_catalog.current_setting('recall_worker.rings', true) is distinct from 'off' then
        perform pg_catalog.pg_notify('session_recalls', '');
    end if;
    return null;
end
$$;
