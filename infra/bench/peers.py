"""Other projects' loaders, where they are installed: how each stores the bench's samples and reads them.

Each loader: (folder, workers, offset in samples) -> batches of one pass.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from infra.bench.samples import BATCH, GROUPS, collate, sample_of, simplejpeg_into

Sample = tuple[str, dict[str, bytes]]  # key, members by <group>.<rest>


def webdataset(folder: Path, workers: int, skip: int, decode_into: Callable = simplejpeg_into) -> Iterator:
    import torch
    import webdataset as wds

    urls = sorted(str(p) for p in (folder / "merged").glob("*.tar"))
    data = wds.WebDataset(urls, shardshuffle=100, seed=0, workersplitter=wds.split_by_worker).shuffle(64)
    data = data.map(lambda s: sample_of({k: v for k, v in s.items() if not k.startswith("__")}, decode_into))
    loader = torch.utils.data.DataLoader(data, BATCH, num_workers=workers, collate_fn=collate)
    yield from itertools.islice(loader, skip // BATCH, None)  # it cannot resume from a position, so it reads up to it


def webdataset_pillow(folder: Path, workers: int, skip: int) -> Iterator:
    """With its own image decoder, as ``.decode("rgb8")`` uses it."""
    from webdataset.autodecode import imagehandler

    own = imagehandler("rgb8")

    def decode_into(jpeg: bytes, out: np.ndarray) -> None:
        out[...] = own("jpg", jpeg)

    yield from webdataset(folder, workers, skip, decode_into)


def mosaicml(folder: Path, workers: int, skip: int) -> Iterator:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # of a process before that was stopped

    def loader() -> StreamingDataLoader:
        data = StreamingDataset(local=str(folder / "mds"), shuffle=True, shuffle_seed=0, batch_size=BATCH)
        collated = lambda samples: collate([sample_of(s) for s in samples])  # noqa: E731  decodes in the workers
        return StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collated)

    yield from _resumed(loader, skip, lambda it: it.state_dict(), lambda it, state: it.load_state_dict(state))


def litdata(folder: Path, workers: int, skip: int) -> Iterator:
    import litdata as ld

    def loader() -> ld.StreamingDataLoader:
        data = ld.StreamingDataset(str(folder / "litdata"), shuffle=True, seed=0, drop_last=False)
        collated = lambda samples: collate([sample_of(s) for s in samples])  # noqa: E731  decodes in the workers
        return ld.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collated)

    yield from _resumed(loader, skip, lambda it: it.state_dict(), lambda it, state: it.load_state_dict(state))


def _resumed(loader: Callable, skip: int, save: Callable, restore: Callable) -> Iterator:
    """All batches of a peer that has states, or those after ``skip`` samples: None, when the clock starts, then what a new
    loader gives that continues from the state of one that has read so far."""
    first = loader()
    if not skip:
        yield from first
        return
    for _ in itertools.islice(first, skip // BATCH):
        pass
    state = save(first)
    del first
    again = loader()
    yield None
    restore(again, state)
    yield from again


def energon(folder: Path, workers: int, skip: int) -> Iterator:
    import megatron.energon as en

    @en.stateless
    def cook(sample: dict) -> dict:
        members = {k: v for k, v in sample.items() if k.startswith(tuple(f"{g}." for g in GROUPS))}
        return {**en.basic_sample_keys(sample), **sample_of(members)}

    class Encoder(en.DefaultTaskEncoder):
        cookers = (en.Cooker(cook),)
        decoder = None

        def batch(self, samples: list[dict]) -> dict:
            return collate(samples)

    def loader() -> en.SavableDataLoader:
        config = en.WorkerConfig(rank=0, world_size=1, num_workers=workers)
        data = en.get_train_dataset(
            str(folder / "merged"),
            worker_config=config,
            batch_size=BATCH,
            shuffle_buffer_size=64,
            max_samples_per_sequence=50,
            task_encoder=Encoder(),
            repeat=False,
        )
        return en.get_savable_loader(data)

    yield from _resumed(loader, skip, lambda it: it.save_state_rank(), lambda it, state: it.restore_state_rank(state))


LOADERS: dict[str, Callable[[Path, int, int], Iterator]] = {
    "webdataset": webdataset,
    "webdataset, Pillow": webdataset_pillow,
    "mosaicml": mosaicml,
    "litdata": litdata,
    "energon": energon,
}
MODULES = {
    "webdataset": "webdataset",
    "webdataset, Pillow": "webdataset",
    "mosaicml": "streaming",
    "litdata": "litdata",
    "energon": "megatron.energon",
}
FOLDERS = {
    "webdataset": "merged",
    "webdataset, Pillow": "merged",
    "mosaicml": "mds",
    "litdata": "litdata",
    "energon": "merged",
}


@functools.cache
def installed(name: str) -> bool:
    """Whether a peer's module is installed and works with our packages; says so if it is only installed."""
    try:
        importlib.import_module(MODULES[name])
        return True
    except ModuleNotFoundError as error:
        if MODULES[name].split(".")[0] == (error.name or "").split(".")[0]:
            return False
        why = error
    except Exception as error:
        why = error
    print(f"{name} is skipped: it cannot be imported: {str(why)[:100]}")
    return False


def write(folder: Path, samples: Sequence[Sample], per_tar: int) -> None:
    """Stores the samples in the form of every peer that is installed."""
    for name, writer in {"litdata": _litdata, "mosaicml": _mosaicml}.items():
        if installed(name):
            writer(folder / FOLDERS[name], samples)
    if installed("webdataset"):
        _tars(folder / FOLDERS["webdataset"], samples, per_tar)
    if installed("energon"):
        _energon(folder / FOLDERS["energon"])


def _litdata(folder: Path, samples: Sequence[Sample]) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, (_, members) in enumerate(samples):
        writer[number] = members
    writer.done()
    writer.merge()


def _mosaicml(folder: Path, samples: Sequence[Sample]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=dict.fromkeys(samples[0][1], "bytes")) as writer:
        for _, members in samples:
            writer.write(members)


def _tars(folder: Path, samples: Sequence[Sample], per_tar: int) -> None:
    import webdataset as wds

    folder.mkdir()
    for number in range(0, len(samples), per_tar):
        with wds.TarWriter(str(folder / f"{number:06d}.tar")) as tar:
            for key, members in samples[number : number + per_tar]:
                tar.write({"__key__": key, **members})


def _energon(folder: Path) -> None:
    """Its index, next to the tars."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    BaseWebdatasetFactory.prepare_dataset(
        folder, sorted(p.name for p in folder.glob("*.tar")), split_parts_ratio=[("train", 1.0)], workers=1
    )
    text = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta/dataset.yaml").write_text(text)
