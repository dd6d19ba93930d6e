#!/usr/bin/env bash
# What a machine with a GPU is borrowed for, in stages: bench/on_gpu.sh STAGE OUT [DEADLINE]. Without arguments it lists the
# stages, with the seconds that each is expected to take and may take at most, and says what this machine lacks.
#
# A stage runs in processes of its own, which are interrupted at its limit, or at DEADLINE (seconds since 1970) if that comes
# first, and killed ten seconds later. It leaves what it found in OUT/STAGE as it comes: a crash, a hang or a failure costs that
# stage alone. `python3 bench/ledger.py OUT` makes the entries of bench/LOG.md out of what is there. Uses the python3 on PATH,
# with torch, pytest and what the build needs; downloads nothing.
set -euo pipefail
self=$(realpath "$0")
out=${2:+$(realpath -m "$2")}  # as it is from here
cd "$(dirname "$self")/.."
root=$PWD
if [ -d /usr/local/cuda/bin ]; then PATH=$PATH:/usr/local/cuda/bin; fi

# stage, expected seconds, most seconds, what it does
stages() {
  cat <<'TABLE'
build      80 200 CUDA code for this chip alone, in place, and Triton's; packed for a second machine
smoke      50 110 one case per kernel
sanitize   60 110 the same under compute-sanitizer, where it is found
tests     180 300 all other tests that need a GPU, in 14 processes that are replaced when they die
cache      40  80 pruning against a device copy
attention  90 150 trajectory_attention against its peers
loss       70 120 the output layer and gae against their peers
memory     60 120 the tests that want most of the memory, a process each
rollout   100 180 the engine against Hugging Face generate
TABLE
}

missing() {
  local what
  for what in python3 nvidia-smi nvcc cmake ninja compute-sanitizer; do
    command -v "$what" >/dev/null || echo "  $what: not on PATH"
  done
  python3 - <<'PYTHON' || true
import importlib.util
for module in ("torch", "triton", "pybind11", "pytest", "xdist", "pytest_timeout", "transformers", "flash_attn"):
    if importlib.util.find_spec(module) is None:
        print(f"  {module}: not importable")
if importlib.util.find_spec("torch") is not None:
    import torch
    if not torch.cuda.is_available():
        print(f"  a CUDA device: torch {torch.__version__} sees none")
PYTHON
}

list() {
  echo "usage: bench/on_gpu.sh STAGE OUT [DEADLINE]"
  printf '%-10s %8s %6s\n' stage expected limit
  stages | while read -r name expected limit what; do printf '%-10s %7ss %5ss  %s\n' "$name" "$expected" "$limit" "$what"; done
  echo "missing here:"
  missing | grep . || echo "  nothing"
}

# Each result, and each failure's text, is in the folder as soon as it is known. A thread ends what hangs: no signal reaches a
# process that waits within CUDA.
pytest_() {
  local each=()
  if python3 -c 'import pytest_timeout' 2>/dev/null; then each=(--timeout 90 --timeout-method thread); fi
  python3 -m pytest -p no:cacheprovider -p bench.on_gpu_report --on-gpu-report "$out" "${each[@]}" "$@"
}
spread() { pytest_ tests -n 14 --dist worksteal --max-worker-restart 40 -m "$1"; }
# Without pytest-benchmark, of whatever version: the run file is the same.
bench() { python3 -m pytest "bench/bench_$1.py" -p no:cacheprovider -p no:benchmark --benchmark -k gpu --benchmark-out="$out/bench.json"; }

build() {
  local capability arch
  command -v nvcc >/dev/null || { echo "build: expected nvcc on PATH or in /usr/local/cuda/bin, found none"; return 1; }
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  if [ "$capability" = 90 ]; then arch=90a; else arch=$capability; fi  # wgmma is in 90a alone
  cmake -S . -B build/on_gpu -G Ninja -DCMAKE_INSTALL_PREFIX="$root/mem1_core" -DCMAKE_INSTALL_LIBDIR=lib \
    -DMEM1_CUDA=ON -DMEM1_CUDA_ARCHITECTURES="$arch-real" -DPython_EXECUTABLE="$(command -v python3)" \
    -DMEM1_TORCH_DIR="$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))')" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)"
  cmake --build build/on_gpu
  cmake --install build/on_gpu
  python3 - "$arch" <<'PYTHON'
import sys, mem1_core
built = mem1_core.cuda_architectures()
assert built == sys.argv[1], f"built for {built!r}, expected {sys.argv[1]!r}"
print("built for", built)
PYTHON
  # The Triton kernels, side by side, into the cache where the tests find most of them.
  python3 tests/triton_report.py "sm_$arch" >"$out/triton_report" 2>&1 || echo "tests/triton_report.py: status $?, see $out/triton_report"
  tar czf "$out/built.tgz" mem1_core/_C.*.so mem1_core/lib mem1_core/include
  # What a start from the cache reads of it, at the paths that it names.
  tar czf "$out/triton.tgz" --exclude='*.tt*ir' --exclude='*.llir' --exclude='*.source' build/triton/
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 bench/ledger.py
}
smoke() { spread "gpu and smoke"; }
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not found"; return 0; }
  compute-sanitizer --target-processes all --error-exitcode 9 --log-file "$out/sanitizer.log" \
    python3 -m pytest -p no:cacheprovider -p bench.on_gpu_report --on-gpu-report "$out" tests/test_smoke_gpu.py -m gpu
}
tests() { spread "gpu and not smoke and not memory"; }
cache() { bench kv_cache; }
attention() { bench attention; }
loss() { bench ppo_loss; }
rollout() { bench rollout; }
memory() {
  local status=0 test
  python3 -m pytest tests -p no:cacheprovider -m "gpu and memory" --continue-on-collection-errors --collect-only -q \
    >"$out/collected" || { status=$?; cat "$out/collected"; }
  while read -r test; do
    pytest_ "$test" || status=$?
  done < <(grep :: "$out/collected" | grep -v ^ERROR)
  return $status
}

if [ -z "$out" ]; then
  list
  exit $(($# > 0))
fi
stage=$1
limit=$(stages | awk -v name="$stage" '$1 == name { print $3 }')
[ -n "$limit" ] || { echo "on_gpu.sh: stage: expected one of $(stages | awk '{ printf "%s ", $1 }'), got $stage" >&2; exit 2; }
out=$out/$stage
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TRITON_CACHE_DIR=$root/build/triton
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}"
if [ "${3:-}" = within ]; then
  "$stage"
  exit
fi
if [ -n "${3:-}" ]; then
  left=$(($3 - $(date +%s) - 10))
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
fi
mkdir -p "$out" "$TRITON_CACHE_DIR"
# Of an earlier run of this stage; nothing else, as OUT may be any folder.
(cd "$out" && rm -f log status results.jsonl bench.json built.tgz triton.tgz triton_report collected sanitizer.log)
say() { echo "$stage: $1" | tee "$out/status"; }
if [ "$limit" -le 0 ]; then
  say "not run: the deadline is near"
  exit 124
fi

SECONDS=0
set -m  # a group of its own, which an interrupt reaches
timeout --signal=INT --kill-after=10 "$limit" bash "$self" "$stage" "$(dirname "$out")" within > >(tee "$out/log") 2>&1 &
group=$!
set +m
stop() {
  kill -INT -- "-$group" || true
  for _ in $(seq 100); do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.1; done
  kill -KILL -- "-$group" 2>/dev/null || true
  say "stopped after $SECONDS s"
  exit 130
}
trap stop INT TERM HUP
status=0
wait "$group" || status=$?
say "status $status after $SECONDS s (limit $limit)"
exit "$status"
