"""External policies, on the side of the process that owns the memory.

Imports `engine`, `guard`, `ports` and what lies below them; `daemon` and `worker` import it.
"""
