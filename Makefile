# make quickstart   install, prepare a corpus from Python's own documentation, train a small MLRA model on 2 processes,
#                   export it to Hugging Face's format (verified), write a sample with stock transformers, and a report
# make test         install with the dev extra, run the daily tests (docs/testing.md has the tiers)
# make test-all     these and the slow ones: all layouts and variants; before a merge
# make test-nightly full matrices, schedules of faults, a Slurm cluster at 72 layers (hours)
# make lint         ruff and mypy
# make study        the small study of docs/studies (18 runs, an estimated ten minutes on 2 cores) and its report
# make bench        the benchmarks of docs/performance.md on this machine, each a ratio within one run (up to an hour), or
#                   some of them: make bench BENCH="scaling checkpoint"; the results lie in runs/bench
# make docs         the documents as a site in build/site, with every link checked
# make locks        the lock files of locks/ anew, after a change of pyproject.toml or constraints.txt (needs PyPI)
# make clean        remove the environment and caches; data/ and runs/ stay
#
# Each target sets up its own virtual environment first; a second call finds it ready. Choices on the command line:
#   PYTHON=python3.12            the interpreter that makes the environment (3.11 or newer, with venv)
#   VENV=.venv                   where the environment is
#   TORCH=cpu|cuda               default: the CUDA build of torch if nvidia-smi finds a GPU, else the CPU build
#   TORCH="torch==2.12.1 ..."    or any arguments of pip install
#   PYTEST_ARGS="-k tev -x"      more arguments for pytest
#   TEST_PROCESSES=2             how many test files run at once; each process has its own pools of ranks (4 GB)
#   BENCH="scaling checkpoint"       which benchmarks: modules of benchmarks/
#   BENCH_ARGS=--quick           arguments of each: --quick shows that they run
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done), \
	$(error no Python 3.11 or newer was found: install one or name it with PYTHON=...))
VENV ?= .venv
TORCH ?= auto
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
# In the order of the folders: tests that wait run beside tests that compute.
IN_PARALLEL = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
BENCH ?= step_time scaling checkpoint
BENCH_ARGS ?=
INSTALL = $(PYTHON) tools/install.py --venv '$(VENV)' --torch '$(TORCH)'
BIN := $(VENV)/bin

# Where there is no GPU, DeepSpeed need not look for one. Threads: one per process, as torchrun has it.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(GPUS),0)
export DS_ACCELERATOR ?= cpu
endif
PROCESSES := $(if $(filter 1,$(GPUS)),1,2)
export OMP_NUM_THREADS ?= 1
# The environment's modules are compiled at their first import, once.
unexport PYTHONDONTWRITEBYTECODE

# Nothing of this project: what anybody does with an exported folder.
define SAMPLE
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
torch.manual_seed(0)
prompt = tokenizer("Return a list of", return_tensors="pt")
text = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_k=40, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(text[0], skip_special_tokens=True))
endef
export SAMPLE

.PHONY: help quickstart test test-all test-nightly lint study bench docs locks clean
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Nothing is uploaded unasked.
quickstart study: export WANDB_MODE ?= offline

quickstart:
	@$(INSTALL) --extra report
	installed=$$SECONDS
	test -e data/python-docs || $(BIN)/mlra-scale prepare --source python-docs --train-bpe 4096 --output data/python-docs
	run=runs/quickstart
	for ((n = 2; ; n++)); do test -e $$run || break; run=runs/quickstart-$$n; done
	$(BIN)/mlra-scale train --nproc $(PROCESSES) --preset laptop --run-dir $$run data.path=data/python-docs \
	    parallel.pipeline=$(PROCESSES)
	echo
	$(BIN)/mlra-scale export $$run $$run/exported --format gpt2
	echo
	echo "a sample, by stock transformers alone:"
	$(BIN)/python -c "$$SAMPLE" $$run/exported
	echo
	echo "the report (a page and its pictures; overview.png has loss and TEV):"
	$(BIN)/mlra-scale report $$run
	echo
	echo "quickstart: installation $$installed s; data, training, export, sample, report $$((SECONDS - installed)) s. Next:"
	echo "  source $(BIN)/activate"
	echo "  less $$run/metrics.jsonl                 # the record: loss, gradient norm, TEV; one JSON object per line"
	echo "  mlra-scale report $$run RUN2 RUN3        # several runs over each other"
	echo "  mlra-scale generate $$run --prompt 'Return a list of'"
	echo "  mlra-scale evaluate $$run --data data/python-docs --max-tokens 20000"
	echo "  mlra-scale export $$run exported/quickstart-mlra --format mlra    # with its factors, and code of its own"
	echo "  mlra-scale prepare --help                # your own text"
	echo "  mlra-scale train --preset gpt2-mlra-72l --dry-run parallel.tensor=2 parallel.pipeline=4 \\"
	echo "      parallel.world_size=32               # what a deep model would take on 32 devices"

test:
	@$(INSTALL) --extra dev
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

test-all:
	@$(INSTALL) --extra dev
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not nightly" $(PYTEST_ARGS)

test-nightly:
	@$(INSTALL) --extra dev
	$(BIN)/python -m pytest -m nightly $(PYTEST_ARGS)

lint:
	@$(INSTALL) --extra dev
	$(BIN)/ruff check .
	$(BIN)/mypy

study:
	@$(INSTALL) --extra report
	test -e data/python-docs || $(BIN)/mlra-scale prepare --source python-docs --train-bpe 4096 --output data/python-docs
	$(BIN)/mlra-scale sweep docs/studies/small.yaml --jobs 2
	$(BIN)/mlra-scale report runs/small

bench:
	@$(INSTALL)
	mkdir -p runs/bench
	for name in $(BENCH); do
	    $(BIN)/python -m benchmarks.$$name --json runs/bench/$$name.json $(BENCH_ARGS) | tee runs/bench/$$name.txt
	done

docs:
	@$(INSTALL) --extra dev
	$(BIN)/mkdocs build --strict

locks:
	@$(INSTALL) --extra locks
	PATH=$(BIN):$$PATH $(BIN)/python tools/lock.py

clean:
	rm -rf '$(VENV)' build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
