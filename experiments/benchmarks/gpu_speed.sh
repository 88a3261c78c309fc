#!/usr/bin/env bash
# Correctness and speed on one NVIDIA GPU, within 8 minutes; see gpu_speed.py.
#
#   COMMIT=... OUT=FOLDER bash experiments/benchmarks/gpu_speed.sh [--tiny] [--seconds=440] \
#     [--case=PATTERN ...]
#
# COMMIT is needed in a copy without .git. PYTHON is the one that has JAX and PyTorch. OUT gets
# gpu_speed.jsonl, a line as soon as it is there, and the programs that were profiled.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-experiments/results}
mkdir -p "$OUT"
exec "${PYTHON:-python3}" -m experiments.benchmarks.gpu_speed --results="$OUT/gpu_speed.jsonl" "$@"
