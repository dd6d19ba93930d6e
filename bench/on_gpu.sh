#!/usr/bin/env bash
# The one command for a machine with a GPU: build, run the `gpu` tests, then all benches. Logs and JSON go to the folder named
# by the first argument (default: bench/results). Uses the python3 on PATH, which must have torch and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-bench/results}" && cd "${1:-bench/results}" && pwd)

python3 -m pip install --quiet --no-build-isolation --no-deps --editable . 2>&1 | tee "$out/build.log"
{
  nvidia-smi
  git hash-object csrc/*/*.cu # what bench/LOG.md names; works outside a checkout too
  git rev-parse HEAD 2>/dev/null || true # a copy of the tree need not be a checkout
} | tee "$out/machine.log"

# Exit status 5: no test is marked `gpu` yet. Anything else that is not 0 must stop the benches: correctness first.
status=0
python3 -m pytest -m gpu tests 2>&1 | tee "$out/tests.log" || status=${PIPESTATUS[0]}
[[ $status -eq 0 || $status -eq 5 ]] || exit "$status"
python3 -m pytest bench/ --benchmark --benchmark-out="$out/bench.json" 2>&1 | tee "$out/bench.log"
