"""Load tests (Locust) and benchmarks; see README.md beside this file."""
