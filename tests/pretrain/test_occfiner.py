"""Task occfiner beyond what every task is asked for: what it learns, and wrong recipes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from occstream.launch.cli import main
from occstream.models.batch import Batch
from occstream.pretrain.config import load_config
from occstream.pretrain.tasks.registry import task_of
from occstream.sharding.grid import VoxelGrid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.schema import IGNORE
from occstream.sharding.stream import ShardReader
from tests.evaluation.drives import Street, predictions
from tests.pretrain.small import HERE

SMALL = str(HERE / "small-occfiner.yaml")
GRID = VoxelGrid("street", (-6, -6, -1), (6, 6, 1), (0.5, 0.5, 0.5))
STREET = f"grid={','.join(map(str, (*GRID.lower, *GRID.upper, 0.5)))}"


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Manifest:
    url = str(tmp_path_factory.mktemp("refiner") / "data")
    base = pack(Street(scenes=3, grid=GRID), url, groups=("labels",), grid=GRID)
    predictions(url, "pseudo-noise", wrong=0.3)
    return base.with_label_sets(["pseudo-noise"])


def batch_of(config, manifest: Manifest, scenes: list[int]) -> Batch:
    """All frames of scenes, as in evaluation."""
    sample = task_of(config).sample("eval", config.eval, ())
    reader, made, keys = ShardReader(manifest, sample.groups), [], []
    for scene in scenes:
        for index in range(manifest.scenes[scene].frames):
            views = {name: np.empty(f.shape, f.dtype) for name, f in sample.fields().items()}
            frame = reader.window(scene, index, sample.window)
            sample(frame, 0, views)
            made.append(views)
            keys.append(frame.key)
    return Batch.of({name: torch.from_numpy(np.stack([v[name] for v in made])) for name in made[0]}, keys)


@pytest.mark.parametrize("kind", ["dualflow", "explicit"])
def test_a_refiner_learns_to_correct_scenes_that_it_has_not_seen(street, kind):
    config = load_config(SMALL, [STREET, f"model.kind={kind}", "window.references=0"])
    task = task_of(config)
    torch.manual_seed(0)
    model = task.model()
    seen, held_out = batch_of(config, street, [0]), batch_of(config, street, [2])
    before = task.loss(model(held_out), held_out)[0].item()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(8):
        loss, _ = task.loss(model(seen), seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.loss(model(held_out), held_out)[0].item() < 0.97 * before


def test_an_untrained_refiner_predicts_its_input(street):
    config = load_config(SMALL, [STREET])
    task, batch = task_of(config), batch_of(config, street, [0])
    batch.occupancy = None
    found = dict(task.predict(task.model().eval(), [batch], "top2", flips=True))
    for index, key in enumerate(batch.keys):
        assert (found[key].semantic == batch.volumes.classes[index, 0].numpy()).all()
    ranked, logits = found[key].ranked, found[key].logits.astype(np.float32)
    assert ranked.shape == logits.shape == (int(found[key].binary.sum()), 2)
    assert (logits[:, 0] - logits[:, 1] == 3).all()


def test_what_the_truth_does_not_know_is_not_learned(street):
    config = load_config(SMALL, [STREET, "loss.lovasz_sample=0"])
    task, batch = task_of(config), batch_of(config, street, [0])
    outputs = task.model()(batch)
    truth = batch.occupancy.semantic
    batch.occupancy.semantic = torch.where(batch.volumes.classes[:, 0] == truth, truth, IGNORE)
    loss, terms = task.loss(outputs, batch)
    right = -torch.log_softmax(torch.tensor([3.0] + [0.0] * 17), 0)[0]
    assert terms["ce"] == pytest.approx(right.item(), rel=1e-4), "of what is known the input is right"
    batch.occupancy.semantic = torch.full_like(truth, IGNORE)
    loss, _ = task.loss(outputs, batch)
    assert loss.item() == 0


def test_weights_of_classes_weigh(street):
    words = [STREET, "loss.lovasz_weight=0"]
    plain, heavy = (load_config(SMALL, [*words, *more]) for more in ([], ["loss.class_weights.free=0.1"]))
    batch = batch_of(plain, street, [0])
    outputs = task_of(plain).model()(batch)
    free = batch.occupancy.semantic == 17
    counts = task_of(heavy).counts(outputs, batch)
    assert counts["ce"] == pytest.approx((~free).sum().item() + 0.1 * free.sum().item(), rel=1e-6)
    a, b = (task_of(config).loss(outputs, batch)[0] for config in (plain, heavy))
    assert a != b
    with pytest.raises(ValueError, match="class_weights has 'sky', which taxonomy"):
        load_config(SMALL, ["loss.class_weights={sky: 2}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.input="], "data.input is not set: name the label group"),
        (["data.input=labels"], "data.input=labels is the truth itself"),
        (["data.input=pseudo-x"], "has no sidecar group 'pseudo-x'; there are: pseudo-noise"),
        (["grid=tiny"], "labels are on grid"),
    ],
)
def test_wrong_inputs_are_named(street, words, said, tmp_path, capsys):
    from occstream.launch import run

    command = ["--dry-run", "--recipe", SMALL, f"data.url={street.url}", f"output={tmp_path}/run", STREET, *words]
    assert run.main("", command) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_its_recipe_is_printed(capsys):
    assert main(["recipe", "occfiner", "window"]) == 0
    out = capsys.readouterr().out
    assert "window.radius" in out
    assert dataclasses.is_dataclass(load_config("occfiner").window)
