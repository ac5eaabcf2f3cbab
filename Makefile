# Each target does all of its own set-up, from nothing, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
FASHION := /usr/share/datasets/fashion-mnist
# apt-get only where it is there and we may use it
APT := $(shell [ "$$(id -u)" = 0 ] && command -v apt-get)

.PHONY: help test test-slow lint quickstart clean

help:
	@echo "make quickstart    distil a small CNN from a Swin on Fashion-MNIST (QUICKSTART_ARGS='--seeds 3')"
	@echo "make test          ruff and the tests (PYTEST_ARGS='-k name')"
	@echo "make test-slow     the minutes-long proofs"
	@echo "make lint          ruff alone"
	@echo "make clean         remove .venv and caches"

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed (make PYTHON=python3.12)"; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# the test of two nodes needs these; without them it is skipped, and says so
.PHONY: test-tools
test-tools:
ifneq ($(APT),)
	@command -v pdsh >/dev/null && [ -x /usr/sbin/sshd ] && command -v ip >/dev/null || \
		{ apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iproute2 openssh-server pdsh >/dev/null; } || \
		echo "iproute2, openssh-server or pdsh could not be installed: the tests of several nodes will be skipped"
endif

test: $(STAMP) test-tools lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP) test-tools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: fashion-mnist
fashion-mnist: $(STAMP)
ifneq ($(APT),)
	@[ -d $(FASHION) ] || { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist >/dev/null; } || \
		echo "dataset-fashion-mnist could not be installed"
endif
	@[ -d $(FASHION) ] || $(BIN)/python -m pip install --quiet ".[mnist]" || true

quickstart: $(STAMP) fashion-mnist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python launch/quickstart.py $(QUICKSTART_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
