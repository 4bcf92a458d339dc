"""Runs training jobs of a JSON file one after the other in one process group: ``worker.py JOBS``, started once per rank."""

import json
import sys

from occstream.pretrain.config import load_config
from occstream.pretrain.engine import init_distributed
from occstream.pretrain.trainer import train

if __name__ == "__main__":
    world = init_distributed(2.0)
    for job in json.loads(open(sys.argv[1]).read()):
        config = load_config(job["recipe"], job["overrides"], stage=job["stage"])
        result = train(config, world)
        if world.is_main:
            (open(f"{config.output}/result.json", "w")).write(json.dumps(result.evaluation.metrics()))
