"""A run is the same whatever it runs on: processes, accumulation, loader workers and ZeRO stage change no sample and no draw."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.processes import Forks, distill_config, metrics, train_config, wait_for

FLOAT32_SUMS = 1e-5
"""Relative difference of losses and gradient norms: in float32, sums over packs in another order differ by some 1e-7 in each of
the steps, and Adam's first steps, whose size does not depend on the gradient's, carry that into the weights."""
SHAPES = {
    "1 process, 4 packs each": (1, {}),
    "2 processes, 2 packs each": (2, {}),
    "4 processes, 1 pack each": (4, {}),
    "1 loader worker": (1, {"data__num_workers": 1}),
    "2 loader workers": (1, {"data__num_workers": 2}),
    "2 processes with 1 loader worker each": (2, {"data__num_workers": 1}),
    "ZeRO stage 0, 2 processes": (2, {"engine": {"zero_stage": 0}}),
    "ZeRO stage 2, 2 processes": (2, {"engine": {"zero_stage": 2}}),
    "ZeRO stage 3, 2 processes, blocks recomputed": (
        2,
        {"engine": {"zero_stage": 3, "whole_below": 100}, "backbone__activation_checkpointing": "full"},
    ),
    "4 processes, 2 to a pack": (4, {"engine": {"sequence_parallel": 2}}),
}


@pytest.fixture(scope="module")
def runs(forks: Forks, tmp_path_factory: pytest.TempPathFactory, latents: Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of each shape of the same run."""
    folder, found = tmp_path_factory.mktemp("invariance"), {}
    for number, (name, (ranks, changes)) in enumerate(SHAPES.items()):
        config = train_config(folder / f"{number}.yaml", latents, train__save_every_steps=100, objective__stratified=True, **changes)
        forks.run("train", str(config), ranks=ranks).ok()
        found[name] = metrics(config.with_suffix(""))
    return found


@pytest.mark.parametrize("name", list(SHAPES)[1:])
def test_the_same_samples_and_noise_at_every_step(runs: dict[str, list[dict[str, float]]], name: str) -> None:
    reference, other = runs[next(iter(SHAPES))], runs[name]
    assert len(reference) == 6
    assert [line["ids_hash"] for line in other] == [line["ids_hash"] for line in reference]
    for key in ("loss", "grad_norm"):  # another noise, time or dropped caption would change these in the second digit
        assert [line[key] for line in other] == pytest.approx([line[key] for line in reference], rel=FLOAT32_SUMS)


def test_workers_change_nothing_at_all(runs: dict[str, list[dict[str, float]]]) -> None:
    assert runs["1 loader worker"] == runs["2 loader workers"] == runs["1 process, 4 packs each"]


def test_steps_differ_from_each_other(runs: dict[str, list[dict[str, float]]]) -> None:
    lines = runs["1 process, 4 packs each"]
    assert len({line["ids_hash"] for line in lines}) == len({line["loss"] for line in lines}) == 6


def test_another_seed_is_another_run(forks: Forks, runs: dict[str, list[dict[str, float]]], tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "seed.yaml", latents, train__seed=4)
    forks.run("train", str(config)).ok()
    pairs = zip(metrics(tmp_path / "seed"), runs["1 process, 4 packs each"], strict=True)
    assert all(a["ids_hash"] != b["ids_hash"] and a["loss"] != pytest.approx(b["loss"], rel=1e-3) for a, b in pairs)


def test_previews_under_stage_3_are_those_of_one_process(forks: Forks, tmp_path: Path, latents: Path) -> None:
    """Every rank holds a part of the averaged weights, so all draw and one writes."""
    prompts = ["a large red disc moving right quickly near the top"]
    preview = {"prompts": prompts, "size": [9, 32, 32], "every_steps": 6, "sampling": {"steps": 2}}
    pictures = []
    for name, ranks, engine in (("alone", 1, {}), ("sharded", 2, {"zero_stage": 3, "whole_below": 100})):
        config = train_config(tmp_path / f"{name}.yaml", latents, engine=engine, preview=preview, optimizer={"lr": 0.01})
        forks.run("train", str(config), ranks=ranks).ok()
        pictures.append([np.asarray(Image.open(tmp_path / name / f"samples/step-{step:08d}.png")).astype(int) for step in (0, 6)])
    (before, after), sharded = pictures
    assert np.abs(after - before).max() > 20  # the weights have moved
    for one, two in zip((before, after), sharded, strict=True):
        assert np.abs(one - two).max() <= 1  # a rounding


