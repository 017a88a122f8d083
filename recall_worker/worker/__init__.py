"""The daemon: row → claim → call → outcome → verdict → settle.

Owns slots, waking, renewing, the breaker, and stopping. Its parts, one file each: `worker` (the claim loop, the runs, and the
order of starting and stopping), `settler` (endings become verdicts and are written, in batches that form by themselves),
`keeper` (leases are renewed, runs that are no longer ours are aborted), `breaker` (one place that knows whether the endpoint is
worth calling), `reach` (whether PostgreSQL answers), `pruner` (where it is switched on, deletes what is over), `process` (signals,
systemd, limits of the operating system).

What the database decides: what is due, who holds a lease, what a settle does. The worker believes a lease to be its own until
told otherwise, and uses its own clock for durations only.
"""
