"""`dit evaluate`: how well one or more runs do, by any of the metrics of `dit/evaluation`, beside the reference clips themselves."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch import Tensor

from data_pipelines import moving_shapes
from data_pipelines.errors import UserError
from data_pipelines.progress import track
from dit.config import EvaluateRun
from dit.config.evaluation import FidelityConfig, ShapesClips, TemporalConfig
from dit.drawing import Opened, check_request, draw, sample_keys, told_apart
from dit.encoders.base import hash_of_weights
from dit.evaluation.clips import RULES, Clip, clips_of, splits_of
from dit.evaluation.metrics import Batch, Metric, build_metrics
from dit.evaluation.pictures import contact_sheet
from dit.evaluation.results import Results, table
from dit.runs import TrainedRun, make_folder
from dit.runtime import distributed

SHOWN = 12
"""Clips of a contact sheet."""
FigureTable = dict[str, dict[str, float | int | None]]


@dataclass
class Split:
    """One kind of captions: what is drawn, the rows of its reference clips under each metric, and the figures of as many others.

    digest: hash of the reference clips. others: clips of the first contestant, kept where a metric compares with them.
    """

    name: Literal["train", "held_out", "all"]
    captions: list[str]
    labels: list[int | None]
    reference: list[Tensor | None]
    floor: FigureTable
    digest: str
    others: list[Tensor]


def main(run: EvaluateRun) -> int:
    """Draw clips with every contestant; write results.json, a table and contact sheets to `out`. Processes share the batches."""
    distributed.init_if_launched()
    _check_size(run)
    folder = make_folder(run.out, "out")
    contestants = [Opened.of(contestant, f"contestants.{index}.") for index, contestant in enumerate(run.contestants)]
    names = told_apart([_traits(opened) for opened in contestants])
    metrics = build_metrics(run.metrics, distributed.device())
    splits = [_open_split(run, name, metrics) for name in splits_of(run.clips)]
    floor = {"name": "reference", "subject": None, "seconds_per_clip": None, "figures": {split.name: split.floor for split in splits}}
    judged = [
        _judge(run, index, name, opened, metrics, splits, folder)
        for index, (name, opened) in enumerate(zip(names, contestants, strict=True))
    ]
    if distributed.rank() > 0:
        return 0
    results: Results = {"protocol": _protocol(run, metrics, splits), "rows": [*judged, floor]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    return 0


def _size(run: EvaluateRun) -> tuple[int, int, int]:
    side = moving_shapes.SIDE
    return (moving_shapes.FRAMES, side, side) if isinstance(run.clips, ShapesClips) else run.clips.size


def _check_size(run: EvaluateRun) -> None:
    frames, *sides = _size(run)
    for index, metric in enumerate(run.metrics):
        least = 11 if isinstance(metric, FidelityConfig) else metric.block if isinstance(metric, TemporalConfig) else 1
        if min(sides) < least or (frames < 2 and isinstance(metric, TemporalConfig)):
            needed = f"sides of {least} pixels or more" + (" and 2 frames" if isinstance(metric, TemporalConfig) else "")
            raise UserError(f"metrics.{index}: {metric.name} needs {needed}, got clips of {list(_size(run))}")


def _protocol(run: EvaluateRun, metrics: Sequence[Metric], splits: Sequence[Split]) -> dict[str, object]:
    rules = {"frames": "all", "resize": "none"} if isinstance(run.clips, ShapesClips) else RULES
    counts = {"samples": run.samples, "per_caption": run.per_caption, "seed": run.seed, "size": list(_size(run))}
    first = {"first_contestant": Path(run.contestants[0].run).name} if any(isinstance(m, FidelityConfig) for m in run.metrics) else {}
    hashes = {split.name: split.digest for split in splits}
    return {"reference": hashes, **counts, "clips": rules, **first, "metrics": {metric.name: metric.facts for metric in metrics}}


# --- reference --------------------------------------------------------------------------------------------------


def _open_split(run: EvaluateRun, name: Literal["train", "held_out", "all"], metrics: Sequence[Metric]) -> Split:
    source = clips_of(run.clips, name, run.samples // run.per_caption, run.per_caption, run.seed)
    digest, seen, parts = xxhash.xxh3_128(), list[Clip](), _parts(run)

    def own(label: str) -> Iterator[Batch]:
        """All clips are read, for what they are is part of the protocol; those of this process are measured."""
        mine = distributed.share(len(parts))
        for number, part in enumerate(_tracked(parts, f"{label} clips, {name}")):
            clips = _take(source, part.stop - part.start, run)
            for clip in clips:
                digest.update(clip.video.numpy().tobytes() + clip.caption.encode())
                seen.append(Clip(clip.video.new_empty(0), clip.caption, clip.label))  # a slice would keep the whole
            if number in mine:
                yield Batch(torch.stack([clip.video for clip in clips]), [clip.caption for clip in clips], None)

    def measured(label: str) -> list[Tensor | None]:
        return _rows(metrics, own(label))

    reference = measured("reference")
    shapes = isinstance(run.clips, ShapesClips)
    drawn = seen[:] if shapes else [clip for clip in seen[: run.samples // run.per_caption] for _ in range(run.per_caption)]
    hashed = digest.hexdigest()
    floor = _figures(metrics, measured("more reference"), reference, run.per_caption if shapes else 1)
    return Split(name, [clip.caption for clip in drawn], [clip.label for clip in drawn], reference, floor, hashed, [])


def _take(source: Iterator[Clip], count: int, run: EvaluateRun) -> list[Clip]:
    clips = list(islice(source, count))
    if len(clips) < count:
        raise UserError(f"clips.path has fewer usable clips than 2 x samples = {2 * run.samples}: lower `samples`, or give more clips")
    return clips


def _parts(run: EvaluateRun) -> list[slice]:
    """The samples of each batch."""
    return [slice(first, min(first + run.batch_size, run.samples)) for first in range(0, run.samples, run.batch_size)]


def _tracked(parts: Sequence[slice], label: str) -> Iterator[slice]:
    return track(parts, label, silent=distributed.rank() > 0)


def _rows(metrics: Sequence[Metric], batches: Iterable[Batch]) -> list[Tensor | None]:
    """Rows of all clips of all processes under each metric, from this one's batches; metrics that have the same rows share them."""
    parts: dict[object, list[Tensor]] = {metric.rows: [] for metric in metrics}
    for batch in batches:
        for rows, collected in parts.items():
            if (values := rows(batch)) is not None:  # type: ignore[operator]
                collected.append(values.cpu())
    whole = {rows: distributed.gather_rows(torch.cat(collected) if collected else None) for rows, collected in parts.items()}
    return [whole[metric.rows] for metric in metrics]


