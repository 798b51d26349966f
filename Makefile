# `make demo` and `make test` set everything up by themselves, in .venv and build.
# PYTHON=... chooses the interpreter of a new .venv; ARGS=... goes to the demo, pytest or benchmarks.
# `make help` prints what follows ## at a target.

PYTHON ?= python3
BIN := .venv/bin
PURE_TESTS := tests/pure
# The kernel tier has run once in `make test`; of it the wheel gets the tests marked smoke.
WHEEL_TESTS ?= -m "smoke or not kernel"
NATIVE := uffdaemon/native/build.py $(wildcard uffdaemon/native/*.[ch])
C_SOURCES = $(filter-out %/_native.c,$(wildcard uffdaemon/native/*.[ch])) $(wildcard tests/sanitize/*.[ch])

# Where tools/preflight.sh puts Python.h if the machine has none; compilers pass over what is absent.
HEADERS := $(CURDIR)/build/headers/usr/include
export C_INCLUDE_PATH := $(HEADERS)/python3:$(HEADERS)$(C_INCLUDE_PATH:%=:%)
# Neither pip nor pyright is to ask for its own newest version.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Tests start hundreds of interpreters: what they import is compiled once, and out of the way.
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/pycache
unexport PYTHONDONTWRITEBYTECODE
# Real-kernel tests wait and start processes more than they compute; each worker has a fork server.
SIDE_BY_SIDE := -n 4 --dist worksteal

.PHONY: demo test t check check-forge docs lint-ci pure bench soak sanitize fuzz wheel wheel-test wheels \
	clean help
.DELETE_ON_ERROR:

demo: .venv/runs  ## a SQLite database comes to life page by page in another process
	$(BIN)/uffdaemon demo $(ARGS)

test: check pure  ## all checks and tests
	$(BIN)/python -m pytest tests --ignore=$(PURE_TESTS) $(SIDE_BY_SIDE) $(ARGS)

t: .venv/develops  ## one test: make t T=path::name ARGS=-x
	$(if $(T),,$(error T=path::name says which test))$(BIN)/python -m pytest $(T) $(ARGS)

check: check-forge docs  ## lint, types and the site
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)
	$(BIN)/mypy
	$(BIN)/pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=$(CURDIR) $(BIN)/pyright --verifytypes uffdaemon \
		--ignoreexternal >build/types.log || { cat build/types.log; false; }

check-forge: .venv/develops  ## shell scripts, workflows, issue forms
	$(BIN)/shellcheck .ci/run tools/*.sh
	$(BIN)/pre-commit validate-config
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms \
		$(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-config \
		.github/ISSUE_TEMPLATE/config.yml
	$(BIN)/zizmor --quiet --offline --pedantic .github/workflows

# The workflows' own linter is a Go program, and is built from source: not part of `make test`.
lint-ci: .venv/develops  ## the workflows by their own linter; takes Go
	PATH="$(CURDIR)/$(BIN):$$PATH" go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

# The site, with the API reference out of the docstrings.  Only what has changed is built again; where
# that fails, everything is: names that moved from one page to another seem to be there twice.
SPHINX := sphinx-build --quiet --fail-on-warning --keep-going -d build/doctrees
docs: .venv/develops  ## the site, in build/docs
	mkdir -p build
	$(BIN)/$(SPHINX) docs build/docs 2>build/docs.log || $(BIN)/$(SPHINX) -E docs build/docs

# The pure modules are covered to the last branch, and by the pure tests alone.
pure: .venv/develops  ## the pure tests, and coverage of the pure modules
	$(BIN)/coverage run -m pytest $(PURE_TESTS)
	$(BIN)/coverage report

bench: .venv/develops  ## all benchmarks; ARGS names some
	$(BIN)/python -m benchmarks --json build/bench.json $(ARGS)

# `make test` has ten thousand of them.
soak: .venv/develops  ## a million moves of pages that threads write to, the page model, daemons that are killed
	$(BIN)/python -m tests.soak $(ARGS)
	$(BIN)/python -m tests.soak.kills 1000 1

# The C code under ThreadSanitizer and AddressSanitizer for longer than `make test` takes; and
# libFuzzer on messages and rules, where there is clang.  SECONDS=... is for each part.
sanitize: SECONDS = 60
sanitize: .venv/develops  ## the C code under ThreadSanitizer and AddressSanitizer; SECONDS=60
	UFFDAEMON_SANITIZE_SECONDS=$(SECONDS) UFFDAEMON_FUZZ_ROUNDS=$(SECONDS)0000 \
		$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/sanitize $(ARGS)

fuzz: SECONDS = 300
fuzz: .venv/develops  ## libFuzzer on messages and rules; takes clang; SECONDS=300
	$(BIN)/python -m tests.sanitize.test_sanitizers $(SECONDS)

wheel: .venv/develops  ## sdist and wheel of this machine, in dist
	rm -rf dist && mkdir -p build
	$(BIN)/pyproject-build --outdir dist >build/wheel.log 2>&1 || { cat build/wheel.log; false; }

# Installs $(1) in an environment of its own.  Tests, docs and examples come out of the sdist; the
# package out of the wheel, and nowhere else.
define install-wheel
	rm -rf build/wheel-test
	$(PYTHON) -m venv build/wheel-test/venv
	tar -xzf dist/uffdaemon-*.tar.gz -C build/wheel-test --strip-components=1
	rm -r build/wheel-test/uffdaemon
	$(2) build/wheel-test/venv/bin/pip install --quiet $(3) "$$(echo dist/$(1))[test]"
endef

wheel-test: wheel  ## installs that wheel into a fresh environment and tests it there
	$(call install-wheel,uffdaemon-*-cp311-abi3-*.whl)
	cd build/wheel-test && venv/bin/python -m pytest $(SIDE_BY_SIDE) $(WHEEL_TESTS)

# There is nothing but Python on this path, no compiler either.
BARE := env PATH=$(CURDIR)/build/wheel-test/venv/bin
wheels: .venv/packs  ## sdist and wheels for x86-64 and arm64, in dist; one is installed and tested
	rm -rf dist
	ZIG_GLOBAL_CACHE_DIR=$(CURDIR)/build/zig $(BIN)/python tools/wheels.py dist
	$(call install-wheel,uffdaemon-*_$(shell uname -m).whl,$(BARE),--only-binary :all:)
	cd build/wheel-test && $(BARE) venv/bin/python -m pytest -m smoke

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1	\2/p' $(MAKEFILE_LIST) | expand -t 14

clean:  ## removes what make has made
	rm -rf .venv build dist *.egg-info uffdaemon/native/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache

# First-time set-up, and the extension again when its sources change.
.venv/runs: pyproject.toml setup.py tools/preflight.sh $(NATIVE)
	sh tools/preflight.sh $(PYTHON)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/develops: pyproject.toml | .venv/runs
	$(BIN)/pip install --quiet --editable '.[test,check,docs,bench]'
	touch $@

.venv/packs: pyproject.toml | .venv/develops
	$(BIN)/pip install --quiet --editable '.[wheels]'
	touch $@
