"""Everything between a tag and its users: locked dependencies, bills of materials, the release.

`lock` writes the locked and hashed dependencies in `release/locks/`, and reads them; `sbom` writes
the bill of materials (SBOM) of the wheel and of the image; `dependencies` says why each dependency
is there; `python -m release` builds a release and checks it, without the network.

Never here: what the worker needs to run.
"""
