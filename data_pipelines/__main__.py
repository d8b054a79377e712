"""Command line of the data path: make shards, check them, look at them. `python -m data_pipelines COMMAND --help`."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import DataBudgetExceeded, UserError

SHARD_SAMPLES = 1000
CLIP_FRAMES = 9
_LISTED = 20  # problems printed one by one; the rest is counted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 3 for damaged data, 5 access denied, 75 storage is away."""
    options = _parser().parse_args(argv)
    commands = {"ingest": _ingest, "shapes": _shapes, "index": _index, "check": _check, "show": _show}
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
    ingest = commands.add_parser("ingest", help="make shards of images and videos")
    ingest.add_argument("source", type=Path, metavar="SRC", help="folder of class folders, or of files with .txt captions; or .tar.gz")
    ingest.add_argument("out", type=Path, metavar="OUT", help="folder of the shards; the same command resumes")
    ingest.add_argument("--captions", help='"sidecar", "class-name", or a text in which {class} is replaced (default: by what SRC is)')
    ingest.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES, help="samples of a shard (default: %(default)s)")
    ingest.add_argument("--clip-frames", type=int, default=CLIP_FRAMES, help="frames that videos are cut into (default: %(default)s)")
    ingest.add_argument("--fps", type=float, help="frame rate of the clips (default: that of each video)")
    ingest.add_argument("--height", type=int, help="scale and crop pictures to this height; with --width")
    ingest.add_argument("--width", type=int, help="scale and crop pictures to this width; with --height")
    shapes = commands.add_parser("shapes", help="render the captioned moving-shapes set")
    shapes.add_argument("out", type=Path, metavar="OUT", help="folder of the shards; the same command resumes")
    shapes.add_argument("--clips", type=int, required=True, help="how many")
    shapes.add_argument("--seed", type=int, default=0, help="of the stream of clips (default: %(default)s)")
    shapes.add_argument("--split", choices=("train", "held_out"), default="train", help="attribute combinations (default: %(default)s)")
    shapes.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES, help="clips of a shard (default: %(default)s)")
    shapes.add_argument("--processes", type=int, default=2, help="at most this many (default: %(default)s)")
    index = commands.add_parser("index", help="index shards of others, once, in parallel; the same command goes on")
    index.add_argument("folder", metavar="DIR", help="folder of tars without index, local or s3://")
    check = commands.add_parser("check", help="verify every checksum")
    check.add_argument("folder", metavar="DIR", help="folder of shards")
    show = commands.add_parser("show", help="draw a contact sheet")
    show.add_argument("folder", metavar="DIR", help="folder of shards")
    show.add_argument("out", type=Path, metavar="OUT", help="image to write, .png")
    show.add_argument("--count", type=int, default=24, help="samples on it (default: %(default)s)")
    return parser


def _ingest(options: argparse.Namespace) -> None:
    from data_pipelines.ingest import RECORD, IngestSettings, ingest

    if (options.height is None) != (options.width is None):
        raise UserError("--height and --width go together: give both or neither")
    size = None if options.height is None else (options.height, options.width)
    settings = IngestSettings(options.captions, options.shard_samples, options.clip_frames, options.fps, size)
    report = ingest(options.source, options.out, settings)
    print(f"{report.samples} samples in {report.shards} shards in {options.out}; {len(report.skipped)} skipped (all in {RECORD})")
    _list_problems(report.skipped)
    if report.uncaptioned:
        print(f"  {report.uncaptioned} samples have no caption")
    if report.ignored:
        print(f"  other files, not looked at: {report.ignored}")


def _shapes(options: argparse.Namespace) -> None:
    from data_pipelines.rendered import ShapesSet, render

    render(options.out, ShapesSet(options.clips, options.seed, options.split, options.shard_samples), options.processes)
    print(f"{options.clips} clips in {options.out}")


def _index(options: argparse.Namespace) -> None:
    from data_pipelines.sources import read_source

    source = read_source(options.folder, config_key="DIR")
    for problem in source.problems:
        print(f"  note: {problem}")
    print(f"{source.samples} samples in {len(source.shards)} shards; manifest {source.hash}")


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


def _list_problems(problems: Sequence[tuple[str, str]]) -> None:
    for what, reason in problems[:_LISTED]:
        print(f"  {what}: {reason}")
    if len(problems) > _LISTED:
        rest = Counter(reason for _, reason in problems[_LISTED:])
        print(f"  and {len(problems) - _LISTED} more: {'; '.join(f'{count} x {reason}' for reason, count in rest.most_common())}")


if __name__ == "__main__":
    sys.exit(main())
