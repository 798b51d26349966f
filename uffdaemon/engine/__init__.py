"""The parts of the handler: events, decisions, results, failures, moves, tasks, and the shutdown.

Imports `hooks`, `sources`, `moves`, `ports`, `guard` and what lies below them; not the handler.
"""
