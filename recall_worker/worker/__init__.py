"""The daemon: row → claim → call → outcome → verdict → settle.

Owns slots, waking, renewing, the breaker, and stopping. Its parts, one file each: `worker` (builds,
starts and stops the others), `dispatcher` (claims and starts), `wake` (when to claim next),
`executor` (one run, step by step), `run` (the runs in hand), `settler` (outcomes become verdicts,
written in batches), `leases` (renews leases, aborts runs that are no longer ours), `breaker` and
`endpoint_status` (whether the endpoint is worth calling), `database_status` (whether PostgreSQL
answers), `heartbeat` (the row in recall_workers), `pruner` (deletes what is over, where switched
on), `failures` (tells RECALL_FAILURE_URL what has failed, where it is set), `process` (signals,
systemd, limits of the operating system).

What the database decides: what is due, who holds a lease, what a settle does. The worker believes a
lease to be its own until the database says otherwise, and uses its own clock for durations only.
"""
