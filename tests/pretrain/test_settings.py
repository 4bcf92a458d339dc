"""Settings that no other test turns: each does what its explanation says."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from occstream.models import build_model
from occstream.models.batch import OccOutputs
from occstream.pretrain import networks, trained
from occstream.pretrain.augment import image_affine, scene_flips
from occstream.pretrain.checkpoint import Checkpoint
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.ema import Ema
from occstream.pretrain.samples import FrameFiller
from occstream.pretrain.streams import EvalData, TrainData
from occstream.pretrain.tasks import b2s
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.tracking import read_events
from occstream.sharding.manifest import Manifest
from occstream.sharding.stream import ShardReader
from tests.models.helpers import SMALL, make_batch, occupancy_loss
from tests.pretrain.inprocess import train, world  # noqa: F401  a fixture
from tests.pretrain.small import RECIPE, pack_small

ALONE = World(0, 1, torch.device("cpu"))


def config(*words: str, stage: str = "finetune"):
    return load_config(RECIPE, list(words), stage=stage)


def network(*words: str, semantic: bool = True, seed: int = 0):
    c = config(*words)
    torch.manual_seed(seed)
    return build_model(c.model_name, c.model, grid=SMALL, num_classes=17, image_size=(32, 64), semantic=semantic).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("settings") / "data")
    pack_small(url, scenes=6)
    return url


# Augmentation


def affines(*words: str, count: int = 200) -> np.ndarray:
    still = ["augment.resize=[0, 0]", "augment.rotate=0", "augment.flip=false"]
    augment = config(*still, *words).augment
    return np.stack([image_affine(np.random.default_rng(n), (176, 99), augment) for n in range(count)])


def test_images_are_mirrored_half_of_the_time_or_never():
    assert 0.4 < (affines("augment.flip=true")[:, 0, 0] < 0).mean() < 0.6
    assert (affines()[:, 0, 0] > 0).all()


def test_images_are_rotated_up_to_so_many_degrees():
    found = affines("augment.rotate=10")
    angles = np.degrees(np.arctan2(found[:, 1, 0], found[:, 0, 0]))
    assert np.abs(angles).max() < 10
    assert angles.min() < -9
    assert angles.max() > 9
    assert np.abs(affines()[:, 1, 0]).max() == 0


@pytest.mark.parametrize("width", [176, 352])
def test_resize_jitter_is_added_to_the_factor_or_a_share_of_it(width):
    def factors(*words):
        augment = config("augment.rotate=0", "augment.flip=false", *words).augment
        drawn = [image_affine(np.random.default_rng(n), (width, 792), augment)[1, 1] for n in range(300)]
        return np.array(drawn) - 88 / width

    added = factors("augment.resize=[-0.06, 0.11]")
    assert (added.min(), added.max()) == pytest.approx((-0.06, 0.11), abs=0.004), "whatever the image's size"
    shares = factors("augment.resize=[-0.136, 0.25]", "augment.resize_relative=true") / (88 / width)
    assert (shares.min(), shares.max()) == pytest.approx((-0.136, 0.25), abs=0.008)


def test_a_range_that_leaves_nothing_of_an_image_is_named():
    with pytest.raises(ValueError, match=r"augment\.resize .* leaves nothing of an image 1760 pixels wide"):
        [
            image_affine(np.random.default_rng(n), (1760, 990), config("augment.resize=[-0.9, -0.8]").augment)
            for n in range(9)
        ]


@pytest.mark.parametrize("axis", [0, 1])
def test_scenes_are_mirrored_along_the_axes_that_are_asked_for(axis):
    augment = config(["augment.flip_x=false", "augment.flip_y=false"][1 - axis]).augment
    drawn = np.array([scene_flips(np.random.default_rng(n), augment) for n in range(100)])
    assert 0.3 < drawn[:, axis].mean() < 0.7
    assert not drawn[:, 1 - axis].any()


def test_augmentation_can_be_off(data):
    def first(*words):
        stream = TrainData(config(f"data.url={data}", *words), ALONE)
        try:
            return stream.next().clone()
        finally:
            stream.close()

    moved, still = first(), first("augment.enabled=false")
    assert moved.keys == still.keys
    assert torch.equal(still.scene_aug, torch.eye(3).expand(4, 3, 3))
    assert torch.equal(still.cameras.post_rot, still.cameras.post_rot[:1, :1].expand_as(still.cameras.post_rot))
    assert not torch.equal(moved.cameras.post_rot, still.cameras.post_rot)


# Data


def test_the_binary_target_can_be_that_of_the_semantic_labels(data):
    """Labels whose two halves differ, so that it shows which one is read."""
    manifest = Manifest.load(data)
    reader = ShardReader(manifest, ("cameras", "labels"))
    frame = reader.frame(0, 0)
    reader.close()
    frame.labels.binary[:] = False
    for word, want in (("semantic", frame.labels.semantic != 17), ("labels", frame.labels.binary)):
        c = config(f"data.binary_from={word}")
        filler = FrameFiller(
            c.augment,
            tuple(frame.cameras),
            manifest.grid,
            c.classes,
            seed=0,
            train=False,
            binary_from=c.data.binary_from,
        )
        views = {name: np.zeros(shape, dtype) for name, (shape, dtype, _) in filler.fields().items()}
        filler(frame, 0, views)
        np.testing.assert_array_equal(views["occupancy.binary"], want)


def scenes_of(data, *words, replay=False):
    words = [
        f"data.url={data}",
        "data.holdout=0",
        *([f"replay.url={data}", "replay.holdout=0"] if replay else []),
        *words,
    ]
    return TrainData(config(*words), ALONE).scenes


def test_seeds_of_subsets_choose_other_scenes(data):
    """Of the labeled data, of the replayed data, and of each further source of it."""
    plain = scenes_of(data, "data.scenes=2")
    others = [scenes_of(data, "data.scenes=2", f"data.subset_seed={n}") for n in range(1, 5)]
    assert all(len(other) == 2 for other in others)
    assert any(other != plain for other in others)
    base = ["data.scenes=1", "replay.scenes=1"]
    seen = [scenes_of(data, *base, f"replay.subset_seed={n}", replay=True) for n in range(6)]
    assert len({frozenset(s) for s in seen}) > 1
    assert {len(s) for s in seen} <= {1, 2}


def test_further_sources_of_replay_have_settings_of_their_own(data, tmp_path):
    more = str(tmp_path / "more")
    pack_small(more, scenes=4, seed=3)
    words = [f"data.url={data}", f"replay.url={data}", "data.scenes=1", "replay.batch=4"]
    words += [f"replay.more=[{{url: {more}, weight: 3, scenes: 2, draw: 1, subset_seed: 1, holdout: 1, mask: none}}]"]
    stream = TrainData(config(*words), ALONE)
    other = Manifest.load(more)
    chosen = {other.scenes[i].name for i in other.subset(2, 1, 1)}
    assert {name for name in stream.scenes if "-s3-" in name} == chosen
    feed = stream._feeds["replay-1"]
    assert len(feed.order.epoch_scenes(0)) == 1
    keys = [key for _ in range(2) for key in stream.next().keys]
    stream.close()
    assert sum("-s3-" in key for key in keys) == 6, "three of four"


@pytest.mark.parametrize(
    "word", ["data.labels=labels-x", "replay.labels=labels-x", "replay.more=[{url: DATA, labels: labels-x}]"]
)
def test_labels_that_were_never_attached_are_named(data, word):
    words, word = [f"data.url={data}", f"replay.url={data}"], word.replace("DATA", data)
    with pytest.raises(ValueError, match="labels-x"):
        TrainData(config(*words, word), ALONE)


def test_what_is_evaluated_on_can_be_chosen(data, tmp_path):
    other = str(tmp_path / "other")
    pack_small(other, scenes=4, seed=2)
    assert len(EvalData(config(f"data.url={data}"), ALONE).scenes) == 1
    whole = EvalData(config(f"data.url={data}", f"eval.url={other}"), ALONE)
    assert whole.scenes == {s.name for s in Manifest.load(other).scenes}
    part = EvalData(config(f"data.url={data}", f"eval.url={other}", "eval.holdout=2"), ALONE)
    held = Manifest.load(other)
    assert part.scenes == {held.scenes[i].name for i in held.held_out(2)}
    name = held.scenes[3].name
    assert EvalData(config(f"eval.url={other}", f"eval.scene_names=[{name}]"), ALONE).scenes == {name}


def test_replayed_frames_have_a_mask_of_their_own(data):
    """The labels' own mask of cameras hides voxels of B frames alone."""
    words = [f"data.url={data}", f"replay.url={data}", "data.mask=none", "replay.mask=camera"]
    stream = TrainData(config(*words), ALONE)
    batch = stream.next()
    s = batch.labeled
    hidden = (~batch.occupancy.binary_valid).flatten(1).any(1)
    assert not hidden[:s].any()
    assert hidden[s:].all()
    stream.close()


