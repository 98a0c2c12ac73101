# `make demo` and `make test` alone set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test workers share the machine's cores: more threads than that only fight each other. A file stays on one worker,
# because its fixtures train once.
WORKERS ?= 2

.PHONY: install demo test lint format types clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hfkd needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=/path/to/python3.11 install" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/hfkd demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy has to see trainers/ where it is imported from: as hfkd.trainers.
types: $(STAMP)
	@rm -rf .types && mkdir -p .types/hfkd
	@for item in hfkd/*; do ln -s ../../$$item .types/hfkd/; done
	@for room in trainers model_cards scripts; do ln -s ../../$$room .types/hfkd/; done
	MYPYPATH=.types $(BIN)/mypy --cache-dir .types/.cache -p hfkd

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .types .pytest_cache .ruff_cache build *.egg-info
