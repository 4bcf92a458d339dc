# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DS_BUILD_OPS = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The type checker would ask npm for newer versions.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.PHONY: demo test bounds lint types docs install dev clean

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/occstream demo

# Three workers for two cores: tests that wait for processes or a server leave a core to the third.
# Byte code is kept also where the environment forbids it: dozens of processes would compile every module again.
test: export PYTHONDONTWRITEBYTECODE =
test: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Once more what calls compiled kernels, with every index checked; its cache is not that of unchecked kernels.
bounds: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(CURDIR)/$(VENV)/bounds \
	  $(BIN)/python -m pytest -q tests/sharding/test_kernel_bounds.py tests/sharding/test_labels.py \
	  tests/sharding/test_synthetic.py tests/sharding/test_rows.py \
	  tests/evaluation/test_propagate.py $(ARGS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mkdocs build -q --strict

# The folders are linked as the package that they are installed as: the checker cannot follow the editable install.
types: dev
	mkdir -p build/types/occstream
	for name in sharding models evaluation pretrain launch; do ln -sfn ../../../$$name build/types/occstream/$$name; done
	ln -sfn ../../../occstream/__init__.py build/types/occstream/__init__.py
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: dev
	$(BIN)/python -m mkdocs build --strict

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "occstream needs Python 3.11 or newer; call: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info
