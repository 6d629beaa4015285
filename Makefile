PYTHON ?= python3
BIN := .venv/bin

.PHONY: export test test-faults test-kernels test-consumers gpu lint clean

export: .venv/.installed
	$(BIN)/python scripts/export.py --fp16

test: .venv/.installed lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The tests that try whatever inputs come, with 10 times as many of each; every kind of network in every precision.
test-faults: .venv/.installed
	TEST_TIMES=10 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
		tests/faults tests/kernels/operators/test_properties.py tests/kernels/operators/test_quantize_linear_properties.py \
		tests/export/test_zoo.py tests/export/test_exact_integers.py

# What the compiler makes of the kernels: good code for each target alone, of those too that run the same instructions;
# executed in an emulator each way of running on each target in each type, then of every network's launches the first,
# middle and last blocks; and the resnet20 of digits, whole, by both runtimes.
test-kernels: .venv/.installed
	TEST_TIMES=10 $(BIN)/python -m pytest tests/emulator tests/kernels/test_compile.py \
		tests/kernels/runtime/test_networks.py
	$(BIN)/python -m tests.emulator.networks

# Our files in ONNX Runtime, OpenVINO, ncnn, MNN, tract and others, installed for the purpose; writes docs/consumers.md.
test-consumers: .venv/.installed
	$(BIN)/python -m tests.consumers

# On a machine with an NVIDIA GPU, by a Python that has PyTorch and Triton already; nothing is installed.
gpu:
	$(PYTHON) scripts/gpu.py $(LIMIT:%=--limit %)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[export,onnxruntime,openvino,sign,tensorrt-rtx,train,dev]'
	touch $@

clean:
	rm -rf .venv build
