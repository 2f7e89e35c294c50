# make demo   render manifests/quickstart.parquet and say where the videos are
# make check  style, and the tests that need no network, process or server: for every change; under two minutes
# make test   run all tests, on the cores there are (at most 8)
# make lint   style, format and types
# make nightly   the long tests: a crash at every call to the store, 20,000 simulated runs
#
# Each makes the virtual environment .venv when it is missing or older than pyproject.toml.
# Another Python: make demo PYTHON=/path/to/python3.12

PYTHON := python3.11 python3.12 python3.13 python3.14 python3 python
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
export RAY_USAGE_STATS_ENABLED := 0

# As many as there are cores, but not more than memory is likely to hold: each loads torch, networks, some start Ray.
WORKERS := -n logical --maxprocesses 8 --dist loadfile
QUICK := tests/test_floors.py tests/ground tests/render/plans tests/render/driving/test_scheduler.py tests/test_report.py \
	tests/sampling/test_guidance.py tests/sampling/test_noise.py tests/sampling/test_ranges.py \
	tests/storage/test_local.py tests/storage/test_memory.py tests/storage/test_records.py tests/storage/test_retrying.py

.PHONY: demo check test lint nightly
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@$(BIN)/magi-ray submit manifests/quickstart.parquet
	@echo "The videos:"
	@ls -1 magi-ray-store/runs/*/videos/*.mp4

check: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -q $(WORKERS) $(QUICK)
	@$(BIN)/python -m pytest -q tests/test_cli.py -k "a_mistake_is_told or every_command_has_help"

test: $(VENV)/installed-test
	@$(BIN)/python -m pytest -q $(WORKERS)

nightly: $(VENV)/installed-test
	@$(BIN)/python -m pytest -q --timeout=0 --all-crash-points tests/test_crash_points.py
	@$(BIN)/python -m tests.simulation --seeds 20000

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Python 3.11 or newer. With an NVIDIA GPU the environment sees the packages of that Python: its torch is the
# user's choice and stays. Without one, torch comes first, so that nothing else chooses another build of it.
$(BIN)/python:
	@for python in $(PYTHON); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "magi-ray needs Python 3.11 or newer; tried: $(PYTHON)." >&2; \
		echo "Install one, then: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	if nvidia-smi >/dev/null 2>&1; then shared=--system-site-packages; fi; \
	"$$python" -m venv $$shared $(VENV) || { \
		rm -rf $(VENV); \
		echo "$$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; \
	}

$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "Installing magi-ray into $(VENV); the first time takes some minutes."
	@nvidia-smi >/dev/null 2>&1 \
		|| $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
		|| $(PIP) install torch==2.13.0
	@$(PIP) install --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(PIP) install --editable '.[test]'
	@touch $@
