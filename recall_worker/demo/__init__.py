"""The demo: `demo` (its acts), `playground` (what they run on: screen, API, daemon), `expectations`
(what was to be seen, and whether it was).

Never here: a database, a process or a setting that the demo did not make itself.
"""
