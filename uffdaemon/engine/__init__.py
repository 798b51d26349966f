"""The parts of the handler: deciding, failures, events, moves, tasks, the end.

Imports `model`, `moves`, `guard` and what lies below them.
"""
