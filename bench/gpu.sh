#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: build, tests, memory and race checker, benchmark. Installs and
# downloads nothing. Results go to $OUT, or bench/results. Exits with 1 if any part failed, after all of them have run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" SSO_BUILD=off OUT="${OUT:-$PWD/bench/results}"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
python=${PYTHON:-python3}
mkdir -p "$OUT" || exit 1
failed=0

part() { # name, seconds, command...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout -k 10 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 60
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || { echo "== $name FAILED ($status)"; failed=1; }
}

missing() { # part, what is not there
  echo "== $1: $2"
  failed=1
}

"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__, torch.version.cuda)' || exit 1
nvidia-smi --query-gpu=driver_version,clocks.sm,power.limit --format=csv 2>/dev/null

# Without nvcc, what was built before is tested, or Triton alone.
if command -v nvcc >/dev/null; then
  NVCC_APPEND_FLAGS="--threads 0" SSO_BUILD_CUDA=1 part build 120 \
    "$python" -c 'import setuptools; setuptools.setup()' -q build_ext --inplace
else
  missing build "nvcc is not installed here"
fi
"$python" -m subspace_optim backends || failed=1

# Neither xdist, hypothesis (conftest.py) nor our versions need to be on this machine.
pytest=("$python" -m pytest -q -rs --noconftest -o addopts= -p no:cacheprovider -W default)
if "$python" -c 'import pytest' 2>/dev/null; then
  part tests 200 "${pytest[@]}" tests/test_gpu.py
  if command -v compute-sanitizer >/dev/null; then
    # Without torch's own caching of memory, so that a byte beyond a tensor is a byte beyond an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 70 compute-sanitizer --tool memcheck --error-exitcode 9 \
      "${pytest[@]}" tests/test_gpu.py -k 'rounds or (projected_adam and 33)'
    part racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 \
      "${pytest[@]}" tests/test_gpu.py -k 'cuda and projected_adam and 33'
  else
    missing memcheck "compute-sanitizer is not installed here"
  fi
else
  missing tests "pytest is not installed here"
fi

part benchmark 160 "$python" -m bench.gpu "$@"
# With MEMORY=1, up to 25 minutes more: a real 7B of random weights under a hard cap of the allocator, as planned.
if [ -z "${MEMORY:-}" ]; then
  :
elif "$python" -c 'import transformers' 2>/dev/null; then
  part plan 200 "$python" -m bench.plan --device cuda --sizes 60m 130m 1b --batch 8 --seq 256 --out "$OUT/plan.json"
  for fit in 24GB 20GB 16GB; do
    part "plan-7b-$fit" 400 "$python" -m bench.plan --device cuda --sizes 7b --seq 256 --accumulation 1 --steps 20 \
      --fit "$fit" --out "$OUT/plan-7b-$fit.json"
  done
else
  missing plan "transformers is not installed here"
fi
exit "$failed"
