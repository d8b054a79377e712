"""The metrics of `dit evaluate`: each reduces clips to one row a clip, batch by batch, and rows to figures with intervals.

Metrics with the same features share their rows. Knows nothing of diffusion.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.moving_shapes import parse
from dit.config import evaluation as config
from dit.evaluation import distances, moving_shapes, pixels
from dit.evaluation.features import ClipScore, Facts, Features, build_features, of_frames
from dit.runtime.figures import Figure, clustered_rate, jackknife_figure, mean_figure

Figures = dict[str, Figure]
Rows = Callable[["Batch"], Tensor | None]
_ADHERENCE = [*(field.name for field in fields(moving_shapes.Adherence)), "all"]
_SQUARE = 0.521405433  # mean distance of two uniform points of the unit square, (2 + sqrt 2 + 5 asinh 1) / 15


@dataclass(frozen=True)
class Batch:
    """Clips (n, T, H, W, 3) uint8 with their captions. others: what a first contestant drew for them, None for itself."""

    videos: Tensor
    captions: Sequence[str]
    others: Tensor | None


@dataclass(frozen=True)
class Metric:
    """rows: a batch to (n, D), None where there is nothing to compare with. figures: rows of clips and of the reference, and how many
    successive clips share a caption, to figures by name. facts: all that they depend on beside the clips."""

    name: str
    rows: Rows
    figures: Callable[[Tensor, Tensor, int], Figures]
    facts: Facts


def build_metrics(configs: Sequence[config.Metric], device: torch.device) -> list[Metric]:
    """The metrics that `configs` name, each network loaded once. Raises UserError for two of one name, or a network that cannot be read."""
    features = cache(lambda wanted: build_features(wanted, device))
    rows = cache(lambda wanted: lambda batch: features(wanted)(batch.videos))
    metrics = [_build(one, features, rows, device) for one in configs]
    names = [metric.name for metric in metrics]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"metrics: {', '.join(repeated)} is asked for twice; networks are told apart by the names of their folders")
    return metrics


def _build(one: config.Metric, features: Callable[..., Features], rows: Callable[..., Rows], device: torch.device) -> Metric:
    def of_sets(figures: Callable[[Tensor, Tensor, int], Figures]) -> Metric:
        assert isinstance(one, config.FeatureMetric)
        return Metric(_name(one), rows(one.features), figures, _facts(one, features(one.features)))

    match one:
        case config.AdherenceConfig():
            return Metric(one.name, _adherence_rows, _adherence_figures, {"version": 1})
        case config.PositionsConfig():
            return Metric(one.name, _position_rows, _position_figures, {"version": 1})
        case config.FrechetConfig():
            if one.extrapolate:
                return of_sets(lambda x, y, repeats: {"": distances.distance_figure(distances.frechet_unbiased, x, y, 2, repeats)})
            return of_sets(lambda x, y, repeats: {"": jackknife_figure(distances.frechet, x, y, unit=repeats)})
        case config.KernelConfig():
            size = one.subset
            return of_sets(
                lambda x, y, repeats: {
                    "": distances.distance_figure(distances.kernel_distance, x, y, -(-max(len(x), len(y)) // size), repeats)
                }
            )
        case config.PrecisionRecallConfig():
            return of_sets(lambda x, y, repeats: dict(zip(("/precision", "/recall"), distances.precision_recall(x, y, one.k, repeats))))
        case config.DiversityConfig():
            return of_sets(lambda x, y, repeats: {"": distances.pairwise(x, repeats)} if repeats > 1 else {})
        case config.ClipScoreConfig():
            score = ClipScore(one, device)
            return Metric(one.name, lambda batch: score(batch.videos, batch.captions)[:, None], _means(""), score.protocol())
        case config.TemporalConfig():
            net = features(one.features)
            return Metric(_name(one), _temporal_rows(one, net), _means("/frame_similarity", "/warping_error"), _facts(one, net))
        case config.FidelityConfig():
            net = features(one.features)
            return Metric(_name(one), _fidelity_rows(net), _means("/psnr", "/ssim", "/feature_distance"), _facts(one, net))
        case _:
            assert_never(one)


# --- features ---------------------------------------------------------------------------------------------------


def _name(one: config.FeatureMetric) -> str:
    features = one.features
    return f"{one.name}/{Path(features.path).name if isinstance(features, config.NetworkFeatures) else features.name}"


def _facts(one: config.FeatureMetric, features: Features) -> Facts:
    in_parts = {"parts": "of captions"} if isinstance(one, config.FrechetConfig | config.KernelConfig) else {}
    return one.model_dump(mode="json", exclude={"features"}) | in_parts | {"features": features.protocol()}


def _means(*names: str) -> Callable[[Tensor, Tensor, int], Figures]:
    return lambda rows, reference, repeats: {name: mean_figure(rows[:, i], repeats) for i, name in enumerate(names)}


def _temporal_rows(one: config.TemporalConfig, features: Features) -> Callable[[Batch], Tensor]:
    def rows(batch: Batch) -> Tensor:
        similarity = pixels.frame_similarity(of_frames(features, batch.videos)).cpu()
        return torch.stack([similarity, pixels.warping_error(batch.videos, one.block, one.radius).cpu()], dim=1)

    return rows


def _fidelity_rows(features: Features) -> Callable[[Batch], Tensor | None]:
    def rows(batch: Batch) -> Tensor | None:
        if batch.others is None:
            return None
        distance = pixels.feature_distance(features.maps(batch.videos), features.maps(batch.others)).cpu()
        return torch.stack([pixels.psnr(batch.videos, batch.others), pixels.ssim(batch.videos, batch.others), distance], dim=1)

    return rows


# --- moving shapes ----------------------------------------------------------------------------------------------


def _adherence_rows(batch: Batch) -> Tensor:
    verdicts = moving_shapes.check_batch(batch.videos.numpy(), [parse(caption) for caption in batch.captions])
    return torch.tensor([[float(value) for value in asdict(verdict).values()] + [float(verdict.all)] for verdict in verdicts])  # (n, 9)


def _adherence_figures(rows: Tensor, reference: Tensor, repeats: int) -> Figures:
    columns = dict(zip(_ADHERENCE, rows.unbind(1), strict=True))
    columns = {"mean": torch.stack([columns[name] for name in moving_shapes.MEANT]).mean(0), **columns}
    return {f"/{name}": clustered_rate(column, repeats) for name, column in columns.items()}


def _position_rows(batch: Batch) -> Tensor:
    return torch.from_numpy(moving_shapes.relative_starts(batch.videos.numpy(), [parse(caption) for caption in batch.captions]))


def _position_figures(rows: Tensor, reference: Tensor, repeats: int) -> Figures:
    """Kolmogorov-Smirnov p of either axis; and, of the distance between clips of one caption, the share that uniform starts have."""
    figures, seen = {}, rows[~rows.isnan().any(1)].double()
    for axis, name in enumerate("xy"):
        if len(seen):
            figures[f"/uniform_p_{name}"] = Figure(distances.uniformity(seen[:, axis])[1], None, None, len(seen))
    groups = rows.view(-1, repeats, 2)
    whole = groups[~groups.isnan().flatten(1).any(1)]
    if repeats > 1 and len(whole):
        figures["/spread"] = distances.pairwise(whole.flatten(0, 1) / _SQUARE, repeats)
    return figures
