#!/usr/bin/env bash
# Everything that needs a GPU: build, tests, memory and race checker, benchmark, in under 10 minutes. Installs and
# downloads nothing. The log and JSON go to $OUT, or bench/results; where git is not, $COMMIT names the commit. Exits
# with 1 if any part failed, after all of them have run.
#
#   bench/gpu.sh            all of that
#   bench/gpu.sh PART...    some of build, tests, memcheck, racecheck, benchmark
#   bench/gpu.sh tune       in 10 minutes more: which block shapes of the Triton kernels are fastest there
#   bench/gpu.sh memory     in 10 minutes more: the planned peaks, and a real 7B of random weights under a hard cap
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" SSO_BUILD=off OUT="${OUT:-$PWD/bench/results}"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$OUT" || exit 1
failed=0

part() { # name, seconds, command...; all parts together end before 10 minutes, whatever each of them may take
  local name=$1 seconds=$2 status left=$((580 - SECONDS))
  shift 2
  [ "$left" -gt 0 ] || { missing "$name" "no time is left; ask for it alone"; return; }
  echo "== $name"
  [ "$seconds" -le "$left" ] || seconds=$left
  timeout -k 10 "$seconds" "$@" 2>&1 | tee -a "$OUT/gpu.log" | tail -n 60
  status=${PIPESTATUS[0]}
  echo "== $name: exit $status after ${SECONDS} s" | tee -a "$OUT/gpu.log"
  [ "$status" -eq 0 ] || failed=1
}

missing() { # part, what is not there
  echo "== $1: $2" | tee -a "$OUT/gpu.log"
  failed=1
}

has() { # a module of Python
  "$python" -c "import $1" 2>/dev/null
}

# Neither xdist, hypothesis (conftest.py) nor our versions need to be on this machine.
pytest=("$python" -m pytest -q -rs --noconftest -o addopts= -p no:cacheprovider -W default tests/test_gpu.py)

build() { # without nvcc, what was built before is tested, or Triton alone
  command -v nvcc >/dev/null || { missing build "nvcc is not installed here"; return; }
  NVCC_APPEND_FLAGS="--threads 0" SSO_BUILD_CUDA=1 part build 120 \
    "$python" -c 'import setuptools; setuptools.setup()' -q build_ext --inplace
}

tests() { # most of their time goes into compiling Triton's kernels: in several processes where xdist is there
  has pytest || { missing tests "pytest is not installed here"; return; }
  if has xdist; then part tests 200 "${pytest[@]}" -n 8; else part tests 200 "${pytest[@]}"; fi
}

sanitized() { # tool, seconds, tests
  has pytest || { missing "$1" "pytest is not installed here"; return; }
  command -v compute-sanitizer >/dev/null || { missing "$1" "compute-sanitizer is not installed here"; return; }
  part "$1" "$2" compute-sanitizer --tool "$1" --error-exitcode 9 "${pytest[@]}" -k "$3"
}

memcheck() { # without torch's own caching of memory, so that a byte beyond a tensor is a byte beyond an allocation
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitized memcheck 70 'rounds or (projected_adam and 33)'
}

racecheck() {
  sanitized racecheck 40 'cuda and projected_adam and 33'
}

benchmark() {
  part benchmark 150 "$python" -m bench.gpu
}

tune() {
  part tune 580 "$python" -m bench.tune --seconds 480
}

memory() {
  has transformers || { missing memory "transformers is not installed here"; return; }
  part plan 120 "$python" -m bench.plan --device cuda --sizes 60m 130m 1b --batch 8 --seq 256
  local fit
  for fit in 24GB 20GB 16GB; do
    part "plan of 7b in $fit" 150 "$python" -m bench.plan --device cuda --sizes 7b --seq 256 --accumulation 1 --steps 20 --fit "$fit"
  done
}

[ $# -gt 0 ] || set -- build tests memcheck racecheck benchmark
for name in "$@"; do
  case $name in
    build | tests | memcheck | racecheck | benchmark | tune | memory) ;;
    *) echo "bench/gpu.sh: no part is called $name; see its first lines" >&2; exit 2 ;;
  esac
done
"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__, torch.version.cuda)' || exit 1
nvidia-smi --query-gpu=driver_version,clocks.sm,power.limit --format=csv 2>/dev/null
"$python" -m subspace_optim backends || failed=1
for name in "$@"; do $name; done
exit "$failed"
