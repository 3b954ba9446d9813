# `make quickstart` and `make test` are all a newcomer needs; both install what is missing first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Byte code is worth several seconds at every start; some machines switch it off.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart results notebooks docs test browser test-slow lint types imports format clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## Make .venv with the pinned versions (a no-op when nothing changed)

# The stamp is written last, so that an install that was cut short is begun again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	# Not compiled: of 33,000 files a quarter are ever imported. What training imports is compiled here, the rest at first use.
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	# The schema of sweep files that W&B's own client was tested with; its wish for an old numpy is about code not used here.
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt sweeps jsonref
	$(PY) -c 'import experiments.train.cli'
	touch $(STAMP)

quickstart: install  ## Train and test a multi-task model on generated images (about two minutes)
	$(PY) -m experiments fit --config experiments/quickstart.yaml

results: install  ## Make the runs that are missing and the tables of the docs (an hour)
	$(PY) docs/results.py

notebooks: install  ## Execute the notebooks that changed, for the site (minutes)
	$(PY) docs/notebooks.py

docs: install  ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

test: install  ## Formatting, lint, types, import contracts, the documentation and the test suite
	# mypy keeps one core busy; the others have what remains.
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target types lint imports docs
	# A file stays with one worker, so that what its tests share is made once; the costly ones do not come last.
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

browser:  ## Debian's Chromium, which the browser tests drive and skip without (needs root)
	apt-get install --yes --no-install-recommends chromium

test-slow: install  ## The tests that take minutes
	$(PY) -m pytest -n 2 -m slow

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: install
	$(VENV)/bin/mypy

imports: install
	$(VENV)/bin/lint-imports

format: install  ## Format and mend what can be mended
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## Remove the environment and the caches (never runs/ or data/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
