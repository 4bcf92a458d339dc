#!/bin/bash
# Offboard auto-labeling on synthetic scenes (the paper's Table 5): a teacher that is told what is occupied learns from 6
# labeled scenes and labels 74 more; students learn from ground truth and its labels, and "truth" from the ground truth
# alone, all for the same number of steps. Data of study-b2s.
#   docs/offboard-study.sh [SEED …]
#   STEPS=3360 SUFFIX=-longer ARMS="top2 truth" docs/offboard-study.sh [SEED …]
#   occstream compare --uri sqlite:///runs/study-offboard/mlflow.db --experiment study-offboard
set -euo pipefail
data=runs/study-b2s/data
out=runs/study-offboard
python=${PYTHON:-python}
launch=${LAUNCH:-launch}
arms=${ARMS:-teacher top1 top2 truth}
suffix=${SUFFIX:-}
one() { # name seed overrides…
  local name=$1 seed=$2
  shift 2
  if [[ " $arms " != *" $name "* ]]; then return; fi
  $python "$launch/finetune.py" --recipe study-tiny "data.url=$data" "output=$out/$name$suffix-s$seed" "train.seed=$seed" \
    optim.lr=2.0e-3 train.batch=2 optim.warmup=40 "train.steps=${STEPS:-1120}" "track.uri=sqlite:///$out/mlflow.db" \
    track.experiment=study-offboard "track.tags={study: study-offboard, arm: $name$suffix}" "$@" > "$out/$name$suffix-s$seed.txt" 2>&1
}
mkdir -p "$out"
for seed in "${@:-0}"; do
  one teacher "$seed" data.scenes=6 model.strategy=offboard model.compact_factor=2 model.cap=4608
  for keep in top1 top2; do
    $python -m occstream.launch.cli predict "$out/teacher-s$seed" $data --name "pseudo-$keep-s$seed" --keep $keep \
      --truth 6 --holdout 16 eval.batch=4
  done
  one top1 "$seed" data.binary_from=semantic data.scenes=80 "data.labels=pseudo-top1-s$seed"
  one top2 "$seed" data.binary_from=semantic data.scenes=80 "data.labels=pseudo-top2-s$seed" data.soft=true
  one truth "$seed" data.binary_from=semantic data.scenes=6
done
