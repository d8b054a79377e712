"""`dit VERB CONFIG [key=value ...]`: dispatch only. Help and config errors import no torch."""

import argparse
import errno
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.errors import StorageUnavailable, UserError
from dit.runtime import heartbeat


@dataclass(frozen=True)
class Verb:
    """One command: its config root (a class of dit.config), what it does, and an example. student_root: of a config with a teacher."""

    root: str
    summary: str
    example: str
    student_root: str | None = None


VERBS = {
    "train": Verb(
        "TrainRun", "train a diffusion transformer; the same command resumes", "dit train configs/train/cifar10_pixels.yaml train.seed=1"
    ),
    "plan": Verb(
        "TrainRun",
        "say what a training or distillation will do with its data, and what it costs, without running it",
        "dit plan configs/train/videos.yaml data.packs_per_step=64",
        "DistillRun",
    ),
    "distill": Verb(
        "DistillRun", "make a few-step student of a trained run; the same command resumes", "dit distill configs/demo/distill.yaml"
    ),
    "encode": Verb(
        "EncodeRun", "write a cache of latents and text embeddings as shards", "dit encode configs/encode/videos.yaml num_workers=2"
    ),
    "sample": Verb(
        "SampleRun",
        "draw images or videos for prompts from a run",
        "dit sample configs/demo/sample.yaml 'prompts=[a small red disc moving left slowly near the top]'",
    ),
    "evaluate": Verb(
        "EvaluateRun", "measure runs: adherence to captions, distances to reference clips", "dit evaluate configs/demo/evaluate.yaml seed=2"
    ),
}
PLAIN_VERBS = {
    "demo": ("train, distil and sample a small video model on moving shapes, from nothing", "dit demo --out runs/demo"),
    "ckpt": ("list, verify, prune and export checkpoints", "dit ckpt verify runs/demo/teacher"),
    "replay": ("run one step of a run again, in one process", "dit replay runs/demo/teacher 1200"),
    "doctor": ("is this machine fit for a run? under torchrun: are they all?", "dit doctor configs/train/videos.yaml"),
    "data": ("curate, make, check and show shards", "dit data ingest photos/ shards/photos"),
}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
"""Nobody's mistake, wherever in a command they come up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0 done or cleanly interrupted, 2 config or input, 3 data, 4 checkpoints, 5 access denied, 75 a store is away or a disk is full or
    broken, 1 a crash.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    heartbeat.start()
    try:
        code = _dispatch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error}. Mend the disk or make room, then start the same command", file=sys.stderr)
        code = StorageUnavailable.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    heartbeat.end(code)
    return code


def _dispatch(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("dit", "data_pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)
    arguments = [a for a in arguments if not a.startswith("--local_rank")]  # a launcher's, which says it by the environment too
    if arguments and arguments[0] == "data":
        return int(importlib.import_module("data_pipelines.__main__").main(arguments[1:]) or 0)
    if arguments and arguments[0] in PLAIN_VERBS:
        return int(importlib.import_module(f"dit.{arguments[0]}").main(arguments[1:]) or 0)
    options = _parser().parse_args(arguments)
    verb = VERBS[options.verb]
    config, files = importlib.import_module("dit.config"), importlib.import_module("data_pipelines.config_file")
    root = verb.student_root if verb.student_root and files.has_section(options.config, "teacher") else verb.root
    run = files.load_run(getattr(config, root), options.config, options.overrides)
    if options.check:
        print(f"{options.config}: valid {root}")
        return 0
    code = int(importlib.import_module(f"dit.{options.verb}").main(run) or 0)
    importlib.import_module("dit.runtime.distributed").shutdown()  # threads of the group that outlive the interpreter may abort the process
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dit", description="Training system for image and video diffusion transformers.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    raw = argparse.RawDescriptionHelpFormatter
    for name, verb in VERBS.items():
        text = f"{verb.summary}\n\nexample:\n  {verb.example}\n\nreference of every key: docs/reference/config.md"
        sub = verbs.add_parser(name, help=verb.summary, description=text, formatter_class=raw)
        sub.add_argument("config", help="YAML file of the run")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides with YAML values")
        sub.add_argument("--check", action="store_true", help="validate the config and stop")
    for name, (summary, example) in PLAIN_VERBS.items():
        verbs.add_parser(name, help=summary, description=f"{summary}\n\nexample:\n  {example}", formatter_class=raw)
    return parser


if __name__ == "__main__":
    sys.exit(main())
