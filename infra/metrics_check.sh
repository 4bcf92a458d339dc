#!/usr/bin/env bash
# Scores 200 random frames with our metrics and with the nuScenes devkit, and compares every number to 1e-6. The devkit needs
# NumPy 1, so it gets a virtual environment of its own; it needs no data set. About a minute once that is installed (0.6 GB).
#
#   infra/metrics_check.sh                     in an environment with occstream
#   infra/metrics_check.sh --golden FILE       also writes the devkit's numbers for the tests (tests/evaluation/devkit.json)
#   SEED=7 infra/metrics_check.sh              other frames
#   DEVKIT=/path/to/venv infra/metrics_check.sh    takes the devkit that is installed there
#
# Writes submissions and both results to $OUT (default metrics-check/).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-metrics-check}
devkit=${DEVKIT:-$out/devkit}
if [ ! -x "$devkit/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$devkit"
  "$devkit/bin/pip" install -q --disable-pip-version-check nuscenes-devkit==1.2.0
fi
python infra/metrics_check/ours.py "$out" "${SEED:-0}"
MPLBACKEND=Agg "$devkit/bin/python" infra/metrics_check/theirs.py "$out"
python infra/metrics_check/compare.py "$out" "$@"
