# make demo      the main job on the built-in model, from nothing
# make test      the tests of every commit, in ten minutes on two cores; TESTS="tests/export -x" for some of them
# make test-all  all tests: compilers, TensorRT's engines, launchers, training, hundreds of random SubNets
# make check     ruff, mypy, the rule of imports, and the site
# make docs      the site, into build/site; broken links and missing references fail
# make fuzz      thousands of hostile files for MINUTES (20), and of random SubNets: programs against gated torch
# make gpu       all that is to be known of a GPU, in 8 minutes; REHEARSE=1 goes through it on the CPU, with small models
# make faults    small faults in a copy of the code, one at a time: does make test see each?

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= digits-dit

.PHONY: install demo test test-all check docs fuzz faults gpu gpu-packages clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "dipgo needs Python 3.11 or later; run: make PYTHON=python3.11" && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# The CPU is enough for everything here; where an installed torch fits, nothing is fetched anew.
TORCH ?= --constraint constraints.txt torch

ASK := $(if $(filter digits-dit,$(MODEL)),--class 3,--prompt "a red fox")

demo: install
	$(BIN)/dipgo compile $(MODEL) --steps 20 --budget 0.35 --preset quick --no-bench --force -o build/demo
	$(BIN)/dipgo bench build/demo/bundle --force -o build/demo/report
	@echo "next: $(BIN)/dipgo run build/demo $(ASK) -n 8 -o build/demo/images.png"

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow" $(TESTS)

test-all: install
	DIPGO_FUZZ=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(TESTS)

check: install docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

MINUTES ?= 20

fuzz: install
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)
	DIPGO_FUZZ=20 $(BIN)/python -m pytest tests/export/test_parity.py -k any_subnet

faults: install
	$(BIN)/python -m tests.mutate -o build/faults.json

GPU := $(if $(REHEARSE),build/gpu-rehearsal --rehearse --seconds 1200,build/gpu)

gpu: install
	$(BIN)/python -m benchmarks.gpu -o $(GPU)

# What a machine with torch, onnx, onnxruntime, transformers and accelerate lacks for make gpu, where it has no network:
# PYTHONPATH=build/gpu-packages python -m benchmarks.gpu. WITH="onnxruntime-gpu tensorrt-rtx" for more backends.
GPU_PACKAGES := diffusers onnx-ir onnxscript pydantic pydantic-core annotated-types typing-inspection cuda-bindings \
	cuda-pathfinder psutil filelock pillow importlib-metadata zipp
GPU_PYTHON ?= 3.12

gpu-packages: install
	$(BIN)/pip install --quiet --no-deps --no-compile --only-binary :all: --python-version $(GPU_PYTHON) --upgrade \
		--constraint constraints.txt --target build/gpu-packages $(GPU_PACKAGES) $(WITH)
	$(BIN)/pip install --quiet --no-deps --no-compile --upgrade --target build/gpu-packages .

clean:
	rm -rf build $(VENV)
