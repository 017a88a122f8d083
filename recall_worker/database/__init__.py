"""PostgreSQL as the worker sees it: the worker's only SQL, and its connections.

`ledger`: the table (claim, renew, settle …). `listener`: the LISTEN connection that wakes the
worker. `connection`: how a connection is opened, how long we wait for it, when it is given up.
`pipeline`: how statements travel on it. `values`: how what comes back is read.
"""
