# Every target makes .venv itself and does nothing twice.
#   make quickstart   fine-tune a real model on this machine, and talk to it before and after
#   make lab          JupyterLab on the notebooks
#   make test         lint, all tests, and beside them every notebook executed and compared (test-fast: no real model, no notebooks)
#   make notebooks    execute all notebooks again and save their outputs
PYTHON ?= python3
BIN := .venv/bin
SANITIZE := tests/nbval_sanitize.cfg

.PHONY: quickstart lab test test-code test-notebooks test-fast notebooks lint clean

quickstart: .venv/.base
	$(BIN)/course quickstart $(if $(NAME),--name "$(NAME)")

lab: .venv/.lab
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

test: lint
	$(MAKE) --jobs=2 test-code test-notebooks

test-code: .venv/.dev
	$(BIN)/python -m pytest tests -m "not gpu"

test-notebooks: .venv/.dev
	$(BIN)/python -m pytest notebooks/*.ipynb --nbval --nbval-current-env --nbval-sanitize-with $(SANITIZE) \
	    --nbval-cell-timeout 1200 --timeout 1200

test-fast: .venv/.dev
	$(BIN)/python -m pytest tests -m "not gpu and not embedded and not slow"

notebooks: .venv/.dev
	$(BIN)/python -m jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.store_widget_state=False \
	    --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=900 notebooks/*.ipynb
	$(BIN)/python -m jupyter nbconvert --to notebook --inplace --coalesce-streams notebooks/*.ipynb

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.lab: .venv/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab,app,mcp]'
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv work_dirs notebooks/work_dirs
