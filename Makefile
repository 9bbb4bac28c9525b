# On a fresh machine: `make reproduce`, `make test`. Any target first sets up $(VENV), once.
SHELL         := /bin/bash
.SHELLFLAGS   := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS     += --no-print-directory
.NOTPARALLEL:

PYTHON ?= python3
SIZE   ?= reproduce
JOBS   ?= $(CORES)

# `make ... VENV=folder` uses that environment as it is; otherwise .venv is ours to make and to make again.
ifeq ($(origin VENV),command line)
SETUP :=
else
override VENV := .venv
SETUP := $(VENV)/.ready
endif
PY     := $(VENV)/bin/python
# The physical cores we may use; nproc alone counts hyper-threads, and believes OMP_NUM_THREADS.
CORES  := $(shell n=$$(env -u OMP_NUM_THREADS nproc); p=$$(lscpu -p=CORE,SOCKET 2>/dev/null | grep '^[0-9]' | sort -u | wc -l); \
            echo $$(( p > 0 && p < n ? p : n )))

# This checkout's package, whichever checkout the environment was made for; this environment's kernel, and no other `python3`.
export PYTHONPATH := $(CURDIR)
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH PYTHONHOME
# Progress at once; no notices that a user can do nothing about.
export PYTHONUNBUFFERED := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One process works with all cores; JOBS processes share them.
test ui-test docs lab: export OMP_NUM_THREADS ?= $(CORES)
reproduce paper: export OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) > $(JOBS) ? $(CORES) / $(JOBS) : 1 )))

CHROMIUM ?= $(firstword $(foreach b,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(b))))

.PHONY: help setup reproduce test ui-test docs paper bench lab figures readme where clean distclean

help:       ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

reproduce: $(SETUP)  ## recompute the main figures and part of table 1 from nothing into runs/, and compare (SIZE=smoke: a sample of it)
	@$(PY) -m intattn_edit.tools.execute reproduce --size $(SIZE) --jobs $(JOBS)

test: $(SETUP)       ## run every notebook's tests, or those of one (NB=path); the last line counts the notebooks
	@rc=0; log=$$(mktemp); trap 'rm -f "$$log"' EXIT; unset NB MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL; \
	$(VENV)/bin/nbdev_test $(if $(NB),--path $(NB)) --n_workers 1 --do_print --timing 2>&1 | tee "$$log" || rc=$$?; \
	awk -v rc=$$rc '/^Starting .*\.ipynb$$/ {n++} /^\t.*\.ipynb$$/ {f++} \
	  END {if (rc && !f) f = n ? n : 1; print (n > f ? n - f : 0), "passed,", f + 0, "failed"; exit f || !n}' "$$log"

# pip brings JupyterLab and playwright; the browser is the system's.
ui-test: $(SETUP)    ## click through the edit bench in JupyterLab in a real browser; installs chromium with apt-get where it may (CHROMIUM=path of another one)
	@browser='$(CHROMIUM)'; if [[ -z $$browser ]]; then \
	  command -v apt-get >/dev/null && [[ $$(id -u) == 0 ]] || { echo "No Chromium found, and it cannot be installed from here: install it (Debian, Ubuntu: sudo apt-get install chromium), or give CHROMIUM=path" >&2; exit 1; }; \
	  echo "Installing chromium with apt-get ..."; log=$$(mktemp); \
	  (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium fonts-dejavu-core) > "$$log" 2>&1 || { tail -5 "$$log" >&2; echo "apt-get could not install chromium; all it said is in $$log" >&2; exit 1; }; \
	  rm -f "$$log"; browser=chromium; fi; \
	CHROMIUM=$$browser $(PY) tests/ui_test.py

docs: $(SETUP)       ## build the site into _docs/ from the notebooks as they are, without network, and check every link
	@$(PY) -m intattn_edit.tools.site

paper: $(SETUP)      ## run the full grid into data/results/, resuming what is there; then figures/ and README.md
	@$(PY) -m intattn_edit.tools.execute paper --jobs $(JOBS)
	@$(PY) -m nbconvert --log-level WARN --KernelManager.transport_encryption=auto --to notebook --execute --inplace nbs/index.ipynb
	@$(VENV)/bin/nbdev_clean
	@$(MAKE) readme

bench: $(SETUP)      ## time each part beside its floor and a textbook, into runs/speed (MODEL=smollm2 DEVICE=cuda)
	@$(PY) -m intattn_edit.tools.execute run speed model=$(or $(MODEL),lab/qwen2) device=$(or $(DEVICE),cpu)

lab: $(SETUP)        ## make the lab's world and train its models again, into data/lab/
	@$(PY) -m intattn_edit.worlds.lab

