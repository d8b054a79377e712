"""Ingest: images and videos as people keep them, curated and made into indexed shards.

Examining comes first: every file is cut into candidates, they are scored, and what is kept is recorded in `plan/` as the samples
of numbered shards. Writing a shard is then a pure function of that record: any process may write any shard, in any order, with
the same bytes. Both go on where they were interrupted.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from data_pipelines import randomness
from data_pipelines.curation import build_stages, candidates_of
from data_pipelines.curation.candidates import Candidate
from data_pipelines.curation.config import IngestConfig
from data_pipelines.curation.duplicates import find_duplicates
from data_pipelines.errors import UserError
from data_pipelines.executors import LOCAL, Executor
from data_pipelines.listing import EXPECTED, identity, list_source, unpacked
from data_pipelines.progress import Progress
from data_pipelines.raw_files import Listing, RawFile
from data_pipelines.samples import BadSample
from data_pipelines.shard_plan import PLAN, SAMPLES, SHARDS, ShardPlan, Skipped, write_shard
from data_pipelines.shard_set import SETTINGS, claim, complete, conclude, write_json
from data_pipelines.storage import published
from data_pipelines.workers import InOrder, WorkerLost

RECORD = "ingest.json"
CLASS_CAPTION = "a photo of a {class}"
SIDECAR, CLASS_NAME = "sidecar", "class-name"
_EXAMINED = "examined.jsonl"
_PARALLEL_SAMPLES = 200  # from here on starting processes pays
_AHEAD = 32  # files that a process has to examine, so that it never waits for the one that collects
_VIDEO_IMAGES = 50  # images that are examined in the time of a video, at least


@dataclass(frozen=True)
class IngestReport:
    """What became of the files: samples written, (what, reason) of what was skipped, samples without a caption."""

    samples: int
    shards: int
    skipped: tuple[Skipped, ...]
    uncaptioned: int
    ignored: dict[str, int]
    classes: tuple[str, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How much was skipped for each reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.skipped).most_common())


def ingest(source: str, out: Path, config: IngestConfig, executor: Executor = LOCAL) -> IngestReport | None:
    """Make shards of `source` in `out`, with a record in `ingest.json`. Raises UserError if nothing in it is usable, and WorkFailed.

    None if shards are left to other processes; whoever finds the last of them complete writes the record.
    """
    try:
        plan = prepare(source, out, config, executor)
    except UserError:
        if executor.config.share is None:
            unpacked_place(source, out).unlink(missing_ok=True)
        raise
    own = [number for number in range(plan.shards) if executor.owns(number)]
    missing = [number for number in own if complete(out, number) is None]
    progress = Progress(sum(map(plan.count, own)), "writing", "samples")
    progress.advance(sum(map(plan.count, set(own) - set(missing))))
    work, pays = partial(write_shard, out), sum(map(plan.count, missing)) >= _PARALLEL_SAMPLES
    for number in executor.run(work, missing, lambda number: complete(out, number) is not None, out, pays=pays):
        progress.advance(plan.count(number))
    if any(complete(out, number) is None for number in range(plan.shards)):
        return None
    unpacked_place(source, out).unlink(missing_ok=True)
    report = _report(out, plan)
    conclude(out, RECORD, {**asdict(report), "reasons": report.reasons})
    if not report.samples:
        raise UserError(f"SRC = {source!r}: no file of it gave a sample; the reasons are in {out / RECORD}")
    return report


# --- examining --------------------------------------------------------------------------------------------------


def unpacked_place(source: str, out: Path) -> Path:
    """Where a compressed archive lies unpacked, beside `out`, from examining it until all shards are written."""
    tag = identity(source)[:12] if source.lower().endswith("gz") else "none"
    return out.absolute().parent / f".{out.name}.{tag}.tar"


def prepare(source: str, out: Path, config: IngestConfig, executor: Executor = LOCAL) -> ShardPlan:
    """Examine `source` and fix the samples of every shard in `out`, or find that this is done. Raises UserError."""
    if "://" not in source and not Path(source).exists():
        raise UserError(f"SRC = {source!r}: no such file or folder; {EXPECTED}")
    if out.resolve() == Path(source).resolve():
        raise UserError(f"OUT = {str(out)!r} is SRC itself; choose another folder, which may lie in SRC")
    spool = unpacked_place(source, out)
    settings = {"made_by": "ingest", **config.model_dump(mode="json"), "source": identity(source, out)}
    if (out / PLAN / SHARDS).is_file():
        claim(out, settings)
        plan = ShardPlan.read(out)
        if any(complete(out, number) is None for number in range(plan.shards)):
            unpacked(Path(source), spool)
        return plan
    if executor.config.share is not None:
        raise UserError(f"OUT = {str(out)!r} holds no plan yet; start the command without --share, which examines SRC and makes one")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    listing = list_source(source, spool, out)
    if not listing.files:
        others = f"files of other kinds: {listing.ignored or 'none'}"
        why = "".join(f"; {count} x {reason}" for reason, count in Counter(reason for _, reason in listing.problems).items())
        raise UserError(f"SRC = {source!r}: no image or video in it ({others}{why})")
    listing = _with_captions(listing, config.captions)
    _stages(config)  # a missing package or model is an error before anything is written
    claim(out, settings)
    (out / PLAN).mkdir(exist_ok=True)
    _examine(listing, config, out / PLAN / _EXAMINED, executor)
    plan = _plan(listing, config, out / PLAN)
    if not plan.samples:
        _unclaim(out)
        reasons = dict(Counter(reason for _, reason in plan.skipped))
        raise UserError(f"SRC = {source!r}: none of its {len(listing.files)} images and videos is usable: {reasons}")
    write_json(out / PLAN / SHARDS, asdict(plan))
    return plan


def _unclaim(out: Path) -> None:
    """Leave nothing of a set without samples; what else is in the folder is not ours."""
    shutil.rmtree(out / PLAN)
    (out / SETTINGS).unlink()
    if not any(out.iterdir()):
        out.rmdir()


def _with_captions(listing: Listing, captions: str | None) -> Listing:
    """Give every file the caption that was asked for; by class if nothing was, there are classes and no file has a caption."""
    by_class = listing.classes and all(file.caption is None for file in listing.files)
    chosen = captions or (CLASS_NAME if by_class else SIDECAR)
    if chosen == SIDECAR:
        return listing
    template = CLASS_CAPTION if chosen == CLASS_NAME else chosen
    if "{class}" in template and not all(file.class_name for file in listing.files):
        raise UserError(f"--captions {chosen}: the files lie in no class folders; use --captions sidecar or a text without {{class}}")
    files = (replace(file, caption=template.replace("{class}", (file.class_name or "").replace("_", " "))) for file in listing.files)
    return replace(listing, files=tuple(files))


@dataclass(frozen=True)
class _Task:
    """A file to examine. lost: how the process that was at it ended, if one did. drop: it has been tried again."""

    file: RawFile
    key: str
    lost: str | None = None
    drop: bool = False


def _examine(listing: Listing, config: IngestConfig, journal: Path, executor: Executor) -> None:
    """Append a line for every file to the journal; files that it holds already are not looked at again.

    Files are shuffled, so that each shard is a mixture. Lines are in that order, whatever the number of processes. Where the listing has
    changed since a line was written, that file and all after it are looked at anew.
    """
    keys = listing.keys()
    names = {file.name: file.name.encode("utf-8", "backslashreplace").decode() for file in listing.files}  # names may hold any bytes
    files = sorted(listing.files, key=lambda file: (randomness.key("ingest", names[file.name]), file.name))
    tasks = [_Task(file, keys[file.name]) for file in files]
    done = _still_valid(journal, tasks)
    progress = Progress(len(files), "examining", "files")
    progress.advance(done)
    pays = sum(1 if file.is_image else _VIDEO_IMAGES for file in files[done:]) >= _PARALLEL_SAMPLES
    processes = executor.processes if pays or executor.config.processes else 1
    work = partial(_examined, config)
    if processes == 1:
        processes = 0
    found = InOrder(lambda _: work, tasks[done:], processes, _AHEAD, lambda _, line: line, _try_again, preload=__name__)
    try:
        with journal.open("ab") as lines:
            for line in found:
                lines.write(line)
                progress.advance()
    finally:
        found.close()


def _examined(config: IngestConfig, task: _Task) -> bytes:
    """The line of a file."""
    lost = [Candidate(task.key, task.file, dropped=task.lost)]
    found = lost if task.drop else candidates_of(_whole(task.file, task.key), config, _stages(config))
    return json.dumps([candidate.as_dict() for candidate in found]).encode() + b"\n"


_stages = cache(build_stages)


def _try_again(task: _Task, lost: WorkerLost) -> _Task:
    """Once more, since the system may have ended the process for other reasons; a file that does it twice is left out."""
    return replace(task, lost=str(lost), drop=task.lost is not None)


def _whole(file: RawFile, key: str) -> Candidate:
    try:
        caption = file.own_caption()
    except BadSample as error:
        return Candidate(key, file, dropped=error.reason)
    return Candidate(key, file, caption=caption, caption_from=None if caption is None else "source")


def _still_valid(journal: Path, tasks: Sequence[_Task]) -> int:
    """How many lines a journal begins with that are those of the first tasks.

    What follows them was cut off by an interruption, or is of files that have come, gone or changed since, and is removed.
    """
    journal.touch()
    lines, end = 0, 0
    with journal.open("r+b") as file:
        for task in tasks:
            line = file.readline()
            if not line.endswith(b"\n") or not _is_of(line, task):
                break
            lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def _is_of(line: bytes, task: _Task) -> bool:
    """Whether a line of the journal is that of a task: of the same file, with the same caption, label, span and key."""
    try:
        first = json.loads(line)[0]
        file, key = RawFile.from_dict(first["file"]), first["key"].partition("@")[0]
    except (ValueError, TypeError, LookupError, AttributeError):
        return False
    return key == task.key and json.dumps(file.as_dict()) == json.dumps(task.file.as_dict())  # as text: NaN equals itself there


def _read_candidates(journal: Path) -> Iterator[Candidate]:
    with journal.open("rb") as lines:
        for line in lines:
            yield from map(Candidate.from_dict, json.loads(line))


def _plan(listing: Listing, config: IngestConfig, folder: Path) -> ShardPlan:
    """Write the kept candidates to `samples.jsonl`, in the order of the journal; near-duplicates are dropped here."""
    alike, titles = _duplicates(folder / _EXAMINED, config)
    starts: list[int] = []
    samples = 0
    skipped = list(listing.problems)
    with published(folder / SAMPLES) as lines:
        for number, candidate in enumerate(_read_candidates(folder / _EXAMINED)):
            if number in alike:
                skipped.append((f"{candidate.title} (like {titles[alike[number]]})", "near-duplicate"))
            elif candidate.dropped is not None:
                skipped.append((candidate.title, candidate.dropped))
            else:
                if samples % config.shard_samples == 0:
                    starts.append(lines.tell())
                lines.write(json.dumps({**candidate.as_dict(), "signature": ""}).encode() + b"\n")
                samples += 1
    return ShardPlan(tuple(starts), config.shard_samples, samples, config.size, tuple(skipped), listing.ignored, listing.classes)


def _duplicates(journal: Path, config: IngestConfig) -> tuple[dict[int, int], dict[int, str]]:
    """Number of every candidate that is a near-duplicate -> number of the one that is kept; and the titles of those."""
    if config.duplicates is None:
        return {}, {}
    kept = ((n, c) for n, c in enumerate(_read_candidates(journal)) if c.dropped is None and c.signature)
    signed = [(n, (f"{c.file.place.address}@{c.file.place.offset}", c.signature)) for n, c in kept]  # spans of a file have several names
    numbers = [number for number, _ in signed]
    found = find_duplicates([item for _, item in signed], config.duplicates)
    alike = {numbers[number]: numbers[first] for number, first in found.items()}
    firsts = set(alike.values())
    return alike, {number: candidate.title for number, candidate in enumerate(_read_candidates(journal)) if number in firsts}


# --- the record --------------------------------------------------------------------------------------------------


def _report(out: Path, plan: ShardPlan) -> IngestReport:
    """Sum up the written shards."""
    samples, uncaptioned, lost = 0, 0, list(plan.skipped)
    for number in range(plan.shards):
        index = complete(out, number)
        assert index is not None, f"shard {number} is not written"
        samples += len(index.entries)
        uncaptioned += sum(entry.caption_length == 0 for entry in index.entries)
        lost += index.problems
    return IngestReport(samples, plan.shards, tuple(lost), uncaptioned, plan.ignored, plan.classes)