def test_the_class_threshold_decides_in_evaluations_pictures_and_predictions(data, monkeypatch, tmp_path):
    """A network that says every voxel is of class 3 with probability 0.4."""
    c, seen = config(f"data.url={data}", "eval.threshold=0.5"), []
    held_out = EvalData(c, ALONE)

    class Says(torch.nn.Module):
        def forward(self, batch):
            logits = torch.full((batch.labeled, 17, *batch.occupancy.binary.shape[1:]), -9.0)
            logits[:, 3] = math.log(0.4 / 0.6)
            return OccOutputs(None, logits)

    def bus(threshold):
        found = config(f"data.url={data}", f"eval.threshold={threshold}")
        return trained.evaluate_on(Says(), EvalData(found, ALONE))

    assert bus(0.5).iou == 0, "all free"
    assert bus(0.3).iou > 0
    monkeypatch.setattr(b2s, "prediction_picture", lambda *_, **words: seen.append(words["threshold"]))
    drawer = trained.Drawer(c, held_out.sensors, scenes=1, folder=tmp_path, step=0)
    for batch in held_out:
        drawer(batch, Says()(batch))
    assert seen == [0.5]


# Losses and optimizer


def test_focal_loss_weighs_positives_by_alpha_and_the_easy_by_gamma():
    batch = make_batch(1, 1)
    batch.occupancy.semantic[:] = 0
    logit = 1.0
    logits = torch.full((1, 17, *SMALL.shape), -30.0)
    logits[:, 0] = logit  # the right class, not yet sure; all others are surely absent
    outputs = OccOutputs(None, logits)
    p = 1 / (1 + math.exp(-logit))
    for alpha, gamma in ((0.25, 2.0), (0.6, 2.0), (0.25, 0.5)):
        loss, _ = occupancy_loss(outputs, batch, config(f"loss.alpha={alpha}", f"loss.gamma={gamma}").loss)
        assert float(loss) == pytest.approx(alpha * (1 - p) ** gamma * -math.log(p), rel=1e-4)


