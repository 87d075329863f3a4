# make demo     environment, build, and `python -m flash_mla`: what this machine is and what it can do
# make test     the tests (TESTS="tests/test_merge.py -k name" for some of them)
# make gpu-test what a GPU of a new kind has to show: tests, the demonstration, and the benchmarks of all that is served
# make build    compile what changed, in place
# make lint     ruff, mypy, clang-format      make format   ruff and clang-format, writing
# make clean    remove everything that make made
#
# The environment is VENV. It uses PYTHON's torch if that is new enough, and installs TORCH otherwise.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TESTS ?=

py := $(VENV)/bin/python
cpp := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' 2>/dev/null)

.PHONY: demo test gpu-test build lint format docs clean

demo: $(VENV)/.installed
	$(MAKE) --no-print-directory build
	$(py) -m flash_mla

test: $(VENV)/.dev
	$(MAKE) --no-print-directory build
	$(py) -m pytest $(TESTS)

# Goes on behind a failure, so that one run tells all; fails in the end.
gpu-test: $(VENV)/.dev
	$(MAKE) --no-print-directory build
	failed=0; \
	$(py) -m pytest $(TESTS) || failed=1; \
	$(py) -m flash_mla || failed=1; \
	$(py) -m benchmarks run --group all --host || failed=1; \
	exit $$failed

build: $(VENV)/.base
	$(py) tools/build_native.py

lint: $(VENV)/.dev
	$(py) -m ruff check
	$(py) -m ruff format --check
	$(py) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cpp)

format: $(VENV)/.dev
	$(py) -m ruff check --fix
	$(py) -m ruff format
	$(VENV)/bin/clang-format -i $(cpp)

# README's generated parts
docs: build
	$(py) tools/support_matrix.py --write

$(VENV)/.base: tools/make_env.sh
	tools/make_env.sh "$(PYTHON)" "$(VENV)" "$(TORCH)"
	@touch $@

# The library is compiled before pip is called, which would hide ten minutes of progress.
$(VENV)/.installed: $(VENV)/.base pyproject.toml setup.py
	$(py) tools/build_native.py
	$(py) -m pip install --quiet --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(py) -m pip install --quiet --no-build-isolation -e ".[test,lint,bench]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .venv .venv-ci .mypy_cache .pytest_cache .ruff_cache
	rm -f flash_mla/libflash_mla.so flash_mla/_build_info.json
	find . -name __pycache__ -prune -exec rm -rf {} +
