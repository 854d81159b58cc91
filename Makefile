# make demo        bake the image, launch it on the local cloud, run the examples (no AWS account)
# make demo-down   stop what `make demo` started; `make demo-purge` also deletes what it kept
# make test        what CI runs; make test-all adds Debian 13, the local cloud's own machines and slow matrices
# make help        all targets, and what each one needs
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
PYTEST := .venv/bin/pytest --durations=15 --durations-min=10
# The folders that mypy checks.
TYPED := scripts infra provisioning/steps provisioning/rootfs/usr/lib/mlflow-host tests
# Baking and launching on the local cloud mounts file systems and starts machines, which needs root. Programs of root
# write to root's home (-H), and compiled Python goes outside the checkout, so the checkout's owner owns all files in
# it.
ELSEWHERE := $(if $(filter 0,$(shell stat -c %u . 2>/dev/null)),,env PYTHONPYCACHEPREFIX=/var/cache/mlflow-ami/bytecode)
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E -H) $(ELSEWHERE)
BASE ?= debian12

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26
	@echo "Each target first installs what it needs with scripts/prepare.sh, and prints it. This needs apt, and root or sudo."
	@echo "Targets that start machines run as root, with sudo if necessary; audit, lint, lock and prepare do not."

.PHONY: prepare prepare-demo prepare-check prepare-lint prepare-bench prepare-test prepare-tools
prepare: ## install what AWS and the examples need: Packer, git, Python packages in .venv
	@scripts/prepare.sh aws
prepare-demo: ## install what the local cloud needs as well: podman, mmdebstrap and what they use
	@scripts/prepare.sh demo
prepare-check:
	@scripts/prepare.sh check
prepare-lint:
	@scripts/prepare.sh lint
prepare-bench:
	@scripts/prepare.sh bench
prepare-test: ## install what the tests need as well: PostgreSQL, nginx, Chromium, scanners
	@scripts/prepare.sh test
prepare-tools: prepare-demo ## build Pulumi's CLI, a current Packer and actionlint below build/tools, unless on PATH (needs Go)
	@$(PYTHON) scripts/prepare_tools.py >/dev/null

.PHONY: demo demo-down demo-purge
demo: prepare-demo ## bake, launch and fill an MLflow server on this machine
	@$(ROOT) $(PYTHON) scripts/demo.py --base $(BASE)
demo-down: ## stop the demo; its image, data volume and buckets are kept
	@$(ROOT) scripts/rehearse.py down
demo-purge: ## stop the demo and delete everything it kept
	@$(ROOT) scripts/rehearse.py down --purge --yes

SECURITY := $(addprefix tests/journey/test_,access.py every_route.py roles_and_routes.py limits_of_a_login.py budgets.py \
	  leaks.py logs.py role.py sandbox.py database_readers.py public_certificate.py domain.py scans.py) \
	$(addprefix tests/unit/test_,site.py users.py credentials.py launch.py units.py reader.py certificates.py acme.py audit.py \
	  bill_of_materials.py guards.py routes.py request_limits.py artifact_location_checks.py) \
	tests/local_cloud/test_signatures.py \
	tests/local_cloud/test_permissions.py tests/stack/test_permissions.py tests/stack/test_secrets.py tests/stack/test_settings.py
BESIDE := build/test-without-machines.txt
.PHONY: test test-on-machines test-without-machines test-all test-schema test-compare test-chaos test-restore \
	test-security test-security-on-machines test-security-without-machines test-housekeeping test-adopt test-swaps \
	test-ubuntu test-tools test-delivery
test: prepare-test ## lint and all tests that CI runs; PART=schema runs those of tests/schema
ifdef PART
	@$(ROOT) $(PYTEST) -m "not slow and not tools" tests/$(PART)
else
	@$(MAKE) --no-print-directory lint
	@echo "tests: on machines, and in parallel all others, whose output follows at the end"
	@exec $(ROOT) $(MAKE) --no-print-directory --jobs=2 test-on-machines test-without-machines
	@if $(PYTHON) scripts/prepare_tools.py --check; then exec $(MAKE) --no-print-directory test-tools-quick; else \
		echo "tests: those with the real Pulumi and Packer were left out: neither is built here (make test-tools)"; fi
endif
# These tests wait for machines much of the time. Without `exec` a SIGTERM would end the shell and leave pytest running.
test-on-machines:
	@exec $(ROOT) $(PYTEST) -m "machine and not slow and not tools"
# Their output goes to a file, so that it does not mix with that of the other tests. The variable with the cloud's
# folder is removed, because the check for leftovers counts processes that have it. The shell passes SIGTERM on.
test-without-machines:
	@mkdir -p build; env -u MLFLOW_AMI_LOCAL_CLOUD $(ROOT) $(PYTEST) -m "not machine and not slow and not tools" >$(BESIDE) 2>&1 & \
	trap 'kill $$!' TERM; trap : INT; while kill -0 $$! 2>/dev/null; do wait $$!; status=$$?; done; \
	echo; cat $(BESIDE); exit $$status
