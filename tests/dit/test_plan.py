"""The dry run: every config of a training or distillation passes it, without data or weights, and its figures are the network's."""

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from data_pipelines.config import Source
from data_pipelines.config_file import has_section, load_run
from data_pipelines.errors import UserError
from data_pipelines.packed import pack_conditioning
from dit.config import DistillRun, SpatioTemporalDiTConfig, TrainRun
from dit.models import build_backbone
from dit.models.flops import activation_bytes
from dit.plan import dry_run, main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAININGS = {path: load_run(TrainRun, str(path)) for path in sorted(CONFIGS.rglob("*.yaml")) if has_section(str(path), "backbone")}
DISTILLATIONS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if has_section(str(path), "teacher")]


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_training_passes_the_dry_run(path: Path) -> None:
    run = TRAININGS[path]
    said = dry_run(run, run, run.data)
    assert "FLOPs a step" in said
    assert f"ZeRO stage {run.engine.zero_stage}, {run.engine.precision}" in said


@pytest.mark.parametrize("path", DISTILLATIONS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_distillation_passes_the_dry_run_with_the_config_of_its_teacher(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    given = load_run(DistillRun, str(path))
    training = next(path for path, run in TRAININGS.items() if run.out == given.teacher.run)
    assert main(load_run(DistillRun, str(path), [f"teacher.run={training}", "data=null"])) == 0
    critic = getattr(given.method, "critic", None)
    calls = 2 / (critic.steps + 1) if critic else 2  # guided, so two calls a step, of those that are the student's turn
    assert f"teacher {calls:.3g})" in capsys.readouterr().out


def test_the_sizes_of_wan_are_its_own() -> None:
    for size, count, clip in (("1.3b", "1,418,996,800", "7.58"), ("14b", "14,288,491,584", "26.90")):
        run = TRAININGS[CONFIGS / "train" / f"wan_{size}.yaml"]
        said = dry_run(run, run, run.data)
        assert f"{count} parameters" in said  # as diffusers counts WanTransformer3DModel
        assert "-> 21 x 30 x 52 = 32,760 tokens, 512 of text" in said
        assert clip in next(line for line in said.splitlines() if line.startswith("| 64 |"))


def test_declared_encoders_are_not_loaded_and_others_are_asked_for(tmp_path: Path) -> None:
    run = TRAININGS[CONFIGS / "train" / "wan_1.3b.yaml"]
    latents = run.encoders.latents.model_copy(update={"stride": None, "path": str(tmp_path)})
    asked = run.model_copy(update={"encoders": run.encoders.model_copy(update={"latents": latents})})
    with pytest.raises(UserError, match=r"encoders\.latents\.path"):
        dry_run(asked, asked, run.data)


def test_sizes_by_rule_are_planned_as_they_will_be_packed() -> None:
    run = TRAININGS[CONFIGS / "train" / "wan_1.3b.yaml"]
    rule = {"pixels": [256 * 256], "aspects": ["1:1"], "max_frames": 17}
    data = type(run.data).model_validate(run.data.model_dump() | {"sizes": [], "size_rule": rule, "token_budget": 32768})
    said = dry_run(run, run.model_copy(update={"preview": None}), data)
    assert "[17, 256, 256] (frames, height, width) -> 5 x 16 x 16 = 1,280 tokens" in said


def test_a_plan_without_encoders_says_so(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = TRAININGS[CONFIGS / "train" / "wan_1.3b.yaml"]
    data = run.data.model_copy(update={"sources": [Source(path=str(latents))]})
    text = run.encoders.text.model_copy(update={"path": str(tmp_path)})
    assert main(run.model_copy(update={"data": data, "encoders": run.encoders.model_copy(update={"text": text})})) == 0
    said = capsys.readouterr().out
    assert "FLOPs a step" in said
    assert "not there, so what is in a step is not planned: encoders." in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["none", "full"])
@pytest.mark.parametrize("grids", [[(4, 16, 16)], [(3, 16, 16), (1, 16, 16)]])
def test_activations_are_as_many_as_autograd_keeps(dtype: torch.dtype, kept: str, grids: list[tuple[int, int, int]]) -> None:
    values = {"hidden_size": 128, "depth": 3, "num_heads": 2, "ffn_size": 640, "activation_checkpointing": kept}
    config, sizes = SpatioTemporalDiTConfig.model_validate(values), dict[int, int]()
    network = build_backbone(config, channels=16, text_width=32).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    alive = list[torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(1024, 64), torch.rand(len(grids)), pack_conditioning(grids, [torch.randn(8, 32)] * len(grids)))
    precision = "fp32" if dtype == torch.float32 else "bf16"
    said = activation_bytes(config, 1024, precision, mixed=len(grids) > 1)
    if kept == "full":  # a block at a time is computed again, and kept, in the backward pass
        plain = config.model_copy(update={"activation_checkpointing": "none"})
        blocks = [activation_bytes(plain.model_copy(update={"depth": n}), 1024, precision, mixed=len(grids) > 1) for n in (1, 2)]
        said -= blocks[1] - blocks[0]
    assert 0.85 < sum(sizes.values()) / said < 1.15


def test_a_second_network_is_in_the_memory_and_heads_are_not() -> None:
    """On one rank in fp32, gradients 4 bytes a parameter, and weights, which are the master weights, with moments 12; no average."""
    base = TRAININGS[CONFIGS / "train" / "wan_1.3b.yaml"]
    critic = {"optimizer": {"lr": 1e-5}}
    rows = []
    for method in (
        {"name": "consistency"},
        {"name": "moment_matching", "critic": critic},
        {"name": "adversarial", "critic": {**critic, "blocks": [0], "features": {"name": "random_conv"}}},
    ):
        values = {"out": "student", "teacher": {"run": "teacher"}, "optimizer": {"lr": 1e-5}, "train": {"samples": 64}}
        run = DistillRun.model_validate({**values, "method": {**method, "guidance": {"s": 3.0}}})
        line = next(line for line in dry_run(run, base, base.data).splitlines() if line.startswith("| 1 |"))
        rows.append([float(cell) for cell in line.split("|")[2:6]])
    plain, moments, heads = rows
    count = 1_418_996_800 / 2**30
    assert [b - a for a, b in zip(plain, moments, strict=True)] == pytest.approx([0, 4 * count, 12 * count, 0], abs=0.02)
    assert heads == plain
