#!/usr/bin/env bash
# LGG by patient on one NVIDIA GPU, within 8 minutes: the best recipe of the LGG experiments, five
# folds and the hold-out of ten patients, then pspnet_resnet50, its hold-out first.
#
#   COMMIT=... SOURCE=FOLDER OUT=FOLDER bash experiments/gpu_lgg.sh [--config.KEY=VALUE ...]
#
# SOURCE holds kaggle_3m. COMMIT is needed in a copy without .git. PYTHON is the one that has JAX.
# WEIGHTS is a file of MobileNetV2's ImageNet weights; without it the backbone starts from random
# ones. OUT gets gpu_lgg.jsonl, a line a run and one over the five folds. BUDGET is in seconds: what
# is not done by then is stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-experiments/results} BUDGET=${BUDGET:-470}
WORK=${WORK:-$(mktemp -d)} STEPS=${STEPS:-8000} FOLD_SECONDS=${FOLD_SECONDS:-60}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$WORK/cache}
mkdir -p "$OUT"

common=(
  --config.data.source="$SOURCE" --config.data.root="$WORK/tfds" --config.data.cache=device
  --config.model.dtype=bfloat16 --config.train.remat=none --config.train.steps="$STEPS"
  --config.train.steps_per_call=50 --config.train.validate_every=$((STEPS / 4))
  --config.train.ema_decay=0.995 --config.optim.learning_rate=3e-4
  --config.optim.new_layer_factor=3.0 --config.data.normalize=volume "$@"
)
recipe=(--config=configs/lgg.py:mobilenet_unet --config.model.pretrained="${WEIGHTS:-}")
pspnet=(--config=configs/lgg.py:pspnet_resnet50 --config.model.pretrained=)

within() { # the command, stopped when the budget is used up
  ((SECONDS < BUDGET)) || { echo "no time left for: $*"; return 0; }
  timeout --signal=TERM --kill-after=10 $((BUDGET - SECONDS)) "$@" || echo "status $?: $*"
  echo "$SECONDS s"
}

folds=("$PYTHON" -m experiments.crossval --most_seconds="$FOLD_SECONDS" --results="$OUT/gpu_lgg.jsonl")
holdout=("$PYTHON" -m experiments.run --results="$OUT/gpu_lgg.jsonl")
within "${folds[@]}" "${recipe[@]}" --workdir="$WORK/gpu_mobilenet_unet_folds" "${common[@]}"
within "${holdout[@]}" "${recipe[@]}" --workdir="$WORK/gpu_mobilenet_unet" "${common[@]}"
within "${holdout[@]}" "${pspnet[@]}" --workdir="$WORK/gpu_pspnet_resnet50" "${common[@]}"
within "${folds[@]}" "${pspnet[@]}" --workdir="$WORK/gpu_pspnet_resnet50_folds" "${common[@]}"
for lines in "$WORK"/*/folds.jsonl; do # a fold's line counts though the others are not done
  [ -e "$lines" ] && cat "$lines" >> "$OUT/gpu_lgg_folds.jsonl"
done
