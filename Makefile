# make gmm | laptop | test | test-all | cluster | fuzz | parity | lint | bench | docs | clean. The first one called builds .venv.
# PYTHON=/path/to/python picks the interpreter; otherwise the first that really runs and is 3.11 to 3.13
# (a version manager's shim can exist on PATH and still refuse to run, so each is tried).
PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp-dev
# uv installs in seconds what takes pip two minutes. Where uv fails, as behind a mirror that only pip knows, pip does it.
pip := $(PY) -m pip --disable-pip-version-check install -q --no-compile
install = $(pip) uv && $(PY) -m uv pip install -q --system-certs --python $(PY) $(1) || $(pip) $(1)

.PHONY: gmm laptop test test-all slow cluster fuzz parity lint bench docs clean
.DEFAULT_GOAL := test

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@set -e; \
	check='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	if [ -x $(PY) ] && $(PY) -c "$$check" 2>/dev/null && [ -z "$(PYTHON)" ]; then \
	  echo "using $(VENV)"; \
	else \
	  found=; \
	  for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3); do \
	    if "$$candidate" -c "$$check" >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11, 3.12 or 3.13 that runs; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  echo "building $(VENV) with $$found"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	$(call install,-r requirements-dev.txt)
	$(call install,--no-deps -e .)
	@touch $@

# torch, transformers, TRL and Liger; the last line fails where a test would skip for want of one
PEERS := $(VENV)/.stamp-peers
$(PEERS): $(STAMP) requirements-bench.txt requirements-bench-no-deps.txt
	$(PY) -m pip install -q -r requirements-bench.txt
	$(PY) -m pip install -q --no-deps -r requirements-bench-no-deps.txt
	$(PY) -c "import torch, transformers, liger_kernel.chunked_loss, trl.trainer.distillation_trainer"
	@touch $@

gmm: $(STAMP)
	$(PY) -m kd_jax.train --config configs/gmm.py --workdir runs/gmm

# the language-model experiment; an hour or two on two cores
laptop: $(STAMP)
	$(PY) -m kd_jax.train --config configs/lm_laptop.py --workdir runs/laptop

# Without LLVM's optimisation, which took a sixth of the time for programs that run for milliseconds. `make test-all`
# keeps it.
QUICK := --xla_backend_optimization_level=0
test: $(STAMP)
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not parity and not cluster" tests

# what takes long: chains that are killed and resumed, many devices
slow: $(STAMP)
	$(PY) -m pytest -q -n 2 --dist loadfile -m "slow and not parity and not cluster" tests

test-all: QUICK :=
test-all: test slow parity

# several processes, and long rounds of faults: half an hour on two cores; SLURM's need it installed, and root
cluster: $(STAMP)
	$(PY) -m pytest -q -m cluster tests

# damaged files for every loader, by seed; `make test` has a short form of it
SEED ?= 0
fuzz: $(STAMP)
	$(PY) -m tests.faults.fuzz --seconds 300 --seed $(SEED)

parity: $(PEERS)
	$(PY) -m pytest -q -m parity tests

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(PEERS)
	$(PY) -m benchmarks.em
	$(PY) -m benchmarks.gmm_sweep
	$(PY) -m benchmarks.gmm_sweep --students 100000
	$(PY) -m benchmarks.lm
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.kd_loss
	$(PY) -m benchmarks.kd_loss --bf16
	$(PY) -m benchmarks.kd_step

DOCS := $(VENV)/.stamp-docs
$(DOCS): $(STAMP) requirements-docs.txt
	$(call install,-r requirements-docs.txt)
	@touch $@

# Fails where a link or an anchor leads nowhere. The pages open from disk; for their search, serve them:
# .venv/bin/python -m http.server -d build/site
docs: $(DOCS)
	$(PY) -m docs.settings
	$(PY) -m docs.pages
	$(PY) -m zensical build --clean --strict
	@echo "open build/site/index.html"

# Leaves runs/ alone: results are not build products.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
