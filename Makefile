# make demo    train, resume and run a small model on the text in examples/kjv: a few minutes on two cores
# make test    the test suite without what is marked slow
# make test-slow   what is marked slow: layouts of all families, dying processes, the documentation's commands
# make campaign    attacks at length: killed at each file operation, damaged files, bad configs; figures in docs/reliability.md
# make test-torch TORCH=torch==2.11.0   both suites with another version of torch, in an environment of its own
# make test-lm-eval   the tests of tasks with the next lm-eval, or with LM_EVAL=0.4.10
# make setup   the environment alone, with all that tests and linters use
#
# Needs Python 3.10 or newer and make. Everything lands in .venv, .venv-* and demo.

PYTHON ?= python3
# What pip is told about torch. A machine without GPU may prefer the small build:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Test workers. Each runs torch on one thread.
JOBS ?= 2
# The slow tests: "slow and not grid" leaves out what crosses all layouts with all families, or compiles them all.
SLOW ?= slow
LM_EVAL ?= 0.5.0.dev1
DEMO_STEPS ?= 500
PYTEST_ARGS ?=

VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow campaign test-torch test-lm-eval table-and-suite setup lint clean

demo: $(VENV)/core.done
	rm -rf demo
	$(BIN)/castalia tokenizer train examples/kjv/kjv.jsonl --vocab-size 2048 --output demo/tokenizer.json
	$(BIN)/castalia data prepare examples/kjv/kjv.jsonl --tokenizer demo/tokenizer.json --output demo/kjv --append-eod
	$(BIN)/castalia train configs/demo.yml train.steps=$(DEMO_STEPS) train.exit_interval=$(shell expr $(DEMO_STEPS) / 2)
	@echo "-- stopped half way; now go on from the checkpoint, in a new process"
	$(BIN)/castalia train demo/run
	$(BIN)/castalia eval demo/run
	$(BIN)/castalia plot demo/run --output demo/loss.png
	$(BIN)/castalia generate demo/run --prompt "And the LORD said unto" --temperature 0.7 --max-tokens 160 --seed 2
	@echo "-- all of it lies in $(CURDIR)/demo: tokenizer.json, kjv_text_document.bin and .idx, loss.png, run/ (config, metrics, checkpoints)"
	@echo "-- watch it, try it and compare its steps in a browser: $(BIN)/castalia serve demo"

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m "not slow and not campaign" $(PYTEST_ARGS)

test-slow: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m "$(SLOW) and not campaign" $(PYTEST_ARGS)

campaign: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/pytest -m campaign -s $(PYTEST_ARGS)

# Wheels of other versions may bring a GPU's libraries along: gigabytes.
test-torch:
	$(MAKE) table-and-suite VENV=.venv-$(subst ==,-,$(firstword $(TORCH))) PYTEST_ARGS="$(PYTEST_ARGS)"

table-and-suite: $(VENV)/test.done
	$(BIN)/python tests/torch_names.py --write
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m "not campaign" $(PYTEST_ARGS)

PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))

# The tasks' tests with another version of lm-eval, by default its development line, in an environment that has all else from $(VENV).
test-lm-eval: $(VENV)/test.done
	$(BIN)/python -m venv .venv-lm-eval
	$(BIN)/python -c "$(PACKAGES)" > "$$(.venv-lm-eval/bin/python -c "$(PACKAGES)")/base.pth"
	.venv-lm-eval/bin/python -m pip install --no-deps lm_eval==$(LM_EVAL)
	OMP_NUM_THREADS=1 .venv-lm-eval/bin/python -m pytest tests/tasks $(PYTEST_ARGS)

setup: $(VENV)/test.done

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-* demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
			"name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.done: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/test.done: $(VENV)/core.done
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@