def test_a_learned_schedule_is_shared_like_other_weights(forks: Forks, tmp_path: Path, latents: Path) -> None:
    """It is asked outside the network too: by the objective, by validation and by samplers."""
    extra = {
        "objective": {"name": "variational"},
        "validation": {"source": str(latents), "samples": 8, "times": [0.5], "every_steps": 2},
        "preview": {"prompts": ["a small blue square"], "size": [9, 32, 32], "every_steps": 2, "sampling": {"steps": 2}},
    }
    lines = []
    for name, ranks, engine in (("alone", 1, {}), ("shared", 2, {"zero_stage": 3, "whole_below": 0})):
        config = train_config(tmp_path / f"{name}.yaml", latents, engine=engine, train__samples=64, **extra)
        forks.run("train", str(config), ranks=ranks).ok()
        lines.append(metrics(tmp_path / name))
    alone, shared = lines
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in shared] == pytest.approx([line[key] for line in alone], rel=FLOAT32_SUMS)
    assert shared[-1]["held_out"]["losses"][0] == pytest.approx(alone[-1]["held_out"]["losses"][0], rel=1e-4)


def test_ranks_that_share_a_teacher_ask_it_alike(forks: Forks, tmp_path: Path, latents: Path, teacher: Path) -> None:
    """Guided in an interval of t alone, of which each rank has its own: under stage 3 each would wait for the other inside."""
    data = {"sources": [{"path": str(latents)}], "token_budget": 96, "packs_per_step": 4, "num_workers": 0}  # two clips in a pack
    method = {"name": "consistency", "guidance": {"s": 2.0, "interval": [0.0, 0.5]}, "solver": "euler", "student_steps": 2}
    lines = []
    for name, count, engine in (("alone", 1, {}), ("shared", 2, {"zero_stage": 3, "whole_below": 0})):
        config = distill_config(tmp_path / f"{name}.yaml", teacher, engine=engine, data=data, method=method)
        ranks = forks.start("distill", str(config), ranks=count)
        try:
            wait_for(lambda: ranks.poll() is not None, seconds=60)  # noqa: B023
        finally:
            ranks.send(signal.SIGKILL)
        ranks.wait().ok()
        lines.append(metrics(tmp_path / name))
    alone, shared = lines
    assert [line["ids_hash"] for line in shared] == [line["ids_hash"] for line in alone]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in shared] == pytest.approx([line[key] for line in alone], rel=FLOAT32_SUMS)


@pytest.mark.slow
def test_distilling_validating_and_drawing_with_two_processes_to_a_pack(forks: Forks, tmp_path: Path, latents: Path, teacher: Path) -> None:
    """Student and teacher are shared, under ZeRO stage 3, where every rank holds a part of every weight and of every token."""
    extra = {
        "validation": {"source": str(latents), "samples": 8, "times": [0.5, 1.0], "every_steps": 3},
        "preview": {"prompts": ["a small blue square"], "size": [9, 32, 32], "every_steps": 6},
    }
    lines, pictures = [], []
    for name, ranks, engine in (("alone", 1, {}), ("shared", 2, {"sequence_parallel": 2, "zero_stage": 3, "whole_below": 100})):
        config = distill_config(tmp_path / f"{name}.yaml", teacher, engine=engine, **extra)
        forks.run("distill", str(config), ranks=ranks).ok()
        lines.append(metrics(tmp_path / name))
        pictures.append(np.asarray(Image.open(tmp_path / name / "samples/step-00000006.png")).astype(int))
    alone, shared = lines
    assert [line["ids_hash"] for line in shared] == [line["ids_hash"] for line in alone]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in shared] == pytest.approx([line[key] for line in alone], rel=FLOAT32_SUMS)
    for step in (2, 5):
        losses = zip(alone[step]["held_out"]["losses"], shared[step]["held_out"]["losses"], strict=True)
        assert all(b == pytest.approx(a, rel=1e-4) for a, b in losses)  # squares of differences
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # a rounding


