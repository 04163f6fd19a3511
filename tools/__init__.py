"""What `make conformance` and `make oracle` run: scripts of this repository, not part of the installed package."""
