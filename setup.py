"""The two things for which pyproject.toml has no settled words; everything else is there."""

from setuptools import setup

setup(
    cffi_modules=["uffdaemon/native/build.py:ffibuilder"],
    # One abi3 wheel for every CPython from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
