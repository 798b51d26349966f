"""Rules: what of a policy C can carry out by itself, written down and published.

Imports `model`, `policy`, `kernel` and `native`; decides nothing about a fault.
"""
