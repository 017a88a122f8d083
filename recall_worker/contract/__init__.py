"""The run endpoint's contract, for others to try: `reference_api` (an API that keeps it), `check`
(does a given API keep it?), `probes` (the calls by which `check` finds out).

What the worker itself sends, and how it reads answers, is in `protocols/contract.py` and
`protocols/native.py`; the probes use both, so that they can't differ from the worker's calls.

Never here: the database.
"""
