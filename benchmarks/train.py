"""Trains one model with one clipping method, in one process or in several that torchrun starts.

    python -m benchmarks train --preset small --method zclip_optim --data my_texts/
    torchrun --nproc-per-node 2 -m benchmarks train --strategy fsdp2

Writes to --out every step (train.jsonl), the result (train.json), a torch.distributed.checkpoint every --save-every
steps and at the end (step-N), and with --tensorboard an event file. --resume goes on from a checkpoint, with any
strategy and number of processes. Every step's batch is divided among the processes.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import UserError
from benchmarks.options import add_data_option, add_out_option, positive_float, positive_int, prepare_folder, seed
from benchmarks.report.pages import Result, document, restored, setup, write_result
from benchmarks.report.progress import StepProgress
from benchmarks.report.records import line, read_records
from benchmarks.report.summary import Summary, format_table, heading, summarize
from benchmarks.training import checkpoint
from benchmarks.training.architectures import ARCHITECTURES
from benchmarks.training.distributed import STRATEGIES, processes, rank_and_count, say
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.presets import PRESETS
from benchmarks.training.run import Run, StepRecord, TrainConfig
from zclip_optim import NonFiniteGradientError, ZClip

LOGGED = ("loss", "lr", "grad_norm", "clipped_norm", "threshold", "clipped", "z_score", "mean", "std", "ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a training."""
    parser.add_argument("--preset", choices=PRESETS, default=default_preset(), help="size of the model")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama", help="kind of model, and its data")
    parser.add_argument("--method", choices=METHODS, default="zclip_optim", help="how gradients are clipped")
    parser.add_argument(
        "--option", type=option, action="append", default=[], metavar="NAME=VALUE", help="of ZClipOptimizer; repeatable"
    )
    parser.add_argument("--steps", type=positive_int, help="instead of the preset's")
    parser.add_argument("--lr", type=positive_float, help="peak learning rate, instead of the preset's")
    parser.add_argument(
        "--batch", type=positive_int, help="examples per step, of all processes; instead of the preset's"
    )
    parser.add_argument("--seed", type=seed, default=0, help="fixes the weights and the order of the data")
    parser.add_argument("--bad-shard", action="store_true", help="corrupt some of the batches")
    parser.add_argument("--strategy", choices=STRATEGIES, default="none", help="how the model is spread")
    parser.add_argument("--save-every", type=positive_int, default=1000, metavar="STEPS", help="between checkpoints")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="checkpoint to go on from")
    parser.add_argument("--tensorboard", action="store_true", help="write an event file too")
    add_data_option(parser)
    add_out_option(parser)


def default_preset() -> str:
    """What this machine can train in minutes."""
    return "small" if torch.cuda.is_available() else "nano"


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as Python writes it; a bare word is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def run(args: argparse.Namespace) -> None:
    """Checks what was given, trains, and writes and prints the result."""
    config, method = config_of(args), method_of(args)
    batches = config.open(args.data)
    prepare_folder(args.out)
    with processes(args.strategy, config.batch) as device:
        say(f"data: {batches.source}")
        training = Run(method, config, batches, device, STRATEGIES[args.strategy])
        if args.resume is not None:
            checkpoint.load(training, args.resume)
        records = records_before(training, args.out) if rank_and_count()[0] == 0 else []
        train(training, records, args)
        finish(training, records, args.out)
        del training  # DDP's model must not outlive the process group


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The options, with the preset's values for those not given."""
    preset = PRESETS[args.preset]
    return TrainConfig(
        steps=args.steps or preset.steps,
        lr=args.lr or preset.lr,
        seed=args.seed,
        preset=args.preset,
        architecture=args.architecture,
        batch=args.batch or preset.batch,
        warmup_share=preset.warmup_share,
        corrupt=args.bad_shard,
    )


def method_of(args: argparse.Namespace) -> Method:
    """The method with its options, checked."""
    method = METHODS[args.method]
    if not method.ours and args.option:
        raise UserError(f"--option is for ZClipOptimizer, --method {args.method} takes none")
    if not method.ours and args.strategy != "none":
        raise UserError(f"--method {args.method} is for one process; --strategy {args.strategy} takes zclip_optim's")
    try:
        method = method.with_options(dict(args.option))
        ZClip(**method.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"--option: {error}") from error
    return method


def records_before(training: Run, out: Path) -> list[StepRecord]:
    """The steps up to the checkpoint that this run's earlier part has left in `out`; later ones will be taken again."""
    path = out / "train.jsonl"
    if not training.taken or not path.exists():
        return []
    records = [record for record in read_records(path) if record.step <= training.taken]
    last = range(training.taken + 1 - len(records), training.taken + 1)
    if [(r.method, r.step) for r in records] != [(training.method.name, step) for step in last]:
        raise UserError(f"--out {out}: its train.jsonl is of another run; choose another folder")
    return records


def train(training: Run, records: list[StepRecord], args: argparse.Namespace) -> None:
    """Takes the steps that are left: a progress bar, a line of JSON per step, checkpoints."""
    steps, first = training.config.steps, rank_and_count()[0] == 0
    progress = StepProgress(training.method.label, steps, training.taken, quiet=not first)
    with log(args.out, records, args.tensorboard) if first else nullcontext(records.append) as write, progress:
        try:
            for record in training.steps():
                write(record)
                progress.show(record)
                if training.taken % args.save_every == 0 or training.taken == steps:
                    checkpoint.save(training, args.out / f"step-{training.taken}")
        except NonFiniteGradientError as error:
            say(f"ended after step {training.taken}: {error}")
    if training.taken < steps:
        say(f"diverged: {training.taken} of {steps} steps taken")


@contextmanager
def log(out: Path, records: list[StepRecord], tensorboard: bool) -> Iterator[Callable[[StepRecord], None]]:
    """A function that adds a record to `records`, to the JSON lines, which begin with them, and to TensorBoard."""
    with (out / "train.jsonl").open("w") as lines, summary_writer(out, tensorboard) as writer:
        lines.writelines(map(line, records))

        def write(record: StepRecord) -> None:
            records.append(record)
            lines.write(line(record))
            lines.flush()
            if writer is not None:
                for name in LOGGED:
                    writer.add_scalar(name, getattr(record, name), record.step)

        yield write


@contextmanager
def summary_writer(out: Path, wanted: bool) -> Iterator[Any]:
    """TensorBoard's writer, or None."""
    if not wanted:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(out) as writer:
        yield writer


def finish(training: Run, records: list[StepRecord], out: Path) -> None:
    """The validation loss and the other figures of the run."""
    method, config = training.method, training.config
    held_out_loss = training.held_out_loss()
    if rank_and_count()[0] != 0:
        return
    row = summarize(method.name, method.label, records, held_out_loss, config.warmup_steps)
    result = heading("train", [config.seed]) | {
        "data": training.batches.source,
        "config": asdict(config) | {"model": asdict(config.shape.model), "options": dict(method.options)},
        "rows": [asdict(row)],
    }
    write_result(out / "train.json", result, page)
    print(f"\n{format_table([row])}\n\nwritten to {out}: train.jsonl, train.json, train.md, checkpoints")


def page(result: Result) -> str:
    """The row of the run."""
    table = format_table([restored(Summary, row) for row in result["rows"]])
    return document("train: one run", result, setup(result), table)
