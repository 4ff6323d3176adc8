# make study [PROFILE=quick]   runs a profile of study.yaml, ends with its table
# make test                    all tests
# make lab                     JupyterLab
# make help                    the rest

PYTHON  ?= python3
PROFILE ?= quick
EXECUTOR ?= local
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

# torch and BLAS decide on threads by themselves; Snakemake gives each run its share
export PYTHONUNBUFFERED := 1

.PHONY: study test browser lab status stale report tables record benchmark lint format lock clean help

study: $(READY)
	@$(BIN)/python -m linl.study run $(PROFILE) --executor $(EXECUTOR) --options='$(OPTIONS)'

test: $(READY)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

browser: $(VENV)/.browser  ## the lessons and an experiment in JupyterLab, in this machine's Chromium; SCREENSHOTS=folder keeps pictures
	@$(BIN)/python -m linl.tests.lab  # says what is missing, if anything is
	@SCREENSHOTS='$(SCREENSHOTS)' $(BIN)/python -m pytest -s linl/tests/browser.py

lab: $(READY)
	@$(BIN)/jupyter lab notebooks

status: $(READY)  ## what of PROFILE is done, running, failed or waiting, and the time left
	@$(BIN)/python -m linl.progress $(PROFILE)

stale: $(READY)  ## finished runs of PROFILE that other code than today's has made
	@$(BIN)/python -m linl.progress $(PROFILE) --stale

report: $(READY)  ## one HTML file of PROFILE: tables, figures, runs and their executed notebooks
	@$(BIN)/python -m linl.webpage $(PROFILE)

record: $(READY)  ## copy the finished runs of PROFILE to results/records/
	@$(BIN)/python -m linl.study record $(PROFILE)

tables: $(READY)  ## results/tables/ anew, from results/records/ alone, and the page of public names
	@$(BIN)/python -m linl.study tables && $(BIN)/python -m linl.api

lint: $(READY)  ## ruff on code and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)  ## ruff puts code and notebooks in order
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

lock: $(READY)  ## requirements.lock anew: newest versions, every hash, Linux and macOS
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-emit-index-url --upgrade -q -o requirements.lock
	@! grep -nE 'https?://' requirements.lock

clean:  ## removes the environment; results stay
	rm -rf $(VENV)

help:
	@sed -n '1,4s/^# //p' Makefile; sed -nE 's/^([a-z]+):.*## (.*)/make \1 — \2/p' Makefile

# The environment: python's own venv, filled from the lock by uv, or by pip where uv can't be had.
# .ready is written last, so that an interrupted installation is taken up again.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  f"linl needs Python 3.11 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python -m venv failed: on Debian and Ubuntu, install the package python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "installing the pinned packages into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
	  VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(BIN)/python -m uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock \
	  && VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(BIN)/python -m uv pip install --quiet --no-deps --no-build-isolation -e . ; \
	else \
	  $(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock \
	  && $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e . ; \
	fi
	@touch $(READY)

# What drives the browser; the browser itself is the machine's, nothing of playwright's is downloaded.
$(VENV)/.browser: $(READY)
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
	  VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(BIN)/python -m uv pip install --quiet --no-build-isolation -e '.[browser]' ; \
	else \
	  $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[browser]' ; \
	fi
	@touch $@
