"""The code blocks of docs/library.md work as they stand, with a real URL."""

from __future__ import annotations

import re

import pytest

from occstream.pretrain import trainer
from occstream.pretrain.config import load_config
from occstream.pretrain.tasks.registry import import_modules
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import ROOT, pack_small

PAGE = (ROOT / "docs/library.md").read_text()
OPENED, PLAIN, MODEL = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("library") / "data")
    pack_small(url, scenes=3)
    return url


def test_open(url):
    names = {}
    exec(OPENED.replace("URL", url), names)
    first = next(iter(names["again"]))
    assert [frame.key for frame in first] != [frame.key for frame in names["frames"]], "it continues"
    assert len(names["images"]) == 6
    assert names["occupied"].dtype == bool


def test_plain_webdataset(url):
    names = {}
    exec(PLAIN.replace("URL", url), names)
    assert len(names["jpegs"]) == 6
    assert all(jpeg[:2] == b"\xff\xd8" for jpeg in names["jpegs"].values())


def test_a_model_of_ones_own(url, world, tmp_path):  # noqa: F811
    (tmp_path / "my_model.py").write_text(MODEL)
    import_modules([str(tmp_path / "my_model.py")])
    recipe = tmp_path / "my.yaml"
    recipe.write_text("grid: tiny\nmodel_name: my_model\naugment: {image_size: [32, 88]}\ndata: {holdout: 1}\n")
    words = [f"data.url={url}", "train.steps=2", "train.batch=2", "track.uri=", "eval.pictures=0"]
    pre = load_config(str(recipe), [*words, f"output={tmp_path}/pre"], stage="pretrain")
    assert trainer.train(pre, world).evaluation.binary_iou >= 0
    more = [f"output={tmp_path}/fine", f"train.init={tmp_path}/pre", f"replay.url={url}"]
    fine = trainer.train(load_config(str(recipe), [*words, *more], stage="finetune"), world)
    assert fine.evaluation.miou >= 0
