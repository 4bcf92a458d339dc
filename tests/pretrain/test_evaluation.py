"""What an evaluation counts: every frame that can be read, once."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from occstream.evaluation.evaluate import evaluate
from occstream.evaluation.occupancy import OccupancyMetric
from occstream.models.batch import OccOutputs
from occstream.pretrain import trained
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.samples import FrameFiller
from occstream.pretrain.streams import EvalData
from occstream.pretrain.tasks import b2s
from occstream.sharding.codec import IncompleteSample
from occstream.sharding.schema import IGNORE
from tests.pretrain.small import RECIPE, pack_small


class Says(torch.nn.Module):
    """All free, but for one frame, which is all of class 3."""

    def __init__(self, key: str):
        super().__init__()
        self.keys = (key, "")

    def forward(self, batch):
        logits = torch.full((batch.labeled, 17, *batch.occupancy.binary.shape[1:]), -9.0)
        for index, key in enumerate(batch.keys):
            logits[index, 3] = 9.0 if key in self.keys else -9.0
        return OccOutputs(None, logits)


def test_a_frame_that_cannot_be_read_is_left_out_and_no_other_counts_twice(tmp_path, monkeypatch, capsys):
    pack_small(str(tmp_path / "data"), scenes=2)
    config = load_config(RECIPE, [f"data.url={tmp_path / 'data'}", "eval.batch=2"], stage="finetune")
    held_out = EvalData(config, World(0, 1, torch.device("cpu")))
    whole = [batch.clone() for batch in held_out]
    lost, other, *_ = [key for batch in whole for key in batch.keys]
    for batch in whole:
        if lost in batch.keys:
            batch.occupancy.binary_valid[batch.keys.index(lost)] = False
            batch.occupancy.semantic[batch.keys.index(lost)] = IGNORE
    right = evaluate(Says(other), whole, OccupancyMetric(config.classes))

    call = FrameFiller.__call__

    def fill(self, frame, epoch, views):
        if frame.key == lost:
            raise IncompleteSample(f"frame {lost}: camera CAM_BACK is missing")
        return call(self, frame, epoch, views)

    monkeypatch.setattr(FrameFiller, "__call__", fill)
    drawer = trained.Drawer(config, held_out.sensors, scenes=5, folder=tmp_path, step=0)
    drawn = []
    monkeypatch.setattr(b2s, "prediction_picture", lambda path, *_, **words: drawn.append(path.name))
    found = trained.evaluate_on(Says(other), held_out, drawer)
    assert (found.frames, found.left_out) == (held_out.total - 1, 1)
    assert (found.iou, found.per_class["bus"]) == (right.iou, right.per_class["bus"])
    assert found.summary().endswith("; without 1 more that cannot be read")
    assert found.metrics()["eval/frames_left_out"] == 1
    assert "eval/frames_left_out" not in right.metrics()
    assert [name.partition("-step")[0] for name in drawn] == [other]
    assert f"replaced incomplete sample: frame {lost}" in capsys.readouterr().out


@pytest.mark.parametrize(("movie", "drawn"), [(False, ["a-0000"]), (True, ["a-0000", "a-0001"])])
def test_a_movie_draws_every_frame_of_the_first_scenes(tmp_path, movie, drawn):
    config = load_config(RECIPE, ["data.url=nowhere"], stage="finetune")
    drawer = trained.Drawer(config, (), scenes=1, folder=tmp_path, step=7, movie=movie)

    def draw(path, *_, **words):
        for part in ("", "-panoptic"):
            Image.new("RGB", (8, 8), "red" if part else "blue").save(path.with_stem(f"{path.stem}{part}"))
        return True

    drawer.task.draw, drawer.task.movie = draw, "-panoptic"
    for keys in (["a-0000", "a-0001"], ["b-0000", ""]):
        drawer(SimpleNamespace(keys=keys), None)
    assert [path.name.partition("-step")[0] for path in drawer.done] == drawn
    written = drawer.animations()
    assert [path.name for path in written] == (["a-step-00000007.gif"] if movie else [])
    for path in written:
        found = Image.open(path)
        assert found.convert("RGB").getpixel((4, 4)) == (255, 0, 0)
