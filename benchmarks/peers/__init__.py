"""Other people's handlers, each in a small program of ours, for benchmarks/everybody.py."""
