PYTHON ?= python3
WORKERS ?= 2
SPACE ?= build/space

PIP_INSTALL = bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off

# Before 3.13, Python decodes the path of an editable installation with the locale's encoding, and does not start if
# the encoding is ASCII and the path is not.
export LC_ALL = C.UTF-8

.DEFAULT_GOAL := help
.PHONY: help test lint format docs audit demo space browser clean

help:  ## List the targets
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

# All tests of a file run on one worker, so that what they share is made once.
test: .venv/installed  ## Create .venv, check style and types, build the documentation, run all tests
	$(MAKE) --jobs=2 lint docs
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/installed  ## Check style and types
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

format: .venv/installed  ## Sort imports and format the code
	.venv/bin/python -m ruff check --fix
	.venv/bin/python -m ruff format

docs: .venv/installed  ## Build the documentation into build/docs; warnings are errors
	.venv/bin/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --builder html docs build/docs

audit: .venv/installed  ## Check the installed packages for known vulnerabilities
	.venv/bin/python scripts/audit.py

demo: .venv-demo/installed  ## Create .venv-demo, prune and fine-tune the example model
	.venv-demo/bin/python scripts/demo.py

space:  ## Create build/space: the demo page with the package, ready for the Hub
	rm -rf '$(SPACE)'
	mkdir -p '$(SPACE)'
	tar -c -f - --exclude __pycache__ --exclude ./web -C demo . -C ../src hf_vssm_prune | tar -x -o -f - -C '$(SPACE)'

browser:  ## Install Chromium for the tests of the demo page (Debian and Ubuntu, as root)
	command -v chromium && command -v chromedriver || \
		{ apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; }

clean:  ## Remove both environments and all caches
	rm -rf .venv .venv-demo .mypy_cache .pytest_cache .ruff_cache build dist

.venv/installed: EXTRA = dev
.venv-demo/installed: EXTRA = train
# The stamp is written last, so that an interrupted installation starts again.
.venv/installed .venv-demo/installed: pyproject.toml constraints-ci.txt
	@echo "Installing the package with its extra '$(EXTRA)' into $(@D); this takes a few minutes."
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PIP_INSTALL) --constraint constraints-ci.txt torch
	$(@D)/$(PIP_INSTALL) --constraint constraints-ci.txt --editable '.[$(EXTRA)]'
	@touch $@
