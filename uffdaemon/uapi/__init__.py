"""The kernel's vocabulary for userfaultfd: events, features, outcomes, why a page did not move.

Pure: the standard library and nothing else.
"""
