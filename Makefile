# The two commands of the README. Everything they need is installed into $(VENV) by requirements/install.py.
PYTHON ?= python3
VENV ?= .venv
BACKEND ?= auto
TORCH_INDEX ?=
MODEL ?= qwen3-next
BIN = $(VENV)/bin

.PHONY: setup demo test lint check-types kernels sanitize sources unit clean

setup:
	@$(PYTHON) requirements/install.py --venv $(VENV) --backend $(BACKEND) --torch-index "$(TORCH_INDEX)"

demo: setup
	@$(BIN)/blackwell-kernels e2e demo --model $(MODEL)

test: setup lint check-types kernels unit

lint:
	$(BIN)/ruff check .

# mypy cannot follow the hand-mapped packages of an editable install: it reads an installed copy
check-types:
	@rm -rf .cache/types build
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation --target .cache/types .
	MYPYPATH=.cache/types $(BIN)/mypy -p blackwell_kernels

# apart from the rest: these tests run Triton's interpreter, which is chosen when Triton is imported
kernels:
	$(BIN)/pytest kernels -n 2

# on a machine with a GPU and CUDA's compute-sanitizer; an allocation a tensor, so that overruns do not land in another
sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
	    $(BIN)/python -m pytest kernels -m sanitize -p no:cacheprovider

# the released vLLM sources that the hooks' signatures are checked against, without importing them
SOURCES = .cache/vllm-sources
sources:
	@$(BIN)/python model_patches/tests/fetch_sources.py $(SOURCES)

unit: sources
	RELEASED_VLLM_SOURCES=$(CURDIR)/$(SOURCES) $(BIN)/pytest tests plugin model_patches microbench e2e

clean:
	rm -rf $(VENV) out .cache build *.egg-info
