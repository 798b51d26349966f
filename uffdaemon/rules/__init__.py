"""Rules: the part of a policy that C can carry out, lowered and published.

Imports `policy`, `sources`, the state of `engine`, `ports` and what lies below them; not the loop.
"""
