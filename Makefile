# Every target works on a fresh machine that has Python 3.10 or newer: it makes what it needs. What a target does stands in
# noxfile.py; here are only its names, and nox itself.
#   make demo     the main job, on a checkpoint it makes, beside torch.load
#   make test     all tests, on the native backend and then on the pure one
#   make test-numpy   those that need no torch, in an environment without it
#   make real     fetch published checkpoints into tests/.cache, where the tests look for them (four wheels)
#   make test-integrations   tests with transformers, accelerate, diffusers, peft, ray, which it installs
#   make coverage branch coverage of zipslicer/ on each backend, line coverage of csrc/
#   make fuzz     each fuzzer for FUZZ_SECONDS=60 (needs clang and its libFuzzer: Debian's clang, libclang-rt-14-dev)
#   make sanitize the tests and the readers under AddressSanitizer, UBSan and ThreadSanitizer
#   make bench    docs/performance.md and the table of the README (7 GB of files in benchmarks/.cache, 90 minutes)
#   make docs     the site of docs/, the API and the command line's help, in build/site; a warning is an error
#   make wheels   dist/: an sdist, wheels, each installed into an empty environment and tested there
#   make lint     ruff, mypy, clang-format, the workflows    make format   let ruff and clang-format rewrite
#   make venv     .venv, for calling pytest and mypy by hand
#   make clean    remove the environments and every build output; the two .cache folders go with `make clean-bench`
#
# PYTHON=python3.12      the interpreter of the environments
# PYTEST_ARGS="-k slice" handed to pytest          BENCH_ARGS="--samples 3" handed to benchmarks/run.py
# ZIPSLICER_REQUIRE_NATIVE=1  a native module that cannot be built is an error, not a pure install

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo examples test test-numpy test-integrations real coverage fuzz sanitize bench docs wheels lint format \
    clean clean-bench

PYTHON ?= python3
export PYTHON
NOX := .venv-nox/bin/nox
PYTEST_ARGS ?=
BENCH_ARGS ?=

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

$(NOX): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "zipslicer needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x .venv-nox/bin/python || $(PYTHON) -m venv .venv-nox || { rm -rf .venv-nox; echo "no venv module? on Debian: apt-get install python3-venv"; exit 1; }
	@.venv-nox/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt nox
	@touch $@

test: $(NOX)
	@$(NOX) -s tests pure -- $(PYTEST_ARGS)

test-numpy: $(NOX)
	@$(NOX) -s no_torch -- $(PYTEST_ARGS)

test-integrations: $(NOX)
	@$(NOX) -s integrations -- $(PYTEST_ARGS)

coverage sanitize wheels: $(NOX)
	@$(NOX) -s $@ -- $(PYTEST_ARGS)

bench: $(NOX)
	@$(NOX) -s bench -- $(BENCH_ARGS)

venv demo examples real fuzz docs lint format: $(NOX)
	@$(NOX) -s $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .nox
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-bench:
	rm -rf benchmarks/.cache tests/.cache