def _figures(metrics: Sequence[Metric], rows: Sequence[Tensor | None], reference: Sequence[Tensor | None], repeats: int) -> FigureTable:
    """On the first process, which writes them; the others would only compute them too."""
    table: FigureTable = {}
    if distributed.rank() > 0:
        return table
    for metric, mine, theirs in zip(metrics, rows, reference, strict=True):
        if mine is not None:
            device = distributed.device()  # decompositions of thousands of features
            figures = metric.figures(mine.to(device), (mine if theirs is None else theirs).to(device), repeats)
            table |= {metric.name + name: figure.as_json() for name, figure in figures.items()}
    return table


# --- contestants ------------------------------------------------------------------------------------------------


def _traits(opened: Opened) -> list[str]:
    sampling, path = opened.sampling, opened.trained.path
    own = f"{path.name} {sampling.sampler} {sampling.steps} s={sampling.guidance.scale:g}"
    return [own, f"step {opened.step}", f"of {path.absolute().parent.name}"]


def _judge(
    run: EvaluateRun, index: int, name: str, opened: Opened, metrics: Sequence[Metric], splits: Sequence[Split], folder: Path
) -> dict[str, object]:
    trained, sampling, size = opened.trained, opened.sampling, _size(run)
    encoders = trained.encoders()
    backbone = opened.network(encoders, run.weights)
    keys = sample_keys(run.seed, run.samples)
    parts = _parts(run)
    own = [parts[number] for number in distributed.share(len(parts))]
    seconds: list[float] = []
    keep = index == 0 and any(isinstance(metric, FidelityConfig) for metric in run.metrics)

    def drawn(split: Split, label: str, shown: list[Tensor]) -> Iterator[Batch]:
        labels = _labels(run, trained, split)
        check_request(encoders, trained.base, split.captions, labels, size, "clips.")
        for number, part in enumerate(_tracked(own, label)):
            captions, classes = split.captions[part], None if labels is None else labels[part]
            start = time.monotonic()
            videos = draw(backbone, encoders, trained.base, captions, classes, size, sampling, keys[part], trained.flow)
            seconds.append(time.monotonic() - start)
            shown += [videos] if sum(map(len, shown)) < SHOWN else []
            split.others += [videos] if keep else []
            yield Batch(videos, captions, split.others[number] if split.others and index else None)

    figures: dict[str, object] = {}
    for split in splits:
        stem, shown = f"{name.replace(' ', '-')}-{split.name}", list[Tensor]()
        rows = _rows(metrics, drawn(split, stem, shown))
        figures[split.name] = _figures(metrics, rows, split.reference, run.per_caption)
        if distributed.rank() == 0:
            clips = torch.cat(shown)[:SHOWN]
            contact_sheet(clips, _marked(split.captions[: len(clips)], metrics, rows), folder / f"{stem}.png")
    weights = {"step": opened.step, "weights": run.weights, "checkpoint": hash_of_weights(backbone)}
    subject = {"run": str(trained.path), **weights, "sampling": sampling.model_dump(mode="json")}
    spent = sum(distributed.gather_json(sum(seconds))) / (len(splits) * run.samples)  # of one process
    return {"name": name, "subject": subject, "seconds_per_clip": spent, "figures": figures}


def _labels(run: EvaluateRun, trained: TrainedRun, split: Split) -> list[int] | None:
    if trained.base.backbone.num_classes is None:
        return None
    labels = [label for label in split.labels if label is not None]
    if len(labels) < len(split.labels):
        raise UserError(
            f"{trained.path} is class-conditional: clips.name={run.clips.name} must give every clip a class label, and does not"
        )
    return labels


def _marked(captions: Sequence[str], metrics: Sequence[Metric], rows: Sequence[Tensor | None]) -> list[str]:
    """Captions, with the verdict of the exact checker if it was asked."""
    for metric, verdicts in zip(metrics, rows, strict=True):
        if metric.name == "adherence" and verdicts is not None:
            return [f"{'ok' if verdict[-1] else 'NO'}: {caption}" for verdict, caption in zip(verdicts, captions)]
    return list(captions)
