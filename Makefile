# `make demo` and `make test` do all the set-up they need: a virtual environment of their own, locked dependencies.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of torch is on PyTorch's own index. A pip that is configured with a source of its own is believed.
TORCH_INDEX ?= $(shell $(PYTHON) -m pip config list | grep -qE "find-links|index-url" || echo https://download.pytorch.org/whl/cpu)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

.PHONY: demo test check format clean

demo: .venv/.ready
	@$(BIN)/icarus demo

test: .venv/.ready
	$(BIN)/python -m pytest

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ICaRus needs Python 3.11 or newer; call make PYTHON=...")'
	@echo "Setting up .venv (once, a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.lock
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
