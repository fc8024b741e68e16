#!/usr/bin/env bash
# Builds, tests, sanitizes and times msn_ext on a machine with a GPU; `benchmarks/gpu.sh` alone says
# how (gpu.py).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
