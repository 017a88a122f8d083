"""`python -m recall_worker`."""

from .cli import main

main()
