"""Runs training jobs of a JSON file one after the other in one process group: ``worker.py JOBS``, started once per rank."""

import json
import sys
from pathlib import Path

from occstream.pretrain.config import load_config
from occstream.pretrain.engine import init_distributed
from occstream.pretrain.trainer import train

if __name__ == "__main__":
    world = init_distributed(2.0)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(job["recipe"], job["overrides"], stage=job["stage"])
        result = train(config, world)
        if world.is_main:
            Path(config.output, "result.json").write_text(json.dumps(result.evaluation.metrics()))
