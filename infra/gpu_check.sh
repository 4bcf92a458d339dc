#!/usr/bin/env bash
# Everything that needs a GPU, in one call of about ten minutes: each section says what it expects and what it found, none
# stops the others, and a table of all comes last. From a checkout:
#
#   infra/gpu_check.sh                  on a machine with occstream installed and one CUDA GPU
#   WHEELS=wheels infra/gpu_check.sh    on a machine without network: installs from that folder first, and keeps the
#                                       torch that is there
#   infra/gpu_check.sh --dry            every section on the CPU at the smallest size: shows that the check works
#   infra/gpu_check.sh --only zero,waits    some of them; --list names them
#
# Writes logs, tables and traces to $OUT (default gpu-check/).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${WHEELS:-}" ]; then
  # torch and numpy as they are; everything else from the folder, without resolving against our exact torch pin.
  python -m pip install --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl
  DS_BUILD_OPS=0 python -m pip install --no-index --no-deps --no-build-isolation -e .
fi
export PYTHONUNBUFFERED=1 DS_BUILD_OPS=0
exec python infra/gpu_check/run.py "$@"
