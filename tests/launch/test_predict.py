"""Auto-labeling as a user does it: offboard training, ``occstream predict``, a student on its labels."""

import pytest
import torch

from occstream.launch.cli import main
from occstream.launch.predict import predict_checkpoint
from occstream.models import kernels
from occstream.pretrain import checkpoint
from occstream.pretrain.tasks.registry import task_of
from occstream.pretrain.trained import load_trained
from occstream.sharding import storage
from occstream.sharding.manifest import Manifest
from occstream.sharding.stream import ShardReader
from tests.forked import Forked
from tests.pretrain.small import RECIPE, environment, losses, pack_small, run_jobs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A packed set and a teacher trained on two of its scenes."""
    root = tmp_path_factory.mktemp("predict")
    pack_small(str(root / "data"), scenes=6)
    words = [
        f"data.url={root}/data",
        f"output={root}/teacher",
        "model.strategy=offboard",
        "model.cap=4608",
        "data.scenes=2",
        "data.mask=none",
    ]
    jobs = [{"recipe": RECIPE, "stage": "finetune", "overrides": [*words, "train.steps=4"]}]
    run_jobs(jobs, 1, root / "logs")
    return root


def labels_of(manifest):
    reader = ShardReader(manifest, (manifest.label_group,))
    found = {}
    for number, scene in enumerate(manifest.scenes):
        for index in range(scene.frames):
            frame = reader.frame(number, index)
            found[frame.key] = frame.labels
    reader.close()
    return found


@pytest.mark.parametrize(("part", "gpu"), [((1, 8), 0), ((4, 8), 3), ((6, 8), 1)])
def test_each_part_takes_its_own_gpu_and_says_so(monkeypatch, capsys, part, gpu):
    class Opened(Exception):
        pass

    def opened(path):
        raise Opened

    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA A100")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(checkpoint, "Checkpoint", opened)
    with pytest.raises(Opened):
        predict_checkpoint("run", "data", "pseudo-a", part=part)
    assert current == [torch.device("cuda", gpu)], "where kernels are launched"
    assert capsys.readouterr().out == f"device: cuda:{gpu} (NVIDIA A100)\n"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_computes_in_its_recipes_precision_and_says_so(place, capsys, precision):
    used = precision == "bf16"
    trained = load_trained(place / "teacher", [f"train.precision={precision}", f"train.kernels={used}"])
    said = f"computes in {precision}, {'with' if used else 'without'} compiled CPU kernels"
    assert said in capsys.readouterr().out
    assert (kernels.compiled_for(torch.zeros(1)) is not None) == used
    found = []
    trained.model.images.register_forward_hook(lambda module, args, out: found.append(out.dtype))
    trained.model(task_of(trained.config).synthetic_batch(1, 0))
    assert found == [torch.bfloat16 if precision == "bf16" else torch.float32]


@pytest.mark.process
def test_the_loop_closes(place, capsys):
    saved = checkpoint.Checkpoint(place / "teacher").state
    assert saved["unknown_share"] == {"data.mask": 0.0}, (
        "its labels know everything, so mask=none counts nothing unknown"
    )
    command = ["predict", str(place / "teacher"), str(place / "data"), "--name", "pseudo-two", "--keep", "top2"]
    # Batches of one frame: more of them than the stream has buffers.
    assert main([*command, "--truth", "2", "--holdout", "1", "eval.batch=1"]) == 0
    assert "kB per frame" in capsys.readouterr().out
    assert main(["verify", str(place / "data"), "--group", "pseudo-two"]) == 0
    base = Manifest.load(str(place / "data"))
    theirs, ours = labels_of(base), labels_of(base.with_sidecar("pseudo-two"))
    kept = {base.scenes[i].name for i in base.subset(2, 0, 1)}
    for key, labels in ours.items():
        truth = theirs[key]
        assert (labels.binary == truth.binary).all(), "offboard labels what is occupied"
        if key.rpartition("-")[0] in kept:
            assert labels.logits is None
            assert (labels.semantic == truth.semantic).all()
        else:
            assert labels.ranked.shape == (int(truth.binary.sum()), 2)
            assert (labels.mask_camera == truth.mask_camera).all()
    words = [f"data.url={place}/data", "data.labels=pseudo-two", "data.soft=true", f"output={place}/student"]
    run_jobs([{"recipe": RECIPE, "stage": "finetune", "overrides": [*words, "train.steps=2"]}], 2, place / "logs2")
    assert losses(place / "student")[2]["train/semantic"] > 0


@pytest.mark.process
def test_parts_and_a_kill_give_the_bytes_of_one_run(place, tmp_path):
    url = str(place / "data")
    whole = predict_checkpoint(place / "teacher", url, "pseudo-whole", keep="top2")
    script = tmp_path / "killed.py"
    script.write_text(
        "import os\nfrom occstream.launch.predict import predict_checkpoint\n"
        f"predict_checkpoint({str(place / 'teacher')!r}, {url!r}, 'pseudo-parts', keep='top2',"
        " progress=lambda done, total: os._exit(9))"
    )
    assert Forked([script], environment(), tmp_path / "log").wait(120) == 9
    assert Manifest.load(url).sidecars().count("pseudo-parts") == 0
    first = predict_checkpoint(place / "teacher", url, "pseudo-parts", keep="top2", part=(2, 2))
    assert first.manifest is None
    second = predict_checkpoint(place / "teacher", url, "pseudo-parts", keep="top2", part=(1, 2))
    assert (second.skipped, second.manifest is not None) == (1, True)
    for number in {s.shard for s in whole.manifest.scenes}:
        a, b = (m.shard(m.label_group, number) for m in (whole.manifest, second.manifest))
        frames = [labels_of(m) for m in (whole.manifest, second.manifest)]
        assert all((frames[0][k].semantic == frames[1][k].semantic).all() for k in frames[0])
        assert a.size == b.size
    again = predict_checkpoint(place / "teacher", url, "pseudo-whole", keep="top2")
    assert (again.frames, again.skipped) == (0, 3)
    assert again.manifest.fingerprint == whole.manifest.fingerprint
    other = predict_checkpoint(place / "teacher", url, "pseudo-whole", keep="top1")
    assert other.skipped == 0, "other predictions take the place of these"


def test_wrong_inputs_are_named(place):
    url = str(place / "data")
    with pytest.raises(ValueError, match="pseudo-…"):
        predict_checkpoint(place / "teacher", url, "Labels")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        predict_checkpoint(place / "nobody", url, "pseudo-x")
    with pytest.raises(ValueError, match="needs i/n"):
        predict_checkpoint(place / "teacher", url, "pseudo-x", part=(3, 2))
    assert not storage.listing(storage.join(url, "pseudo-x"))
