# Two commands matter: `make demo` and `make test`. Everything they make lies under build/.
PYTHON ?= python3

TEST_ENV := build/test-env
TEST_PYTHON := $(TEST_ENV)/bin/python
AUDIT_ENV := build/audit-env
DEMO_ENV := build/demo-env
DEMO_PYTHON ?= $(DEMO_ENV)/bin/python
PYTEST_ARGS ?=
EQUIVALENCE_ARGS ?=
CAMPAIGN_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-containers test equivalence lint audit format bench clean distclean test-env demo-env FORCE

help:
	@echo 'make demo       measure a small campaign with a real transformer on this machine, and show the table'
	@echo 'make demo-containers  PyTorch and vLLM in containers of their own, on the lab (Debian 12, root; tests/lab/README.md)'
	@echo 'make test       run every test this machine can run, and say what it could not run'
	@echo 'make equivalence  compare with the old build on the same inputs (EQUIVALENCE_ARGS=--live: campaigns too)'
	@echo 'make lem.pyz    build the program into one file'
	@echo 'make lint       ruff and mypy; yamllint, ansible-lint and systemd-analyze for the fleet'
	@echo 'make audit      bandit, and pip-audit of what the program carries (needs PyPI and its database of advisories)'
	@echo 'make format     let ruff lay out the code'
	@echo 'make bench      print figures of the program itself beside their targets'
	@echo 'make clean      remove what was built; distclean: the virtual environments too'
	@echo
	@echo 'PYTHON=python3.12         the Python to make environments from (3.10 or newer)'
	@echo 'DEMO_PYTHON=…/bin/python  measure with an environment of your own that has PyTorch and transformers'
	@echo 'PYTEST_ARGS="-k manifest" passed to pytest by make test'

# Always looked at: a file taken away from lem/ must leave the zip too, and building takes less than a second.
lem.pyz: FORCE
	@$(PYTHON) lem.pyz-build/build.py --output $@

demo: lem.pyz demo-env
	$(DEMO_PYTHON) examples/make_demo_model.py build/demo-model
	$(DEMO_PYTHON) lem.pyz campaign examples/demo.yaml --executor local --fresh --yes

# The lab is a Docker Engine with CPU builds of both engines; bringing it up the first time takes some minutes.
demo-containers: lem.pyz demo-env
	$(DEMO_PYTHON) examples/make_demo_model.py build/demo-model
	$(PYTHON) -m tests.lab up
	eval "$$($(PYTHON) -m tests.lab env)" && \
	  $(PYTHON) lem.pyz campaign examples/two-backends.yaml --executor docker --fresh --yes $(CAMPAIGN_ARGS)

# An environment named by the caller is taken as it is.
demo-env:
ifeq ($(DEMO_PYTHON),$(DEMO_ENV)/bin/python)
	@$(PYTHON) lem.pyz-build/environment.py $(DEMO_ENV) examples/requirements.txt
endif

test-env:
	@$(PYTHON) lem.pyz-build/environment.py $(TEST_ENV) tests/requirements.txt

test: test-env
	$(TEST_PYTHON) -m pytest $(PYTEST_ARGS)

equivalence: test-env
	$(TEST_PYTHON) -m tests.equivalence $(EQUIVALENCE_ARGS)

lint: test-env
	$(TEST_PYTHON) -m ruff check
	$(TEST_PYTHON) -m ruff format --check
	$(TEST_PYTHON) -m mypy
	$(TEST_PYTHON) -m tests.fleet.lint

# Not part of CI: a day on which the database cannot be reached, or learns something new, is no fault of a change.
audit: test-env
	$(TEST_PYTHON) -m bandit --quiet --configfile pyproject.toml --recursive lem lem.pyz-build examples
	@$(PYTHON) lem.pyz-build/environment.py $(AUDIT_ENV) tests/requirements-audit.txt
	$(AUDIT_ENV)/bin/python -m pip_audit --strict --disable-pip --requirement lem.pyz-build/vendor.txt

format: test-env
	$(TEST_PYTHON) -m ruff check --fix
	$(TEST_PYTHON) -m ruff format

bench: test-env lem.pyz
	@$(TEST_PYTHON) -m tests.bench

clean:
	rm -rf lem.pyz build/vendor build/demo-model .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find lem lem.pyz-build tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf build

FORCE:
