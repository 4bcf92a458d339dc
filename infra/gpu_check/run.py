"""Runs the sections of the GPU check and writes a table; see ``../gpu_check.sh``.

On a GPU each section has a process of its own: an error on the device, or a hang, ends that section alone. Dry, all run in
this process, on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from checks import Section

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 4.0  # that a section may take


class Outcome(TypedDict):
    """Of a section: ok, skipped or FAILED; what it found; how long it took."""

    status: str
    found: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if no section failed, else 1."""
    parser = argparse.ArgumentParser(prog="infra/gpu_check.sh", description="Checks what only a GPU can show.")
    parser.add_argument("--dry", action="store_true", help="every section on the CPU at the smallest size")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-check")), help="default gpu-check")
    parser.add_argument("--only", default="", help="comma-separated names of sections")
    parser.add_argument("--list", action="store_true", help="print the sections and what each expects")
    parser.add_argument("--section", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dry:
        # Before anything imports DeepSpeed or Triton.
        os.environ.update({"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    # Before the installed package: the tests' small data set and recipe are not part of it.
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    sections = _sections()
    if args.list:
        for s in sections.values():
            print(f"{s.name:<12} {s.expected}")
        return 0
    chosen = args.only.split(",") if args.only else list(sections)
    unknown = [name for name in chosen if name not in sections]
    if unknown:
        print(f"error: no section {', '.join(unknown)}; there are {', '.join(sections)}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    if args.section:
        return _one(sections[args.section], args)
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            print("error: no CUDA device; infra/gpu_check.sh --dry runs on the CPU", file=sys.stderr)
            return 2
    found: dict[str, Outcome] = {}
    for name in chosen:
        began = time.perf_counter()
        print(f"== {name}: {sections[name].expected}", flush=True)
        status, text = (_here if args.dry else _apart)(sections[name], args)
        found[name] = {"status": status, "found": text, "seconds": round(time.perf_counter() - began, 1)}
        print(f"   {status}: {text}", flush=True)
    table = _table(sections, found)
    print(table)
    (args.out / "table.md").write_text(table + "\n")
    (args.out / "table.json").write_text(json.dumps(found, indent=1))
    return int(any(f["status"] == "FAILED" for f in found.values()))


def _sections() -> dict[str, Section]:
    import numbers_agree  # noqa: F401  registers its sections, as do the next two
    import speed  # noqa: F401
    import training  # noqa: F401
    from checks import SECTIONS

    return SECTIONS


def _here(section: Section, args: argparse.Namespace) -> tuple[str, str]:
    """Runs a section in this process; what it prints goes into a file."""
    from checks import Check, Failed, Skipped

    log = args.out / f"{section.name}.log"
    with log.open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        try:
            return "ok", section.work(Check(args.dry, args.out))
        except Skipped as reason:
            return "skipped", str(reason)
        except Failed as found:
            return "FAILED", str(found)
        except Exception as error:  # whatever it is, the other sections continue
            traceback.print_exc()
            said = str(error).strip().splitlines()
            return "FAILED", f"{type(error).__name__}: {said[0][:200] if said else ''} (see {log})"


def _one(section: Section, args: argparse.Namespace) -> int:
    status, text = _here(section, args)
    (args.out / f"{section.name}.json").write_text(json.dumps([status, text]))
    return 0


def _apart(section: Section, args: argparse.Namespace) -> tuple[str, str]:
    """Runs a section in a process of its own."""
    result = args.out / f"{section.name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(args.out), "--section", section.name]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return "FAILED", f"not done after {MINUTES:.0f} minutes (see {section.name}.log)"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    if result.exists():
        return tuple(json.loads(result.read_text()))
    last = (said.strip().splitlines() or ["no message"])[-1]
    return "FAILED", f"ended with code {process.returncode}: {last[:200]}"


def _table(sections: dict[str, Section], found: dict[str, Outcome]) -> str:
    lines = ["", "| section | expected | found | | s |", "|---|---|---|---|---|"]
    for name, f in found.items():
        text = f["found"].replace("\n", "<br>").replace("|", "/")
        lines.append(f"| {name} | {sections[name].expected} | {text} | {f['status']} | {f['seconds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
