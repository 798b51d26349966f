"""System calls with types: userfaultfds, memory of this process, page scans, exact copies.

Imports `native`, `uapi`, `errors` and `ranges`; knows neither regions nor trio.
"""
