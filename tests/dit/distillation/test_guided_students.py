"""Students that take the scale of guidance as an input: told what their target was made with, and apart from one another by it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config import Contestant, DistillRun, SpatioTemporalDiTConfig, TrainRun
from dit.config.objective import Guidance, SamplingConfig
from dit.diffusion import AtScale, ClassifierFreeGuidance, sample
from dit.distillation import build_distillation, build_student_sampling, student_backbone
from dit.models import build_backbone
from dit.runs import TrainedRun
from tests.dit.distillation.toy_students import method

NULL = torch.full((1, 4), 0.5)
OPTIONS = {"name": "consistency", "solver": "euler", "guidance": {"s": 2.0}, "guidance_range": (1.0, 4.0)}


def text_teacher(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A constant velocity, the mean of the text: guided, 0.5 + s (mean - 0.5), and so is what a student jumps by."""
    text = torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)])
    return cond.per_token(text)[:, None].expand_as(x_t)


def guided_text(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    assert cond.guidance is not None
    return 0.5 + cond.per_token(cond.guidance)[:, None] * (text_teacher(x_t, t, cond) - 0.5)


TEACHER = ClassifierFreeGuidance(text_teacher, NULL, 2.0, None)


def pack(count: int, first: int = 0) -> PackedLatents:
    generator = torch.Generator().manual_seed(first)
    cond = pack_conditioning([(1, 2, 1)] * count, [torch.full((1, 4), float(i % 3) / 2 - 0.5) for i in range(count)])
    keys = tuple(range(first, first + count))
    return PackedLatents(torch.randn(2 * count, 3, generator=generator), cond, keys, ("",) * count, torch.ones(count))


def test_a_student_that_knows_its_scale_has_no_loss_and_one_that_does_not_has_some() -> None:
    objective, batch = build_distillation(method(**OPTIONS), TEACHER, None), pack(60)
    assert float(objective(guided_text, batch, 0.3).per_sample.max()) < 1e-10
    fixed = ClassifierFreeGuidance(text_teacher, NULL, 2.0, None)
    unaware = objective(lambda x_t, t, cond: fixed(x_t, t, replace(cond, guidance=None)), batch, 0.3).per_sample
    assert float(unaware.mean()) > 1e-2


def test_each_sample_has_the_target_of_a_run_with_its_scale() -> None:
    batch, told = pack(12), []

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if cond.guidance is not None:
            told.append(cond.guidance)
        return x_t.sin() + cond.per_token(t)[:, None]

    losses = build_distillation(method(**OPTIONS), TEACHER, None)(student, batch, 0.3).per_sample
    assert all(torch.equal(scales, told[0]) for scales in told)
    assert len(told) == 2
    assert 1 <= float(told[0].min()) < 2 < 3 < float(told[0].max()) <= 4
    for i, s in enumerate(told[0].tolist()):
        fixed = method(**{**OPTIONS, "guidance": {"s": s}, "guidance_range": None})
        alone = build_distillation(fixed, ClassifierFreeGuidance(text_teacher, NULL, s, None), None)(student, batch, 0.3)
        torch.testing.assert_close(alone.per_sample[i], losses[i])


def test_a_backbone_learns_to_be_guided_by_one_call() -> None:
    config = method(**OPTIONS)
    sizes = {"hidden_size": 24, "depth": 1, "num_heads": 2, "ffn_size": 24, "patch_size": (1, 1, 1), "frequency_size": 16}
    plain = SpatioTemporalDiTConfig.model_validate(sizes)
    torch.manual_seed(0)
    student, taught = (build_backbone(c, channels=3, text_width=4) for c in (student_backbone(config, plain), plain))
    student.load_state_dict({**student.state_dict(), **taught.state_dict()})
    batch = pack(6)
    t = torch.full((6,), 0.5)
    assert torch.equal(AtScale(student, 3.0)(batch.tokens, t, batch.cond), taught(batch.tokens, t, batch.cond))  # no effect at first
    objective, optimizer = build_distillation(config, TEACHER, None), torch.optim.Adam(student.parameters(), 1e-2)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        optimizer.zero_grad()
        objective(student, pack(24, 100 * step), step / 150).per_sample.mean().backward()
        optimizer.step()
    cond, keys = batch.cond, list(range(6))
    drawn = []
    for s in (1.0, 2.0, 3.0, 4.0):
        sampling = build_student_sampling(config).model_copy(update={"steps": 1})
        calls = 0

        def counted(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            nonlocal calls
            calls += 1
            return student(x_t, t, cond)

        with torch.no_grad():
            own = sample(AtScale(counted, s), cond, keys, 3, sampling, 1.0)
            truth = sample(AtScale(guided_text, s), cond, keys, 3, sampling, 1.0)
        assert calls == 1
        assert float((own - truth).square().mean().sqrt()) < 0.2
        drawn.append(float(cond.per_sample(own)[0] - cond.per_sample(own)[2]))  # text -0.5 moves down, 0.5 not at all
    assert drawn == sorted(drawn)
    assert drawn[-1] - drawn[0] > 2


def test_a_run_with_the_input_is_sampled_at_scales_of_its_range_only(tmp_path: Path) -> None:
    run = DistillRun.model_validate(
        {"out": "out", "teacher": {"run": "teacher"}, "method": OPTIONS, "optimizer": {"lr": 1e-3}, "train": {"samples": 8}}
    )
    trained = TrainedRun(tmp_path, run, TrainRun.model_construct())
    assert trained.sampling.guidance == Guidance(s=2.0)
    assert trained.sampling_for(Contestant(run="out", steps=1)).guidance == Guidance(s=2.0)
    fits = SamplingConfig(sampler="consistency", steps=1, guidance=Guidance(w=2.5))
    assert trained.sampling_for(Contestant(run="out", sampling=fits)).guidance.scale == 3.5
    for guidance in (Guidance(s=5.0), Guidance(s=0.5), Guidance(s=2.0, rescale=0.3), Guidance(s=2.0, negative_prompt="blur")):
        asked = SamplingConfig(sampler="consistency", steps=1, guidance=guidance)
        with pytest.raises(UserError, match=r"from s=1 to 4.*sampling\.guidance\.s"):
            trained.sampling_for(Contestant(run="out", sampling=asked))


@pytest.mark.parametrize("changes", [{"guidance": {"s": 5}}, {"guidance": {"s": 1}}, {"guidance_range": (4, 2)}, {"flow": "data"}])
def test_a_range_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"guidance_range=|flow=data"):
        method(**{**OPTIONS, **changes})
