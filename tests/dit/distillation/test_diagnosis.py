"""The judge of students: against the exact flow of mixtures it tells good students from bad ones, and in words what is wrong."""

import pytest
import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, pack_conditioning
from dit.config.distillation import DiagnosisConfig
from dit.config.objective import SamplingConfig
from dit.diffusion import Denoiser
from dit.diffusion.ground_truth import pack_of_points
from dit.distillation import build_distillation, step_calls, traits_of
from dit.distillation.diagnosis import Judge, Pack
from dit.distillation.traits import Traits
from dit.distillation.verdict import advice, is_worse, table, verdict
from tests.dit.distillation.test_exact import GAUSSIAN, METHODS, MIXTURE, exact
from tests.dit.distillation.toy_students import method

TRAITS = Traits()
CONFIG = DiagnosisConfig(noises=8, teacher_steps=100)


def judge(sampler: str, teacher: Denoiser = GAUSSIAN, traits: Traits = TRAITS, frames: int = 3) -> Judge:
    """Six conditions of 8 clips, in packs of 16: `frames` tokens of two channels each, all independent."""
    packs = [
        Pack(pack_conditioning([(frames, 1, 1)] * 16, [torch.zeros(1, 4)] * 16), tuple(range(first, first + 16))) for first in (0, 16, 32)
    ]
    return Judge(CONFIG, SamplingConfig.model_validate({"sampler": sampler, "steps": 4}), traits, teacher, packs, 2, 1.5)


