"""What serves a userfaultfd: trio's sleep or a resolver thread, and the watchdog beside them.

Imports `native`, `kernel` and `placement`; knows no regions and no policies.
"""
