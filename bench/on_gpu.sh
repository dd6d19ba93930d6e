#!/usr/bin/env bash
# What a machine with a GPU is borrowed for, in stages: bench/on_gpu.sh STAGE OUT. Without arguments it lists the stages, with
# the seconds that each is expected to take and may take at most, and says what this machine lacks.
#
# A stage runs in processes of its own, which are interrupted and then killed at their limit, and leaves what it found in
# OUT/STAGE as it comes: a crash, a hang or a failure costs that stage alone. `python3 bench/ledger.py OUT` makes the entries of
# bench/LOG.md out of what is there. Uses the python3 on PATH, with torch, pytest and what the build needs; downloads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

# stage, expected seconds, most seconds, what it does
stages() {
  cat <<'TABLE'
build      90 240 CUDA code for this chip alone, in place, and the hashes of the sources
smoke      60 120 one case per kernel, each in a process of its own
sanitize   60 120 the same under compute-sanitizer, where it is found
tests     200 330 all tests that need a GPU, in two processes that are replaced when they die
memory     60 120 the tests that want most of the memory, one process each
attention  90 150 trajectory_attention against its peers
loss       90 150 the output layer against its peers
cache      40  80 pruning against a device copy
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

if [ $# -ne 2 ]; then
  echo "usage: bench/on_gpu.sh STAGE OUT"
  printf '%-10s %8s %6s  %s\n' stage expected limit ""
  stages | while read -r name expected limit what; do printf '%-10s %7ss %5ss  %s\n' "$name" "$expected" "$limit" "$what"; done
  echo "missing here:"
  missing | grep . || echo "  nothing"
  exit $(($# > 0))
fi

stage=$1
limit=$(stages | awk -v name="$stage" '$1 == name { print $3 }')
[ -n "$limit" ] || { echo "on_gpu.sh: stage: expected one of $(stages | awk '{ printf "%s ", $1 }'), got $stage" >&2; exit 2; }
out=$(mkdir -p "$2/$stage" && cd "$2/$stage" && pwd)
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}"

# Interrupted at the limit, so that pytest can report and save; killed ten seconds later.
within() { timeout --signal=INT --kill-after=10 "$@"; }

pytest_() { # seconds, arguments: each result and each failure's text is in the folder as soon as it is known
  local each=()
  python3 -c 'import pytest_timeout' 2>/dev/null && each=(--timeout 100 --timeout-method thread)
  within "$1" python3 -m pytest -p bench.on_gpu_report --on-gpu-report "$out" "${each[@]}" "${@:2}"
}

build() {
  local arch folder
  arch=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}a-real" if a == 9 else f"{a}{b}-real")')
  folder=$root/build/on_gpu
  cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_INSTALL_PREFIX="$root/mem1_core" -DCMAKE_INSTALL_LIBDIR=lib \
    -DMEM1_CUDA=ON -DMEM1_CUDA_ARCHITECTURES="$arch" -DPython_EXECUTABLE="$(command -v python3)" \
    -DMEM1_TORCH_DIR="$(python3 -c 'import os, torch; print(os.path.dirname(torch.__file__))')" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)"
  within "$limit" cmake --build "$folder"
  cmake --install "$folder"
  arch=${arch%-real} python3 -c 'import os, mem1_core; got = mem1_core.cuda_architectures(); print("built for", got); assert got == os.environ["arch"], got'
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 bench/ledger.py
}
smoke() {
  local status=0 one
  for one in $(python3 -m pytest tests -m "gpu and smoke" --collect-only -q 2>/dev/null | grep :: | tr ' ' '\a'); do
    pytest_ 40 "${one//$'\a'/ }" || status=$?
  done
  return $status
}
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not on PATH"; return 0; }
  within "$limit" compute-sanitizer --target-processes all --error-exitcode 9 --log-file "$out/sanitizer.log" \
    python3 -m pytest -p bench.on_gpu_report --on-gpu-report "$out" tests -m "gpu and smoke"
}
tests() { pytest_ "$limit" tests -m "gpu and not smoke and not memory" -n 2 --dist loadscope --max-worker-restart 20; }
memory() {
  local status=0 one
  for one in $(python3 -m pytest tests -m "gpu and memory" --collect-only -q 2>/dev/null | grep :: | tr ' ' '\a'); do
    pytest_ 60 "${one//$'\a'/ }" || status=$?
  done
  return $status
}
bench() { within "$limit" python3 -m pytest "bench/bench_$1.py" --benchmark -k gpu --benchmark-out="$out/bench.json"; }
attention() { bench attention; }
loss() { bench ppo_loss; }
cache() { bench kv_cache; }
rollout() { bench rollout; }

status=0
SECONDS=0
"$stage" > >(tee "$out/log") 2>&1 || status=$?
echo "$stage: status $status after $SECONDS s" | tee "$out/status"
exit "$status"
