"""Benchmarks and audits; run from the repository's root, not installed."""
