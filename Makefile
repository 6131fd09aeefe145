# `make demo` and `make test` need nothing but Python 3.9 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_FLAGS ?=

.PHONY: demo proof actions test tiny clean
.DEFAULT_GOAL = demo

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
		{ echo 'error: $(PYTHON) is older than 3.9; run make PYTHON=python3.12 (or another that you have)'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'error: no venv here; on Debian or Ubuntu: apt install python3-venv'; exit 1; }
	@echo "installing into $(VENV): about 6 GB on Linux, 2 GB with a torch for CPUs; this takes minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pytest pytest-xdist ruff isal scikit-image datasets peft pyarrow
	@touch $@

# Prepares the bundled clips, fine-tunes the tiny checkpoint, generates from held-out first frames, scores: demo/
demo: $(VENV)/.installed
	$(BIN)/python tests/demo.py

# Does generated video help a robot's policy? Measured in PyBullet, on top of the demo's model: proof/, see tests/proof/README.md
proof: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pybullet==3.2.7
	$(BIN)/python tests/proof/proof.py

# Is the action followed? Fine-tunes the tiny checkpoint with actions and without, and measures: actions/, see tests/actions/README.md
actions: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pybullet==3.2.7
	$(BIN)/python tests/actions/experiment.py

test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

# Makes tests/tiny_svd again from nothing (needs PyBullet to render; hours on a CPU): see tests/tiny/README.md
tiny: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pybullet==3.2.7
	PYTHON=$(BIN)/python sh tests/tiny/make_tiny.sh

clean:
	rm -rf demo proof actions .pytest_cache .ruff_cache
