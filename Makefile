# Two commands: `make run` and `make test`. Both set up what is missing in .venv/ and .servers/ and install nothing else.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help run test check format bench bench-latency bench-rules bench-notify bench-growth bench-overload bench-soak bench-history pictures texts lock clean
.DELETE_ON_ERROR:

ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Three processes of tests, each with servers of its own and whole files to run: many tests wait, so two cores have room.
PARALLEL ?= --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

help:
	@echo "make run            set everything up and run the whole system (ARGS=--help for its options)"
	@echo "make test           set everything up and run the tests (ARGS= goes to pytest)"
	@echo "make check          format, lint, types, import contracts, settings, deployment files and migrations"
	@echo "make format         format the code and mend what the linter can"
	@echo "make bench          measure readings a second through a whole system, beside what the machine can do (ARGS=--short: a minute)"
	@echo "make bench-latency  measure the time from reading to notification"
	@echo "make bench-rules    measure what rules cost on one core, beside a hand-written loop"
	@echo "make bench-notify   measure 3,000 notifications a second over all three protocols"
	@echo "make bench-growth   measure whether a reading costs more beside many chains, sensors, organizations and readings"
	@echo "make bench-overload five minutes of many times more than can be processed: are the promises kept?"
	@echo "make bench-history measure how long charts wait beside five million readings (ARGS=--readings=50000000: fifty)"
	@echo "make bench-soak     ten minutes under load with two of everything: is memory flat?"
	@echo "make pictures       take the pictures of the guides anew, with Chromium, into docs/pictures"
	@echo "make texts          bring the translations in pages/locale up to date, name what is not translated, compile them"
	@echo "make lock           pin every Python package that the requirements pull in, in constraints.txt"
	@echo "make clean          remove the environment, the unpacked servers and caches; data in var/ stays"

run: $(VENV)/.run
	@exec $(BIN)/python -m deploy.run $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m deploy.servers get
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	@echo "the database parts again, on PostgreSQL"
	@$(BIN)/python -m pytest --postgres $(PARALLEL) $(ARGS) || [ $$? -eq 5 ]  # 5: ARGS chose no test that uses the database

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/lint-imports
	@echo "manage.py check --deploy, as in production"
	@secret() { $(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(48))'; }; \
	SECRET_KEY=$$(secret) JWT_SECRET=$$(secret) DEVICE_TOKEN_KEY=$$(secret) REDIS_PASSWORD=$$(secret) MQTT_PASSWORD=$$(secret) \
	AEMOS_ENV=production ALLOWED_HOSTS=aemos.test \
	$(BIN)/python manage.py check --deploy --fail-level WARNING
	@echo "deployment files"
	$(BIN)/hadolint deploy/docker/Dockerfile
	$(BIN)/kubernetes-validate --strict --quiet $(filter-out %kustomization.yaml %keda.yaml,$(wildcard deploy/kubernetes/*.yaml))
	@echo "manage.py makemigrations --check"
	@AEMOS_ENV=test $(BIN)/python manage.py makemigrations --check --dry-run

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.throughput $(ARGS)

bench-latency: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.latency $(ARGS)

bench-rules: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.rules $(ARGS)

bench-notify: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.notify $(ARGS)

bench-growth: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.growth $(ARGS)

bench-overload: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.overload $(ARGS)

bench-history: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.history $(ARGS)

bench-soak: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.soak $(ARGS)

texts: $(VENV)/.dev
	@DJANGO_SETTINGS_MODULE=aemos.settings AEMOS_ENV=test $(BIN)/python -m tests.texts

pictures: $(VENV)/.dev
	@$(BIN)/python -m deploy.servers get
	@$(BIN)/python -m tests.pictures

# In an environment of its own, so that what was installed by hand is not pinned for everybody.
lock: $(BIN)/python
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && cp requirements*.txt "$$work" && : >"$$work/constraints.txt" && \
	"$(PYTHON)" -m venv "$$work/venv" && cd "$$work" && \
	venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r requirements-examples.txt && \
	{ echo "# Every Python package at the version the tests run with. Written by make lock."; \
	venv/bin/python -m pip freeze --disable-pip-version-check; } >"$(CURDIR)/constraints.txt.new" && \
	mv "$(CURDIR)/constraints.txt.new" "$(CURDIR)/constraints.txt"

clean:
	rm -rf $(VENV) .servers staticfiles .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "AEMOS needs Python 3.11 or later, and there is no python3; install it"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "AEMOS needs Python 3.11 or later; $(PYTHON) is older. Install python3.11, or name another with PYTHON="; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "$(PYTHON) cannot make virtual environments; install them (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv --clear $(VENV)

# A stamp is newer than the lists it was made from, so an unchanged list installs nothing.
$(VENV)/.run: requirements.txt requirements-examples.txt constraints.txt | $(BIN)/python
	@$(call install,-r requirements.txt -r requirements-examples.txt)

$(VENV)/.dev: requirements.txt requirements-dev.txt constraints.txt | $(BIN)/python
	@$(call install,-r requirements-dev.txt)

define install
echo "installing the Python packages of: $(subst -r ,,$(1)) (once, about a minute)"; \
$(PIP) $(1) 2>$(VENV)/pip.log || { grep -m 1 ERROR $(VENV)/pip.log || tail -n 1 $(VENV)/pip.log; \
echo "the packages could not be installed; is there a network? The whole story: $(VENV)/pip.log"; exit 1; }; \
touch $@
endef
