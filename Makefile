# `make demo` and `make test` set everything up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo survey-demo web web-check test test-gpu lint format bench bench-gpu clean

demo: $(STAMP)
	@mkdir -p out
	$(BIN)/ifr-fast trace --html out/mary.html --png out/mary.png --json out/mary.json

# The page that draws graphs is TypeScript; node is needed to change it, and to check that the
# committed script is what its sources give.
WEB := ifr_fast/explorer/web
$(WEB)/node_modules: $(WEB)/package.json $(WEB)/package-lock.json
	cd $(WEB) && npm ci --no-audit --no-fund && touch node_modules

web: $(WEB)/node_modules
	cd $(WEB) && npm run --silent build

web-check: $(WEB)/node_modules
	cd $(WEB) && npm run --silent check

test: $(STAMP)
	$(BIN)/pytest $(PYTEST_ARGS)

# A survey of the default model on prose, code, other languages and sums takes about ten minutes.
SURVEY := out/survey-demo
survey-demo: $(STAMP)
	$(BIN)/python bench/demo/survey_demo.py $(SURVEY)/inputs
	$(BIN)/ifr-fast survey $(SURVEY)/inputs/*.jsonl --label-by pos --out $(SURVEY)/survey --resume
	$(BIN)/ifr-fast report $(SURVEY)/survey --contrast ioi:third

# These targets try out and measure the Triton kernels on a GPU (docs/gpu.md). A machine without a
# network runs bench/device_check.py by itself.
GPU_SEEN = $(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no GPU here: install its build for yours into $(VENV)")'
DEVICE_CHECK = $(BIN)/python bench/device_check.py --budget 3600 --patience 4

test-gpu: $(STAMP)
	$(GPU_SEEN)
	$(DEVICE_CHECK) --out out/test-gpu --steps versions compile correctness tests
	$(BIN)/pytest tests/kernels -k "triton and not test_triton.py" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The sdist and the wheels, in out/wheels.
wheels:
	.ci/wheels $(PYTHONS)

bench: $(STAMP)
	$(BIN)/python bench/run.py $(BENCH_ARGS)
	$(BIN)/pytest bench

bench-gpu: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(GPU_SEEN)
	$(BIN)/python bench/device_check.py --make-weights out/smollm2.safetensors
	$(DEVICE_CHECK) --part all --weights out/smollm2.safetensors $(BENCH_ARGS)

# Both variables pin the isolated build of the kernel: pip 25.3 and later reads the second.
$(STAMP): export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