test-all: prepare-test ## every test: Debian 13 and the slow matrices included
	@$(ROOT) $(PYTEST)
test-schema: prepare-test ## schema carry-over between the last eight MLflow releases, every pair of neighbours
	@$(ROOT) $(PYTEST) tests/schema
test-security: prepare-test ## access and leaks: route walk, canaries, fuzzers, scanners, missing guards (Debian 12)
	@exec $(MAKE) --no-print-directory --keep-going test-security-on-machines test-security-without-machines
# First, and alone: test_budgets.py measures what requests cost each other.
test-security-on-machines:
	@exec $(ROOT) $(PYTEST) -k "not debian13" -m machine $(SECURITY)
# Half of them run other tests in a copy of the repository, once for each removed check.
test-security-without-machines:
	@exec $(ROOT) $(PYTEST) -n 2 -k "not debian13" -m "not machine" $(SECURITY)
test-compare: prepare-test ## beside plain MLflow: 10,000 generated requests to two releases, 220 hard names of files
	@$(ROOT) $(PYTEST) tests/compare tests/unit/test_artifact_names.py
test-chaos: prepare-test ## kill the database step, PostgreSQL and the machine at random moments, and fill the disk
	@$(ROOT) $(PYTEST) tests/chaos
test-adopt: prepare-test ## move in from MLflow 1.30 to the newest: databases, dumps, mlruns/, servers; kills
	@$(ROOT) $(PYTEST) tests/adopt tests/journey/test_adopt.py
test-ubuntu: prepare-test ## the machine tests of tests/journey and tests/image on Ubuntu 24.04, if its archive answers
	@$(ROOT) env TEST_BASES=ubuntu24.04 $(PYTEST) -m "machine and not slow and not tools" tests/journey tests/image
test-swaps: prepare-test ## trainings by clients of four releases during ten replacements of the machine
	@$(ROOT) $(PYTEST) -k "not debian13" tests/journey/test_training_during_replacement.py
test-restore: prepare-test ## restore on a machine: after a lost volume, to any moment, from dumps, killed half-way
	@$(ROOT) $(PYTEST) tests/journey/test_backups.py tests/journey/test_postgresql_major.py
test-housekeeping: prepare-test ## removals in eight releases; a volume that fills up; jobs; files of 1 GiB either way
	@$(ROOT) $(PYTEST) tests/unit/test_garbage.py tests/schema/test_garbage_collection.py \
		tests/journey/test_housekeeping.py tests/journey/test_jobs_and_big_files.py

# Debian gives ordinary users a PATH without /usr/sbin, where losetup and nginx are.
TOOLS := $(CURDIR)/build/tools
WITH_TOOLS := env PATH="$(TOOLS)/bin:$$PATH:/usr/sbin:/sbin" PACKER_PLUGIN_PATH=$(TOOLS)/packer-plugins
.PHONY: test-tools-quick
test-tools: prepare-test prepare-tools ## the real tools: Pulumi's engine against ours, its CLI, a bake by a current Packer
	@$(ROOT) $(WITH_TOOLS) $(PYTEST) -m tools
test-delivery: prepare-test prepare-tools ## the workflows' steps: bake, drill, promote, deploy, smoke, retire on the local cloud
	@$(ROOT) $(WITH_TOOLS) $(PYTEST) tests/delivery tests/journey/test_delivery.py
test-tools-quick: # the tests with real tools that take under five minutes: no bake, no comparison of the engines
	@$(ROOT) $(WITH_TOOLS) $(PYTEST) -m "tools and not slow"

.PHONY: check fix lint lock bench audit follow
# No root and no apt packages: what runs at every change. Compiled Python is kept even where the environment forbids it,
# because compiling MLflow and moto takes as long as many tests. A file's tests stay in one process, and so do its
# fixtures.
check: export PYTHONDONTWRITEBYTECODE :=
check: prepare-check ## format, lint, types and the short tests that need nothing else
	@.venv/bin/ruff format --check -q . && .venv/bin/ruff check -q .
	@.venv/bin/mypy $(TYPED)
	@exec $(PYTEST) -q -n 2 --dist loadfile -m "not machine and not service and not slow and not tools and not long" tests/unit
fix: prepare-check ## format, and mend what ruff can mend
	@.venv/bin/ruff check --fix -q .; .venv/bin/ruff format -q .
lint: prepare-lint ## ruff, mypy, shellcheck, packer fmt
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy $(TYPED)
	@git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
	@packer fmt -check packer
lock: prepare ## renew provisioning/requirements.lock
	@$(PYTHON) scripts/lock.py
follow: prepare-test prepare-bench ## try the newest MLflow: lock, compare, bake, drill, bench, and a page to read; MLFLOW=X another one
	@$(ROOT) $(PYTHON) scripts/follow.py $(if $(MLFLOW),--mlflow-version $(MLFLOW))
audit: prepare ## packages of the newest image with known vulnerabilities, as far as the network allows
	@$(PYTHON) scripts/audit.py
bench: prepare-bench ## speed and memory beside a default mlflow server, as ratios
	@$(ROOT) $(PYTHON) -m tests.bench
