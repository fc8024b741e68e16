#!/usr/bin/env bash
# Builds, tests, sanitizes and times msn_ext on a machine with a GPU, from a bare checkout, offline.
#
#   benchmarks/gpu.sh                      all parts; limits add up to 520 seconds
#   benchmarks/gpu.sh build test           only these, of: build test sanitize bench steps
#   OUT=/tmp/results benchmarks/gpu.sh     results there; default: benchmarks/results/<GPU's name>
#   PYTHON=python3.12 benchmarks/gpu.sh    default: python3
#
# Needs nvcc, compute-sanitizer (for `sanitize`), cmake, ninja, and in that Python: torch with CUDA,
# transformers, pybind11, scikit-build-core, pytest, hypothesis; with pytest-xdist, tests run side
# by side. The package is installed into build/gpu/site, never into the environment. A part that fails
# does not stop the next one; the table at the end says which did, and the exit status is then 1.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly all_parts=(build test sanitize bench steps)
readonly python=${PYTHON:-python3}
readonly site=$PWD/build/gpu/site
readonly command_line="$0 $*"
parts=("$@")
((${#parts[@]})) || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
  if [[ " ${all_parts[*]} " != *" $part "* ]]; then
    echo "gpu.sh: unknown part '$part'; expected: ${all_parts[*]}" >&2
    exit 2
  fi
done
if ! command -v nvidia-smi >/dev/null; then
  echo "gpu.sh: no nvidia-smi: this machine has no NVIDIA driver" >&2
  exit 2
fi

query() { nvidia-smi --id=0 --query-gpu="$1" --format=csv,noheader; }
gpu=$(query name)
arch=$(query compute_cap | tr -d '. ') # 9.0 -> 90
slug=$(tr -cs 'a-z0-9\n' '-' <<<"${gpu,,}" | sed 's/^-//; s/-$//')
out=${OUT:-benchmarks/results/$slug}
mkdir -p "$out"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

build() {
  rm -rf "$site"
  MSN_CUDA=on MSN_CUDA_ARCHITECTURES=$arch-real "$python" -m pip install . --no-build-isolation \
    --no-deps --no-index --target "$site" --config-settings build-dir="$PWD/build/gpu/cmake"
  # -P here and below: the checkout's own msn_ext, which has no compiled part, must not shadow the
  # built one.
  "$python" -P -c 'import msn_ext; print(msn_ext.build_info())
assert msn_ext.build_info()["cuda"], "built without CUDA"'
}

test_() {
  local several=()
  if "$python" -P -c 'import xdist' 2>/dev/null; then several=(-n 8 --dist worksteal); fi
  MSN_REQUIRE_CUDA=1 "$python" -P -m pytest -q "${several[@]}" \
    python_tests/ops --ignore=python_tests/ops/test_sanitizers.py \
    python_tests/decoding/test_runner.py python_tests/decoding/test_runner_pool.py
}

sanitize() {
  local tool failed=0
  for tool in memcheck racecheck initcheck; do
    echo "== compute-sanitizer $tool"
    # Without torch's caching allocator every tensor is an allocation of its own, whose bounds are
    # checked.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" benchmarks/sanitize_ops.py || { echo "== $tool failed"; failed=1; }
  done
  return "$failed"
}

bench() { "$python" benchmarks/ops.py --device cuda --json "$out/kernels.json"; }

# An 8-billion model's step, plain and with 64 nodes, weights drawn at random.
steps() {
  rm -f "$out/steps.jsonl"
  "$python" benchmarks/steps.py --shape llama-3-8b --device cuda --dtype bfloat16 --context 2048 \
    --nodes 1,64 --output "$out/steps.jsonl"
}

versions() {
  "$python" - "$gpu" "$(query driver_version)" "$command_line" >"$out/versions.json" <<'PY'
import importlib.metadata
import json
import subprocess
import sys


def run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


commit = run("git", "rev-parse", "HEAD") or "unknown"
if commit != "unknown" and run("git", "status", "--porcelain", "--untracked-files=no"):
    commit += " with changes"
nvcc = run("nvcc", "--version")
gpu, driver, command = sys.argv[1:]
facts = {
    "git_commit": commit,
    "gpu": gpu,
    "driver": driver,
    "cuda": nvcc.splitlines()[-2].split()[-1] if nvcc else None,
    "python": sys.version.split()[0],
    "torch": version("torch"),
    "transformers": version("transformers"),
    "command": command,
}
print(json.dumps(facts, indent=2))
PY
}

# run PART SECONDS FUNCTION: in a shell of its own (so that `set -e` holds inside), its output also
# to a file.
declare -A result
failed=0
run() {
  local part=$1 limit=$2 start=$SECONDS status=0
  printf '\n==== %s\n' "$part"
  timeout --kill-after=10 "$limit" bash -c "set -euo pipefail; $3" 2>&1 |
    tee "$out/$part.log" || status=${PIPESTATUS[0]}
  case $status in
    0) result[$part]=ok ;;
    124 | 137) result[$part]="FAILED: over $limit s" ;;
    *) result[$part]="FAILED: exit status $status" ;;
  esac
  ((status == 0)) || failed=1
  result[$part]+=" ($((SECONDS - start)) s)"
}

export python site arch out
export -f build test_ sanitize bench steps
versions
for part in "${parts[@]}"; do
  case $part in
    build) run build 110 build ;;
    test) run test 110 test_ ;;
    sanitize) run sanitize 100 sanitize ;;
    bench) run bench 100 bench ;;
    steps) run steps 100 steps ;;
  esac
done

printf '\n%s, sm_%s, driver %s; results in %s\n' "$gpu" "$arch" "$(query driver_version)" "$out"
for part in "${parts[@]}"; do printf '%-10s %s\n' "$part" "${result[$part]}"; done
exit "$failed"
