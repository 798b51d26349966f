"""External policies, on the side of the worker process that runs them.

Imports `daemon` and `external`; nothing imports it: the supervisor starts it.
"""
