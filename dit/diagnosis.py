"""What a distillation says of its student at previews: figures, a picture beside the teacher, a note, and a warning if it is no use."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipelines.packed import Grid, check_patch, pack_conditioning
from dit.config import DistillRun, TrainRun
from dit.diffusion import Denoiser, levels, shift_of
from dit.distillation import Alternating, Distillation, build_student_sampling, step_calls, takes_guidance, traits_of
from dit.distillation.diagnosis import Judge, Pack
from dit.distillation.verdict import Figures, advice, is_worse, table, verdict
from dit.drawing import sample_keys, to_videos
from dit.evaluation.pictures import contact_sheet
from dit.runs import Encoders
from dit.runtime import distributed

log = logging.getLogger(__name__)
SHOWN = 3
"""Prompts in the picture."""


class Diagnosis:
    """Judges the student of a run at its previews, always from the same noise. Writes `student.md` and `samples/student-step-N.png`.

    base: the training run with the student's backbone. objective: whose teacher it is held against. flow_of(network): its denoiser.
    step_tokens: of a step over all ranks, at most. token_budget: of a pack.
    """

    def __init__(
        self,
        run: DistillRun,
        base: TrainRun,
        encoders: Encoders,
        folder: Path,
        objective: Distillation | Alternating,
        flow_of: Callable[[nn.Module], Denoiser],
        token_budget: int,
        step_tokens: int,
    ) -> None:
        assert run.diagnosis is not None
        assert run.preview is not None
        self.run, self.base, self.encoders, self.folder, self.flow_of = run, base, encoders, folder, flow_of
        self.sampling = build_student_sampling(run.method)
        grid = check_patch(encoders.latent_size(run.preview.size, "preview.size"), base.backbone.patch_size)
        self.shift = shift_of(prod(grid), base.objective.shift)
        channels = encoders.latents.channels * prod(base.backbone.patch_size)
        packs = _packs(run, base, encoders, grid, token_budget)
        self.judge = Judge(run.diagnosis, self.sampling, traits_of(run.method), objective.teacher, packs, channels, self.shift)
        self.every_steps, said = rhythm(run, self.judge, prod(grid), step_tokens)
        if distributed.rank() == 0:
            log.info(said)
        self._beside: dict[str, Tensor] = {}

    def __call__(self, network: nn.Module, step: int) -> Figures:
        """Judge `network` after `step` steps. Call it on the first rank, or on all that hold a part of the weights."""
        figures, drawn = self.judge(self.flow_of(network))
        if distributed.rank() == 0:
            self._picture(drawn, self.folder / "samples" / f"student-step-{step:08d}.png")
            history = [*_recorded(self.folder / "metrics.jsonl", step), (step, figures)]
            (self.folder / "student.md").write_text(self._note(history))
            if is_worse(figures, self.sampling.steps):
                lines = [verdict(figures, self.sampling.steps), *advice(history, self.sampling.steps), f"See {self.folder}/student.md"]
                log.warning("WARNING: after step %d %s", step, "\n  ".join(lines))
        return figures

    def _picture(self, drawn: Mapping[int, Tensor], path: Path) -> None:
        """Rows: the student in each number of steps, below it the teacher in as many, last the teacher's long walk. Columns: prompts."""
        config, judge = self.run.preview, self.judge
        assert config is not None
        if not self._beside:
            named = {_row("teacher", n): latents for n, latents in judge.reference.few.items()}
            named[_row("teacher", judge.teacher_steps)] = judge.reference.states[-1]
            self._beside = {name: self._decoded(latents) for name, latents in named.items()}
        rows: dict[str, Tensor] = {}
        for n in judge.all_counts:
            rows |= {_row("student", n): self._decoded(drawn[n])} if n in drawn else {}
            rows[_row("teacher", n)] = self._beside[_row("teacher", n)]
        rows |= self._beside  # the long walk last
        captions = [f"{name}: {prompt}" for name in rows for prompt in config.prompts[:SHOWN]]
        contact_sheet(torch.cat(list(rows.values())), captions, path, columns=len(captions) // len(rows))

    def _decoded(self, latents: Tensor) -> Tensor:
        """The first clip of the first prompts: (n, T, H, W, 3) uint8."""
        assert self.run.diagnosis is not None
        first = latents[:: self.run.diagnosis.noises][:SHOWN]
        grids = self.judge.packs[0].cond.grids[:1] * len(first)
        cond = pack_conditioning(grids, [self.encoders.null_text] * len(first))
        tokens = first.reshape(-1, self.judge.channels).to(self.encoders.null_text.device)
        return to_videos(tokens, cond, self.encoders, self.base.backbone.patch_size)

    def _note(self, history: Sequence[tuple[int, Figures]]) -> str:
        step, figures = history[-1]
        sampling, method = self.sampling, self.run.method
        times = ", ".join(f"{t:.3g}" for t in levels(sampling, self.shift)[:-1].tolist())
        lines = [
            f"# Student of {self.run.teacher.run}, step {self.run.teacher.step}",
            "",
            f"Method {method.name}. Sampled by `{sampling.sampler}` in {sampling.steps} steps, from t = {times} for clips of this size. "
            f"Guidance {method.guidance} is {'an input, and this its default' if takes_guidance(method) else 'baked in'}.",
            "",
            f"After step {step} {verdict(figures, sampling.steps)}",
            "",
            *(f"- {text}" for text in advice(history, sampling.steps)),
            "",
            "Student / teacher in as many steps: distance of their latents to what the teacher makes of the same noise in "
            f"{self.judge.teacher_steps} Euler steps. Gap and self-consistency: means over the levels where the student's steps begin. "
            "Motion and diversity: parts of the teacher's.",
            "",
            *table(history, self.judge.counts),
            "",
            f"![student and teacher](samples/student-step-{step:08d}.png)",
        ]
        return "\n".join(lines) + "\n"


def _row(name: str, steps: int) -> str:
    return f"{name}, {steps} step{'s' if steps > 1 else ''}"


def rhythm(run: DistillRun, judge: Judge, tokens: int, step_tokens: int) -> tuple[int, str]:
    """Every how many steps the student is judged, and the equation. tokens: of a clip.

    The least multiple of preview.every_steps whose network calls are at most `diagnosis.share` of those of the training between.
    """
    assert run.diagnosis is not None
    assert run.preview is not None
    clips = sum(len(pack.keys) for pack in judge.packs)
    a_clip = sum(judge.counts) + judge.sampling.steps * (2 if judge.traits.any_time else 1)
    a_sample = step_calls(run.method).forward_passes
    between = run.preview.every_steps * step_tokens / tokens * a_sample
    previews = max(1, ceil(clips * a_clip / (run.diagnosis.share * between)))
    every, part = run.preview.every_steps * previews, clips * a_clip / (previews * between)
    long = sum(judge.all_counts) + judge.teacher_steps
    return every, (
        f"the student is judged every {every} steps: {clips} clips x {a_clip} calls are {part:.2%} of the training between, "
        f"{every} steps x {step_tokens / tokens:.4g} clips x {a_sample} calls (diagnosis.share: {run.diagnosis.share:g}); "
        f"the teacher once: {clips} clips x {long} steps"
    )


def _recorded(path: Path, before: int) -> list[tuple[int, Figures]]:
    """Earlier diagnoses: the lines of `metrics.jsonl` that have one."""
    if not path.is_file():
        return []
    with path.open() as file:
        lines = [json.loads(line) for line in file if '"student": {' in line]
    return [(line["step"], line["student"]) for line in lines if line["step"] < before]


def _packs(run: DistillRun, base: TrainRun, encoders: Encoders, grid: Grid, token_budget: int) -> list[Pack]:
    """Clips of one prompt beside each other, the first of each with the noise of its preview; packs no larger than in training."""
    config, noises = run.preview, run.diagnosis.noises if run.diagnosis else 0
    assert config is not None
    count, texts = len(config.prompts), encoders.text.encode(list(config.prompts))
    keys = sample_keys(base.train.seed, count * noises)
    clips = [(prompt, keys[noise * count + prompt]) for prompt in range(count) for noise in range(noises)]
    size = max(1, token_budget // (2 * prod(grid)))  # guidance doubles them
    packs = []
    for first in range(0, len(clips), size):
        prompts, own = zip(*clips[first : first + size], strict=True)
        labels = None if config.labels is None else torch.tensor([config.labels[p] for p in prompts], device=texts[0].device)
        packs.append(Pack(pack_conditioning([grid] * len(prompts), [texts[p] for p in prompts], labels), own))
    return packs
