"""The kernel's vocabulary for userfaultfd: events, features, outcomes, why a page did not move.

Pure: imports only the standard library.
"""
