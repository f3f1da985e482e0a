#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: tests, memory checker, benchmark. Installs and downloads nothing.
# Results go to $OUT, or bench/results. Exits with 1 if any part failed, after all of them have run.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" SSO_BUILD=off OUT="${OUT:-$PWD/bench/results}"
python=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0

part() { # name, seconds, command...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 60
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || { echo "== $name FAILED ($status)"; failed=1; }
}

$python -c 'import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)' || exit 1

# Neither xdist, hypothesis (conftest.py) nor our versions need to be on this machine.
pytest=("$python" -m pytest -q --noconftest -o addopts= -p no:cacheprovider -W default)
if $python -c 'import pytest' 2>/dev/null; then
  part tests 240 "${pytest[@]}" tests/test_gpu.py
else
  echo "== tests: pytest is not installed here"; failed=1
fi

if command -v compute-sanitizer >/dev/null; then
  # Without torch's own caching of memory, so that a byte beyond a tensor is a byte beyond an allocation.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "${pytest[@]}" tests/test_gpu.py -k 'triton and (rounds or (projected_adam and 33))'
else
  echo "== memcheck: compute-sanitizer is not installed here"; failed=1
fi

part benchmark 200 "$python" bench/gpu.py "$@"
exit "$failed"