WITH_CRITIC: dict[str, dict[str, Any]] = {
    "distribution_matching": {"critic": {"heads": {"blocks": [0, 1], "weight": 0.5, "critic_weight": 0.5}}},
    "moment_matching": {"critic": {}},
    "adversarial": {"critic": {"blocks": [0, 1], "features": {"name": "random_conv"}, "frames": 3}, "distillation_weight": 2.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CRITIC)
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [(2, {"zero_stage": 2}), (4, {"sequence_parallel": 2, "zero_stage": 3, "whole_below": 100})],
    ids=["ranks", "shared"],
)
def test_a_student_with_a_critic_is_the_same_on_more_processes(
    forks: Forks, tmp_path: Path, teacher: Path, ranks: int, engine: dict[str, int], name: str
) -> None:
    """The student's gradient goes through critic and heads, which are sharded, and of which every rank sees a part of the tokens."""
    critic = {"steps": 1, "optimizer": {"lr": 1e-3}, **WITH_CRITIC[name]["critic"]}
    method = {"name": name, "guidance": {"s": 2.0}, "student_steps": 2, **WITH_CRITIC[name], "critic": critic}
    lines = []
    for name, count, sharding in (("alone", 1, {}), ("spread", ranks, engine)):
        config = distill_config(tmp_path / f"{name}.yaml", teacher, method=method, engine=sharding)
        forks.run("distill", str(config), ranks=count).ok()
        lines.append(metrics(tmp_path / name))
    alone, spread = lines
    assert [line["network"] for line in spread] == ["critic", "student"] * 3
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in spread] == pytest.approx([line[key] for line in alone], rel=10 * FLOAT32_SUMS)


def test_a_command_leaves_its_group_before_it_ends(forks: Forks, tmp_path: Path, latents: Path) -> None:
    config = train_config(tmp_path / "left.yaml", latents, train__samples=16)
    forks.run("tests/distributed/leaving.py", "train", str(config), ranks=2).ok()


def test_drawing_is_no_step_to_a_supervisor(forks: Forks, tmp_path: Path, latents: Path) -> None:
    """It takes one rank as long as it takes, and would be a step that is stuck."""
    preview = {"prompts": ["a small blue square"], "size": [9, 32, 32], "every_steps": 1, "sampling": {"steps": 10}}
    config = train_config(tmp_path / "watched.yaml", latents, preview=preview)
    ranks, said = forks.start("tests/distributed/watched.py", str(tmp_path), "train", str(config), ranks=2), set[tuple[str, int]]()

    def is_over() -> bool:
        said.update((pulse["phase"], pulse["step"]) for pulse in (json.loads(file.read_text()) for file in tmp_path.glob("rank-*.json")))
        return ranks.poll() is not None

    wait_for(is_over)
    ranks.wait().ok()
    assert {("step", 0), ("draw", 0), ("draw", 2)} <= said


def test_what_is_drawn_and_judged_is_that_of_one_process(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    """Of four processes that share three batches one has none."""
    contestants = [{"run": str(teacher), "steps": 2}]
    prompts = [f"a large {colour} disc moving right quickly near the top" for colour in ("red", "blue", "green")]
    metrics = [{"name": "adherence"}, {"name": "fidelity", "features": {"name": "random_conv"}}]
    configs: dict[str, dict[str, Any]] = {
        "sample": {"prompts": prompts, "size": [9, 32, 32], "batch_size": 1, "contestants": contestants},
        "evaluate": {"samples": 8, "batch_size": 3, "metrics": metrics, "contestants": contestants * 2},
    }
    for verb, config in configs.items():
        (tmp_path / f"{verb}.yaml").write_text(json.dumps(config))
        for ranks in (1, 4):
            forks.run(verb, str(tmp_path / f"{verb}.yaml"), f"out={tmp_path}/{verb}-{ranks}", ranks=ranks).ok()
    drawn, shared = ({path.name: path.read_bytes() for path in (tmp_path / f"sample-{n}").rglob("*.*")} for n in (1, 4))
    assert drawn == shared
    assert len(drawn) == 3 + 4  # clips; sheet, two grids, prompts
    judged, together = (json.loads((tmp_path / f"evaluate-{n}" / "results.json").read_text()) for n in (1, 4))
    assert judged["protocol"] == together["protocol"]
    for alone, of_four in zip(judged["rows"], together["rows"], strict=True):
        assert alone["figures"] == of_four["figures"]
        assert alone["figures"]["train"]["adherence/all"]["count"] == 8
