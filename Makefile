# Two commands for a newcomer, each from nothing: `make demo` and `make test`. `make` lists the rest.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test run site torture fuzz bench export readme clean-nbs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## simulate, train and evaluate a small model, in minutes; ARRAY=arca_block for another detector
	@$(VENV)/bin/icecube-nb demo $(if $(ARRAY),--array $(ARRAY))

test: $(STAMP)  ## check the repository and run all notebooks as tests; ARGS="layers 01_preprocess" for some
	@$(VENV)/bin/python tools/check.py $(ARGS)

run: $(STAMP)  ## run notebooks and save their outputs; NB="03_train 05_stack" ARGS="--flags slow", or ARGS=--stale
	@$(VENV)/bin/python tools/run_notebook.py $(NB) $(ARGS)

torture: $(STAMP)  ## hostile files, kill -9, full disks, a Kaggle file of real size; then `make fuzz`: 2 GB of disk
	@$(VENV)/bin/python tools/check.py torture 06_kaggle --flags slow --timeout 10800
	@$(MAKE) fuzz

MINUTES ?= 60
fuzz: $(STAMP)  ## random command lines on damaged files; goes on where it ended; MINUTES=5 for a short look
	@$(VENV)/bin/python tools/fuzz.py --minutes $(MINUTES) --out bench/results/fuzz.json
	@$(VENV)/bin/python tools/fuzz_readers.py --minutes $(MINUTES) --out bench/results/fuzz_readers.json

bench: $(STAMP)  ## measure each stage beside a padded reference, in one table; ARGS="--rounds 5"
	@$(VENV)/bin/python bench/speed.py $(ARGS)

export: $(STAMP)  ## write the package from the notebooks
	@$(VENV)/bin/nbdev_export

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	@$(VENV)/bin/python tools/readme.py

site: $(STAMP)  ## make a plain web site of the notebooks in _site, and check its links
	@$(VENV)/bin/python tools/make_site.py

clean-nbs: $(STAMP)  ## take out of the notebooks what is not worth committing
	@$(VENV)/bin/nbdev_clean

setup: $(STAMP)  ## make the environment in .venv, with the versions of constraints.txt

# The stamp is written last, so an installation that was interrupted is taken up again.
$(STAMP): settings.ini $(CONSTRAINTS) setup.py
	@command -v $(PYTHON) > /dev/null || \
	  { echo "$(PYTHON) is not there. Name a Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) -V 2>&1`." \
	         "Name another: make PYTHON=python3.12 ..."; exit 1; }
	@rm -f $@
	@echo "Installing into $(VENV), once: a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@
