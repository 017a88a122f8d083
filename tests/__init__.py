"""The tests mirror the house: test_judge, test_ledger and so on; `house/` is for the daemon as a process."""
