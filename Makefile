# What a newcomer types. Each command sets up what it needs by itself, in .venv: for train requirements-core.txt, for the
# others requirements-test.txt.
PY = .venv/bin/python

# Threads that wait for each other spin, and starve where other programs want the cores: so they soon give way. Measured in
# benchmarks/NOTES.md.
export GOMP_SPINCOUNT ?= 10000

.PHONY: help train test test-fast lint ladder reference bench

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

train: .venv/core  ## prepare the default text, train a small GPT on it and let it write: minutes on two cores
	$(PY) data/stdlib/prepare.py
	$(PY) train.py config/train_stdlib.py --overwrite=True

test: .venv/test  ## run every test
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/test  ## run the tests that take seconds
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

lint: .venv/test  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m mypy .

ladder: .venv/test  ## climb README's ladder, and record its numbers in docs/ladder.md: an hour and more
	$(PY) data/stdlib/prepare.py
	$(PY) course/ladder.py
	$(PY) course/pages.py

reference: .venv/test  ## write the settings into docs/reference.md
	$(PY) docs/reference.py

# ablate.py takes more than an hour, kills.py one, damage.py and modern.py half of one: they are called by name, and
# gpu_probe.py by gpu_check.sh
by_name = %/ablate.py %/kills.py %/damage.py %/modern.py %/gpu_probe.py
measured = benchmarks/peers.py $(filter-out %/peers.py $(by_name),$(wildcard benchmarks/*.py))
bench: .venv/test  ## measure speed and memory against peers (NANOGPT=FOLDER, a clone) and limits: many minutes
	@for script in $(measured); do echo "$(PY) $$script"; case $$script in */peers.py|*/start.py) \
	$(PY) $$script $(if $(NANOGPT),--nanogpt=$(NANOGPT));; *) $(PY) $$script;; esac || exit; done

# ------------------------------------------------------------------------------------------------
# The set-up. It runs again when the requirements have changed, the Python of .venv is gone, or one was interrupted.

# The Pythons that the requirements are for; make train PYTHON=/path/to/python takes another one than the first of these.
tested = $(if $(1),$(shell $(1) -c 'import sys; (3, 11) <= sys.version_info < (3, 15) and print("$(1)")' 2>/dev/null))
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(call tested,$(name))))

# .venv/unfinished: a set-up was interrupted and may have left half a package that pip takes for whole. Start afresh.
has_pip = $(shell $(PY) -c 'import pip; print("yes")' 2>/dev/null)
is_sound = $(and $(if $(wildcard .venv/unfinished),,yes),$(call tested,$(PY)),$(has_pip))
has_venv = $(shell $(PYTHON) -c 'import ensurepip, venv; print("yes")' 2>/dev/null)
no_python = plainGPT needs Python 3.11 to 3.14. Install one, or say where it is: make PYTHON=/path/to/python
no_venv = $(PYTHON) has no venv. On Debian and Ubuntu: sudo apt install $(notdir $(PYTHON))-venv

# make fills in the variables of a recipe before it runs the first line
.venv/core .venv/test: .venv/%: requirements-%.txt .venv/bin/python $(wildcard .venv/unfinished)
	$(if $(is_sound),,$(if $(call tested,$(PYTHON)),$(if $(has_venv),,$(error $(no_venv))),$(error $(no_python))))
	@echo 'Setting up .venv: the first time it downloads PyTorch, which takes minutes'
	$(if $(is_sound),,rm -rf .venv)
	@mkdir -p .venv && touch .venv/unfinished
	$(if $(is_sound),,$(PYTHON) -m venv .venv)
	$(PY) -m pip install --disable-pip-version-check -r $<
	@mv .venv/unfinished $@

.venv/test: requirements.txt requirements-core.txt
.venv/bin/python: ;