def test_averages_decay_as_they_are_told():
    module = torch.nn.Linear(1, 1, bias=False)
    c = config("train.ema_decay=0.5", "train.ema_start=1000000").train
    torch.nn.init.zeros_(module.weight)
    ema = Ema(module, c)
    torch.nn.init.ones_(module.weight)
    ema.update()
    assert float(ema.values["weight"]) == pytest.approx(0.5, abs=1e-3)
    early = Ema(torch.nn.Linear(1, 1), config("train.ema_start=0").train)
    assert early.updates == 0


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory, world):  # noqa: F811
    """Short runs by name."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {
        "plain": [],
        "no-ema": ["train.ema=false"],
        "other-seed": ["train.seed=1"],
        "decay": ["optim.weight_decay=0.9"],
        "tagged": ["track.tags.arm=a", "track.axes={scenes: 5}", "train.profile=1", "train.steps=12", "eval.scenes=1"],
        "epochs": ["train.steps=null", "train.epochs=0.5"],
    }
    results = {}
    for name, words in jobs.items():
        base = ["train.steps=2", "optim.lr=0.01", "optim.warmup=0"]
        results[name] = train(world, "pretrain", data, folder / name, *base, *words)
    return folder, results


def weights(folder, name, kind="model"):
    return Checkpoint(folder / name).tensors(kind)


def test_a_run_without_averages_saves_and_evaluates_the_weights(runs):
    folder, _ = runs
    assert weights(folder, "plain", "ema")
    assert not weights(folder, "no-ema", "ema")
    plain, none = weights(folder, "plain"), weights(folder, "no-ema")
    assert all(torch.equal(plain[key], none[key]) for key in plain), "averaging changes no step"


def test_a_seed_makes_other_weights_and_another_order(runs):
    folder, results = runs
    assert results["plain"].loss != results["other-seed"].loss
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(folder, "plain").values(), weights(folder, "other-seed").values())
    )


def test_weight_decay_shrinks_weights(runs):
    folder, _ = runs
    plain, small = (weights(folder, name)["binary_head.weight"].abs().sum() for name in ("plain", "decay"))
    assert float(small / plain) == pytest.approx((1 - 0.01 * 0.9) ** 2 / (1 - 0.01 * 0.01) ** 2, abs=5e-3)


def test_epochs_are_passes_over_the_data(runs):
    _, results = runs
    assert results["epochs"].steps == math.ceil(0.5 * 15 / 4)  # five scenes of three frames, four to a step


def test_tags_axes_and_a_profile_are_in_the_runs_folder(runs):
    folder, _ = runs
    events = list(read_events(folder / "tagged" / "metrics.jsonl"))
    assert any(e.get("metrics", {}).get("axis/scenes") == 5 for e in events)
    assert "arm" in json.dumps(events) or "arm: a" in (folder / "tagged/config.yaml").read_text()
    assert (folder / "tagged/profile.json.gz").stat().st_size > 0
    assert "aten::" in (folder / "tagged/profile.txt").read_text()


def test_only_the_image_encoder_is_compiled_and_only_on_cuda(monkeypatch):
    model, compiled = network(), []
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled.append(f) or f)
    c = config("train.compile=true").train
    levels = model.images.levels
    assert c.compile
    for kind, count in (("cpu", 0), ("cuda", 1)):
        networks.accelerate(model, types.SimpleNamespace(type=kind), False, compiled=task_of(config()).compile)
        assert len(compiled) == count
    assert compiled == [levels]


# The network


def test_the_backbone_its_stride_and_its_weights(tmp_path):
    small, large = network(), network("model.backbone=resnet34")
    assert len(large.images.state_dict()) > len(small.images.state_dict())
    with torch.no_grad():
        for stride in (8, 16, 32):
            features = network(f"model.feature_stride={stride}").images(torch.zeros(1, 3, 32, 64))
            assert features.shape[-2:] == (32 // stride, 64 // stride)
    path = tmp_path / "weights.safetensors"
    save_file({f"resnet.{k}": v for k, v in network(seed=1).images.body.state_dict().items()}, path)
    loaded, other = network(f"model.backbone_weights={path}"), network(seed=1)
    for key, value in other.images.body.state_dict().items():
        torch.testing.assert_close(loaded.images.body.state_dict()[key], value)


def test_pixels_are_normalized_by_mean_and_deviation():
    batch = make_batch(1, 0)
    seen = []
    model = network("model.pixel_mean=[10, 20, 30]", "model.pixel_std=[2, 4, 5]", semantic=False)
    model.images.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(batch)
    want = (batch.cameras.images[0].float() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
        [2.0, 4, 5]
    ).view(3, 1, 1)
    torch.testing.assert_close(seen[0], want)


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("model.depth_blocks=2", "lift.splat."),
        ("model.depth_aspp=true", "lift.splat."),
        ("model.volume_block=true", "lift.raw."),
        ("model.encoder_blocks=[1, 3]", "lift.encoder."),
    ],
)
def test_parts_of_the_lift_are_there_or_not(word, part):
    plain, more = (set(network(*words).state_dict()) for words in ([], [word]))
    assert [k for k in more - plain if k.startswith(part)]
    assert all(k.startswith(part) for k in more ^ plain)
    with torch.no_grad():
        assert network(word)(make_batch(1, 1)).semantic_logits.isfinite().all()


@pytest.mark.parametrize(("word", "absent"), [("model.depth_aspp=false", "aspp"), ("model.volume_block=false", "raw.")])
def test_parts_of_the_lift_can_be_left_out(word, absent):
    assert not [k for k in network(word).lift.state_dict() if absent in k]


def test_strides_of_the_volume_encoder():
    sizes = []
    for strides in ("[2, 2]", "[1, 2]"):
        encoder, seen = network(f"model.encoder_strides={strides}").lift.encoder, []
        for module in encoder.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.shape[2]))
        with torch.no_grad():
            encoder(torch.zeros(1, 16, 16, 16, 4), (4, 4, 4))
        sizes.append(sorted({n for n in seen if n > 4} | {min(seen)}))
    assert [size[-1] for size in sizes] == [8, 16]


def test_the_binary_volume_has_so_many_grid_voxels_to_each_of_its_own():
    with torch.no_grad():
        for factor in (1, 2):
            logits = network(f"model.binary_factor={factor}", "model.compact_factor=2")(make_batch(1, 1)).binary_logits
            assert logits.shape == (1, 16 // factor, 16 // factor, 4)


def test_a_voxel_counts_as_occupied_from_the_threshold():
    scores = torch.rand(1, 8 * 8 * 4, generator=torch.Generator().manual_seed(0))
    for threshold in (0.3, 0.8):
        part = network(f"model.threshold={threshold}", "model.floor=1", "model.cap=9999").semantic
        [chosen] = part.select(scores)
        assert set(chosen.tolist()) == set(torch.nonzero(scores[0] > threshold).flatten().tolist())
