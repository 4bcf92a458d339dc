#!/usr/bin/env bash
# Everything that needs a GPU, in one call: correctness against the CPU, then speed. From the repository's root:
#
#   infra/gpu_check.sh                  on a machine with occstream installed
#   WHEELS=wheels infra/gpu_check.sh    on a machine without network: installs from that folder first, and keeps the
#                                       torch that is there
#
# Writes what it finds to $OUT (default gpu-check/): agree.txt, the runs' metrics.jsonl, pictures, summary.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-check}
STEPS=${STEPS:-60}
BATCH=${BATCH:-8}
mkdir -p "$OUT"
if [ -n "${WHEELS:-}" ]; then
  # torch and numpy as they are; everything else from the folder, without resolving against our exact torch pin.
  python -m pip install --no-index --find-links "$WHEELS" --no-deps "$WHEELS"/*.whl
  DS_BUILD_OPS=0 python -m pip install --no-index --no-deps --no-build-isolation -e .
fi
export PYTHONUNBUFFERED=1
occstream doctor | tee "$OUT/doctor.txt" || true

echo "== 1. the same network, weights and batch on CPU, GPU, and GPU with Triton kernels"
python - <<'PY' | tee "$OUT/agree.txt"
import dataclasses
import itertools
from typing import get_args

import torch
from occstream.models import MODELS, build_model, kernels
from occstream.models.b2s import Strategy
from occstream.pretrain.config import load_config
from occstream.pretrain.losses import LossConfig, occupancy_loss
from tests.models.helpers import make_batch, SMALL

assert torch.cuda.is_available(), "no CUDA device"
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
print("device", torch.cuda.get_device_name(0), "torch", torch.__version__)
config = load_config("tests/pretrain/small.yaml", ["model.dropout=0.0"]).model
worst = 0.0
for name, strategy in itertools.product(sorted(MODELS), get_args(Strategy)):
    torch.manual_seed(0)
    settings = dataclasses.replace(config, strategy=strategy, dense_layers=1)
    model = build_model(name, settings, grid=SMALL, num_classes=17, image_size=(32, 64), semantic=True)
    batch, found = make_batch(3, 2 if model.predicts_binary else 3), {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Offsets begin at whole cells, where linear interpolation has a kink and rounding picks the side.
            if key.endswith("offsets.bias"):
                parameter += 0.3
    for device in ("cpu", "cuda", "kernels"):
        kernels.use(device == "kernels")
        place = "cpu" if device == "cpu" else "cuda"
        model = model.to(place).train()
        model.zero_grad()
        moved = batch.to(place)
        loss, _ = occupancy_loss(model(moved), moved, LossConfig())
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        found[device] = (loss.item(), norm.item())
    for device in ("cuda", "kernels"):
        gap = max(abs(a - b) / abs(a) for a, b in zip(found["cpu"], found[device]))
        worst = max(worst, gap)
        print(f"{name} {strategy}: loss and gradient norm cpu {found['cpu']} {device} {found[device]}, gap {gap:.1e}")
assert worst < 1e-3, worst
print("CPU and GPU agree, worst relative gap", worst)
PY

if python -c 'from nvidia import nvimgcodec' 2> /dev/null; then
  echo "== 1b. the same stream with JPEGs decoded by the readers and by the GPU"
  python - <<'PY' | tee "$OUT/decoder.txt"
import tempfile
import time

import torch
from occstream.pretrain.config import load_config
from occstream.pretrain.engine import World
from occstream.pretrain.replay import TrainData
from tests.pretrain.small import pack_small

with tempfile.TemporaryDirectory() as folder:
    pack_small(f"{folder}/data", scenes=6, image_size=[900, 1600])
    found = {}
    for decoder in ("cpu", "nvimagecodec"):
        words = [f"data.url={folder}/data", f"train.decoder={decoder}", "augment.image_size=[256,704]", "train.threads=8"]
        feed = TrainData(load_config("tests/pretrain/small.yaml", words, stage="finetune"), World(0, 1, torch.device("cuda")))
        images = feed.next().images.float()
        began = time.perf_counter()
        for _ in range(40):
            feed.next()
        torch.cuda.synchronize()
        print(f"{decoder}: {160 / (time.perf_counter() - began):.0f} samples/s of 900 x 1600, trained at 256 x 704")
        found[decoder] = images
        feed.close()
    gap = (found["cpu"] - found["nvimagecodec"]).abs().mean().item()
    print(f"mean difference of pixels {gap:.2f} of 255")
    assert gap < 2
PY
fi

echo "== 2. shards"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
occstream shard synthetic scenes=64 frames=4 'image_size=[256,704]' lidar=false --groups cameras,labels \
  --scenes-per-shard 8 --workers "$(nproc)" --out "$WORK/shards"

echo "== 3. r50: pre-training and fine-tuning with replay, fp32 and bf16"
common=(data.url="$WORK/shards" data.holdout=4 eval.batch=2 track.uri= train.steps="$STEPS" train.batch="$BATCH"
  train.log_every=10 train.threads=8 train.warmup=10)
for precision in fp32 bf16; do
  deepspeed --num_gpus 1 launch/pretrain.py --recipe r50 "${common[@]}" train.precision=$precision \
    output="$OUT/pretrain-$precision"
  deepspeed --num_gpus 1 launch/finetune.py --recipe r50 "${common[@]}" train.precision=$precision \
    replay.url="$WORK/shards" replay.holdout=4 train.init="$OUT/pretrain-$precision" output="$OUT/finetune-$precision"
done

echo "== 4. a step, taken apart: the r50 of the paper, and the memory of an offboard step"
occstream bench step --recipe r50 --batch "$BATCH" --repeats 5 --json "$OUT/step-r50.json" | tee "$OUT/step-r50.txt"
occstream bench step --recipe r50-bevformer --batch 2 --json "$OUT/step-bevformer.json" | tee "$OUT/step-bevformer.txt"
occstream bench step --recipe r50-offboard --stage finetune --batch 1 --json "$OUT/step-offboard.json" |
  tee "$OUT/step-offboard.txt"

echo "== 5. summary"
python - "$OUT" <<'PY' | tee "$OUT/summary.txt"
import json, sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
    last = {}
    for line in file.read_text().splitlines():
        last |= json.loads(line).get("metrics", {})
    keys = ("train/loss", "perf/samples_per_s", "perf/step_s_p50", "perf/data_wait_frac", "mem/max_alloc_gib", "eval/binary_iou")
    print(file.parent.name, " ".join(f"{k}={last[k]:.4g}" for k in keys if k in last))
PY
find "$OUT" -name '*.safetensors' -delete  # large, and not what this is about
