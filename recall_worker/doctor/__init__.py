"""`doctor`: does the worker have all that it needs, and does it do its work?

`doctor.examine` makes the checks. `examination` holds the findings and queries the database. The
other files are the checks by subject: `server`, `schema`, `listener`, `workers`, `backlog`,
`endpoint`, `failures`, `secrets`. A finding is ok, a note or a problem, with what was seen and what
to do.
"""
