# Everything happens in .venv, which is made from requirements.lock the first time a target needs it.
# Needed on the machine: Python >= 3.11, git, make, bash. PYTHON=/path/to/python3 chooses the interpreter.

SHELL := bash
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)
READY := .venv/ready
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
DETECTRON2 := git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833

# Idle OpenMP threads sleep instead of spinning: on a busy machine with few cores spinning makes small nets 5-20x slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs notebook wheel matrix detectron2 lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## Table 4 at smoke size on this machine, from pre-training to the printed table
	@$(BIN)/python slurm/launch.py table4 --preset smoke --executor local
	@$(BIN)/python paper/make_tables.py table4

test: $(READY) ## the tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(READY) ## ruff, rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(READY) ## the site, into site/: strict, every link checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict && echo "written: site/index.html (its search wants a server: python -m http.server -d site)"

notebook: $(READY) ## run examples/mixmask_in_ten_minutes.ipynb and store what it shows
	@cd examples && ../$(BIN)/python -c "import nbclient, nbformat; path = 'mixmask_in_ten_minutes.ipynb'; \
	    book = nbformat.read(path, 4); nbclient.NotebookClient(book, record_timing=False).execute(); nbformat.write(book, path)"

wheel: $(READY) ## dist/mixmask-*.whl: the library, the stages of training and evaluation, their recipes
	@set -o pipefail; $(BIN)/python -m build --no-isolation --outdir dist . | tail -n 1

matrix: $(READY) ## the library's tests at the oldest and the newest versions allowed, each in an environment of its own
	@$(PIP) install --quiet uv==0.13.9
	@for side in lowest-direct highest; do $(try_versions) || exit 1; done

# From outside the checkout the wheel trains the embedded example; then the checkout's tests run.
define try_versions
	echo "== $$side" && $(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv/$$side && \
	$(BIN)/uv pip install --quiet --resolution $$side --python .venv/$$side '.[test]' && \
	$(BIN)/uv pip list --quiet --python .venv/$$side | grep -E '^(torch|torchvision|numpy|pillow) ' && \
	(cd .venv && $$side/bin/python -m mixmask.pretrain.train --config cifar100_moco --runs-dir "$$(mktemp -d)" \
	    --set dataset=photos epochs=1 batch_size=250 backbone.width=4 backbone.bn_groups=1 moco.queue=500 knn.k=20) && \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/$$side/bin/python -m pytest -q tests/unit
endef

detectron2: .venv/detectron2 ## detectron2, which only detection/ needs (one to three minutes; needs a C++ compiler)

lock: $(READY) ## requirements.lock from pyproject.toml; versions stay where they can (UPGRADE=--upgrade: they do not)
	@$(PIP) install --quiet uv==0.13.9
	@$(BIN)/uv pip compile --no-config --quiet --universal --generate-hashes --no-header --no-annotate \
	    --extra dev $(UPGRADE) --output-file requirements.lock pyproject.toml
	@touch requirements.lock

# The stamp goes first and comes back last, so an interrupted set-up starts over with an empty .venv.
# --no-cache-dir: older pips hold a whole file in memory (PyTorch: 3 GB in all) to write it to their cache.
# --no-compile: the byte code of what is really imported is written at the first import.
$(READY): pyproject.toml requirements.lock
	@set -euo pipefail; SECONDS=0; \
	if [ ! -e $@ ]; then $(make_venv); fi; \
	rm -f $@; \
	echo "set-up: installing requirements.lock (with PyTorch for CUDA on Linux about 3 GB to download, one to two minutes)"; \
	$(PIP) install --no-cache-dir --no-compile --progress-bar off --require-hashes --no-deps -r requirements.lock \
	    | { grep --line-buffered -oE 'Downloading .*[0-9]{3,}\.[0-9] MB' || true; }; \
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .; \
	touch $@; echo "set-up: done in $$SECONDS s"

define make_venv
	python=; found=; \
	for candidate in $(CANDIDATES); do \
	    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; found=$$candidate; \
	    "$$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue; python=$$candidate; break; \
	done; \
	[ -n "$$found" ] || { echo "error: no Python >= 3.11 found (looked for: $(CANDIDATES)); install one, or say PYTHON=/path/to/it" >&2; exit 1; }; \
	[ -n "$$python" ] || { echo "error: $$found has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	echo "set-up: $$("$$python" --version) in .venv"; \
	"$$python" -m venv --clear .venv
endef

# Tied to its torch version, so built again when the lock changes. PATH: torch finds ninja there.
.venv/detectron2: $(READY) requirements.lock
	@command -v c++ >/dev/null || { echo "error: detectron2 needs a C++ compiler; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PIP) uninstall -qq --yes detectron2
	@echo "detectron2: building, one to three minutes"
	@$(PIP) install --quiet 'setuptools<82' wheel ninja
	@PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS=2 $(PIP) install --quiet --no-build-isolation '$(DETECTRON2)'
	@touch $@
