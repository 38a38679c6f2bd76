"""Benchmarks: `python -m loadtests.bench NAME`, a table for people and one JSON line last."""
