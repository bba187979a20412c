# `make` lists the targets. All it needs is python3 (3.10 or newer) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock

# Real data sets, where a copy stands beside the checkout. Without one, flatminima uses its download cache.
ifndef FLATMINIMA_DATA
ifneq ($(wildcard ../shared/data/.),)
export FLATMINIMA_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test lint format bench clean

help:
	@echo "make env      create .venv with flatminima and its development tools, at the versions of requirements.lock"
	@echo "make demo     SGD, SAM, SWAD and SAM+SWAD on scikit-learn's digits; writes runs/digits/report.html"
	@echo "make test     ruff, mypy --strict and pytest"
	@echo "make lint     ruff and mypy only"
	@echo "make format   rewrite the code as ruff wants it"
	@echo "make bench    install what the benchmarks compare with, and run them, one file per claim"
	@echo "make clean    remove both environments and the caches; results in runs/ stay"

env: $(VENV)/installed

# The stamp is written last: an interrupted installation is taken up again, a finished one is not repeated.
$(VENV)/installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
		f"Python 3.10 or newer is needed, and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=/path/to/a/newer/python")'
	@echo "[1/4] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch (the largest download; this can take some minutes)"
	@$(PIP) torch
	@echo "[3/4] installing the other packages"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@echo "[4/4] checking"
	@$(BIN)/python -m pip --disable-pip-version-check check
	@touch $@

demo: env
	$(BIN)/flatminima compare --data digits --methods sgd,sam,swad,sam+swad --seeds 5 --out runs/digits

test: lint
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The libraries that the benchmarks compare with lie in an environment of their own, on top of the other: they bring a
# torchvision along, and one that does not fit the build of torch keeps transformers, which tests need, from being imported.
$(BENCH)/installed: $(VENV)/installed
	@echo "installing the libraries that the benchmarks compare with into $(BENCH)"
	@$(BIN)/python -m venv --without-pip $(BENCH)
	@$(BIN)/python -c '$(SITE)' > "$$($(BENCH)/bin/python -c '$(SITE)')/below.pth"
	@$(subst -m pip,-m pip --python $(BENCH)/bin/python,$(PIP)) --no-build-isolation --editable '.[bench]'
	@touch $@

bench: $(BENCH)/installed
	@for file in benchmarks/*.py; do echo "$$file"; $(BENCH)/bin/python $$file || exit 1; done

clean:
	rm -rf $(VENV) $(BENCH) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
