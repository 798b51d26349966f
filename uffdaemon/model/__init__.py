"""State without a system call: regions, their tables, open faults, batches, counters.

Pure: imports `uapi`, `errors`, `ranges`, `actions`, and the page book of `native`.
"""
