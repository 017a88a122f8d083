"""PostgreSQL as the worker sees it: the only SQL of the worker, and how PostgreSQL is reached.

`ledger` is the table (claim, renew, settle …), `listener` the LISTEN connection that wakes the worker, `connection` how a
connection is opened, waited for and given up, `pipeline` what travels on it, `values` what comes back.
"""
