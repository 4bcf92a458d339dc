"""Unknown is not free: what a label set does not know enters neither loss nor metric, for every source."""

import dataclasses

import numpy as np
import pytest
import torch

from occstream.evaluation.evaluate import evaluate
from occstream.evaluation.occupancy import OccupancyMetric, OccupancyResult
from occstream.models import Batch, OccOutputs
from occstream.pretrain import checkpoint
from occstream.pretrain.augment import AugmentConfig
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.losses import LossConfig
from occstream.pretrain.samples import FrameFiller
from occstream.pretrain.streams import EvalData, TrainData
from occstream.pretrain.tasks.b2s import B2SRecipe
from occstream.pretrain.tasks.occupancy import unknown_share
from occstream.pretrain.tracking import read_events
from occstream.sharding.grid import get_grid
from occstream.sharding.labelconfig import LabelConfig
from occstream.sharding.labels import Labeler
from occstream.sharding.pack import pack
from occstream.sharding.schema import IGNORE, Scene
from occstream.sharding.sources import open_source
from tests.models.helpers import occupancy_loss
from tests.pretrain.inprocess import train, world  # noqa: F401
from tests.pretrain.small import RECIPE, pack_small
from tests.sharding import layouts
from tests.sharding.toy import ToySource

SETS = [(name, i) for name, writers in layouts.LAYOUTS.items() for i in range(len(writers))]
# Share of the voxels that the layouts of the tests leave unknown.
UNKNOWN = {
    ("nuscenes", 1): 0.5,
    ("nuscenes", 2): 1 / get_grid("openoccupancy").size,
    ("nuscenes", 3): 1 / get_grid("surroundocc").size,
    ("occ3d", 0): 0.5,
    ("openscene", 0): 0.0,
    ("semantickitti", 0): 3 / get_grid("semantickitti").size,
    ("sscbench", 0): 3 / get_grid("semantickitti").size,
}


def filled(frame, grid, taxonomy, **settings) -> dict[str, np.ndarray]:
    """The arrays of a sample without images (so the frame of the grid does not matter)."""
    grid = dataclasses.replace(grid, frame="ego")
    filler = FrameFiller(AugmentConfig(image_size=(32, 32)), (), grid, taxonomy, seed=0, train=False, **settings)
    views = {name: np.zeros(shape, kind) for name, (shape, kind, _) in filler.fields().items()}
    filler(frame, 0, views)
    return views


@pytest.mark.parametrize(("name", "number"), SETS)
def test_unknown_voxels_are_invalid_by_default(name, number, tmp_path):
    source = open_source(name, layouts.LAYOUTS[name][number](tmp_path))
    scene, grid = source.load(source.scene_names()[0]), source.grid
    if grid is None:  # no labels of its own: made from LiDAR, which sees little
        grid = get_grid("tiny")
        scene = Labeler(grid, source.taxonomy.name, LabelConfig(level=False))(Scene(scene.name, scene.frames[:1]))
    frame = scene.frames[0]
    known = frame.labels.known()
    semantic = frame.labels.semantic is not None
    views = filled(frame, grid, source.taxonomy, semantic=semantic)
    np.testing.assert_array_equal(views["occupancy.binary_valid"], known)
    if semantic:
        assert (views["occupancy.semantic"][~known] == IGNORE).all()
    if (name, number) in UNKNOWN:
        assert 1 - known.mean() == pytest.approx(UNKNOWN[name, number], abs=1e-12)
    elif frame.labels.mask_lidar is not None:
        assert not known.all()
    everything = filled(frame, grid, source.taxonomy, semantic=semantic, mask="none")
    assert everything["occupancy.binary_valid"].all()


def test_the_default_is_auto_everywhere():
    config = B2SRecipe()
    assert (config.data.mask, config.replay.mask, config.eval.mask) == ("auto", "auto", "auto")
    for recipe in ("r50-openscene", "r50-offboard", "a100-openscene"):
        config = load_config(recipe, [], stage="finetune")
        assert {config.data.mask, config.replay.mask if recipe != "r50-offboard" else "auto", config.eval.mask} == {
            "auto"
        }
    more = load_config(RECIPE, ["replay.more=[{url: x}]"], stage="finetune").replay.more
    assert more[0].mask == "auto"


