PYTHON ?= python3
# Another torch than that of constraints.txt, in an environment of its own: make test TORCH=2.8.0
TORCH ?=
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin

.PHONY: demo test real packages-table lint docs clean

demo: .venv/demo
	@echo 'Training six models on two tasks from three seeds; about three minutes on two cores.'
	.venv/bin/unvanish compare --out unvanish-compare

test: $(VENV)/installed
	$(BIN)/pytest -q

# In an environment of its own: other packages' requirements leave the one of the tests as it is.
real: .venv-real/installed
	.venv-real/bin/pytest -q -m real tests/real

# The same, and the table of docs/howto/packages.md is measured anew.
packages-table: .venv-real/installed
	.venv-real/bin/pytest -q -m real tests/real --packages-table docs/howto/packages.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/installed
	$(BIN)/sphinx-build -W --keep-going -q -j 2 docs docs/_build/html

# What the demo needs and no more: no tools for tests and documentation.
.venv/demo: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	@echo 'Making .venv and installing unvanish with what it needs: downloads torch, then compiles the kernels.'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --editable .
	touch $@

.venv/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,docs]'
	touch $@

.venv-torch-%/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	$(PYTHON) -m venv .venv-torch-$*
	sed 's/^torch==.*/torch==$*/' constraints.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/pip install --quiet --disable-pip-version-check -c .venv-torch-$*/constraints.txt --editable '.[dev,docs]'
	touch $@

.venv-real/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	$(PYTHON) -m venv .venv-real
	.venv-real/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,real]'
	@# It comes with norse, compiled for another torch; torchmetrics, and so Lightning, fails to import beside it.
	.venv-real/bin/pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .venv-real .venv-torch-* build dist docs/_build
