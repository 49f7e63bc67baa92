# Two commands need nothing before them: `make test` and `make demo`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: test demo lint clean

test: lint
	$(BIN)/python -m pytest

demo: $(READY)
	$(BIN)/python -m samples.demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,text,export,hf,rtx,report,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out .cache
