"""What `dit distill` decides before it runs."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipelines.config_file import load_run, save_resolved
from data_pipelines.errors import NoValidCheckpoint, UserError
from data_pipelines.packed import Conditioning, pack_conditioning, patchify
from dit.config import Contestant, DistillRun, TrainRun
from dit.config.distillation import ConsistencyConfig
from dit.config.objective import Guidance, SamplingConfig, WeakModel
from dit.diffusion import RECTIFIED_FLOW
from dit.diffusion.ground_truth import pack_of_points
from dit.distill import check_critic, check_teacher, frames_of, looks_of, start_of_critic, with_fixed_networks
from dit.distillation import build_distillation, build_student_sampling
from dit.drawing import guide
from dit.engine import durable
from dit.evaluation.features import RandomConv
from dit.models import build_backbone
from dit.runs import Encoders, TrainedRun


def request(folder: Path, step: int | None) -> DistillRun:
    return DistillRun.model_validate(
        {
            "out": str(folder / "student"),
            "teacher": {"run": str(folder / "teacher"), "step": step},
            "method": {"name": "consistency", "guidance": {"s": 2}},
            "optimizer": {"lr": 1e-3},
            "train": {"samples": 8},
        }
    )


def checkpoint(root: Path, step: int) -> None:
    """An empty one that is valid."""
    durable.publish(durable.stage(root, step), root, step, [])


def test_a_student_keeps_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    teacher, student = (tmp_path / name / "checkpoints" for name in ("teacher", "student"))
    checkpoint(teacher, 5)
    run = with_fixed_networks(request(tmp_path, None))
    assert run.teacher.step == 5
    checkpoint(student, 1)
    save_resolved(run, tmp_path / "student" / "config.resolved.yaml")
    checkpoint(teacher, 10)
    assert with_fixed_networks(request(tmp_path, None)).teacher.step == 5
    assert with_fixed_networks(request(tmp_path, 10)).teacher.step == 10


def test_a_damaged_checkpoint_of_the_teacher_is_passed_over(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher" / "checkpoints"
    for step in (5, 10):
        checkpoint(teacher, step)
    (teacher / "step-00000010" / "manifest.json").write_text("{}")
    assert with_fixed_networks(request(tmp_path, None)).teacher.step == 5
    (teacher / "step-00000005" / "manifest.json").unlink()
    with pytest.raises(NoValidCheckpoint, match="step-00000005"):
        with_fixed_networks(request(tmp_path, None))


def test_a_checkpoint_may_stand_for_its_run() -> None:
    values = request(Path("runs"), None).model_dump()
    found = DistillRun.model_validate(values | {"teacher": {"run": "runs/teacher/checkpoints/step-00000500"}}).teacher
    assert (found.run, found.step) == ("runs/teacher", 500)
    with pytest.raises(ValueError, match="step 500, and step is 400"):
        DistillRun.model_validate(values | {"teacher": {"run": "runs/teacher/checkpoints/step-00000500/", "step": 400}})


def test_a_student_keeps_the_weaker_model_that_guided_its_teacher(tmp_path: Path) -> None:
    for name in ("teacher", "weak"):
        checkpoint(tmp_path / name / "checkpoints", 5)
    values = request(tmp_path, None).model_dump()
    values["method"] = {"name": "consistency", "guidance": {"s": 2, "weak": {"run": str(tmp_path / "weak")}}}
    asked = DistillRun.model_validate(values)
    run = with_fixed_networks(asked)
    assert run.method.guidance.weak == WeakModel(run=str(tmp_path / "weak"), step=5)
    checkpoint(tmp_path / "student" / "checkpoints", 1)
    save_resolved(run, tmp_path / "student" / "config.resolved.yaml")
    checkpoint(tmp_path / "weak" / "checkpoints", 10)
    assert with_fixed_networks(asked) == run


CRITIC = {"critic": {"optimizer": {"lr": 1e-3}}}


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        ({"name": "mean_flow"}, {"name": "consistency"}, None),
        ({"name": "progressive", "student_steps": 8}, {"name": "progressive", "student_steps": 4, "teacher_steps": 2}, None),
        ({"name": "consistency", "phases": 4, "student_steps": 4}, {"name": "progressive", "student_steps": 1, "teacher_steps": 4}, None),
        ({"name": "progressive", "student_steps": 8}, {"name": "progressive", "student_steps": 2, "teacher_steps": 2}, "= 4: expected"),
        ({"name": "progressive", "student_steps": 8}, {"name": "consistency"}, "its 8 steps alone, got method.name=consistency"),
        ({"name": "consistency"}, {"name": "progressive"}, "jumps to the data"),
        ({"name": "distribution_matching", **CRITIC}, {"name": "consistency"}, "jumps to the data"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_which_students_teach(teacher: dict[str, object], student: dict[str, object], said: str | None) -> None:
    """A mean velocity is one of the flow; steps are known to a student that takes several of them as one."""
    base = request(Path("runs"), None).model_dump()
    taught, run = (DistillRun.model_validate(base | {"method": method | {"guidance": {"s": 1}}}) for method in (teacher, student))
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_teacher(run, TrainedRun(Path("runs/teacher"), taught, BASE))


@pytest.mark.parametrize(("s", "said"), [(1.0, "from s=2 to 6"), (3.0, None), (7.0, "from s=2 to 6")])
def test_a_student_that_is_told_its_guidance_teaches_at_scales_of_its_range(s: float, said: str | None) -> None:
    told = {"name": "consistency", "phases": 4, "student_steps": 4, "guidance": {"s": 3}, "guidance_range": [2, 6]}
    own = {"name": "progressive", "student_steps": 2, "teacher_steps": 2, "guidance": {"s": s}}
    base = request(Path("runs"), None).model_dump()
    teacher, run = (DistillRun.model_validate(base | {"method": method}) for method in (told, own))
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_teacher(run, TrainedRun(Path("runs/teacher"), teacher, BASE))


def test_a_student_takes_the_steps_that_it_knows() -> None:
    for method, can in (({"name": "consistency"}, True), ({"name": "consistency", "phases": 4, "student_steps": 4}, False)):
        values = request(Path("runs"), None).model_dump() | {"method": method | {"guidance": {"s": 2}}}
        trained = TrainedRun(Path("runs/student"), DistillRun.model_validate(values), BASE)
        own = trained.sampling
        assert trained.sampling_for(Contestant(run="", steps=own.steps)) == own
        others = (Contestant(run="", steps=2), Contestant(run="", sampling=SamplingConfig(sampler=own.sampler, steps=2)))
        for other, key in zip(others, ("steps", "sampling"), strict=True):
            with nullcontext() if can else pytest.raises(UserError, match=f"4 steps alone, and is asked for 2: remove contestants.{key}"):
                assert trained.sampling_for(other).steps == 2


def test_a_teacher_that_cannot_be_guided_is_refused() -> None:
    run, base = request(Path("runs"), None), BASE
    check_teacher(run, TrainedRun(Path("runs/teacher"), base, base))
    undropped = base.model_copy(update={"objective": base.objective.model_copy(update={"condition_dropout": 0.0})})
    student = DistillRun.model_validate(run.model_dump() | {"method": {"name": "mean_flow", "guidance": {"s": 2}}})
    for trained, said in ((undropped, "condition_dropout=0"), (student, "baked in")):
        with pytest.raises(UserError, match=said):
            check_teacher(run, TrainedRun(Path("runs/teacher"), trained, undropped))
        plain = run.model_copy(update={"method": run.method.model_copy(update={"guidance": Guidance(s=1.0)})})
        check_teacher(plain, TrainedRun(Path("runs/teacher"), trained, undropped))


def test_a_difference_of_bf16_answers_is_refused() -> None:
    values = request(Path("runs"), None).model_dump() | {"engine": {"precision": "bf16"}}
    for derivative, fits in (("forward", True), ("difference", False)):
        values["method"] = {"name": "mean_flow", "guidance": {"s": 2}, "derivative": derivative}
        with nullcontext() if fits else pytest.raises(ValueError, match=r"method\.derivative: forward"):
            DistillRun.model_validate(values)


BASE = TrainRun.model_validate(
    {
        "out": "runs/teacher",
        "data": {"sources": [{"path": "shards"}], "sizes": [[1, 8, 8]], "token_budget": 64, "packs_per_step": 1},
        "backbone": {"hidden_size": 24, "depth": 1, "num_heads": 2, "ffn_size": 24},
        "optimizer": {"lr": 1e-3},
        "train": {"samples": 8},
    }
)


def text_teacher(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A constant velocity: the mean of the text."""
    text = torch.stack([part.mean() for part in cond.text.split(cond.text_lengths)])
    return cond.per_token(text)[:, None].expand_as(x_t)


