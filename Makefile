# make demo and make test set up all they need, in .venv; nothing is installed outside the project.
PYTHON ?= python3
SERVERS ?= moto seaweedfs
SIZE ?= 1GiB
ROUNDS ?= 5

BIN := .venv/bin
READY := .venv/ready
BENCH_DIR := .servers/bench
BENCH_PORT := 18333

.PHONY: demo test lint format bench servers clean

demo: $(READY) ## fine-tune a real model, kill it in mid-save, resume from S3
	$(BIN)/cloudckpt demo

test: $(READY) servers ## the tests, on the servers named in SERVERS: moto seaweedfs localstack rgw
	SERVERS="$(SERVERS)" $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## save and load beside PyTorch's own, on a SeaweedFS of its own
	PYTHON=$(BIN)/python localstack/seaweedfs.sh install
	localstack/seaweedfs.sh start $(BENCH_DIR) $(BENCH_PORT)
	AWS_ENDPOINT_URL=http://127.0.0.1:$(BENCH_PORT) AWS_ACCESS_KEY_ID=testing AWS_SECRET_ACCESS_KEY=testingsecret \
	AWS_REGION=us-east-1 $(BIN)/cloudckpt bench s3://bench/run --create-bucket --rounds $(ROUNDS) --size $(SIZE) $(BENCH); \
	status=$$?; localstack/seaweedfs.sh stop $(BENCH_DIR); rm -rf $(BENCH_DIR); exit $$status

servers: $(READY)
	@for name in $(SERVERS); do \
	  if [ "$$name" != moto ] && ! localstack/$$name.sh check 2>/dev/null; then \
	    localstack/$$name.sh install || exit 1; \
	  fi; \
	done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-localstack .servers .pytest_cache .mypy_cache .ruff_cache .hypothesis
