"""Benchmarks and audits; run from the repository's root, not installed."""

import os

# Else torch's profiler writes two lines of its own for each profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
