"""Moving pages with UFFDIO_MOVE: the calls, what to do about a refusal, previews, staging.

Imports `kernel` and what lies below it; knows no daemon.
"""
