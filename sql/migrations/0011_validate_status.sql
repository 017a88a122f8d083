-- works with code from: 15
-- The baseline, part two. Reads every row once, under a lock that lets readers and writers pass:
-- apart from 0010, whose exclusive lock would stop them meanwhile.
do $$
begin
    if exists (
        select from pg_constraint
        where conrelid = 'session_recalls'::regclass
            and conname = 'session_recalls_status_known' and not convalidated
    ) then
        alter table session_recalls validate constraint session_recalls_status_known;
    end if;
end
$$;
