"""Task panoocc beyond what every task is asked for: ZeRO, its recipes, its stages, and wrong recipes."""

from __future__ import annotations

import math
import re

import pytest
import torch

from occstream.launch.cli import main
from occstream.models.panoocc import PanoOcc
from occstream.pretrain.config import load_config
from occstream.pretrain.engine import build_engine
from occstream.pretrain.tasks.panoocc import PanoOccTask
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding.manifest import Manifest
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import HERE, losses, run_jobs

SMALL = str(HERE / "small-panoocc.yaml")


def task(*words: str, stage: str = "finetune") -> PanoOccTask:
    return task_of(load_config(SMALL, [f"stage={stage}", *words]))


# Of all that is made here nothing is pruned: which voxels are kept may turn on the last digit of a score.
SPARSE = ["model.decoder=sparse", "model.submanifold=true", "model.keep=[1, 1]"]


@pytest.mark.slow
@pytest.mark.parametrize(("learned", "decoder"), [("true", []), ("false", []), ("false", [*SPARSE, "optim.lr=1e-4"])])
def test_a_partitioned_network_learns_the_same(world, learned, decoder):  # noqa: F811
    """Also where modules run twice a step, once without gradients."""
    found = []
    for zero in (0, 3):
        words = [f"train.zero_stage={zero}", "train.batch=2", "optim.lr=1e-3", f"model.past_gradient={learned}"]
        of = task(*words, *decoder)
        batch = of.synthetic_batch(1, 1)
        batch.history.exists[0, 1] = False
        torch.manual_seed(0)
        engine = build_engine(of.model().train(), of.config, world)
        found.append([])
        for _ in range(3):
            loss, _ = of.loss(engine(batch), batch)
            found[-1].append(loss.item())
            engine.backward(loss)
            engine.step()
    assert found[0][0] != found[0][2]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.process
def test_two_processes_train_at_every_zero_stage_and_resume_at_another(root, tmp_path):
    """One of them has no labeled frame, and either of them often none with a past."""
    jobs = []
    for learned, stages in (("true", (1, 2)), ("false", (3, 0))):
        words = [f"data.url={root}/data", f"replay.url={root}/data", "train.batch=1", "replay.batch=3", "eval.scenes=1"]
        words += [f"output={tmp_path}/{learned}", "eval.pictures=0", f"model.past_gradient={learned}"]
        words += ["heads=voxels", "eval.points=false"]  # the data has no sweeps
        words += [*SPARSE, "model.keep=[0.3, 0.5]"] if learned == "false" else []
        for steps, zero in zip((1, 2), stages):
            overrides = [*words, f"train.steps={steps}", f"train.zero_stage={zero}", "optim.schedule=constant"]
            jobs.append({"recipe": SMALL, "stage": "finetune", "overrides": overrides})
    run_jobs(jobs, 2, tmp_path / "log")
    for learned in ("true", "false"):
        found = losses(tmp_path / learned)
        assert sorted(found) == [1, 2]
        assert all(math.isfinite(v) for step in found.values() for v in step.values())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["panoocc-tiny", "panoocc-small", "panoocc-base", "panoocc-occ3d"])
def test_recipes_serve_every_stage(name, stage):
    of = task_of(load_config(name, [], stage=stage))
    with torch.device("meta"):
        model = of.model()
    expected = set(of.transfer(model).expected)
    own = {key for key in model.state_dict() if key.startswith(PanoOcc.SEMANTIC)}
    assert expected == set(model.state_dict()) - own
    assert bool(own) == (stage == "finetune")
    fine = {"panoocc-occ3d": (200, 200, 16), "panoocc-tiny": (48, 48, 8)}.get(name, (200, 200, 32))
    assert of.config.model.fine == fine


def test_sizes_are_those_that_the_paper_counts():
    """10.24 M of queries (Sec. 4.2); 7.08 M and 1.77 M of the fusion's convolutions; an up-sampler of about 2.7 M (Table 6)."""
    with torch.device("meta"):
        model = task_of(load_config("panoocc-small", [])).model()
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    assert model.views.queries.numel() == 10_240_000
    assert [
        conv.weight.numel() for conv in (model.temporal.blocks[0].first[0], model.temporal.blocks[0].second[0])
    ] == [
        27 * 1024 * 256,
        27 * 256 * 256,
    ]
    assert count(model.decoder) == pytest.approx(2.43, abs=0.02)
    assert len(model.views.layers[0].planes) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.class_weights.cra=2"], "loss.class_weights has 'cra', which taxonomy 'occ3d' has not"),
        (["data.interval=0"], "interval is 0, must be 1 to 50 key-frames"),
        (["model.queries=[6, 6, 3]"], "is not whole times as fine as the decoder's (24, 24, 6)"),
        (["model.feature_levels=5"], "5 levels of image features from stride 8 on; need 1 or more, up to stride 64"),
        (["model.decoder=sparse"], "keep has 3 numbers, must have one for each of 2 levels"),
        (["model.upsample=[[2, 2, 1]]"], "upsample has 1 levels and upsample_channels 2"),
        (["stage=pretrain", "loss.binary_weight=0"], "loss.binary_weight is 0, and stage pretrain learns nothing else"),
    ],
)
def test_wrong_recipes_are_named(words, said):
    def build():
        of = task(*words)
        of.check(of.model())

    with pytest.raises(ValueError, match=re.escape(said)):
        build()


def test_predictions_of_pre_training_are_refused():
    with pytest.raises(ValueError, match="predicts no classes; give a fine-tuned one"):
        task(stage="pretrain").check_prediction()


def test_its_keys_are_explained(capsys):
    assert main(["recipe", "panoocc-small", "model"]) == 0
    said = capsys.readouterr().out
    assert "model.past_gradient" in said
    assert "model.queries" in said


def test_classes_of_voxels_alone_are_scored_without_boxes(root):
    of = task("heads=voxels", "eval.points=false")
    batch = of.synthetic_batch(1, 0)
    assert batch.boxes is None
    metric = of.scoring(Manifest.load(f"{root}/data"), None).metric()
    metric.update(of.model().eval()(batch), batch)
    assert set(metric.result().headline) == {"binary_iou", "iou", "miou"}
