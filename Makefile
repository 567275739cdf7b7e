PYTHON ?= python3
# Another torch than that of constraints.txt, in an environment of its own: make test TORCH=2.8.0
TORCH ?=
# Errors only: pip's remarks about its own configuration are noise here. Compilation uses every core.
INSTALL := pip install -qq --disable-pip-version-check
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)
VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin

.PHONY: demo test real packages-table lint docs wheel clean

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
	$(BIN)/sphinx-build -W --keep-going -q -j 4 docs docs/_build/html

# A wheel, tried in an empty environment: the core alone has to watch and diagnose.
wheel: $(VENV)/installed
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/$(INSTALL) -c constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/python ../../.ci/core.py

# What the demo needs and no more: no tools for tests and documentation.
.venv/demo: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	@echo 'Making .venv, downloading torch and what the demo needs, compiling the kernels (a minute or two on two idle cores).'
	@$(PYTHON) -m venv .venv
	@.venv/bin/$(INSTALL) -c constraints.txt --editable '.[lab]'
	touch $@

.venv/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	@echo 'Installing what tests and documentation need into .venv, and compiling the kernels if they changed.'
	@$(PYTHON) -m venv .venv
	@$(BIN)/$(INSTALL) -c constraints.txt --editable '.[dev,docs]'
	touch $@

.venv-torch-%/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	$(PYTHON) -m venv .venv-torch-$*
	sed 's/^torch==.*/torch==$*/' constraints.txt > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/$(INSTALL) -c .venv-torch-$*/constraints.txt --editable '.[dev,docs]'
	touch $@

.venv-real/installed: pyproject.toml constraints.txt $(wildcard CMakeLists.txt csrc/*)
	$(PYTHON) -m venv .venv-real
	.venv-real/bin/$(INSTALL) -c constraints.txt --editable '.[dev,real]'
	@# It comes with norse, compiled for another torch; torchmetrics, and so Lightning, fails to import beside it.
	.venv-real/bin/pip uninstall -qq --yes torchvision
	touch $@

clean:
	rm -rf .venv .venv-real .venv-torch-* build dist docs/_build