@dataclasses.dataclass(frozen=True)
class Blind(ToySource):
    """Labels that know a quarter of the voxels, and call the others free."""

    def load(self, name):
        scene = super().load(name)
        for frame in scene.frames:
            labels = frame.labels
            known = np.zeros(labels.binary.shape, bool)
            known[: len(known) // 4] = True
            labels.mask_lidar, labels.mask_camera = known, known
            labels.binary, labels.semantic = (
                labels.binary & known,
                np.where(known, labels.semantic, 17).astype(np.uint8),
            )
            labels.flow = labels.logits = labels.ranked = None
        return scene


def test_neither_loss_nor_metric_sees_them():
    frame = Blind().load("toy-0").frames[0]
    source = ToySource()
    arrays = filled(frame, source.grid, source.taxonomy)
    batch = Batch.of({n: torch.from_numpy(a)[None] for n, a in arrays.items()}, ["toy-0-0000"])
    unknown = torch.from_numpy(~frame.labels.known())[None]
    shape = tuple(batch.occupancy.binary.shape)
    scores = []
    for value in (-9.0, 9.0):  # what is said of unknown voxels
        binary = torch.zeros(shape).masked_fill(unknown, value).requires_grad_()
        semantic = torch.zeros(1, 17, *shape[1:]).masked_fill(unknown[:, None], value).requires_grad_()
        outputs = OccOutputs(binary, semantic)
        loss, _ = occupancy_loss(outputs, batch, LossConfig())
        loss.backward()
        assert binary.grad[unknown].abs().max() == 0
        assert semantic.grad.movedim(1, -1)[unknown].abs().max() == 0
        assert binary.grad.abs().max() > 0
        result = evaluate(_Says(outputs), [batch], OccupancyMetric(source.taxonomy))
        scores.append((loss.item(), result.iou, result.binary_iou))
    assert scores[0] == scores[1]


class _Says(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, batch):
        return self.outputs


def test_what_a_setting_counts_is_measured_and_said(tmp_path):
    url = str(tmp_path / "data")
    manifest = pack(Blind(), url)
    scenes = range(len(manifest.scenes))
    assert unknown_share(manifest, scenes, "auto") is None
    assert unknown_share(manifest, scenes, "lidar") is None
    assert unknown_share(manifest, scenes, "camera") == 0
    assert unknown_share(manifest, scenes, "none") == 0.75
    words = [f"data.url={url}", "grid=-4,-4,-1,4,4,1,1", "data.mask=none", "eval.mask=none", "train.batch=1"]
    config = load_config(RECIPE, words, stage="finetune")
    alone = World(0, 1, torch.device("cpu"))
    data, held_out = TrainData(config, alone), EvalData(config, alone)
    assert data.unknown == {"data.mask": 0.75}
    assert data.notes == [
        "data.mask=none: 75.0 % of the voxels that count are unknown to the labels; data.mask=auto leaves them out"
    ]
    assert held_out.unknown == 0.75
    assert held_out.notes[0] == "eval.convention=auto: occ3d, inferred from taxonomy occ3d"
    assert held_out.notes[1].startswith("eval.mask=none: 75.0 %")
    other = EvalData(load_config(RECIPE, [*words, "eval.convention=openscene"], stage="finetune"), alone)
    assert (other.scoring.metric().convention, held_out.scoring.metric().convention) == ("openscene", "occ3d")
    assert other.notes[0].startswith("eval.convention=openscene: the labels' own is occ3d")
    result = OccupancyResult(1, binary_iou=50.0, mask="none", unknown=held_out.unknown)
    assert result.summary() == "binary IoU 50.00 (convention occ3d, mask none, 75.0 % unknown voxels counted)"
    assert result.metrics()["eval/unknown_share"] == 75
    assert "eval/unknown_share" not in OccupancyResult(1, binary_iou=50.0).metrics()


def test_a_run_says_it_once_and_keeps_it(tmp_path, world, capsys):  # noqa: F811
    pack_small(str(tmp_path / "data"), scenes=2, lidar=True)
    words = [
        "data.mask=none",
        "eval.mask=none",
        "train.steps=2",
        "train.batch=2",
        "model.strategy=offboard",
        "model.cap=4608",
    ]
    result = train(world, "finetune", tmp_path / "data", tmp_path / "run", *words)
    said = capsys.readouterr().out
    assert said.count("data.mask=none: ") == said.count("eval.mask=none: ") == 1
    share = checkpoint.Checkpoint(tmp_path / "run").state["unknown_share"]["data.mask"]
    assert 0.05 < share < 0.95
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    [run] = [e["run"] for e in events if "run" in e]
    assert float(run["params"]["unknown_share.data.mask"]) == share
    scores = {k: v for e in events for k, v in e.get("metrics", {}).items()}
    assert scores["eval/unknown_share"] == 100 * result.evaluation.unknown > 0
    assert result.evaluation.convention == "occ3d"
