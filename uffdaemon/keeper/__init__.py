"""A keeper: a small process that holds descriptors while their daemon is replaced.

Imports `errors` and `journal`; `process.py` is a script that uses the standard library only.
"""
