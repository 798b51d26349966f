"""Handlers of other people's making, each in a small program of ours, for benchmarks/everybody.py."""
