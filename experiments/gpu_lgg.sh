#!/usr/bin/env bash
# LGG by patient on one NVIDIA GPU, within 10 minutes: U-Net on MobileNetV2 with ImageNet weights,
# tested on the hold-out of ten patients (three seeds) and by five folds over all patients.
#
#   COMMIT=... SOURCE=FOLDER OUT=FOLDER bash experiments/gpu_lgg.sh [--config.KEY=VALUE ...]
#
# SOURCE holds kaggle_3m. COMMIT is needed in a copy without .git. PYTHON is the one that has JAX.
# WEIGHTS is a file of MobileNetV2's ImageNet weights; without it they are fetched. RUNS are those
# of the list below that are done, JOBS at a time, in WORK. OUT gets gpu_lgg.jsonl, a line a run.
# BUDGET is in seconds: what is not done by then is stopped behind a checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-experiments/results} BUDGET=${BUDGET:-560} JOBS=${JOBS:-3}
WORK=${WORK:-$(mktemp -d)} STEPS=${STEPS:-1350} STAGGER=${STAGGER:-90}
RUNS=${RUNS:-holdout_0 fold_0 fold_1 fold_2 fold_3 fold_4 holdout_1 holdout_2}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$WORK/cache}
export XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$OUT" "$WORK"

recipe=(
  --config=configs/lgg.py:unet,strong --config.model.backbone=mobilenet_v2
  --config.model.pretrained="${WEIGHTS:-imagenet}" --config.model.dtype=bfloat16
  --config.data.source="$SOURCE" --config.data.root="$WORK/tfds" --config.data.cache=device
  --config.data.lesion_floor=0.25 --config.train.batch_size=32 --config.train.steps="$STEPS"
  --config.train.steps_per_call=50 --config.train.validate_every=$((STEPS / 3))
  --config.train.remat=none --config.train.ema_decay=0.995 --config.optim.learning_rate=5e-4
  --config.optim.new_layer_factor=3.0 "$@"
)

one() { # a run of the list, stopped when the budget is used up
  local left=$((BUDGET - SECONDS)) split=(--config.seed="${1#*_}")
  if [[ $1 = fold_* ]]; then
    split=(--config.data.split=kfold --config.data.folds=5 --config.data.fold="${1#*_}")
    split+=(--config.data.public_holdout=False)
  fi
  ((left > 30)) || { echo "no time left for $1"; return 0; }
  timeout --signal=TERM --kill-after=15 "$left" "$PYTHON" -m experiments.run "${recipe[@]}" \
    "${split[@]}" --workdir="$WORK/$1" --results="$OUT/gpu_lgg.jsonl" >"$WORK/$1.log" 2>&1 ||
    echo "status $?: $1: $(tail -n 1 "$WORK/$1.log")"
  echo "$1: done after $SECONDS s"
}

# The data set is built and the step compiled once: the others find both.
"$PYTHON" -c "
from pspnet_jax.config import lgg
from pspnet_jax.data import sources
config = lgg.get_config()
config.data.source, config.data.root = '$SOURCE', '$WORK/tfds'
sources.load(config)"
echo "built after $SECONDS s"
for name in $RUNS; do
  while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
  one "$name" &
  [[ $name = "${RUNS%% *}" ]] && sleep "$STAGGER"
done
wait
