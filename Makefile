# Two commands: `make generate` runs the main job, `make test` passes the tests.
# `make oracle` before `make test` has every family held to Hugging Face transformers as well.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

TWO := --numprocesses 2 --dist loadfile
BOTH_WAYS := exactness generate_cli interrupt stress store

.PHONY: generate test oracle lint clean

generate: $(READY)
	$(BIN)/mlx-flash generate --slots 12 --max-tokens 300 \
		--chat-template-config '{"enable_thinking": false}' "Tell me a story about a lantern."

# Both ways: with the native kernels, and the suites that exercise them once more without.
test: $(READY) lint
	$(BIN)/python -m pytest $(TWO)
	$(BIN)/python -m pytest $(TWO) --reference $(addprefix tests/test_,$(BOTH_WAYS:=.py))

# Beside the environment, not in it: transformers imports PyTorch wherever it finds it, which would
# cost every other test five seconds and 200 MB.
oracle: .oracle/torch

.oracle/torch: | $(READY)
	$(BIN)/python -m pip install --quiet --target .oracle 'torch==2.13.*'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd custom_kernels/cpu && ../../$(BIN)/clang-format --dry-run --Werror *.cpp *.h *.inc tests/*.cpp

$(READY): pyproject.toml hatch_build.py $(wildcard custom_kernels/cpu/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv .oracle build dist mlx_flash/_native*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
