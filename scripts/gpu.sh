#!/usr/bin/env bash
# The GPU rung of the proof ladder, with the machine's own Python and torch, no network, no install.
#
#   scripts/gpu.sh [build] [test] [sanitize] [bench]     these steps; all four if none is named
#
# OUT names the folder for logs and JSON (default report/gpu), PYTHON the interpreter (default python3).
# Every step has a limit of its own, in seconds, below 600 in all. A step that fails does not stop the
# ones after it; the exit code is the number of steps that failed.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 1
readonly root=$PWD
readonly out=${OUT:-report/gpu}
readonly python=${PYTHON:-python3}
readonly build=$root/build/gpu
mkdir -p "$out"
export PYTHONPATH=$build/lib${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

declare -A limits=([build]=170 [test]=140 [sanitize]=140 [bench]=140)

architecture() {
  local found
  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
  echo "${found:-90}"
}

step_build() {
  CUDAARCHS=$(architecture) TRIFUSE_BUILD_CUDA=1 \
    "$python" setup.py -q build --build-lib "$build/lib" --build-temp "$build/temp" &&
    "$python" -m trifuse info
}

step_test() {
  "$python" -m pytest tests -m gpu -ra -q -p no:cacheprovider
}

# memcheck: out-of-bounds and misaligned accesses; racecheck: unordered accesses to shared memory.
# Without torch's caching, every tensor is an allocation of its own with nothing valid behind it.
step_sanitize() {
  local tool code=0 said
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on the PATH"
    return 77
  fi
  said=$(mktemp)
  for tool in memcheck racecheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" scripts/gpu_small_shapes.py 2>&1 | tee "$said"
    [[ ${PIPESTATUS[0]} -eq 0 ]] || code=1
    if grep -q "Device not supported" "$said"; then
      echo "compute-sanitizer cannot examine this device"
      code=77
      break
    fi
  done
  rm -f "$said"
  return "$code"
}

step_bench() {
  "$python" -m trifuse report --device cuda --out "$out/report" --time-limit 100 --no-example
}

# In a process of its own, so that timeout can end it: this script with --only.
if [[ ${1:-} == --only ]]; then
  case $2 in
    build) step_build ;;
    test) step_test ;;
    sanitize) step_sanitize ;;
    bench) step_bench ;;
  esac
  exit
fi

steps=("$@")
[[ $# -gt 0 ]] || steps=(build test sanitize bench)
failed=0
results=()
for name in "${steps[@]}"; do
  if [[ -z ${limits[$name]:-} ]]; then
    echo "gpu.sh: there is no step '$name'; choose from build, test, sanitize, bench" >&2
    exit 2
  fi
done
for name in "${steps[@]}"; do
  echo "== $name (at most ${limits[$name]} s, log in $out/$name.log)"
  start=$SECONDS
  timeout --kill-after=5 "${limits[$name]}" bash "$0" --only "$name" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) state=passed ;;
    77) state="not run: $(tail -n 1 "$out/$name.log")" ;;
    124 | 137) state="failed: ran past ${limits[$name]} s" ;;
    *) state="failed: exit code $code" ;;
  esac
  [[ $state != failed* ]] || failed=$((failed + 1))
  echo "== $name: $state, $((SECONDS - start)) s"
  results+=("$(printf '{"step": "%s", "state": "%s", "seconds": %d}' "$name" "${state//\"/\'}" $((SECONDS - start)))")
done
(IFS=,; printf '[%s]\n' "${results[*]}") >"$out/steps.json"
exit "$failed"
