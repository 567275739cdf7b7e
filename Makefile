PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean

demo: .venv/installed
	$(BIN)/unvanish compare --out unvanish-compare

test: .venv/installed
	$(BIN)/pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/sphinx-build -W --keep-going -q -j 2 docs docs/_build/html

.venv/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv build dist docs/_build
