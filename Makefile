PYTHON ?= python3
BIN := .venv/bin

.PHONY: export test lint clean

export: .venv/.installed
	$(BIN)/python scripts/export.py --fp16

test: .venv/.installed lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[onnxruntime,sign,tensorrt-rtx,train,dev]'
	touch $@

clean:
	rm -rf .venv build
