# All that people and CI run. PYTHON is the interpreter of the environment: .venv/bin/python where there is one.
PYTHON ?= $(shell [ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)
export OMP_NUM_THREADS ?= 1
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
WORKERS ?= 2

.PHONY: fix check laws test

fix:
	$(PYTHON) -m ruff format src tests
	$(PYTHON) -m ruff check --fix src tests

check:
	$(PYTHON) -m ruff format --check src tests
	$(PYTHON) -m ruff check src tests
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as c; c()"
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

laws:
	$(PYTHON) -m pytest tests/laws

test: check
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadgroup
