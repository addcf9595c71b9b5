# Everything builds .venv first if it is missing or requirements.lock is newer.
# Needs git, make and Python 3.11 or newer; what else there is, requirements.lock brings.

VENV := .venv
PYTHON := $(VENV)/bin/python
UV := uv==0.13.9

.PHONY: demo test check docs lock goldens

demo: $(VENV)/ready
	@if [ -d runs/demo ]; then $(PYTHON) search.py resume demo; \
	else $(PYTHON) search.py launch demo --method alr --data digits --noise symmetric:0.4 --trials 24; fi
	@echo "the runs in the browser: $(PYTHON) search.py ui"

test: $(VENV)/ready
	$(PYTHON) -m pytest -n 2 --dist worksteal

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

goldens: $(VENV)/ready
	$(PYTHON) -m tests.test_goldens

docs: $(VENV)/ready
	$(PYTHON) docs/pages.py

lock: $(VENV)/ready
	$(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --group dev pyproject.toml -o requirements.lock

$(VENV)/ready: requirements.lock
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(UV)
	VIRTUAL_ENV=$(VENV) $(VENV)/bin/uv pip sync requirements.lock
	touch $@
