# Every target makes what it needs: `make demo` and `make test` work on a fresh machine that has Python 3.10 or newer.
#   make demo     the main job, on a checkpoint it makes, beside torch.load
#   make test     all tests, on the native backend and then on the pure one
#   make test-numpy   those that need no torch, in an environment without it
#   make real     fetch published checkpoints into tests/.cache, where the tests look for them (four wheels)
#   make test-integrations   tests with transformers, accelerate, diffusers, peft, ray, which it installs
#   make fuzz     each fuzzer for FUZZ_SECONDS=60 (needs clang and its libFuzzer: Debian's clang, libclang-rt-14-dev)
#   make sanitize the tests and the readers under AddressSanitizer, UBSan and ThreadSanitizer
#   make bench    docs/performance.md and the table of the README (7 GB of files in benchmarks/.cache, 90 minutes)
#   make docs     the site of docs/, the API and the command line's help, in build/site; a warning is an error
#   make lint     ruff, mypy, clang-format          make format   let ruff and clang-format rewrite
#   make clean    remove the environments and every build output; the two .cache folders go with `make clean-bench`
#
# PYTHON=python3.12      the interpreter of the environments
# PYTEST_ARGS="-k slice" handed to pytest          BENCH_ARGS="--samples 3" handed to benchmarks/run.py
# ZIPSLICER_REQUIRE_NATIVE=1  a native module that cannot be built is an error, not a pure install

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo examples test test-numpy test-integrations real fuzz sanitize bench docs lint format clean clean-bench

PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench
NUMPY := .venv-numpy
DOCS := .venv-docs
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt

BUILD_PACKAGES := cmake ninja pybind11 scikit_build_core
DEV_PACKAGES := $(BUILD_PACKAGES) torch
INTEGRATION_PACKAGES := transformers accelerate diffusers peft ray
DOCS_PACKAGES := mkdocs-material mkdocstrings mkdocstrings-python
BENCH_PACKAGES := $(BUILD_PACKAGES) torch numpy safetensors lightning-fabric matplotlib fsspec aiohttp obstore

NATIVE_SOURCES := pyproject.toml $(wildcard CMakeLists.txt csrc/*)
PYTHON_FOLDERS := zipslicer tests benchmarks examples fuzz docs
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cc benchmarks/*.cc fuzz/*.cc)

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# ---------------------------------------------------------------- environments, each behind two stamps

define make_venv  # $(1) folder, $(2) packages
	@echo "== $(1): $(2)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "zipslicer needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { rm -rf $(1); echo "no venv module? on Debian: apt-get install python3-venv"; exit 1; }
	$(1)/bin/python -m pip install $(PIP_FLAGS) $(2)
endef

$(VENV)/.packages: constraints.txt
	$(call make_venv,$(VENV),$(DEV_PACKAGES))
	@touch $@

# Editable, so that Python files need no reinstall; a change of the C++ or of the build does. Built in this environment
# (no isolation): the build tools are the pinned ones, and nothing is fetched twice. The extra `dev` of pyproject.toml
# names the rest of what tests and checks need.
$(VENV)/.installed: $(VENV)/.packages $(NATIVE_SOURCES)
	@echo "== zipslicer[dev], editable"
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation --editable '.[dev]'
	@touch $@

$(NUMPY)/.installed: constraints.txt $(NATIVE_SOURCES)
	$(call make_venv,$(NUMPY),$(BUILD_PACKAGES) pytest hypothesis)
	$(NUMPY)/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation --editable '.[numpy]'
	@touch $@

$(BENCH)/.packages: constraints.txt
	$(call make_venv,$(BENCH),$(BENCH_PACKAGES))
	@touch $@

$(DOCS)/.packages: constraints.txt
	$(call make_venv,$(DOCS),$(DOCS_PACKAGES))
	@touch $@

# The ancestor has the same import name: it lies aside, and only the process that measures it looks there.
$(BENCH)/zipslicer-0.8.1: $(BENCH)/.packages
	@rm -rf $@
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ zipslicer==0.8.1
	@touch $@

# A plain wheel, as users get it.
$(BENCH)/.installed: $(BENCH)/.packages $(NATIVE_SOURCES) $(wildcard zipslicer/*.py zipslicer/*/*.py)
	@echo "== zipslicer, as a wheel"
	$(BENCH)/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

# ---------------------------------------------------------------- targets

demo: $(VENV)/.installed
	@$(VENV)/bin/python examples/demo.py

examples: $(VENV)/.installed
	@$(VENV)/bin/python examples/example_resnet18.py
	@$(VENV)/bin/python examples/larger_than_memory.py