def test_guidance_is_baked_in_and_captions_are_never_dropped() -> None:
    guidance = {"w": 2.0, "interval": [0.0, 0.5]}
    config = ConsistencyConfig.model_validate({"name": "consistency", "guidance": guidance, "stages": 1, "solver": "euler"})
    encoders = Encoders(None, None, torch.full((1, 4), 0.5))  # type: ignore[arg-type]
    guided = guide(text_teacher, encoders, BASE, config.guidance, RECTIFIED_FLOW)
    objective = build_distillation(config, guided, None)
    batch = pack_of_points(torch.zeros(300, 2), 0)  # their text is zero: guided velocity 0.5 + 3 (0 - 0.5) = -1 up to t = 0.5, 0 above

    losses = objective(lambda x_t, t, cond: torch.full_like(x_t, -1.0), batch, 0.0)
    inside = losses.t <= 0.5
    assert 100 < int(inside.sum()) < 200
    assert float(losses.per_sample[inside].abs().max()) < 1e-10
    torch.testing.assert_close(losses.per_sample[~inside], torch.full((int((~inside).sum()),), 0.25))  # half of the gap of 1, squared
    assert build_student_sampling(config).guidance.scale == 1.0


@pytest.mark.parametrize(
    ("method", "objective", "said"),
    [
        ({"name": "distribution_matching", "critic": {}}, {"name": "variational"}, "schedule that runs/teacher has learned"),
        ({"name": "adversarial", "critic": {"blocks": [0]}}, {"name": "ddpm"}, "rectified flow, and runs/teacher is on vp"),
        ({"name": "adversarial", "critic": {"blocks": [0, 1]}}, {}, "heads on block 1, but the teacher's blocks are 0 to 0"),
        ({"name": "adversarial", "critic": {"blocks": [0]}}, {}, None),
        ({"name": "distribution_matching", "critic": {}}, {"name": "ddpm"}, None),
        ({"name": "adversarial", "critic": {"blocks": [1], "features": {"name": "random_conv"}}}, {"name": "ddpm"}, None),
        ({"name": "moment_matching", "critic": {}}, {"name": "variational"}, "schedule that runs/teacher has learned"),
        ({"name": "moment_matching"}, {"name": "variational"}, None),
        ({"name": "consistency"}, {"name": "variational"}, None),
    ],
)
def test_a_critic_that_cannot_be_made_of_the_teacher_is_refused(
    method: dict[str, object], objective: dict[str, object], said: str | None
) -> None:
    critic = method.get("critic")
    method = method | {"guidance": {"s": 2.0}} | ({"critic": {"optimizer": {"lr": 1.0}, **critic}} if isinstance(critic, dict) else {})
    values = {"out": "runs/student", "teacher": {"run": "runs/teacher"}, "optimizer": {"lr": 1e-3}, "train": {"samples": 8}}
    run = DistillRun.model_validate({**values, "method": method})
    base = TrainRun.model_validate(BASE.model_dump() | {"objective": objective})
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_critic(run, base)


