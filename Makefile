# make demo        bake the image, launch it on the embedded cloud, run the examples (no AWS account)
# make demo-down   stop what `make demo` started; `make demo-purge` also deletes what it kept
# make test        what CI runs; make test-all adds Debian 13, the local cloud's own machines and slow matrices
# make help        all targets
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
PYTEST := .venv/bin/pytest
# Baking and launching on the embedded cloud mounts file systems and starts machines: that takes root.
ROOT := $(if $(filter 0,$(shell id -u)),,sudo -E)
BASE ?= debian12

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: prepare prepare-test
prepare: ## install what baking and rehearsing need (apt packages, .venv)
	@scripts/prepare.sh demo
prepare-test: ## install what the tests need as well
	@scripts/prepare.sh test

.PHONY: demo demo-down demo-purge
demo: prepare ## bake, launch and fill an MLflow server on this machine
	@$(ROOT) $(PYTHON) scripts/demo.py --base $(BASE)
demo-down: ## stop the demo; its image, data volume and buckets are kept
	@$(ROOT) $(PYTHON) scripts/rehearse.py down
demo-purge: ## stop the demo and delete everything it kept
	@$(ROOT) $(PYTHON) scripts/rehearse.py down --purge --yes

SECURITY := $(addprefix tests/journey/test_,access.py every_route.py leaks.py role.py sandbox.py database_readers.py \
	  public_certificate.py domain.py scans.py) \
	$(addprefix tests/unit/test_,site.py users.py credentials.py launch.py units.py reader.py certificates.py acme.py audit.py \
	  bill_of_materials.py guards.py routes.py) \
	tests/local_cloud/test_permissions.py tests/stack/test_permissions.py tests/stack/test_secrets.py tests/stack/test_settings.py
BESIDE := build/test-without-machines.txt
.PHONY: test test-on-machines test-without-machines test-all test-schema test-chaos test-restore test-security \
	test-housekeeping
test: prepare-test ## lint and all tests that CI runs
	@$(MAKE) --no-print-directory lint
	@echo "tests: on machines, and beside them those that need none, which are shown when they have ended"
	@exec $(ROOT) $(MAKE) --no-print-directory --jobs=2 test-on-machines test-without-machines
# Half of it waits for machines much of the time. Without `exec` a SIGTERM would end the shell and leave pytest running.
test-on-machines:
	@exec $(ROOT) $(PYTEST) -m "machine and not slow"
# The other half writes to a file, or its lines would run into the others'. The cloud's folder is not for it to know:
# whoever names that is taken for something the cloud left running. SIGTERM, which the shell alone gets, is passed on.
test-without-machines:
	@mkdir -p build; env -u MLFLOW_AMI_LOCAL_CLOUD $(ROOT) $(PYTEST) -m "not machine and not slow" >$(BESIDE) 2>&1 & \
	trap 'kill $$!' TERM; trap : INT; while kill -0 $$! 2>/dev/null; do wait $$!; status=$$?; done; \
	echo; cat $(BESIDE); exit $$status
test-all: prepare-test ## every test: Debian 13 and the slow matrices included
	@$(ROOT) $(PYTEST)
test-schema: prepare-test ## schema carry-over between the last eight MLflow releases, every pair of neighbours
	@$(ROOT) $(PYTEST) tests/schema
test-security: prepare-test ## who gets in and what leaks: route walk, canaries, fuzzers, scanners, missing guards (Debian 12)
	@$(ROOT) $(PYTEST) -k "not debian13" $(SECURITY)
test-chaos: prepare-test ## kill the database step, PostgreSQL and the machine at random moments
	@$(ROOT) $(PYTEST) tests/chaos
test-restore: prepare-test ## restore on a machine: after a lost volume, to any moment, from dumps, killed half-way
	@$(ROOT) $(PYTEST) tests/journey/test_backups.py tests/journey/test_postgresql_major.py
test-housekeeping: prepare-test ## removals in eight releases; a volume that fills up; jobs; files of 1 GiB either way
	@$(ROOT) $(PYTEST) tests/unit/test_garbage.py tests/schema/test_removal_of_what_was_deleted.py \
		tests/journey/test_housekeeping.py tests/journey/test_jobs_and_big_files.py

.PHONY: lint lock bench audit
lint: prepare-test ## ruff, mypy, shellcheck, packer fmt
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy scripts infra provisioning/rootfs/usr/lib/mlflow-host
	@git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
	@packer fmt -check packer
lock: prepare ## renew provisioning/requirements.lock
	@$(PYTHON) scripts/lock.py
audit: prepare ## packages of the newest image with known vulnerabilities, as far as the network allows
	@$(PYTHON) scripts/audit.py
bench: prepare-test ## speed and memory beside a default mlflow server, as ratios
	@$(ROOT) $(PYTHON) -m tests.bench
