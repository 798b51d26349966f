# `make demo` and `make test` set everything up by themselves, in .venv and build.
# PYTHON=... chooses the interpreter of a new .venv; ARGS=... goes to the demo, pytest or benchmarks.

PYTHON ?= python3
BIN := .venv/bin
PURE_TESTS := tests/pure
# The kernel tier has run once in `make test`; of it the wheel gets the tests marked smoke.
WHEEL_TESTS ?= -m "smoke or not kernel"
NATIVE := uffdaemon/native/build.py $(wildcard uffdaemon/native/*.[ch])

# Where tools/preflight.sh puts Python.h if the machine has none; compilers pass over what is absent.
HEADERS := $(CURDIR)/build/headers/usr/include
export C_INCLUDE_PATH := $(HEADERS)/python3:$(HEADERS)$(C_INCLUDE_PATH:%=:%)
# Neither pip nor pyright is to ask for its own newest version.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test check pure bench soak sanitize fuzz wheel wheel-test clean
.DELETE_ON_ERROR:

demo: .venv/runs
	$(BIN)/uffdaemon demo $(ARGS)

test: check pure
	$(BIN)/python -m pytest tests --ignore=$(PURE_TESTS) $(ARGS)

check: .venv/develops
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright

# The pure modules are covered to the last branch, and by the pure tests alone.
pure: .venv/develops
	$(BIN)/coverage run -m pytest $(PURE_TESTS)
	$(BIN)/coverage report

bench: .venv/develops
	$(BIN)/python -m benchmarks --json build/bench.json $(ARGS)

# A million moves of pages that threads write to; `make test` has ten thousand of them.
soak: .venv/develops
	$(BIN)/python -m tests.soak $(ARGS)

# The C code under ThreadSanitizer and AddressSanitizer for longer than `make test` takes; and
# libFuzzer on messages and rules, where there is clang.  SECONDS=... is for each part.
sanitize: SECONDS = 60
sanitize: .venv/develops
	UFFDAEMON_SANITIZE_SECONDS=$(SECONDS) UFFDAEMON_FUZZ_ROUNDS=$(SECONDS)0000 \
		$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/sanitize $(ARGS)

fuzz: SECONDS = 300
fuzz: .venv/develops
	$(BIN)/python -m tests.sanitize.test_sanitizers $(SECONDS)

wheel: .venv/develops
	rm -rf dist && mkdir -p build
	$(BIN)/pyproject-build --outdir dist >build/wheel.log 2>&1 || { cat build/wheel.log; false; }

# Tests, docs and examples come out of the sdist; the package out of the wheel, and nowhere else.
wheel-test: wheel
	rm -rf build/wheel-test
	$(PYTHON) -m venv build/wheel-test/venv
	tar -xzf dist/uffdaemon-*.tar.gz -C build/wheel-test --strip-components=1
	rm -r build/wheel-test/uffdaemon
	build/wheel-test/venv/bin/pip install --quiet "$$(echo dist/uffdaemon-*-cp311-abi3-*.whl)[test]"
	cd build/wheel-test && venv/bin/python -m pytest $(WHEEL_TESTS)

clean:
	rm -rf .venv build dist *.egg-info uffdaemon/native/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache

# First-time set-up, and the extension again when its sources change.
.venv/runs: pyproject.toml setup.py tools/preflight.sh $(NATIVE)
	sh tools/preflight.sh $(PYTHON)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/develops: pyproject.toml | .venv/runs
	$(BIN)/pip install --quiet --editable '.[test,check,bench]'
	touch $@
