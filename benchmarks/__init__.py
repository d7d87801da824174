"""Benchmarks: `python -m benchmarks NAME [--json FILE]`, run from the repository."""
