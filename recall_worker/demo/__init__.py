"""The demo: `demo` (its acts), `playground` (what they run on: screen, API, daemon), `expectations`
(what was expected, and whether it was seen).

Never here: a database, a process or a setting that the demo did not create itself.
"""
