"""``occstream doctor``: what this machine has, and what to install."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata


@dataclass
class Finding:
    """One line of the report. ``ok`` None means: not needed here, for information."""

    name: str
    ok: bool | None
    value: str
    remedy: str = ""


def examine(url: str = "") -> list[Finding]:
    """Looks at Python, packages, accelerators, tools and, if given, an object store (reads only)."""
    found = [
        Finding(
            "python", sys.version_info >= (3, 11), platform.python_version(), "occstream needs Python 3.11 or newer"
        ),
        Finding("cpu cores", None, str(os.cpu_count())),
    ]
    accelerator = _accelerator()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # only looking: DeepSpeed need not search for a GPU and warn
    for package in ("torch", "deepspeed", "webdataset", "fsspec", "s3fs", "zstandard", "simplejpeg", "numba", "mlflow"):
        found.append(_package(package, "pip install -e ."))
    found += accelerator
    spconv = next((p for p in ("spconv-cu120", "spconv-cu126", "spconv") if _version(p)), "")
    value = f"{spconv} {_version(spconv)}" if spconv else "not installed"
    found.append(
        Finding("spconv", True if spconv else None, value, "for sparse-convolution models: pip install -e '.[gpu]'")
    )
    codec = next((p for p in ("nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13") if _version(p)), "")
    value = f"{codec} {_version(codec)}" if codec else "not installed"
    remedy = "to decode JPEGs on the GPU (train.decoder=nvimagecodec): pip install -e '.[jpeg]'"
    found.append(Finding("nvimagecodec", True if codec else None, value, remedy))
    found.append(_tool("g++", "torch.compile and DeepSpeed's fused optimizers (not needed by default)"))
    found.append(_tool("pdsh", "deepspeed --hostfile over ssh (not needed with srun or Kubernetes)"))
    found.append(_tool("numactl", "deepspeed --bind_cores_to_rank (not needed by default)"))
    if url:
        found.append(_store(url))
    return found


def report(findings: list[Finding]) -> str:
    """The findings as a fixed-width table."""
    marks = {True: "ok     ", False: "MISSING", None: "-      "}
    lines = []
    for f in findings:
        remedy = f"   -> {f.remedy}" if f.remedy and f.ok is not True else ""
        lines.append(f"{marks[f.ok]} {f.name:<14} {f.value}{remedy}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _package(name: str, remedy: str) -> Finding:
    version = _version(name)
    if not version:
        return Finding(name, False, "not installed", remedy)
    try:
        importlib.import_module(name)
    except Exception as error:
        return Finding(name, False, f"{version}, but import fails: {str(error)[:80]}", remedy)
    return Finding(name, True, version)


def _accelerator() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []
    from occstream.pretrain.device import describe, pick_device

    try:
        device = pick_device()
    except ValueError as error:
        return [Finding("cuda", False, str(error))]
    if device.type == "cpu":
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        return [Finding("cuda", None, f"{describe(device)}; torch is {built}", "training runs on the CPU with gloo")]
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    gpus = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    return [
        Finding("cuda", True, gpus),
        Finding("nccl", torch.distributed.is_nccl_available(), nccl, "install the CUDA build of torch"),
        Finding("bfloat16", torch.cuda.is_bf16_supported(), "", "use train.precision=fp32 on this GPU"),
    ]


def _tool(name: str, purpose: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, True if path else None, "found" if path else "not found", f"only for {purpose}")


def _store(url: str) -> Finding:
    from occstream.sharding.manifest import Manifest
    from occstream.sharding.secrets import redact

    shown = redact(url)
    try:
        manifest = Manifest.load(url)
    except Exception as error:
        reason = redact(" ".join(str(error).split()))[:160]
        return Finding(
            "data", False, f"{shown}: {reason}", "check the URL, AWS_ENDPOINT_URL_S3 and the credentials chain"
        )
    return Finding("data", True, f"{shown}: {len(manifest.scenes)} scenes, fingerprint {manifest.fingerprint}")
