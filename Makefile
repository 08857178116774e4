# The tasks of a checkout. `make setup` needs Python 3.11 or later and make, nothing else; every other target sets up first.
PYTHON     ?= python3
UV_VERSION ?= 0.13.9
ARGS       ?=
CASES      ?= 2000
ifneq ($(origin NAME),command line)   # some shells set NAME to the host's
NAME       := demo-$(shell date +%Y%m%d-%H%M%S)
endif

VENV  := .venv
BIN   := $(VENV)/bin
PY    := $(BIN)/python
STAMP := $(VENV)/.setup-stamp
RUN   := runs/$(NAME)

# programs that a notebook starts are the environment's own
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup pretrain test bench fuzz index lab readme notebooks docs lock clean

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## install everything, exactly as in requirements.lock, into .venv

$(STAMP): requirements.lock settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cromss needs Python 3.11 or later, and this is %d.%d: name a newer one, as in make setup PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); uv venv --quiet --python $(PYTHON) $(VENV); } || { rm -rf $(VENV); \
	    echo "no virtual environment could be made: install Python's venv module (Debian and Ubuntu: python3-venv), or uv" >&2; exit 1; }
	@$(PY) -m uv --version >/dev/null 2>&1 || { $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; \
	    $(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); }
	@echo "Installing requirements.lock into $(VENV), once. The download is large, for PyTorch brings its CUDA libraries on Linux."
	$(PY) -m uv pip install --compile-bytecode --python $(PY) -r requirements.lock
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

# The executed notebook lies in the run's own folder, beside its metrics. ARGS passes parameters on: make pretrain ARGS="-p epochs 2"
pretrain: setup  ## pretrain on the built-in scenes by papermill (NAME=..., ARGS="-p epochs 2 ...")
	@mkdir -p "$(RUN)"
	$(PY) -m papermill nbs/pretrain.ipynb "$(RUN)/pretrain.ipynb" -r name "$(NAME)" $(ARGS) --no-progress-bar --stdout-file - --stderr-file - \
	    || { echo "The run stopped. The notebook up to there is $(RUN)/pretrain.ipynb" >&2; exit 1; }
	@$(PY) -m nbconvert --to html --HTMLExporter.exclude_raw=True --log-level ERROR "$(RUN)/pretrain.ipynb"
	@echo
	@echo "The run lies in      $(RUN)"
	@echo "To read it, open     $(RUN)/pretrain.html   (or pretrain.ipynb, in JupyterLab)"
	@echo "Its curves live      $(BIN)/tensorboard --logdir runs"

# worksteal: tests of a file stay in one process, for they share what is costly, until the other process has nothing left to do
test: setup  ## run the notebooks as tests, then pytest, by two processes; the checkout is left as it is
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -ra -p no:cacheprovider -n 2 --dist worksteal

bench: setup  ## time the published steps, transcribed, and ours by turns; writes bench/results.md (about 10 minutes, on a machine with nothing else to do)
	$(PY) bench/bench.py $(ARGS)

fuzz: setup  ## read data sets of every format with 2,000 kinds of damage each (CASES=...; about 20 minutes)
	OMP_NUM_THREADS=1 CROMSS_FUZZ=$(CASES) $(PY) -m pytest tests/test_fuzz.py -v -p no:cacheprovider

index: setup  ## prepare a store of 250,000 locations with tiny values, and time opening it (about 10 minutes, 4 GB)
	$(PY) bench/index.py

lab: setup  ## open JupyterLab on the tutorial of the explorer (ARGS=--no-browser)
	$(PY) -m jupyterlab --notebook-dir=nbs --LabApp.default_url=/lab/tree/tutorials/03_explore.ipynb --LabApp.app_settings_dir=$(CURDIR)/tools/lab $(ARGS)

readme: setup  ## make README.md from nbs/index.ipynb
	$(PY) tools/readme.py

notebooks: setup  ## execute every notebook in place, export its module, clean it; then the README
	@for book in nbs/[0-9]*.ipynb nbs/tutorials/*.ipynb nbs/index.ipynb nbs/findings.ipynb nbs/pretrain.ipynb nbs/finetune.ipynb; do test -f "$$book" || continue; echo "$$book"; \
	    $(PY) -m nbconvert --to notebook --execute --inplace --log-level ERROR "$$book" || exit 1; done
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(PY) tools/still.py
	$(PY) tools/readme.py

docs: setup  ## make the site in _docs/ (needs Quarto, quarto.org)
	@command -v quarto >/dev/null || { echo "the site is made by Quarto, which is not installed: see quarto.org" >&2; exit 1; }
	$(BIN)/nbdev_docs

lock: setup  ## resolve settings.ini into requirements.lock (ARGS=--upgrade takes every newest version)
	$(PY) -m uv pip compile --quiet setup.py --extra dev --universal --python-version 3.11 --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command "make lock" $(ARGS) -o requirements.lock

clean:  ## remove what can be made again: caches, builds, the site; never .venv, runs or stores
	rm -rf build dist _docs _proc *.egg-info .pytest_cache .hypothesis nbs/.ipynb_checkpoints
	find cromss tests tools nbs -name __pycache__ -type d -prune -exec rm -rf {} +
