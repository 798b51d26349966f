"""Guarded memory of this process: regions with buffers and arrays, and what a placement requires.

Imports `kernel`, `model` and `placement`; knows no handler and no loop.
"""