def halved(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """It sees the right place from afar, and goes half the way."""
    return 0.5 * exact(x_t, t, cond)


def collapsed(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """It always answers with the mean of the data."""
    level = cond.per_token(t)[:, None]
    return (x_t - GAUSSIAN.means[0]) / level


@pytest.mark.parametrize("sampler", ["euler", "consistency"])
def test_the_exact_student_is_better_in_any_number_of_steps_and_a_bad_one_worse(sampler: str) -> None:
    judged = judge(sampler)
    figures, drawn = judged(exact)
    assert list(drawn) == [1, 2, 4, 8]
    assert [figures[f"verdict/{n}"] for n in (1, 2, 4)] == [1.0, 1.0, 1.0], figures
    assert figures["distance/1"] < 1e-2 * figures["teacher/1"]
    assert figures["change/1"] == pytest.approx(figures["distance/1"] - figures["teacher/1"])
    assert figures["change_low/1"] < figures["change/1"] < figures["change_high/1"] < 0
    assert len([name for name in figures if name.startswith("gap/")]) == 4
    assert max(value for name, value in figures.items() if name.startswith(("gap/", "self_consistency/"))) < 1e-3
    assert figures["motion"] == pytest.approx(1, abs=0.15)
    assert figures["diversity"] == pytest.approx(1, abs=0.15)

    bad = judged(halved)[0]
    assert bad["verdict/1"] == -1
    assert bad["gap/1.00"] > 0.1
    assert bad["self_consistency/0.33"] > 0.02
    flat = judged(collapsed)[0]
    assert flat["diversity"] < 0.1 > flat["motion"]
    assert [flat[f"verdict/{n}"] for n in (2, 4, 8)] == [-1.0] * 3


def test_the_undistilled_model_is_not_distinguishable_from_itself_and_no_number_is_worse() -> None:
    judged = judge("euler", MIXTURE)
    figures = judged(MIXTURE)[0]
    assert [figures[f"verdict/{n}"] for n in (1, 2, 4, 8)] == [0.0] * 4
    assert figures["distance/2"] == figures["teacher/2"] > figures["teacher/8"] > 0
    broken = judged(lambda x_t, t, cond: x_t * torch.nan)[0]
    assert broken["verdict/4"] == -1
    assert advice([(1, figures), (2, broken)], 4)[0].startswith("It draws no numbers any more")


def test_figures_depend_on_the_keys_alone() -> None:
    before = torch.random.get_rng_state()
    first = judge("consistency", MIXTURE)(exact)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert judge("consistency", MIXTURE)(exact)[0] == first


def test_what_a_student_cannot_do_is_not_asked_of_it() -> None:
    figures, drawn = judge("euler", traits=Traits(any_steps=False, any_time=False), frames=1)(exact)
    assert list(drawn) == [4]
    assert not [name for name in figures if name.startswith("self_consistency") or name == "motion"]
    assert len(judge("euler", traits=Traits(any_steps=False)).reference.few) == 4


def test_a_student_that_need_not_follow_the_flow_is_compared_as_a_set() -> None:
    """It maps noise to the data in another way: x -> -x before the flow."""

    def mirrored(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        level = cond.per_token(t)[:, None]
        landed = -x_t - level * exact(-x_t, t, cond)
        return (x_t - landed) / level

    for traits, expected in ((Traits(), -1.0), (Traits(follows_flow=False), 1.0)):
        assert judge("euler", traits=traits)(mirrored)[0]["verdict/1"] == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_step_calls_the_networks_as_often_as_it_is_said(name: str) -> None:
    counts = {"trained": 0, "plain": 0, "teacher": 0}

    def student(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        counts["trained" if torch.is_grad_enabled() else "plain"] += 1
        return exact(x_t, t, cond)

    def teacher(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        counts["teacher"] += 1
        return GAUSSIAN(x_t, t, cond)

    config = method(**{"name": name, **METHODS[name], "guidance": {"s": 1.0}})
    build_distillation(config, teacher, None)(student, pack_of_points(GAUSSIAN.draw(4, 1), 0), 0.5)
    assert step_calls(config)._asdict() == counts
    guided = config.model_copy(update={"guidance": config.guidance.model_copy(update={"s": 3.0})})
    assert step_calls(guided).teacher == 2 * counts["teacher"]
    assert step_calls(guided).forward_passes == 3 + counts["plain"] + 2 * counts["teacher"]
    assert traits_of(config).any_steps == (name not in ("phases", "progressive"))


def test_words_say_what_the_figures_point_to() -> None:
    worse = {"distance/4": 0.3, "teacher/4": 0.2, "change/4": 0.1, "change_low/4": 0.05, "change_high/4": 0.15, "verdict/4": -1.0}
    better = {**worse, "distance/4": 0.1, "verdict/4": 1.0}
    assert verdict(worse, 4) == (
        "the student is WORSE than the undistilled model in 4 steps (distance 0.3, teacher 0.2; difference 0.1, "
        "95 % interval 0.05 to 0.15)."
    )
    assert is_worse(worse, 4)
    assert not is_worse(better, 4)
    assert advice([(10, better)], 4) == []
    assert "first look" in advice([(10, worse)], 4)[0]
    assert "comes nearer (0.4 before" in advice([(10, {**worse, "distance/4": 0.4}), (20, worse)], 4)[0]
    assert "lower optimizer.lr" in advice([(10, {**worse, "distance/4": 0.2}), (20, worse)], 4)[0]
    assert "stays where it is" in advice([(10, {**worse, "distance/4": 1.01 * worse["distance/4"]}), (20, worse)], 4)[0]
    assert "no numbers" in advice([(10, {**worse, "distance/4": None})], 4)[0]
    drifted = {**worse, "gap/1.00": 0.5, "self_consistency/1.00": 0.01}
    assert any("drifted" in text for text in advice([(10, drifted)], 4))
    still = advice([(10, {**better, "motion": 0.5, "diversity": 0.6})], 4)
    assert ["moves 0.50" in still[0], "differ 0.60" in still[1]] == [True, True]
    assert table([(10, better), (20, worse)], [4])[2:] == [
        "| 10 | 0.1 / 0.2 better | - | - | - | - |",
        "| 20 | 0.3 / 0.2 **worse** | - | - | - | - |",
    ]