# Bare pytest, never `python -m pytest`: that one puts the checkout first on the path and would test its files.
# `cd /` for the same reason. A native module that is there and broken is tested, and fails; only a missing one is not.
define run_tests  # $(1) folder of the environment
	@status=0; backends="native pure"; \
	if ! (cd / && "$(CURDIR)/$(1)/bin/python" -c 'import importlib.util as u; assert u.find_spec("zipslicer._native")' 2>/dev/null); then \
	    if [ "$${ZIPSLICER_REQUIRE_NATIVE:-0}" = 1 ]; then \
	        echo "no native backend was built, and ZIPSLICER_REQUIRE_NATIVE=1 asks for one: rm $(1)/.installed, then again"; exit 1; \
	    fi; \
	    echo "== no native backend was built (was there a C++ compiler?): the tests run on pure only"; backends="pure"; \
	fi; \
	for backend in $$backends; do \
	    echo "== tests, backend $$backend"; \
	    if ZIPSLICER_BACKEND=$$backend $(1)/bin/pytest $(PYTEST_ARGS); then summary="$$summary $$backend: passed."; \
	    else summary="$$summary $$backend: FAILED."; status=1; fi; \
	done; \
	echo "== tests:$$summary"; exit $$status
endef

test: $(VENV)/.installed
	$(call run_tests,$(VENV))

# What needs no torch, and all of framework="np", where there is none.
test-numpy: export ZIPSLICER_WITHOUT_TORCH := 1
test-numpy: $(NUMPY)/.installed
	$(call run_tests,$(NUMPY))

# The one step of the tests that needs the network; without it, these tests are skipped.
real: $(VENV)/.packages
	$(VENV)/bin/python tests/real_checkpoints.py

# Tests that skip elsewhere, because these packages are large and change often: not part of `make test`.
$(VENV)/.integrations: $(VENV)/.installed
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) $(INTEGRATION_PACKAGES)
	@touch $@

test-integrations: $(VENV)/.integrations
	ZIPSLICER_REQUIRE_INTEGRATIONS=1 $(VENV)/bin/pytest tests/test_integrations.py tests/test_examples.py tests/test_docs.py $(PYTEST_ARGS)

# ---------------------------------------------------------------- fuzzers and sanitizers

CLANGXX ?= clang++
FUZZ_SECONDS ?= 60
FUZZ_ARGS ?=
FUZZED := build/fuzz
CORE := csrc/directory.cc csrc/machine.cc csrc/extent.cc
FUZZ_FLAGS := -std=c++17 -g -O1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all

$(FUZZED)/fuzz_%: fuzz/fuzz_%.cc $(CORE) $(wildcard csrc/*.h)
	@command -v $(CLANGXX) >/dev/null || { echo "no $(CLANGXX): on Debian, apt-get install clang libclang-rt-14-dev"; exit 1; }
	@mkdir -p $(FUZZED)
	$(CLANGXX) $(FUZZ_FLAGS) -o $@ $< $(CORE) -pthread

# A plain install in an environment of its own, which sees the packages of .venv behind it: an editable one comes by a
# loader that atheris cannot look into, and without sanitizers.
define make_plain_venv  # $(1) folder, $(2) CXXFLAGS
	@rm -rf $(1)
	$(PYTHON) -m venv --without-pip $(1)
	@$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth"
	CXXFLAGS="$(2)" $(VENV)/bin/python -m pip --python $(1)/bin/python install $(PIP_FLAGS) --no-build-isolation --no-deps \
	    --force-reinstall .
endef

FUZZ := .venv-fuzz

$(FUZZ)/.installed: $(VENV)/.installed $(wildcard zipslicer/*.py zipslicer/*/*.py)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) atheris
	$(call make_plain_venv,$(FUZZ),)
	@touch $@

