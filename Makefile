# make reproduce   run the walkthrough's first five notebooks at full length: trains everything, refreshes data/ and
#                  figures/, prints the answers (the sixth writes a file of 5 GB, the seventh is for the hand, the eighth wants 15 GB)
# make experiments run nbs/experiments at full length with the shipped weights, two notebooks at a time: an hour on two
#                  cores, and 20 minutes of one core more the first time, for a second set of encoders
# make test        every test and every notebook, with shortened training (IBLLM_QUICK=1, set in conftest.py)
# make check       the quick part of it: the tests without the notebooks and without the slow ones
# make test-oldest the same with the oldest releases that settings.ini admits, in .venv-oldest; wants PYTHON=python3.10
# make lab         open the walkthrough in JupyterLab
# make explore     open the explorer as a page of its own, without a notebook around it
# make readme      write README.md from nbs/index.ipynb
# Each needs only Python 3.10 or newer and git, and makes its own .venv on first use.

PYTHON ?= python3
BIN ?= .venv/bin
README ?= README.md
WALKTHROUGH := $(sort $(wildcard nbs/walkthrough/0[1-5]_*.ipynb))
# The longest first. 01 trains models that most others share; those that train their own go beside it.
EXPERIMENTS := $(foreach number,01 05 12 04 09 03 02,$(wildcard nbs/experiments/$(number)_*.ipynb))
EXPERIMENTS += $(filter-out $(EXPERIMENTS),$(sort $(wildcard nbs/experiments/[0-9]*.ipynb)))
export OMP_NUM_THREADS ?= 1

.PHONY: reproduce experiments test check test-oldest lab explore chromium readme

# Runs a notebook in place, however long it takes; IBLLM_QUICK=0 is its full length.
RUN := $(BIN)/jupyter nbconvert --to notebook --inplace --execute --ExecutePreprocessor.timeout=-1 \
  --ExecutePreprocessor.store_widget_state=False

reproduce: .venv/.done
	for notebook in $(WALKTHROUGH); do IBLLM_QUICK=0 OMP_NUM_THREADS=2 $(RUN) $$notebook || exit 1; done
	$(BIN)/nbdev-clean
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute nbs/index.ipynb
	$(BIN)/nbdev-clean
	$(MAKE) readme
	$(BIN)/python -m json.tool --no-ensure-ascii data/results/answers.json
	@echo 'The bell above was seen, heard and felt. Next: make lab opens the walkthrough; figures/ and data/results/ hold what it measured.'

experiments: .venv/.done
	printf '%s\n' $(EXPERIMENTS) | IBLLM_QUICK=0 OMP_NUM_THREADS=1 xargs -n 1 -P 2 $(RUN)
	$(BIN)/nbdev-clean

# The browser's tests come by themselves: what a person waits for is timed, and wants a quiet machine.
test: .venv/.done chromium
	$(BIN)/python -m pytest tests nbs -n 2 --dist loadfile --ignore tests/test_browser.py --nbval-lax \
	  --nbval-current-env --nbval-cell-timeout=600 --nbval-sanitize-with=tests/nbval_sanitize.cfg
	$(BIN)/python -m pytest tests/test_browser.py

check: .venv/.done
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --ignore tests/test_browser.py

# What old releases of others warn of is no concern of ours; the tools that two of the files test are of one release only.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e . pytest pytest-timeout hypothesis openexr
	.venv-oldest/bin/python -m pip install -q -c constraints.txt --no-deps open-clip-torch
	.venv-oldest/bin/python -m pytest tests -W default --ignore tests/test_repository.py \
	  --ignore tests/test_browser.py --ignore tests/test_tools.py

lab: .venv/.done
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(firstword $(WALKTHROUGH))

explore: .venv/.done
	$(BIN)/voila nbs/explore.ipynb

# The explorer is tested in Chromium. Root on Debian gets it here; who has none sees those tests skipped, with the reason.
chromium:
	@if ! command -v chromium && [ "$$(id -u)" = 0 ] && command -v apt-get; then \
	  apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium || true; fi > /dev/null

readme: .venv/.done
	$(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --no-input --stdout nbs/index.ipynb | \
	  sed -e 's#](\.\./#](#g' -e 's#="\.\./#="#g' -e '/./,$$!d' | cat -s > $(README)

.venv/.done: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps open-clip-torch  # the tests take CLIP's vocabulary from it
	touch $@
