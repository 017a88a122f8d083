"""`top`: a screen that shows what the workers do now, and what is due next.

Owns what is on that screen, the keys that it takes, and the terminal while it is shown. `feed` asks
PostgreSQL, at most once a second, and hears its notifications; `picture` is what it answered;
`view` is what the person has chosen by keys; `frame` makes one screen of both, and is pure, as
`view` is; `screen` is the loop between terminal and feed.

Everything is read from PostgreSQL, in one snapshot a look, and PostgreSQL's clock is the only one:
between two looks spans tick by the time that has passed here. What can't be counted with few reads
is counted up to a bound, and is shown so.

Never here: a change of any row, a word to a worker, the messages of recalls. Nothing of it is
imported by the daemon: rich is needed here alone.
"""
