-- works with code from: 15
-- transaction: none
-- Recalls whose last call ended in trouble, by how: `list --outcome failed`. Those that were
-- answered, as nearly all are, are not in it: a page of them is found without. Nor is what is no
-- outcome of ours: a text that somebody wrote there may be too long for an index.
create index concurrently if not exists idx_recalls_trouble
    on session_recalls (last_outcome, trigger_at)
    where last_outcome in ('accepted', 'busy', 'gone', 'misconfigured', 'unavailable', 'unknown',
        'failed', 'refused', 'capped', 'misfired', 'expired', 'unsent', 'malformed');
