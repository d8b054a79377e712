"""Every mistake in a config is named with its place, its value, what is allowed and the nearest valid name, all at once."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data_pipelines.config_file import ConfigError, load_run, save_resolved
from data_pipelines.curation.config import IngestConfig
from dit.config import DistillRun, EncodeRun, EvaluateRun, SampleRun, TrainRun

ROOT = Path(__file__).resolve().parents[3]
GOOD = """
out: runs/x
data: {sources: [{path: shards}], token_budget: 64, packs_per_step: 2}
backbone: {hidden_size: 64, depth: 2, num_heads: 4, ffn_size: 128}
optimizer: {lr: 1e-4}
train: {samples: 100}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def test_a_good_config_loads_and_its_resolved_form_is_the_same_run(tmp_path: Path) -> None:
    run = load_run(TrainRun, write(tmp_path, GOOD))
    assert run.optimizer.lr == 1e-4
    save_resolved(run, tmp_path / "resolved.yaml")
    assert load_run(TrainRun, str(tmp_path / "resolved.yaml")) == run


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rate=1", ["unknown key optimizer.learning_rate", "Allowed here", "lr"]),
        ("optimizer.warmup_step=1", ["did you mean warmup_samples"]),
        ("trian.seed=1", ["unknown key trian", "did you mean train"]),
        ("optimizer.seed=1", ["did you mean train.seed"]),
        ("optimizer.lr=-1", ["optimizer.lr is -1", "greater than 0"]),
        ("optimizer.lr=fast", ["optimizer.lr is 'fast'", "number"]),
        ("engine.zero_stage=7", ["engine.zero_stage is 7", "Allowed: 0, 1, 2, 3"]),
        ("engine={gather_within: 2}", ["gather_within=2 needs zero_stage 3, got 1"]),
        ("engine={compile: true, zero_stage: 3}", ["compile=true needs zero_stage 0, 1 or 2, got 3"]),
        ("backbone.modulation=sharde", ["did you mean shared"]),
        ("backbone.num_heads=5", ["hidden_size / num_heads = 64 / 5", "backbone"]),
        (
            "objective={name: rectified_flwo}",
            ["objective.name is 'rectified_flwo'", "did you mean rectified_flow", "Allowed: rectified_flow"],
        ),
        ("encoders.latents={name: vae}", ["encoders.latents.name", "small_video_vae, pixels, diffusers"]),
        ("preview={prompts: [], size: [1, 8, 8]}", ["preview.prompts", "at least 1"]),
        ("data.sources.0.pth=x", ["unknown key data.sources.0.pth", "did you mean path"]),
        ("objective.times={name: uniform, mean: 1}", ["unknown key objective.times.mean"]),
        ("objective={path: {name: trigflow}, prediction: noise}", ["objective.prediction=noise", "t = 1", "predict velocity"]),
        ("objective={name: ddpm, variance: learned}", ["backbone.learned_variance=False", "objective.variance"]),
        ("objective={path: {name: vp}, weighting: {name: min_snrr}}", ["objective.weighting.name", "did you mean min_snr?"]),
        ("objective={shift: {base_tokenz: 3}}", ["objective.shift.base_tokenz", "did you mean base_tokens"]),
    ],
)
def test_an_error_names_key_place_and_way_out(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(TrainRun, write(tmp_path, GOOD), [override])
    for part in [*parts, override.partition("=")[0].split(".")[0]]:
        assert part in str(error.value), str(error.value)


def test_all_problems_come_in_one_report_with_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path, GOOD.replace("lr: 1e-4", "lrr: 1e-4").replace("depth: 2", "depth: 0").replace("token_budget: 64", "token_budget: no")
    )
    with pytest.raises(ConfigError) as error:
        load_run(TrainRun, path)
    text = str(error.value)
    assert "4 problems" in text  # lrr unknown, lr missing, depth, token_budget
    assert f"{path}:5: unknown key optimizer.lrr" in text
    assert f"{path}:4: backbone.depth is 0" in text
    assert f"{path}:3: data.token_budget" in text


def test_both_guidance_conventions_at_once_are_refused(tmp_path: Path) -> None:
    text = GOOD + "preview: {prompts: [a], size: [1, 8, 8], sampling: {guidance: {s: 3, w: 2}}}\n"
    with pytest.raises(ConfigError, match="exactly one of s"):
        load_run(TrainRun, write(tmp_path, text))
    run = load_run(TrainRun, write(tmp_path, text.replace("s: 3, ", "")))
    assert run.preview is not None
    assert run.preview.sampling.guidance.scale == 3.0


def test_base_merges_one_level_only(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "parent.yaml")
    child = write(tmp_path, "base: parent.yaml\noptimizer: {weight_decay: 0.1}\n", "child.yaml")
    run = load_run(TrainRun, child)
    assert (run.optimizer.lr, run.optimizer.weight_decay) == (1e-4, 0.1)
    with pytest.raises(ConfigError, match="only one level"):
        load_run(TrainRun, write(tmp_path, "base: child.yaml\n", "grandchild.yaml"))


def test_missing_files_broken_yaml_and_repeated_keys(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "train_small.yaml")
    with pytest.raises(ConfigError, match=r"did you mean train_small\.yaml"):
        load_run(TrainRun, str(tmp_path / "train_smal.yaml"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_run(TrainRun, write(tmp_path, "a: [", "broken.yaml"))
    with pytest.raises(ConfigError, match="given twice"):
        load_run(TrainRun, write(tmp_path, GOOD + "out: again\n", "twice.yaml"))


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dit", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_a_config_error_exits_with_2_before_torch_is_imported(tmp_path: Path) -> None:
    start = time.monotonic()
    result = run_cli("train", write(tmp_path, GOOD), "optimizer.lr=-1")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "optimizer.lr" in result.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in result.stderr.splitlines() if line.startswith("import time"))
    assert time.monotonic() - start < 30  # a hang, not a speed, is what this line catches


@pytest.mark.parametrize("verb", ["train", "distill", "encode", "sample", "evaluate"])
def test_help_of_every_verb_has_an_example_and_imports_little(verb: str) -> None:
    result = run_cli(verb, "--help")
    assert result.returncode == 0
    assert f"dit {verb} " in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "pydantic", "numpy"}


VERB_ROOTS = {
    "train": TrainRun,
    "distill": DistillRun,
    "encode": EncodeRun,
    "sample": SampleRun,
    "evaluate": EvaluateRun,
    "data": IngestConfig,
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_is_valid_for_the_command_in_its_header(path: Path) -> None:
    header = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in header if line.startswith("dit ") and str(path.relative_to(ROOT)) in line]
    assert commands, f"{path} has no header line `dit VERB {path.relative_to(ROOT)}`"
    load_run(VERB_ROOTS[commands[0].split()[1]], str(path))
