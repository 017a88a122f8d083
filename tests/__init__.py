"""The tests mirror the package: test_judge for judge, test_ledger for database/ledger, and so on.

`process/` tests the daemon as a process, `support/` is what they share, `planted/` holds the
defects that tests must find.
"""
