"""Journals: what a successor has to know about userfaultfds whose daemon was killed.

Imports `native`, `uapi`, `kernel` and `model`.
"""
