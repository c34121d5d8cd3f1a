"""Benchmarks and audits. They are run from the repository's root and are not installed."""

import os

# Without this setting, torch's profiler logs two lines for each profile.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
