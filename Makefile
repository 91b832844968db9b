# make demo and make test set up all they need, in .venv; nothing is installed outside the project.
PYTHON ?= python3
SERVERS ?= moto seaweedfs
CLOUDS ?= gcs $(if $(shell command -v npm),azurite)
BROWSER ?= $(if $(or $(CHROMIUM),$(shell command -v chromium || command -v chromium-browser)),chromium,none)
SIZE ?= 1GiB
ROUNDS ?= 5
SERVER ?= seaweedfs
SCHEME ?= http
FUZZ ?= manifest safetensors zip frames http
FUZZ_S ?= 60
KILLS ?= 50

BIN := .venv/bin
READY := .venv/ready
BENCH_DIR := .servers/bench
BENCH_PORT := 18333
BENCH_TLS_PORT := 18344
BENCH_COMMAND := $(BIN)/cloudckpt bench --rounds $(ROUNDS) --size $(SIZE)
BENCH_http := AWS_ENDPOINT_URL=http://127.0.0.1:$(BENCH_PORT)
BENCH_https := AWS_ENDPOINT_URL=https://127.0.0.1:$(BENCH_TLS_PORT) AWS_CA_BUNDLE=$(BENCH_DIR)/ca.pem

.PHONY: demo test lint format faults kills bench bench-async bench-on-seaweedfs bench-on-rgw bench-on-null bench-on-null-tls bench-on-cloud servers s3 docs ray fuzz clean

demo: $(READY) ## fine-tune a real model, kill it in mid-save, resume from S3
	$(BIN)/cloudckpt demo

test: $(READY) servers ## the tests, on the servers named in SERVERS: moto seaweedfs localstack rgw, and CLOUDS: gcs azurite
	@[ "$(BROWSER)" != none ] || echo "!!! no chromium here: THE TESTS OF PAGES ARE LEFT OUT" >&2
	SERVERS="$(SERVERS)" CLOUDS="$(CLOUDS)" BROWSER="$(BROWSER)" $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-on-$(SERVER) ## save and load beside others; SERVER: seaweedfs, rgw (root; SCHEME=https), null, null-tls, cloud

bench-async: $(READY) ## what saves behind training take of it, beside torch's async_save; BENCH="--rounds 5 --json FILE"
	PYTHON=$(BIN)/python localstack/seaweedfs.sh install
	localstack/seaweedfs.sh start $(BENCH_DIR) $(BENCH_PORT)
	$(BENCH_http) AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testingsecret AWS_REGION=us-east-1 \
	$(BIN)/cloudckpt bench-async s3://bench/run --create-bucket $(BENCH); \
	status=$$?; localstack/seaweedfs.sh stop $(BENCH_DIR); rm -rf $(BENCH_DIR); exit $$status

bench-on-null bench-on-null-tls bench-on-cloud: $(READY)
	$(BENCH_COMMAND) --server $(@:bench-on-%=%) $(BENCH)

bench-on-seaweedfs bench-on-rgw: $(READY)
	PYTHON=$(BIN)/python localstack/$(@:bench-on-%=%).sh install
	TLS_PORT=$(BENCH_TLS_PORT) localstack/$(@:bench-on-%=%).sh start $(BENCH_DIR) $(BENCH_PORT)
	$(BENCH_$(SCHEME)) AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testingsecret AWS_REGION=us-east-1 \
	$(BENCH_COMMAND) s3://bench/run --create-bucket $(BENCH); \
	status=$$?; localstack/$(@:bench-on-%=%).sh stop $(BENCH_DIR); rm -rf $(BENCH_DIR); exit $$status

fuzz: $(READY) ## hostile input for each reader named in FUZZ, FUZZ_S seconds each; what fails is kept in .fuzz
	$(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	@mkdir -p .fuzz
	@for name in $(FUZZ); do \
	  (cd tests && FUZZ_FOUND=../.fuzz ../$(BIN)/python -W ignore -m fuzz $$name -max_total_time=$(FUZZ_S)) || exit 1; \
	done

faults: $(READY) servers ## every fault at every request, every kill, much damage, on the servers named in SERVERS: hours
	SERVERS="$(SERVERS)" FAULT_CASES=all FAULT_KILLS=all FAULT_SAVES=500 DAMAGE=10 \
	$(BIN)/python -m pytest -s tests/test_fault_matrix.py tests/test_endurance.py tests/test_damage.py

kills: $(READY) servers ## kill -9 at a random moment of KILLS trainings, on the servers named in SERVERS; each goes on to the same losses
	SERVERS="$(SERVERS)" KILLS=$(KILLS) $(BIN)/python -m pytest -s tests/test_kills.py

s3: $(READY) ## a local S3 with a bucket, without docker, until Ctrl-C
	localstack/up.sh

docs: $(READY) ## the site, in build/site
	$(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

ray: $(READY) ## Ray Train loses a worker and goes on: minutes
	tests/frameworks.sh ray

servers: $(READY)
	@for name in $(SERVERS) $(CLOUDS); do \
	  if [ "$$name" != moto ] && ! localstack/$$name.sh check 2>/dev/null; then \
	    localstack/$$name.sh install || exit 1; \
	  fi; \
	done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .azurite .fuzz build .venv .venv-localstack .venv-aiobotocore-oldest .servers .pytest_cache .mypy_cache .ruff_cache .hypothesis
