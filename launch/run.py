"""What the scripts that train share: arguments, process group, one training run."""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from occstream.launch.data import at_least


def main(stage: str = "", argv: Sequence[str] | None = None) -> int:
    """Runs one stage, "": the one that the recipe names.

    Returns:
        0 done, 2 wrong input, 3 training failed, 75 stopped and saved.
    """
    args = parser(stage).parse_intermixed_args(argv)
    begin = functools.partial(imported, args.imports)
    if args.dry_run:
        from occstream.launch.dryrun import dry_run

        numbers = {"ranks": args.world_size, "memory_gb": args.memory_gb, "rate": args.rate, "price": args.price}
        return guarded(lambda: begin() or dry_run(stage, args.recipe, args.overrides, **numbers))
    if args.world_size != 1 or args.memory_gb or args.rate or args.price:
        parser(stage).error("--world-size, --memory-gb, --rate and --price require --dry-run")
    overrides = [*args.overrides, *([f"train.profile={args.profile}"] if args.profile else [])]
    return guarded(lambda: begin() or _run(stage, args.recipe, overrides))


def parser(stage: str) -> argparse.ArgumentParser:
    """The arguments of a stage, or of the one that the recipe names ("")."""
    does = {"pretrain": "Pre-trains on binary occupancy.", "finetune": "Fine-tunes semantic occupancy."}
    made = argparse.ArgumentParser(
        prog=f"launch/{stage or 'train'}.py",
        description=does.get(stage, "Trains the stage that a recipe names, of any task."),
        epilog="Overrides are dotted keys of the recipe, for example optim.lr=1e-4 data.scenes=2000 output=runs/a. "
        "Rerunning the same command resumes from the newest complete checkpoint.",
    )
    made.add_argument("--recipe", required=True, help="name of a packaged recipe, or path of a .yaml file")
    made.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    import_argument(made)
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps (train.profile)")
    dry = made.add_argument_group("dry run")
    dry.add_argument(
        "--dry-run", action="store_true", help="check everything and estimate memory and time; start nothing"
    )
    dry.add_argument("--world-size", type=at_least(1), default=1, help="processes that the run will have (default 1)")
    dry.add_argument("--memory-gb", type=float, default=0.0, help="memory of a GPU; refuse a run that does not fit")
    dry.add_argument(
        "--rate", type=float, default=0.0, help="frames/s per GPU, to estimate the time (a short run prints it)"
    )
    dry.add_argument("--price", type=float, default=0.0, help="price of a GPU-hour, to estimate the cost")
    return made


def import_argument(parser: argparse.ArgumentParser) -> None:
    """``--import``: tasks, models and sources of other people."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module, or a .py file, that registers a task, a model or a source of your own",
    )


def imported(names: Sequence[str]) -> int:
    """Imports what ``--import`` names, and what a parent process was given. Returns 0."""
    from occstream.pretrain.tasks.registry import import_modules

    import_modules(names)
    return 0


def _run(stage: str, recipe: str, overrides: Sequence[str]) -> int:
    from occstream.pretrain.config import load_config

    # A wrong recipe fails before anything heavy starts.
    config = load_config(recipe, overrides, **({"stage": stage} if stage else {}))
    if not stage and int(os.environ.get("RANK", 0)) == 0:
        print(f"task {config.task}, stage {config.stage}", flush=True)

    import torch.distributed as dist

    from occstream.pretrain.device import describe
    from occstream.pretrain.distributed import init_distributed
    from occstream.pretrain.guards import REQUEUE
    from occstream.pretrain.trainer import train

    world = init_distributed(config.train.timeout_minutes)
    if world.is_main:
        print(f"device: {describe(world.device)}{f', {world.size} processes' if world.size > 1 else ''}", flush=True)
    try:
        result = train(config, world)
        if world.is_main:
            speed = f", {result.samples_per_s:.1f} samples/s" if math.isfinite(result.samples_per_s) else ""
            if result.stopped:
                print(
                    f"stopped by {result.stopped} after step {result.steps}; saved at {result.checkpoint}. The same command "
                    f"resumes from there (exit code {REQUEUE})",
                    flush=True,
                )
                return REQUEUE
            print(
                f"done: {result.steps} steps, {result.samples} samples, loss {result.loss:.4f}{speed}; "
                f"checkpoint {result.checkpoint}",
                flush=True,
            )
        return REQUEUE if result.stopped else 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA's own error, or the CPU allocator's."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _ranks_lost(error: RuntimeError) -> bool:
    """Gloo's plain errors have no class of their own."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "third_party/gloo" in str(error)


def guarded(work: Callable[[], int]) -> int:
    """Runs ``work``; errors that a user can correct become one line on stderr and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    try:
        code = work()
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except KeyboardInterrupt:
        print(f"{where}interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if os.environ.get("OCCSTREAM_TRACEBACK") or not (_out_of_memory(error) or _ranks_lost(error)):
            raise
        if _ranks_lost(error):
            print(
                f"{where}error: another rank failed or did not answer in time ({' '.join(str(error).split())[:160]}): look for "
                "the first message of another rank. The same command resumes from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            return 3
        said = str(error).splitlines()[0][:200]
        print(
            f"{where}error: out of memory ({said}). Use less with: train.accumulate (more micro-steps), "
            "model.checkpointing=true, train.precision=bf16, train.zero_stage=2 (or 3 on several GPUs), model.head_rows, "
            "model.cap, augment.image_size, eval.batch=1",
            file=sys.stderr,
            flush=True,
        )
        return 3
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("OCCSTREAM_TRACEBACK"):
            raise
        print(f"{where}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 3 if isinstance(error, FloatingPointError) else 2
    except Exception as error:
        # By name: importing MLflow takes seconds.
        if type(error).__name__ != "MlflowException" or os.environ.get("OCCSTREAM_TRACEBACK"):
            raise
        said = " ".join(str(error).split())[:300]
        print(f"{where}error: MLflow: {said}; is the server up, and is the URI right?", file=sys.stderr, flush=True)
        return 2
