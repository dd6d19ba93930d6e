# make demo    roll out, evaluate, train and draw, on the CPU, from a bare checkout
# make test    all tests this machine can run, in WORKERS processes (0: in pytest's own, as --pdb wants it); NEWEST=1: with
#              the newest packages instead of constraints.txt's
# make ends    the tests of what other packages do for this one, with the oldest supported and the newest there are
# make lint    ruff, mypy, clang-format
# make ext     rebuild the compiled part after an edit in csrc/ (seconds)
#
# The virtual environment is made once, and its packages are brought up to date when what they follow from changes. It
# sees the packages of the Python that makes it if there is a torch among them; else it is closed and TORCH is installed;
# on a CPU-only machine with the public index, say
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu". No later step replaces the torch that is there.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= demo
NEWEST ?=
WORKERS ?= $(shell .ci/workers)

BIN := $(VENV)/bin
SPREAD = -n $(WORKERS) --dist worksteal
STEP := @.ci/step
READY := $(VENV)/ready$(if $(NEWEST),-newest)
VERSIONS := $(if $(NEWEST),--upgrade --upgrade-strategy eager,--constraint constraints.txt) --constraint $(VENV)/torch.txt
INSTALL := $(BIN)/python -m pip install --verbose $(VERSIONS)

.PHONY: demo test ends lint ext clean
.DELETE_ON_ERROR:

demo: ext
	$(BIN)/mem1 demo --out $(OUT) --overwrite

test: ext
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

ends: ext
	.ci/ends $(abspath $(BIN))/python $(SPREAD)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.c' | xargs $(BIN)/clang-format --dry-run --Werror

ext: $(READY)
	$(BIN)/cmake --build build/editable
	$(BIN)/cmake --install build/editable >/dev/null

$(VENV)/torch.txt:
	$(STEP) "[1/4] virtual environment" $(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(STEP) "[2/4] $(TORCH)" sh -c '$(BIN)/python -c "import torch" || $(BIN)/python -m pip install $(TORCH)'
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >$@

$(READY): $(VENV)/torch.txt pyproject.toml setup.py CMakeLists.txt constraints.txt mem1_core/versions.py
	@rm -f $(VENV)/ready*
	$(STEP) "[3/4] build tools" $(INSTALL) setuptools cmake ninja pybind11
	$(STEP) "[4/4] mem1_core and what it requires" $(INSTALL) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/lint: $(READY)
	$(STEP) "linters" $(INSTALL) --no-build-isolation --editable ".[lint]"
	@touch $@

clean:
	rm -rf build dist $(VENV) mem1_core/lib mem1_core/include mem1_core/_C*.so *.egg-info
