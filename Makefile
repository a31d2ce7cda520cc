# The main targets are `make demo` and `make test`. They write only to build/ and lem.pyz.
PYTHON ?= python3

TEST_ENV := build/test-env
TEST_PYTHON := $(TEST_ENV)/bin/python
OLD_ANSIBLE_ENV := build/ansible-2.18
AUDIT_ENV := build/audit-env
DEMO_ENV := build/demo-env
DEMO_PYTHON ?= $(DEMO_ENV)/bin/python
PYTEST_ARGS ?=
TEST_PROCESSES ?= 4
CAMPAIGN_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-containers sdist test test-long lint fleet-newer audit format bench clean distclean test-env demo-env FORCE

help:
	@echo 'make demo       run a small campaign with a real transformer on this machine, and show the table'
	@echo 'make demo-containers  run PyTorch, vLLM and servers in containers, on the lab (Debian 12, root; tests/lab/README.md)'
	@echo 'make test       run every test that this machine can run, and list the others'
	@echo 'make test-long  run the tests that take minutes each, which make test leaves out'
	@echo 'make lem.pyz    build the program as one file'
	@echo 'make sdist      pack everything that git tracks into build/dist: the program, the tests, the zip builder'
	@echo 'make lint       ruff and mypy; yamllint, ansible-lint and systemd-analyze for the fleet'
	@echo 'make fleet-newer  run the playbooks with newer versions of ansible-core, in Debian 13 on the lab'
	@echo 'make audit      bandit, and pip-audit of the vendored packages (needs PyPI and its advisory database)'
	@echo 'make format     format the code with ruff'
	@echo 'make bench      print figures of the program itself, with their targets'
	@echo 'make clean      remove build products; distclean: also the virtual environments'
	@echo
	@echo 'PYTHON=python3.12         the Python that creates the environments (3.10 or newer)'
	@echo 'DEMO_PYTHON=…/bin/python  use your own environment with PyTorch and transformers for the demo'
	@echo 'PYTEST_ARGS="-k manifest" passed to pytest by make test and make test-long'
	@echo 'TEST_PROCESSES=4          how many processes run the tests (0: one, whose output you see at once)'

# Always rebuilt, so that deleted files disappear from the zip, too. This takes less than a second.
lem.pyz: FORCE
	@$(PYTHON) lem.pyz-build/build.py --output $@

# setuptools leaves a folder that would add files of this tree to the next sdist.
sdist: test-env
	@rm -rf *.egg-info
	@$(TEST_PYTHON) -c 'from setuptools.build_meta import build_sdist; print("build/dist/" + build_sdist("build/dist"))' \
	  | tail -n 1
	@rm -rf *.egg-info

demo: lem.pyz demo-env
	$(DEMO_PYTHON) examples/make_demo_model.py build/demo-model
	$(DEMO_PYTHON) lem.pyz campaign examples/demo.yaml --executor local --fresh --yes

# The lab is Docker with CPU builds of the engines; the first setup takes some minutes.
demo-containers: lem.pyz demo-env
	$(DEMO_PYTHON) examples/make_demo_model.py build/demo-model
	$(PYTHON) -m tests.lab up
	eval "$$($(PYTHON) -m tests.lab env)" && for name in two-backends vllm-serve llama-server; do \
	  $(PYTHON) lem.pyz campaign examples/$$name.yaml --executor docker --fresh --yes $(CAMPAIGN_ARGS) || exit; \
	done

# An environment that the user names is not changed.
demo-env:
ifeq ($(DEMO_PYTHON),$(DEMO_ENV)/bin/python)
	@$(PYTHON) lem.pyz-build/environment.py $(DEMO_ENV) examples/requirements.txt
endif

test-env:
	@$(PYTHON) lem.pyz-build/environment.py $(TEST_ENV) tests/requirements.txt
	@$(PYTHON) lem.pyz-build/environment.py $(OLD_ANSIBLE_ENV) tests/requirements-ansible-2.18.txt

# Two processes run what uses Docker, and mostly wait for it; the others run the rest (tests/conftest.py).
test: test-env
	$(TEST_PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

test-long: test-env
	$(TEST_PYTHON) -m pytest -m long $(PYTEST_ARGS)

lint: test-env
	$(TEST_PYTHON) -m ruff check
	$(TEST_PYTHON) -m ruff format --check
	$(TEST_PYTHON) -m mypy
	$(TEST_PYTHON) -m tests.fleet.lint

# Not part of CI: these versions need a newer Python than Debian 12 has.
fleet-newer: test-env
	@$(TEST_PYTHON) -m tests.fleet.newer

# Not part of CI: it depends on the advisory database, which may be unreachable or have new entries.
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
