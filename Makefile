# Two commands from nothing: `make quickstart` and `make test`. Everything they need is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# One thread a process: libgomp's threads spin when the cores are busy, and results must not depend on their number.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Tests in the order of tests/conftest.py: long ones first.
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: install browser quickstart papers test coverage test-slow test-gpu faults bench audit lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): 2 GB of packages, PyTorch above all; minutes, as fast as they arrive (pip says only what is wrong)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,judge]'
	@echo "installed: $(BIN)/ppo-vs-dpo"
	@touch $(STAMP)

# The report is tested in a real browser. Without one those tests skip and say so.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; \
	  else echo "no chromium and chromedriver: the report's browser tests will skip"; fi

quickstart: $(STAMP)
	@$(BIN)/ppo-vs-dpo experiment=quickstart

# All miniatures of papers (resumable), then the table of what held.
papers: $(STAMP)
	@$(BIN)/ppo-vs-dpo paper run --all --table docs/papers.md

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" $(WORKERS) $(ARGS)

# The same tests, traced, and what share of each file they run.
coverage: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" $(WORKERS) --cov --cov-report=term $(ARGS)

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

# What only a GPU can show, on a machine with one: about three minutes.
test-gpu: $(STAMP)
	PPO_VS_DPO_TEST_GPU=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/device/test_real.py $(ARGS)

# Kills at random moments, spoilt files, wrong settings; ARGS='--kills 20 --seed 7' and so on (docs/faults.md).
faults: $(STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults $(ARGS)

# Speed and memory beside TRL's trainers, one thread each; installs trl==1.12.0 into a throw-away folder.
bench: $(STAMP)
	@$(BIN)/python -m benchmarks.ppo_vs_trl
	@$(BIN)/python -m benchmarks.dpo_vs_trl
	@$(BIN)/python -m benchmarks.reward_vs_trl
	@$(BIN)/python -m benchmarks.ppo_vs_trl --scaling --rounds 1

# The comparison's statistics under simulation; writes the tables of docs/statistics.md.
audit: $(STAMP)
	$(BIN)/python -m benchmarks.statistics_audit --write docs/statistics.md $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .coverage*
