# Every verb prepares what it needs in .venv: Python 3.11 or newer, pip and make are enough to begin.
#   make demo    an answer to look at          make check   style, types, floors
#   make test    every test, every document    make docs    the documentation, into site/
#   make bench   ours beside sampling          make clean   remove what the verbs made
# Another interpreter: make PYTHON=python3.12 ...    Options of the benchmark: make bench BENCH="--quick"

PYTHON ?= python3
JOBS ?= 2
BENCH ?=
BIN := .venv/bin
export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.PHONY: help demo test shapes check docs bench clean

help:
	@sed -n 's/^#  *//p' Makefile | head -4

demo: .venv/.demo
	$(BIN)/pushforward demo

test: .venv/.dev
	$(BIN)/pytest -n $(JOBS)
	$(MAKE) --no-print-directory shapes

# The same tests once more, with every annotated shape and type checked at run time. An int counts as
# a float, as it does for mypy; beartype's dice inside Hypothesis strategies are not the strategies' own.
# Statistical tests are left out: they make the calls that others make, ten thousand times.
CHECKER = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
shapes: .venv/.dev
	$(BIN)/pytest -n $(JOBS) -q -m "not slow and not statistical" --ignore=tests/test_documents.py --ignore=tests/oracles \
	  --ignore=tests/benchmarks --ignore=tests/reproductions \
	  --ignore=tests/linearised_laplace/test_distributed.py --ignore=tests/sampling/test_distributed.py \
	  --ignore=tests/degeneracy/test_distributed.py \
	  "--jaxtyping-packages=pushforward,$(CHECKER)" \
	  -W ignore::hypothesis.errors.HypothesisDeprecationWarning

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/.dev
	$(BIN)/python benchmarks/expectation.py $(BENCH)
	$(if $(BENCH),,$(BIN)/python benchmarks/digits.py)

clean:
	rm -rf .venv build dist site demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks reproductions docs -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment, in two sizes; the larger contains the smaller ------------------------------

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pushforward needs Python 3.11 or newer: make PYTHON=/path/to/python ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv; the first time PyTorch is downloaded, which takes some minutes."
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv; the first time PyTorch is downloaded, which takes some minutes."
	$(PIP_INSTALL) -e ".[dev,docs]"
	@touch .venv/.demo $@
