"""Command line of the data path: make shards, check them, look at them. `python -m data_pipelines COMMAND --help`."""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.config import ExecutorConfig
from data_pipelines.config_file import load_run
from data_pipelines.errors import DataBudgetExceeded, UserError
from data_pipelines.executors import Executor

SHARD_SAMPLES = 1000
_LISTED = 20  # problems printed one by one; the rest is counted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 3 for damaged data, 5 access denied, 75 storage is away."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    if rest and ("overrides" not in options or any(item.startswith("-") or "=" not in item for item in rest)):
        parser.error(f"not understood: {' '.join(rest)}")
    options.argv = (sys.executable, "-m", "data_pipelines", *given, "--executor=local", "--share=")
    options.overrides = [*getattr(options, "overrides", []), *rest]  # argparse leaves those that follow an option
    commands = {"ingest": _ingest, "shapes": _shapes, "index": _index, "check": _check, "show": _show, "stats": _stats}
    try:
        commands[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines", description="Make shards, check them, look at them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ingest = commands.add_parser("ingest", help="curate images and videos, and make shards of them")
    ingest.add_argument("source", metavar="SRC", help="folder, .tar(.gz), manifest (.csv, .jsonl, .parquet) or folder of WebDataset tars")
    ingest.add_argument("out", type=Path, metavar="OUT", help="folder of the shards; the same command resumes")
    ingest.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the config, with a YAML value")
    ingest.add_argument("--config", help="YAML file of an IngestConfig (docs/reference/config.md); options and key=value override it")
    ingest.add_argument("--captions", help='"sidecar", "class-name", or a text in which {class} is replaced (default: by what SRC is)')
    ingest.add_argument("--shard-samples", type=int, help="samples of a shard (default: 1000)")
    ingest.add_argument("--clip-frames", type=_numbers, help="frames that videos are cut into (default: 9); several as 33,9")
    ingest.add_argument("--fps", type=float, help="frame rate of the clips (default: that of each video)")
    ingest.add_argument("--height", type=int, help="scale and crop pictures to this height; with --width")
    ingest.add_argument("--width", type=int, help="scale and crop pictures to this width; with --height")
    shapes = commands.add_parser("shapes", help="render the captioned moving-shapes set")
    shapes.add_argument("out", type=Path, metavar="OUT", help="folder of the shards; the same command resumes")
    shapes.add_argument("--clips", type=int, required=True, help="how many")
    shapes.add_argument("--seed", type=int, default=0, help="of the stream of clips (default: %(default)s)")
    shapes.add_argument("--split", choices=("train", "held_out"), default="train", help="attribute combinations (default: %(default)s)")
    shapes.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES, help="clips of a shard (default: %(default)s)")
    index = commands.add_parser("index", help="index shards of others, once, in parallel; the same command goes on")
    index.add_argument("folder", metavar="DIR", help="folder of tars without index, local or s3://")
    for command in (ingest, shapes, index):
        _add_executor(command)
    check = commands.add_parser("check", help="verify every checksum")
    check.add_argument("folder", metavar="DIR", help="folder of shards")
    show = commands.add_parser("show", help="draw a contact sheet, and histograms of every field")
    show.add_argument("folder", metavar="DIR", help="folder of shards")
    show.add_argument("out", type=Path, metavar="OUT", help="image to write, .png")
    show.add_argument("--count", type=int, default=24, help="samples on it (default: %(default)s)")
    stats = commands.add_parser("stats", help="mean and standard deviation of the latents of a cache")
    stats.add_argument("folder", metavar="DIR", help="folder of a latent cache")
    stats.add_argument("--json", type=Path, metavar="OUT", help="write the numbers to this file too")
    return parser


def _add_executor(command: argparse.ArgumentParser) -> None:
    command.add_argument("--executor", default="local", metavar="local|slurm-array|ray", help="where the work is done (default: local)")
    command.add_argument("--processes", help="processes of this machine, or of each task of an array (default: one a core)")
    command.add_argument("--tasks", help="tasks of the array, or shards that Ray works on at a time (default: 8)")
    command.add_argument("--slurm-options", metavar="TEXT", help='options of sbatch: --slurm-options="--partition=cpu --time=1:00:00"')
    command.add_argument("--share", metavar="I/N", help="make only the shards whose number is I modulo N; tasks of an array do so")


def _executor(options: argparse.Namespace) -> Executor:
    slurm = None if options.slurm_options is None else shlex.split(options.slurm_options)
    given = {key: getattr(options, key) for key in ("processes", "tasks", "share")} | {"name": options.executor, "slurm_options": slurm}
    flags = [f"{key}={json.dumps(value) if key == 'slurm_options' else value}" for key, value in given.items() if value is not None]
    return Executor(load_run(ExecutorConfig, None, flags), options.argv)


