"""Rules: the part of a policy that C can carry out by itself, lowered and published.

Imports `model`, `policy`, `kernel` and `native`; decides nothing about a fault.
"""
