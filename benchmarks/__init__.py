"""What the daemon costs, against yardsticks in C that run in the same minutes.

Absolute times on a machine that others share mean nothing, so every figure is a ratio: the sides
take turns (A B C A B C), and the medians of their rounds are divided.  What faults is a program
in C, so that the handler is what is measured.
"""
