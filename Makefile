# The commands of this project; `make help` lists them.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.stamp
KUBERNETES := $(VENV)/kubernetes
SITE := $(VENV)/site
RELEASE := $(VENV)/release
SOURCES := worker tasks tests
# Tests run in parallel, one process per core, at least two. Without the slow ones, one more: some wait for timeouts.
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 2 ] && echo $$n || echo 2)
# Keep compiled modules, whatever the environment says: otherwise each test process would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(STAMP) ## Run the end-to-end demo: deliver 60,000 events in a sandbox, and check the result
	$(BIN)/imattr demo

test: $(STAMP) ## Run every test
	$(BIN)/pytest -n $(JOBS) --dist worksteal

setup: $(STAMP) ## Create the virtual environment from the hash-checked lock

fast: $(STAMP) ## Format, lint, types, spelling, and every test that needs no real time
	$(MAKE) --no-print-directory -j 2 --output-sync lint tests-without-waiting

check: $(STAMP) lint ## Check everything once, with coverage of the whole product
	$(BIN)/pytest -n $(JOBS) --dist worksteal --cov --cov-report=
	$(BIN)/python -m tests.coverage

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/codespell $(SOURCES) docs *.md
	$(BIN)/mypy

tests-without-waiting: $(STAMP)
	FAST_TESTS=1 $(BIN)/pytest -n $$(( $(JOBS) + 1 )) --dist worksteal -m "not slow"

format: $(STAMP) ## Format the code and fix what the linter can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bugs: $(STAMP) ## Plant bugs on purpose, promise by promise: its proof must find each
	$(BIN)/python -m tests.planted

scenarios: $(STAMP) ## Simulate what goes wrong in production, in virtual time
	$(BIN)/python -m tests.scenarios

schedules: $(STAMP) ## Run seeded schedules with faults at every step (SEEDS=3000, SEED=7)
	$(BIN)/python -m tests.schedules $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),3000) --first $(or $(FIRST),1))

chaos: $(STAMP) ## Break everything in a running system (MINUTES=3, SEED=7, FSYNC=always, REDIS=sentinel)
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),3) $(if $(SEED),--seed $(SEED)) --fsync $(or $(FSYNC),always) $(if $(REDIS),--redis $(REDIS))

failovers: $(STAMP) ## Fail Redis over again and again (REDIS=sentinel, REPLICAS=1, TIMES=30)
	$(BIN)/python -m tests.chaos.failovers --redis $(or $(REDIS),sentinel) --replicas $(or $(REPLICAS),0) --times $(or $(TIMES),30)

upgrades: $(STAMP) ## Upgrade a fleet of the previous version under load, worker by worker, and downgrade it
	$(BIN)/python -m tests.chaos.upgrades

alerts: $(STAMP) ## Check which alerts fire under a real Prometheus when things go wrong (needs prometheus)
	$(BIN)/python -m tests.monitoring

soak: $(STAMP) ## Run at full rate, and check that nothing grows (MINUTES=30)
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.bench ## Measure what the docs claim (half an hour; PARTS=rivals)
	$(BIN)/python -m tests.bench $(PARTS)

manifests: $(KUBERNETES)/.stamp ## Render the Helm chart for a trial and for production (build/manifests), and check it
	$(KUBERNETES)/bin/python -m tests.manifests

screenshots: $(STAMP) ## Play an operator's story in a sandbox, and take the screenshots of docs/operate/console.md (needs chromium)
	$(BIN)/python -m tests.console.story

pictures: $(STAMP) ## Draw the pictures of docs/, or those in NAMES (NAMES="how/limiter.svg"; needs chromium for Flower's)
	$(BIN)/python -m tests.pictures $(NAMES)

image: ## Build the container image with docker, podman or buildah, and check that it runs (BASE=...)
	docker/image

docs: $(STAMP) ## Generate the pages of docs/ that come from the code
	$(BIN)/python -m tests.docs

site: $(SITE)/.stamp ## Build the documentation (build/site), with no warnings and every link checked
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --strict

release: $(RELEASE)/.stamp ## Build, check and list all of a release (build/release); upload nothing
	$(RELEASE)/bin/python -m tests.release $(PYTHONS)

# Both projects, the first's groups, and the extra of the second that they need.
COMPILE := uv pip compile --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet
lock: ## Upgrade the locks to the newest allowed versions (needs uv)
	$(COMPILE) --upgrade worker/pyproject.toml -o requirements.lock
	$(COMPILE) --upgrade worker/pyproject.toml --extra sandbox --group dev -c requirements.lock -o requirements-dev.lock
	$(COMPILE) --upgrade worker/pyproject.toml --group bench -c requirements-dev.lock -o requirements-bench.lock
	$(COMPILE) --upgrade --group kubernetes -o requirements-kubernetes.lock
	$(COMPILE) --upgrade --group site -o requirements-site.lock
	$(COMPILE) --upgrade --group release -o requirements-release.lock

clean: ## Remove the environment, caches and sandbox data
	rm -rf $(VENV) .imattr .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis build worker/build *.egg-info worker/*.egg-info

# The stamp is renewed when the lock or a project file changes. uv is faster, but not needed.
$(STAMP): requirements-dev.lock pyproject.toml worker/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("imattr needs Python 3.11 or newer, found " + sys.version.split()[0] + "; choose one with make PYTHON=...")'
	@if command -v uv >/dev/null 2>&1; then \
	    uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	    uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.lock && \
	    uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable . --editable worker ; \
	else \
	    $(PYTHON) -m venv $(VENV) && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . --editable worker ; \
	fi
	@touch $@

# What the benchmark compares with. Nothing else needs it.
$(VENV)/.bench: $(STAMP) requirements-bench.lock
	@if command -v uv >/dev/null 2>&1; then \
	    uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-bench.lock ; \
	else \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-bench.lock ; \
	fi
	@touch $@

# The tools for the chart's manifests, the site and a release, each in an environment of its own: they need other versions than we do.
$(VENV)/%/.stamp: requirements-%.lock | $(STAMP)
	@rm -rf $(@D)
	@if command -v uv >/dev/null 2>&1; then \
	    uv venv --quiet --python $(PYTHON) $(@D) && \
	    uv pip install --quiet --python $(@D)/bin/python --require-hashes -r $< ; \
	else \
	    $(PYTHON) -m venv $(@D) && \
	    $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes -r $< ; \
	fi
	@touch $@

.PHONY: help run test setup fast check lint tests-without-waiting format docs bugs scenarios schedules chaos failovers upgrades alerts soak bench manifests screenshots pictures site release image lock clean
