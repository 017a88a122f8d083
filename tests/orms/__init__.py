"""Migration tools that applications use, from PyPI, on an adopted database. None of them is a
dependency of recall-worker, and each has an environment of its own."""
