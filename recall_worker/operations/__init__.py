"""What operators read and do, whatever shows it: the command line, the console.

Owns the words for a recall (`words`), why it is in its state (`why`), what became of it (`story`),
its next moments (`moments`), what can be done to it and why that does not apply (`actions`), and
acting on many in batches (`bulk`); and the connection that all of it is asked on (`connection`).
PostgreSQL decides everything; here it is put into words.

Never here: options, pages, a terminal's width, what is asked before something is done.
"""
