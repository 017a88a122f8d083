-- works with code from: 1
-- Whose turn it is to do what one replica does for all.
create table recall_chores (
    chore text primary key,
    worker text not null,
    until timestamptz not null,
    rests boolean not null default false
);
comment on column recall_chores.worker is 'whose turn it is, or was last';
comment on column recall_chores.until is 'before this instant nobody else begins: the turn is over sooner, or was left by a worker that died';
comment on column recall_chores.rests is 'whether the turn is over, and until is when the next one may begin';

-- Autovacuum looks when a twentieth of a table is dead, not a fifth: each run leaves two dead rows, and the claim's small indexes carry an entry
-- for each until a vacuum. Measured with 300,000 settled rows kept beside a worker at speed: at most 4,000 dead rows and not 110,000, idx_recalls_due a
-- third, idx_recalls_active_pending and idx_recalls_one_run half as large, runs a second the same. A hundredth was no better: below two
-- per cent of the pages a vacuum passes the indexes over. `recall_attempts` has dead rows only where it is pruned, and is then as large as
-- what is kept and a twentieth more. How fast a vacuum goes, and how often one is thought of, is the server's and left to it.
-- Fillfactor is left alone: it would make room for updates in place (HOT), and there are none, as every claim, renewal and settle changes
-- what idx_recalls_due is made of (0 % of updates, whatever the fillfactor).
-- Not where somebody has set it otherwise. This lock stops neither reads nor writes, only another one of its kind, most often an autovacuum's: that gives
-- way, but not before it has stood in somebody's way for a second (deadlock_timeout), so more than that is waited.
set local lock_timeout = '3s';
do $$
declare
    place regclass;
begin
    foreach place in array array['session_recalls', 'recall_attempts']::regclass[] loop
        if not exists (
            select from pg_class c cross join unnest(c.reloptions) o
            where c.oid = place and o like 'autovacuum\_vacuum\_scale\_factor=%'
        ) then
            execute format('alter table %s set (autovacuum_vacuum_scale_factor = 0.05)', place);
        end if;
    end loop;
end
$$;
