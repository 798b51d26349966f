"""External policies, on the side of the process that owns the memory.

Imports `engine`, `guard`, `ports` and what lies below them; the worker imports this.
"""
