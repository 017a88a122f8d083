"""The audit: replicas, a database, an API, an application, operators and agents, a seeded schedule
of faults, and at the end the account.

`python -m tests.chaos --seed 101 --minutes 2`. One file each: `drawn` (the settings of a seed),
`api` (a run endpoint on raw sockets that honours keys and records every request), `hand` (the
application: schedules, cancels, skips, moves and deletes with its own SQL), `people` (operators
with commands and at the console, agents at the MCP server), `journal` (what they asked for, and
what is on record of it), `stage` (PostgreSQL, the installed wheel's processes, proxies between),
`faults` (what is done to them, and when), `account` (what must be true of all that, from the
records alone), `report` (what several runs come to). Nothing here asks recall-worker's own code
what happened.
"""
