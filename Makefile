# make demo    roll out, train, evaluate and draw, on the CPU, from a bare checkout
# make test    all tests this machine can run
# make lint    ruff, mypy, clang-format
# make ext     rebuild the compiled part after an edit in csrc/ (seconds)
#
# The virtual environment is made once. It sees the packages of the Python that makes it if there is a torch among them;
# else it is closed and TORCH is installed; on a CPU-only machine with the public index, say
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu".
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= demo

BIN := $(VENV)/bin

.PHONY: demo test lint ext clean

demo: ext
	$(BIN)/mem1 demo --out $(OUT)

test: ext
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.c' | xargs $(BIN)/clang-format --dry-run --Werror

ext: $(VENV)/ready
	$(BIN)/cmake --build build/editable
	$(BIN)/cmake --install build/editable >/dev/null

$(VENV)/ready: pyproject.toml setup.py CMakeLists.txt
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || \
		($(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install --quiet $(TORCH))
	$(BIN)/python -m pip install --quiet "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/lint: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[lint]"
	touch $@

clean:
	rm -rf build dist $(VENV) mem1_core/lib mem1_core/include mem1_core/_C*.so *.egg-info
