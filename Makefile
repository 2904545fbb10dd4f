# Needs Python >= 3.10 and make; everything is installed into .venv, with the versions of constraints.txt.
# On Linux, PyPI's torch brings gigabytes of CUDA libraries. For the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

VENV ?= .venv
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& echo $$python && break; done)

PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

.PHONY: help demo test test-slow lint

help:
	@echo "make demo   compare samplers on the packaged checkpoint, as one labelled picture"
	@echo "make test   run the tests, in under four minutes"
	@echo "make test-slow   run those that take longer"
	@echo "make lint   check style and types"

demo: $(VENV)/.installed-cli
	$(VENV)/bin/genie-diffusers compare --guidance 3 --seed 8 --classes 1,9,7,0,8,5,4,3

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# One stamp for each extra of pyproject.toml. pip is the last thing that `venv` installs.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || test -n "$(PYTHON)" || { \
		echo "No Python >= 3.10 with the modules venv and ensurepip was found; name one: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing genie-diffusers[$*] into $(VENV); the first time takes minutes."
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	@touch $@
