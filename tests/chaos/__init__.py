"""The audit: replicas, a database, an API and an application, a seeded schedule of faults, and at
the end the account.

`python -m tests.chaos --seed 101 --minutes 2`. One file each: `api` (a run endpoint on raw sockets
that honours keys and records every request), `hand` (the application: schedules, cancels, skips,
moves and deletes with its own SQL, and keeps a journal), `stage` (PostgreSQL, the installed wheel's
daemons, proxies between), `faults` (what is done to them, and when), `account` (what must be true
of all that, from the records alone), `report` (what several runs come to). Nothing here asks
recall-worker's own code what happened.
"""
