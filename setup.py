"""What pyproject.toml has no settled words for; everything else is there."""

import sysconfig

from setuptools import setup

# One abi3 wheel for every CPython from 3.11 on; free-threaded ones have no stable ABI before 3.15.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["uffdaemon/native/build.py:ffibuilder"],
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
