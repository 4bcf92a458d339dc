"""Where the network runs: on a GPU, or on the CPU if that is asked for or there is no NVIDIA device. Never on the CPU because
a driver does not fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path("/")
# CUDA's release -> the oldest Linux driver that runs it (NVIDIA's table of minor version compatibility).
OLDEST = {11: (450, 80), 12: (525, 60), 13: (580,)}


def pick_device(number: int = 0, share: bool = False) -> torch.device:
    """The device of this process; every entry point that computes asks here.

    Args:
        number: of the process on this machine.
        share: processes beyond the number of GPUs take theirs in turns; False: they are refused.

    Returns:
        ``cuda:<number>``, or ``cpu`` if ``DS_ACCELERATOR=cpu`` or if the machine has no NVIDIA device.

    Raises:
        ValueError: there is an NVIDIA device and it cannot be used (driver and what it must be are named), or there are fewer
            GPUs than processes.
    """
    wanted = os.environ.get("DS_ACCELERATOR", "")
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"DS_ACCELERATOR is {wanted!r}, must be cuda or cpu (or not set)")
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        found = nvidia_device()
        if not found and wanted != "cuda":
            return torch.device("cpu")
        raise ValueError(
            f"{found or 'DS_ACCELERATOR=cuda'}, but torch cannot use a GPU: {_reason()}. To run on the CPU anyway, set "
            "DS_ACCELERATOR=cpu"
        )
    count = torch.cuda.device_count()
    if number >= count and not share:
        raise ValueError(
            f"process {number} of this machine finds {count} GPUs: start one process per GPU, and let each see all of them "
            "(CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node)"
        )
    return torch.device("cuda", number % count)


def describe(device: torch.device) -> str:
    """One line: the device, and why it is the CPU."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    asked = os.environ.get("DS_ACCELERATOR") == "cpu" and nvidia_device()
    return "CPU (DS_ACCELERATOR=cpu)" if asked else "CPU (no NVIDIA device here)"


def computes_bf16(device: torch.device) -> bool:
    """Whether it multiplies bf16 by instructions of its own: CUDA from compute capability 8.0 on, CPUs with AVX512-BF16 or AMX.
    Elsewhere bf16 is slower than fp32, on some CPUs many times."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def nvidia_device() -> str:
    """How this machine shows that it has an NVIDIA device; empty if it does not, as far as files and nvidia-smi tell."""
    if found := sorted((ROOT / "dev").glob("nvidia[0-9]*")):
        return f"there is /dev/{found[0].name}"
    if (ROOT / "proc/driver/nvidia/version").exists():
        return "an NVIDIA driver is loaded (/proc/driver/nvidia)"
    for place in sorted((ROOT / "sys/bus/pci/devices").glob("*")):
        if _text(place / "vendor") == "0x10de" and _text(place / "class").startswith("0x03"):
            return f"there is an NVIDIA device at PCI address {place.name}"
    return "nvidia-smi finds a GPU" if _smi("--list-gpus").startswith("GPU ") else ""


def driver_version() -> str:
    """Such as 535.104.05; empty if no driver is loaded."""
    said = _text(ROOT / "proc/driver/nvidia/version") or _smi("--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"\b\d{3,}(\.\d+)+\b", said)
    return found[0] if found else ""


def _reason() -> str:
    """Why torch sees no GPU, with what to do."""
    built = torch.version.cuda
    if not built:
        return f"torch {torch.__version__} is a CPU build; install the CUDA build"
    oldest, driver = OLDEST.get(int(built.split(".")[0]), ()), driver_version()
    needed = f"torch {torch.__version__} is built for CUDA {built}"
    if oldest:
        needed += f", which needs a driver from {'.'.join(map(str, oldest))} on"
    if not driver:
        return f"no NVIDIA driver is loaded, {needed}"
    if oldest and tuple(map(int, driver.split("."))) < oldest:
        return f"the driver is {driver}, {needed}: update the driver, or install a build of torch for an older CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which may hide it (driver {driver}, {needed})"
    try:
        torch.cuda.init()
        said = "no GPU is assigned to this container or job"
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:160]
    return f"{said} (driver {driver}, {needed})"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _smi(*words: str) -> str:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ""
    try:
        return subprocess.run([tool, *words], capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
