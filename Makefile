# `make demo` and `make test` do everything they need, on a machine with Python (3.11 or later) and make.
PYTHON ?= python3
VENV   := .venv/bin
ARGS   ?=

.PHONY: setup demo test stress lint bench docs conformance oracle oracle-fuzz
.DEFAULT_GOAL := setup

setup: .venv/stamp               # an environment to run and test in: .venv
.venv/stamp: pyproject.toml tools/setup.sh
	@sh tools/setup.sh $(PYTHON)

demo: setup                      # an unmodified program on a software /dev/iommu
	@$(VENV)/python examples/demo.py $(ARGS)

test: setup                      # all tests that need no kernel tree, no compiler, no root
	@$(VENV)/python -m pytest -n auto -q -m "not oracle and not slow" $(ARGS)

stress: setup                    # the tests that take long: threads race everything for a minute
	@$(VENV)/python -m pytest -q -m "slow and not oracle" $(ARGS)

lint: .venv/lint-stamp           # style, types (two opinions), and which room imports which
	@status=0; for check in "ruff check" mypy pyright "lint-imports --no-logo"; do $(VENV)/$$check || status=1; done; exit $$status
.venv/lint-stamp: .venv/stamp
	@echo "setup: installing what make lint asks into .venv"
	@$(VENV)/python -m pip install -qq --disable-pip-version-check -e '.[test,lint]'
	@touch $@

bench: setup                     # medians, and their ratio to a floor measured in the same run
	@$(VENV)/python -m bench $(ARGS)

docs: .venv/docs-stamp            # guide and API reference as a site in build/docs; links that lead nowhere are errors
	@$(VENV)/python -m sphinx -W --keep-going -n -q -b html -c docs $(ARGS) . build/docs
	@echo "docs: build/docs/index.html"
.venv/docs-stamp: .venv/stamp
	@$(VENV)/python -m pip install -qq --disable-pip-version-check -e '.[docs]'
	@touch $@

conformance: setup               # the kernel's own selftest programs, through `iommufd run`
	@$(VENV)/python -m tools.conformance $(ARGS)

oracle: setup                    # the conformance checks on a real kernel, in an emulated VM
	@$(VENV)/python -m tools.oracle test $(ARGS)

oracle-fuzz: setup               # random programs on the real kernel and on the software, answer by answer
	@$(VENV)/python -m tools.fuzz $(or $(SEEDS),0-1999) $(ARGS)