def judging(**critic: object) -> DistillRun:
    method = {"name": "adversarial", "guidance": {"s": 2.0}, "critic": {"optimizer": {"lr": 1.0}, "blocks": [1], **critic}}
    values = {"out": "runs/student", "teacher": {"run": "runs/teacher"}, "optimizer": {"lr": 1e-3}, "train": {"samples": 8}}
    return DistillRun.model_validate({**values, "method": method})


def test_keys_without_effect_on_heads_are_refused(tmp_path: Path) -> None:
    pixels = {"features": {"name": "random_conv"}}
    with pytest.raises(ValueError, match="leave frames out"):
        judging(frames=2)
    with pytest.raises(ValueError, match="leave times out"):
        judging(**pixels, times={"name": "uniform"})
    with pytest.raises(ValueError, match="leave pool out"):
        judging(features={"name": "network", "path": "dino", "pool": "mean"})
    run = judging(**pixels, frames=2)
    save_resolved(run, tmp_path / "config.yaml")
    assert load_run(DistillRun, str(tmp_path / "config.yaml")) == run
    encoders = Encoders.load(BASE.encoders, torch.device("cpu"))
    with pytest.raises(UserError, match=r"method\.critic\.blocks: got 2, but the layers of random_conv are 0 to 1"):
        looks_of(judging(**pixels, blocks=[0, 2]), BASE, encoders)
    with pytest.raises(UserError, match=r"method\.critic\.features\.path: got 'nowhere'"):
        looks_of(judging(features={"name": "network", "path": "nowhere"}), BASE, encoders)


