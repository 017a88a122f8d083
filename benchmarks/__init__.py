"""recall-worker side by side with its peers, on one machine, one PostgreSQL, one sink, in one run.

    pip install '.[embedded,bench]'     # and Node.js 20 or newer, with npm, for graphile-worker
    python -m benchmarks --json build/performance.json --docs docs/performance.md --plots docs/plots
    python -m benchmarks --only wake,backlog --quick      # a look, in a minute or two
    # measures nothing; the same tables and plots from raw figures that --json wrote:
    python -m benchmarks --report build/performance.json \
        --docs docs/performance.md --plots docs/plots

The raw figures are written where --json says, and are not kept in the repository: they belong to a
release's files. Tables and raw figures name the commit that was measured.

The first takes about twenty-five minutes and needs the machine to itself. It needs no services:
PostgreSQL is the embedded one, on a data directory of its own with PostgreSQL's default settings
(fsync on; only max_connections is raised, for twenty replicas of each), removed afterwards. The
wheel of this checkout and the npm packages are installed into a cache directory (BENCH_CACHE, else
below the user's cache).

How it is measured
- The sink is one process that answers at once and stamps each request's arrival with the monotonic
  clock, which all processes of a host share.
- All contenders get the same rows: one statement for each row, by one connection, in its own
  transaction, as the peer's own library would write it.
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
  ones call through aiohttp, as recall-worker does. PgQueuer and graphile-worker delete finished
  jobs, the others keep them; all but graphile-worker keep a history of each run.
- The bare worker does only what any worker must: the shortest claim, a call, and one write that
  says so, over recall-worker's own connections to PostgreSQL. No worker of this kind wakes faster.
- The bare loop is aiohttp with as many tasks as there are slots: no database, the same body and
  headers. Nothing over aiohttp is faster. The same through httpx, over the same transport
  (httpx-aiohttp), shows the cost of a general client.
- CPU is the kernel's count for the processes (schedstat): the worker's, and PostgreSQL's with all
  its children.

`transport.py`, beside this, compares HTTP clients; it stands alone.
"""
