"""The daemon: what applications call, and the servers behind it, one for each userfaultfd.

Imports everything below; `worker`, `check`, `demo` and the command line import it.
"""