@pytest.mark.parametrize("jumps", [False, True])
def test_a_critic_starts_as_its_teacher_whatever_step_it_is_told(jumps: bool) -> None:
    """Also where the teacher is a student of jumps, which answers with another mean velocity for each."""
    encoders = Encoders.load(BASE.encoders, torch.device("cpu"))
    base = BASE.model_copy(update={"backbone": BASE.backbone.model_copy(update={"jumps": jumps})})
    teacher = build_backbone(base.backbone, channels=encoders.latents.channels, text_width=encoders.text.width)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    values = {"out": "x", "teacher": {"run": "y"}, "optimizer": {"lr": 1}, "train": {"samples": 1}}
    critic = {"optimizer": {"lr": 1.0}}
    values["method"] = {"name": "distribution_matching", "guidance": {"s": 1.0}, "student_steps": 4, "critic": critic}
    start = start_of_critic(DistillRun.model_validate(values), base, encoders, teacher)
    assert "jump_embedder.mlp.2.weight" in start.state_dict()
    cond = pack_conditioning([(1, 2, 2)] * 2, [torch.randn(3, encoders.text.width)] * 2)
    x, t = torch.randn(8, teacher.patch_embedder.in_features), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = teacher(x, t, cond)
        for jump in (torch.zeros(2), torch.tensor([1.0, 0.25])):
            torch.testing.assert_close(start(x, t, cond.over(jump)), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(teacher(x, t, cond.over(torch.ones(2))), expected) != jumps


def test_heads_look_at_decoded_frames_and_the_gradient_comes_back() -> None:
    """Of clips of any size in one pack, against the clip decoded and looked at as evaluation does, and a central difference."""
    encoders, base = Encoders.load(BASE.encoders, torch.device("cpu")), BASE
    base = base.model_copy(update={"backbone": base.backbone.model_copy(update={"patch_size": (1, 2, 2)})})
    looks = looks_of(judging(features={"name": "random_conv", "seed": 3}, frames=3), base, encoders)
    assert looks is not None
    assert (list(looks.widths), looks.text_width, looks.classes) == ([64], encoders.text.width, None)
    for size in ((3, 8, 4), (1, 4, 4)):  # of latents
        latents = torch.randn(8, *size, generator=torch.Generator().manual_seed(1))
        tokens, grid = patchify(latents, (1, 2, 2)).requires_grad_(), (size[0], size[1] // 2, size[2] // 2)
        (found,) = looks.layers(tokens, grid, 11)
        video = encoders.latents.decode(latents[None])
        seen = frames_of(video.shape[2], 3, 11)
        assert len(seen) == min(3, video.shape[2])
        pixels = (video[:, :, seen].transpose(1, 2) + 1) / 2
        torch.testing.assert_close(found, RandomConv(3, torch.device("cpu")).layers(pixels)[1][0])
        (gradient,) = torch.autograd.grad(found.double().square().mean(), tokens)
        way = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            ahead, behind = (looks.layers(tokens + step * way, grid, 11)[0].double().square().mean() for step in (1e-3, -1e-3))
        assert float((gradient * way).sum()) == pytest.approx(float(ahead - behind) / 2e-3, rel=2e-2)


def test_frames_are_spaced_evenly_from_one_that_the_key_draws() -> None:
    assert frames_of(5, None, 1) == frames_of(5, 5, 1) == frames_of(5, 9, 1) == [0, 1, 2, 3, 4]
    drawn = {tuple(frames_of(9, 3, key)) for key in range(100)}
    assert drawn == {(0, 3, 6), (1, 4, 7), (2, 5, 8)}
    assert {tuple(frames_of(4, 3, key)) for key in range(100)} == {(0, 1, 2), (1, 2, 3)}
    assert frames_of(9, 3, 5) == frames_of(9, 3, 5)
