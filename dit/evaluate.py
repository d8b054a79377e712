"""`dit evaluate`: how well the videos of one or more runs obey their captions, by the exact checker of moving shapes."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines import moving_shapes
from data_pipelines.progress import track
from data_pipelines.randomness import key
from dit.config import EvaluateRun
from dit.config.objective import SamplingConfig
from dit.drawing import draw, sample_keys
from dit.evaluation.moving_shapes import check_batch, summarise
from dit.evaluation.pictures import contact_sheet
from dit.runs import Encoders, TrainedRun, make_folder
from dit.runtime import distributed

SIZE = (moving_shapes.FRAMES, moving_shapes.SIDE, moving_shapes.SIDE)


@dataclass(frozen=True)
class Row:
    """One line of the table: a run, how it was sampled, and what the checker says of trained and of held-out captions."""

    run: str
    sampling: SamplingConfig
    train: dict[str, object]
    held_out: dict[str, object]
    seconds_per_clip: float


def main(run: EvaluateRun) -> int:
    """Draw clips for captions of both splits with every run and setting; write results.json, a table and contact sheets to `out`."""
    folder = make_folder(run.out, "out")
    rows = []
    for index, contestant in enumerate(run.contestants):
        trained = TrainedRun.open(contestant.run, f"contestants.{index}.run")
        encoders = Encoders.load(trained.base.encoders, distributed.device())
        backbone = trained.backbone(encoders, contestant.step, run.weights, distributed.device())
        rows.append(_evaluate(run, trained, encoders, backbone, trained.sampling_for(contestant), folder))
    results = {"samples": run.samples, "seed": run.seed, "weights": run.weights, "rows": [_as_json(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(rows)
    (folder / "table.md").write_text(text + "\n")
    print(text)
    return 0


def captions(split: moving_shapes.Split, count: int, seed: int) -> list[str]:
    """`count` captions of a split, all of them as evenly as `count` allows, in an order that depends on the seed."""
    everything = sorted(moving_shapes.all_captions(split), key=lambda text: key("evaluation", seed, text))
    return [everything[index % len(everything)] for index in range(count)]


def _evaluate(
    run: EvaluateRun, trained: TrainedRun, encoders: Encoders, backbone: torch.nn.Module, sampling: SamplingConfig, folder: Path
) -> Row:
    start = time.monotonic()
    summaries = {}
    for split in ("train", "held_out"):
        prompts = captions(split, run.samples, run.seed)
        videos = _draw_all(
            run, trained, encoders, backbone, sampling, prompts, f"{trained.path.name} {sampling.steps} steps, {split} captions"
        )
        verdicts = check_batch(videos.numpy(), [moving_shapes.parse(prompt) for prompt in prompts])
        summaries[split] = summarise(verdicts)
        marked = [f"{'ok' if verdict.all else 'NO'}: {prompt}" for verdict, prompt in zip(verdicts, prompts, strict=True)]
        contact_sheet(videos[:12], marked[:12], folder / f"{trained.path.name}-{sampling.sampler}{sampling.steps}-{split}.png")
    seconds = (time.monotonic() - start) / (2 * run.samples)
    return Row(str(trained.path), sampling, summaries["train"], summaries["held_out"], seconds)


def _draw_all(
    run: EvaluateRun,
    trained: TrainedRun,
    encoders: Encoders,
    backbone: torch.nn.Module,
    sampling: SamplingConfig,
    prompts: list[str],
    label: str,
) -> Tensor:
    keys = sample_keys(run.seed, len(prompts))
    parts = [slice(first, first + run.batch_size) for first in range(0, len(prompts), run.batch_size)]
    return torch.cat([draw(backbone, encoders, trained.base, prompts[p], None, SIZE, sampling, keys[p]) for p in track(parts, label)])


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table: adherence to trained / held-out captions."""
    names = ("shape", "colour", "direction", "speed", "mean", "size", "position", "all")
    head = "| run | sampler | steps | guidance | " + " | ".join(names) + " | s/clip |"
    lines = [head, "|" + "---|" * (len(names) + 5)]
    for row in rows:
        cells = [f"{row.train[name]:.3f} / {row.held_out[name]:.3f}" for name in names]
        sampling = row.sampling
        lines.append(
            f"| {Path(row.run).name} | {sampling.sampler} | {sampling.steps} | s={sampling.guidance.scale:g} | "
            + " | ".join(cells)
            + f" | {row.seconds_per_clip:.3f} |"
        )
    return "\n".join(lines)


def _as_json(row: Row) -> dict[str, object]:
    values = {"run": row.run, "sampling": row.sampling.model_dump(mode="json"), "train": row.train, "held_out": row.held_out}
    return values | {"seconds_per_clip": row.seconds_per_clip}
