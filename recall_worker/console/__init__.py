"""`console`: pages for people, live, in a process of its own, never in the daemon.

Owns its HTTP (`app`), who is let in (`access`), its connections (`database`), what each page shows
(`pages`, `agenda`, and `brief`: why, in a few words beside a row), what is sent live (`live`, and
`questions`: what pages have in common), what people do (`acting`), and how it is drawn
(`rendering`, templates/, static/).

PostgreSQL decides what may be done, and by whom: a reading account makes the console read-only. All
questions are bounded, and all open pages together cost one look a second. What an action does, and
the sentences, are those of the command line (`operations`).

Never here: a recall's next state, SQL that changes something, a script or a style in a page.
"""
