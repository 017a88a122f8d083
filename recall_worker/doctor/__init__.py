"""`doctor`: is all there that the worker needs, and does it do its work?

`doctor.examine` makes the checks; `examination` holds what is found and asks the database; the
others are the checks by subject: `server`, `schema`, `listener`, `workers`, `backlog`, `endpoint`.
A finding is ok, a note or a problem, with what was seen and what to do.
"""
