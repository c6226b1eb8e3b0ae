# Two commands: `make generate` runs the main job, `make test` passes the tests.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: generate test lint clean

generate: $(READY)
	$(BIN)/mlx-flash generate --slots 12 --max-tokens 300 \
		--chat-template-config '{"enable_thinking": false}' "Tell me a story about a lantern."

test: $(READY) lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
