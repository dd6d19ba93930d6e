#!/usr/bin/env bash
# The one command for a machine with a GPU: build, run the `gpu` tests, then the GPU tables of the benches, in ten minutes at
# most: what takes longer is interrupted, and what is measured by then is saved. Logs and JSON go to the folder named by the
# first argument (default: bench/results). Uses the python3 on PATH, which must have torch, pytest and what the build needs;
# nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-bench/results}" && cd "${1:-bench/results}" && pwd)
export PYTHONUNBUFFERED=1                                      # an interrupted run keeps its log
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" # for a build in place
limit_s=570 tests_s=300

within() { # seconds, command...: interrupts the command, so that pytest can save and report, then kills it
  timeout --signal=INT --kill-after=15 "$@"
}

build() {
  python3 -m pip install --quiet --no-index --no-build-isolation --no-deps --editable . && return
  echo "on_gpu.sh: pip did not install into this python3, as where the system manages it: building in place"
  python3 setup.py --quiet build_ext --build-lib .
}

build 2>&1 | tee "$out/build.log"
{
  nvidia-smi || true
  python3 bench/ledger.py # the hashes that bench/LOG.md names, and the commit
} 2>&1 | tee "$out/machine.log"
# A failed test does not stop the benches, which check each result before they time it: the exit status tells of both.
status=0
within "$tests_s" python3 -m pytest -m gpu --durations=10 tests 2>&1 | tee "$out/tests.log" || status=$?
# The short ones first: a run that is cut short has them.
within $((limit_s - SECONDS)) python3 -m pytest bench/bench_kv_cache.py bench/bench_ppo_loss.py bench/ --benchmark -k gpu --benchmark-out="$out/bench.json" 2>&1 |
  tee "$out/bench.log" || status=$?
exit "$status"