figures: $(SETUP)    ## render figures and tables from the records in data/results/, nothing else
	@$(PY) -m intattn_edit.tools.execute figures

# Where PyPI and GitHub find what the README shows and links to.
REPOSITORY := https://github.com/intattn-edit/intattn_edit
RAW        := https://raw.githubusercontent.com/intattn-edit/intattn_edit/main

readme: $(SETUP)     ## write README.md from nbs/index.ipynb
	@$(PY) -m nbconvert --log-level WARN --to markdown --output-dir . --output README nbs/index.ipynb \
	  --RegexRemovePreprocessor.patterns '#\|\s*hide' --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags hide-input
	@awk '/^```/ {code = !code; if (code && $$0 == "```") $$0 = "```python"} !NF && !code && blank++ {next} NF {blank = 0} 1' README.md | \
	  sed -E 's|(!\[[^]]*\]\()\.\./|\1$(RAW)/|g; s|\]\(\.\./|]($(REPOSITORY)/blob/main/|g' > README.tmp && mv README.tmp README.md

.PHONY: release pin
release: $(SETUP)    ## VERSION=0.2.0: into settings.ini, the package and CITATION.cff; CHANGELOG.md gets its heading
	@[[ "$(VERSION)" =~ ^[0-9]+\.[0-9]+\.[0-9]+$$ ]] || { echo "Name the version: make release VERSION=0.2.0" >&2; exit 1; }
	@grep -q '^## Unreleased$$' CHANGELOG.md || { echo "CHANGELOG.md has no line '## Unreleased': write what is new below one" >&2; exit 1; }
	@sed -i -E 's/^version = .*/version = $(VERSION)/' settings.ini
	@sed -i -E 's/^version: .*/version: $(VERSION)/' CITATION.cff
	@sed -i -E "s/^## Unreleased$$/## Unreleased\n\n## $(VERSION), $$(date +%F)/" CHANGELOG.md
	@$(VENV)/bin/nbdev_export
	@echo "Version $(VERSION) stands everywhere. Then: make test NB=nbs/tools/packaging.ipynb; git commit -a; git tag v$(VERSION)"

pin:        ## PIN=name==version: that version in constraints.txt; then set up again
	@[[ "$(PIN)" =~ ^[A-Za-z0-9._-]+==[0-9][0-9a-z.]*$$ ]] || { echo "Name the pin: make pin PIN=pandas==2.3.3" >&2; exit 1; }
	@name='$(PIN)'; name=$${name%%==*}; grep -qi "^$$name==" constraints.txt || \
	  { echo "constraints.txt has no $$name: it holds what is installed" >&2; exit 1; }; sed -i "s/^$$name==.*/$(PIN)/I" constraints.txt
	@$(MAKE) setup

where: $(SETUP)      ## print which package the commands import
	@$(PY) -P -c 'import intattn_edit; print(intattn_edit.__file__)'

clean:      ## remove what was computed or built; committed files and .venv stay
	@rm -rf runs build dist _docs _proc .cache *.egg-info
	@find nbs intattn_edit -name __pycache__ -o -name .ipynb_checkpoints | xargs -r -d '\n' rm -rf

distclean: clean  ## ... and .venv
	@rm -rf .venv

setup: $(SETUP)      ## only set up .venv
	@echo "$(VENV) is ready"

define OLD_PYTHON
import sys
v = sys.version_info
v >= (3, 11) or sys.exit("intattn_edit needs Python 3.11 or newer; $(PYTHON) is %d.%d.%d. Try: make $(MAKECMDGOALS) PYTHON=python3.12" % v[:3])
endef
export OLD_PYTHON

# The stamp is written last, so that an interrupted set-up is done again, from nothing.
.venv/.ready: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) found: install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$OLD_PYTHON"
	@echo "Setting up .venv with $$($(PYTHON) -V): PyTorch and what else constraints.txt pins; some minutes, once ..."
	@start=$$SECONDS; \
	$(PYTHON) -m venv --clear .venv || { echo "Could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	$(PY) -m pip install --no-input -c constraints.txt -e '.[dev]' 2>&1 | tee .venv/install.log | \
	  sed -un 's/^Collecting torch[<>=].*/... downloading/p; s/^Installing collected packages.*/... installing/p' || \
	  { grep ERROR .venv/install.log || tail -5 .venv/install.log; \
	    echo "The set-up failed; all of it is in .venv/install.log. The same command tries again." ; exit 1; } >&2; \
	$(PY) -m intattn_edit.engine.weights smollm2; \
	touch $@; echo "... ready in $$((SECONDS - start)) s"
