# The commands of a working day. Needs make and Python >= 3.11, and nothing else.
#   PYTHON  the interpreter that the environment is made with     make test PYTHON=python3.12
#   VENV    where the environment lies                            make test VENV=.venv312
#   ONLY    a single benchmark                                    make bench ONLY=gemm
#   ARGS    what train, test and their kin pass on                make test ARGS="-k router"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ONLY ?= *

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PINS := constraints/py311.txt constraints/py312.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-all bench lint clean

help:
	@echo 'make train      environment, then the default training run     ARGS="--help" lists its options'
	@echo 'make test       environment, then the default test tier (minutes)'
	@echo 'make test-slow  the tests marked slow (minutes more)'
	@echo 'make test-all   every test that needs no accelerator (hours)'
	@echo 'make bench      the benchmarks, side by side'
	@echo 'make lint       ruff: rules and formatting'
	@echo 'make clean      removes environments and caches; keeps runs/'
	@echo 'make help       this list'

train: $(STAMP)
	@$(PY) -m dsv3_jax.train $(ARGS)

test: $(STAMP)
	@$(PY) -m pytest $(ARGS)

# pytest ends with 5 when it found nothing to run, which is worth a line and no failure.
test-slow: $(STAMP)
	@$(PY) -m pytest -m slow $(ARGS) || \
	{ [ $$? -eq 5 ] && echo 'test-slow: no slow test was found, so nothing was run'; }

test-all: $(STAMP)
	@$(PY) -m pytest -m 'not gpu' $(ARGS)

# One benchmark: make bench ONLY=train_cpu ARGS="--torch-python /path/to/python"
bench: $(STAMP)
	@set -e; for file in benchmarks/$(ONLY).py; do \
	  echo "== $$file"; $(PY) "$$file" $(ARGS); \
	done

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

clean:
	rm -rf .venv .venv312 .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for all targets; made again when the project's needs or its pins change.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "Python >= 3.11 is needed, and $(PYTHON) says: $$($(PYTHON) --version 2>&1 | head -n 1);" \
	  "name another with PYTHON=/path/to/python3.12"; exit 1; } >&2
	@echo "Installing into $(VENV), once: about 1 GB, a minute or two on a fast connection ..."
	@$(PYTHON) -m venv $(VENV)
	@line=$$($(PY) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")'); \
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  --config-settings editable_mode=compat --constraint constraints/$$line.txt --editable '.[dev]'
	@touch $@