def _ingest(options: argparse.Namespace) -> None:
    from data_pipelines.curation.config import IngestConfig
    from data_pipelines.ingest import PLAN, RECORD, ingest

    if (options.height is None) != (options.width is None):
        raise UserError("--height and --width go together: give both or neither")
    size = None if options.height is None else (options.height, options.width)
    given = {"captions": options.captions, "shard_samples": options.shard_samples, "clip_frames": options.clip_frames, "fps": options.fps}
    flags = [f"{key}={json.dumps(value)}" for key, value in (given | {"size": size}).items() if value is not None]
    config = load_run(IngestConfig, options.config, [*flags, *options.overrides])
    report = ingest(options.source, options.out, config, executor := _executor(options))
    if report is None:
        print(_share_done(executor))
        return
    print(f"{report.samples} samples in {report.shards} shards in {options.out}; {len(report.skipped)} skipped")
    if names := report.classes:
        print(_printable(f"  {len(names)} classes, by folder: {', '.join(names[:_LISTED])}{' ...' if names[_LISTED:] else ''}"))
    for reason, count in report.reasons.items():
        example = next(what for what, why in report.skipped if why == reason)
        print(_printable(f"  {count} x {reason}: {example}{' ...' if count > 1 else ''}"))
    print(f"  all that was skipped: {options.out / RECORD}; every score: {options.out / PLAN}")
    if report.uncaptioned:
        print(f"  {report.uncaptioned} samples have no caption")
    if report.ignored:
        print(f"  other files, not looked at: {report.ignored}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _shapes(options: argparse.Namespace) -> None:
    from data_pipelines.rendered import ShapesSet, render

    settings = ShapesSet(options.clips, options.seed, options.split, options.shard_samples)
    whole = render(options.out, settings, executor := _executor(options))
    print(f"{options.clips} clips in {options.out}" if whole else _share_done(executor))


def _index(options: argparse.Namespace) -> None:
    from data_pipelines.sources import index_source, read_source

    index_source(options.folder, executor := _executor(options), "DIR")
    if executor.config.share is not None:
        print(_share_done(executor))
        return
    source = read_source(options.folder, config_key="DIR")
    for problem in source.problems:
        print(f"  note: {problem}")
    print(f"{source.samples} samples in {len(source.shards)} shards; manifest {source.hash}")


def _share_done(executor: Executor) -> str:
    return f"share {executor.config.share} is done; others are not"


def _check(options: argparse.Namespace) -> None:
    from data_pipelines.progress import track
    from data_pipelines.shards import verify_shard
    from data_pipelines.sources import read_source

    source = read_source(options.folder, config_key="DIR")
    damaged: list[str] = []
    bad: list[tuple[str, str]] = []
    for shard in track(source.shards, "checking"):
        found = verify_shard(shard.address, source.index(shard))
        damaged += [f"{found.shard}: {damage}" for damage in found.damage]
        bad += [(f"{shard.name}/{key}", reason) for key, reason in found.bad]
    for problem in source.problems:
        print(f"  note: {problem}")
    for line in damaged:
        print(f"  damaged: {line}")
    _list_problems(bad)
    print(f"manifest {source.hash}: {source.samples} samples in {len(source.shards)} shards")
    if damaged or bad:
        counts = f"{len(damaged)} shards are damaged, {len(bad)} of {source.samples} samples unusable"
        raise DataBudgetExceeded(f"DIR = {options.folder!r}: {counts}")


def _show(options: argparse.Namespace) -> None:
    from data_pipelines.contact import contact_sheet

    if options.count < 1:
        raise UserError(f"--count {options.count}: expected at least 1")
    print(f"{contact_sheet(options.folder, options.out, options.count)} samples on {options.out}")


def _stats(options: argparse.Namespace) -> None:
    from data_pipelines.latent_stats import latent_stats
    from data_pipelines.shard_set import write_json

    stats = latent_stats(options.folder)
    print(f"{stats.samples} samples, {stats.positions} places; {len(stats.bad)} unusable")
    for channel, (mean, std) in enumerate(zip(stats.mean, stats.std)):
        print(f"  channel {channel:3d}  mean {mean:+.4f}  std {std:.4f}")
    print(f"  all channels  mean {stats.overall_mean:+.4f}  std {stats.overall_std:.4f}")
    _list_problems(stats.bad)
    if options.json is not None:
        write_json(options.json, {**vars(stats), "overall_mean": stats.overall_mean, "overall_std": stats.overall_std})


def _list_problems(problems: Sequence[tuple[str, str]]) -> None:
    for what, reason in problems[:_LISTED]:
        print(_printable(f"  {what}: {reason}"))
    if len(problems) > _LISTED:
        rest = Counter(reason for _, reason in problems[_LISTED:])
        print(f"  and {len(problems) - _LISTED} more: {'; '.join(f'{count} x {reason}' for reason, count in rest.most_common())}")


def _printable(text: str) -> str:
    """Without what a terminal cannot show: file names may hold any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
