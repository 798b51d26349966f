# What cffi generates; `Any` ends in uffdaemon/native/__init__.py.
from typing import Any

ffi: Any
lib: Any