$(FUZZED)/seeds: $(VENV)/.installed $(wildcard fuzz/seeds.py tests/hostile/*.py tests/makers.py)
	@rm -rf $@
	$(VENV)/bin/python fuzz/seeds.py $@

# What a fuzzer finds it writes to build/fuzz, and ends: put it into fuzz/regressions, and mend what it breaks.
define fuzz  # $(1) command, $(2) folder of seeds
	@echo "== $(1)"
	@mkdir -p $(FUZZED)/corpus/$(notdir $(lastword $(1)))
	$(1) $(FUZZED)/corpus/$(notdir $(lastword $(1))) fuzz/regressions/$(2) $(FUZZED)/seeds/$(2) \
	    -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 -artifact_prefix=$(FUZZED)/ -print_final_stats=1 $(FUZZ_ARGS) 2>&1 | \
	    grep -v "^#\|INFO: \|NEW_FUNC" | tail -25; exit $${PIPESTATUS[0]}
endef

fuzz: $(FUZZED)/fuzz_directory $(FUZZED)/fuzz_machine $(FUZZED)/seeds $(FUZZ)/.installed
	$(call fuzz,$(FUZZED)/fuzz_directory,directory)
	$(call fuzz,$(FUZZED)/fuzz_machine,machine)
	$(call fuzz,env ZIPSLICER_BACKEND=pure $(FUZZ)/bin/python fuzz/fuzz_open.py,open)
	$(call fuzz,env ZIPSLICER_BACKEND=native $(FUZZ)/bin/python fuzz/fuzz_open.py,open)
	$(call fuzz,$(FUZZ)/bin/python fuzz/fuzz_differential.py,machine)

# The reader alone on threads under ThreadSanitizer, then the tests of what calls the C++, with a native module under
# AddressSanitizer and UBSan: those of writers, of the command line and of pages call nothing that these do not, and take
# twice as long, since the programs that they start are slow to begin under a sanitizer. That module lies in an environment of its own, which sees the packages of .venv behind it. Leaks are looked for in the
# reader and, by the fuzzers, in the parsers: Python itself never frees all.
SANITIZED := build/sanitize
COMMA := ,
ASAN := .venv-asan
SANITIZED_TESTS := archive arrays backend checkpoint composites concurrency conformance dcp dcp_source deferred differential \
    exports faults joined legacy module numpy_tensors pickling plan product program real_checkpoints safetensors_file scan \
    shards source staging state_dict stream synthetic table tensors verify
SANITIZE_FLAGS := -std=c++17 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all
DRIVER := fuzz/drive_reader.cc
# ThreadSanitizer wants to know where memory lies; where that cannot be had, the kernel may place it well enough.
FIXED := $(shell setarch -R true 2>/dev/null && echo setarch -R)

$(SANITIZED)/drive_thread: $(DRIVER) $(CORE) $(wildcard csrc/*.h)
	@mkdir -p $(SANITIZED)
	$(CXX) $(SANITIZE_FLAGS) -fsanitize=thread -o $@ $(DRIVER) $(CORE) -pthread

$(SANITIZED)/drive_address: $(DRIVER) $(CORE) $(wildcard csrc/*.h)
	@mkdir -p $(SANITIZED)
	$(CXX) $(SANITIZE_FLAGS) -fsanitize=address,undefined -o $@ $(DRIVER) $(CORE) -pthread

$(ASAN)/.installed: $(VENV)/.installed $(wildcard zipslicer/*.py zipslicer/*/*.py)
	$(call make_plain_venv,$(ASAN),-g -fno-omit-frame-pointer -fsanitize=address$(COMMA)undefined -fno-sanitize-recover=undefined)
	@touch $@

# Python and torch are not instrumented: the runtime is loaded before them, and what they never free is not asked about.
sanitize: $(SANITIZED)/drive_thread $(SANITIZED)/drive_address $(ASAN)/.installed
	$(FIXED) $(SANITIZED)/drive_thread $(SANITIZED)/archive
	ASAN_OPTIONS=detect_leaks=1 $(SANITIZED)/drive_address $(SANITIZED)/archive
	cd $(SANITIZED) && \
	    ZIPSLICER_SANITIZED=1 ZIPSLICER_BACKEND=native OMP_NUM_THREADS=1 \
	    ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    $(CURDIR)/$(ASAN)/bin/python $(CURDIR)/$(VENV)/bin/pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	    -p no:cacheprovider $(PYTEST_ARGS) $(SANITIZED_TESTS:%=$(CURDIR)/tests/test_%.py)

bench: $(BENCH)/.installed $(BENCH)/zipslicer-0.8.1
	$(BENCH)/bin/python benchmarks/make_files.py
	$(BENCH)/bin/python benchmarks/run.py $(BENCH_ARGS)
	$(BENCH)/bin/python benchmarks/report.py

# The pure backend, out of this folder: the site needs no more of the package than its docstrings and its parser.
docs: $(DOCS)/.packages
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR) ZIPSLICER_BACKEND=pure $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "== build/site/index.html"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check $(PYTHON_FOLDERS)
	$(VENV)/bin/ruff format --check $(PYTHON_FOLDERS)
	$(VENV)/bin/mypy
	@if [ -f .clang-format ]; then echo clang-format --dry-run --Werror; $(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES); fi

format: $(VENV)/.packages
	$(VENV)/bin/ruff check --fix $(PYTHON_FOLDERS)
	$(VENV)/bin/ruff format $(PYTHON_FOLDERS)
	@if [ -f .clang-format ]; then $(VENV)/bin/clang-format -i $(CXX_SOURCES); fi

clean:
	rm -rf $(VENV) $(BENCH) $(NUMPY) $(DOCS) $(ASAN) $(FUZZ) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-bench:
	rm -rf benchmarks/.cache tests/.cache
