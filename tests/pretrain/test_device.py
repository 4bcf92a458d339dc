"""The CPU only if it is asked for or there is nothing else; what hinders a GPU is named."""

import subprocess

import pytest
import torch

from occstream.launch import doctor
from occstream.pretrain import device
from occstream.pretrain.device import describe, driver_version, nvidia_device, pick_device

OLD = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12.2.0"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@box)"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without any sign of a GPU, and a torch that is built for CUDA 13."""
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def put(name, text=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return put


def give_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA A100")


def test_without_an_nvidia_device_it_is_the_cpu(machine):
    assert pick_device() == torch.device("cpu")
    assert describe(torch.device("cpu")) == "CPU (no NVIDIA device here)"
    machine("sys/bus/pci/devices/0000:00:02.0/vendor", "0x8086\n")
    machine("sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n")
    machine("sys/bus/pci/devices/0000:00:1f.0/vendor", "0x10de\n")
    machine("sys/bus/pci/devices/0000:00:1f.0/class", "0x040300\n")  # its sound
    assert pick_device() == torch.device("cpu")


def test_an_old_driver_is_named_with_the_one_that_is_needed(machine, monkeypatch):
    machine("dev/nvidia0")
    machine("proc/driver/nvidia/version", OLD)
    with pytest.raises(
        ValueError, match=r"/dev/nvidia0.* driver is 535\.104\.05.*CUDA 13\.0.*from 580 on.*DS_ACCELERATOR"
    ):
        pick_device()
    [finding] = doctor._accelerator()
    assert finding.ok is False
    assert "535.104.05" in finding.value
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert pick_device() == torch.device("cpu")
    assert describe(torch.device("cpu")) == "CPU (DS_ACCELERATOR=cpu)"


@pytest.mark.parametrize("built", ["12.8", "11.8"])
def test_a_driver_that_is_new_enough_is_not_blamed(machine, monkeypatch, built):
    machine("dev/nvidia0")
    machine("proc/driver/nvidia/version", OLD)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(ValueError, match=r"no GPU is assigned to this container or job \(driver 535"):
        pick_device()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("proc/driver/nvidia/version", OPEN, r"/proc/driver/nvidia.*driver 580\.65\.06"),
        ("sys/bus/pci/devices/0000:65:00.0/vendor", "0x10de\n", "PCI address 0000:65:00.0.*no NVIDIA driver is loaded"),
    ],
)
def test_other_signs_of_a_device(machine, monkeypatch, file, text, said):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    machine("sys/bus/pci/devices/0000:65:00.0/class", "0x030200\n")
    machine(file, text)
    with pytest.raises(ValueError, match=said):
        pick_device()


def test_nvidia_smi_is_asked_where_there_are_no_files(machine, monkeypatch):
    answers = {"--list-gpus": "GPU 0: NVIDIA RTX A6000 (UUID: GPU-1)\n", "--query-gpu=driver_version": "570.1\n"}
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        device.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0, answers[words[1]], "")
    )
    assert nvidia_device() == "nvidia-smi finds a GPU"
    assert driver_version() == "570.1"
    with pytest.raises(ValueError, match=r"driver is 570\.1"):
        pick_device()


def test_other_hindrances_are_named(machine, monkeypatch):
    machine("dev/nvidia0")
    machine("proc/driver/nvidia/version", OPEN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is ''"):
        pick_device()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="CPU build"):
        pick_device()
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ValueError, match="must be cuda or cpu"):
        pick_device()


def test_the_accelerator_that_is_asked_for_is_there_or_missed(machine, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ValueError, match="DS_ACCELERATOR=cuda, but torch"):
        pick_device()


def test_each_process_has_a_gpu_and_parts_take_theirs_in_turns(machine, monkeypatch):
    give_gpus(monkeypatch, 4)
    assert pick_device(3) == torch.device("cuda", 3)
    assert describe(pick_device(3)) == "cuda:3 (NVIDIA A100)"
    with pytest.raises(ValueError, match="finds 4 GPUs"):
        pick_device(4)
    assert [pick_device(part, share=True).index for part in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    give_gpus(monkeypatch, 1)  # the user showed one of them: CUDA_VISIBLE_DEVICES=5
    assert pick_device(6, share=True).index == 0
