"""Every mistake in a config is named with its place, its value, what is allowed and the nearest valid name, all at once."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from data_pipelines.config_file import ConfigError, load_run, save_resolved
from data_pipelines.curation.config import IngestConfig
from dit import cli
from dit.config import DistillRun, EncodeRun, EvaluateRun, SampleRun, TrainRun

ROOT = Path(__file__).resolve().parents[3]
GOOD = """
out: runs/x
data: {sources: [{path: shards}], token_budget: 64, packs_per_step: 2}
backbone: {hidden_size: 64, depth: 2, num_heads: 4, ffn_size: 128}
optimizer: {lr: 1e-4}
train: {samples: 100}
"""
GOOD_OF = {
    "train": GOOD,
    "distill": """
out: runs/y
teacher: {run: runs/x}
method: {name: consistency, guidance: {s: 2}}
optimizer: {lr: 1e-4}
train: {samples: 100}
""",
    "encode": "{sources: [{path: shards}], sizes: [[9, 32, 32]], out: latents}",
    "sample": "{contestants: [{run: runs/x}], prompts: [a], size: [9, 32, 32], out: drawn}",
    "evaluate": "{contestants: [{run: runs/x}], out: judged}",
}


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def test_a_good_config_loads_and_its_resolved_form_is_the_same_run(tmp_path: Path) -> None:
    run = load_run(TrainRun, write(tmp_path, GOOD))
    assert run.optimizer.lr == 1e-4
    save_resolved(run, tmp_path / "resolved.yaml")
    assert load_run(TrainRun, str(tmp_path / "resolved.yaml")) == run


MISTAKES = {
    "train": """
        optimizer.learning_rate=1 | unknown key | Allowed here: betas, eps
        optimizer.warmup_step=1 | did you mean warmup_samples
        optimizer.shedule=cosine | did you mean schedule
        optimizer.momentum=0.9 | unknown key
        optimizer.seed=1 | did you mean train.seed
        trian.seed=1 | unknown key trian
        traning={samples: 5} | unknown key | did you mean train
        engine.zero_stages=2 | did you mean zero_stage
        engine.fp16=true | unknown key
        backbone.hiden_size=64 | did you mean hidden_size
        backbone.heads=4 | did you mean num_heads
        backbone.modulation=sharde | did you mean shared
        backbone.attention=window | did you mean windowed
        backbone.name=unet | Allowed: spatiotemporal_dit
        data.source=x | did you mean sources
        data.sources.0.pth=x | did you mean path
        data.batch_size=8 | unknown key
        train.epochs=10 | unknown key
        train.steps=10 | unknown key
        train.save_every=10 | did you mean save_every_steps
        ema.dekay=0.9 | did you mean decay
        guard.on_spikes=clip | did you mean on_spike
        preview.prompt=a | did you mean prompts
        validation.path=x | unknown key
        optimizer.lr=-1 | greater than 0
        optimizer.lr=0 | greater than 0
        optimizer.lr=fast | number
        optimizer.lr=.nan | finite
        optimizer.lr=.inf | finite
        optimizer.lr=null | number
        optimizer.lr=[1e-4] | number
        optimizer.betas=[0.9, 1.0] | less than 1
        optimizer.betas=[0.9] | optimizer.betas.1 | missing
        optimizer.weight_decay=-0.1 | greater than or equal to 0
        optimizer.warmup_samples=0.5 | integer
        optimizer.final_lr_fraction=2 | less than or equal to 1
        optimizer.max_grad_norm=0 | greater than 0
        optimizer.schedule=linear | Allowed: constant, cosine
        engine.zero_stage=7 | Allowed: 0, 1, 2, 3
        engine.zero_stage=two | Allowed: 0, 1, 2, 3
        engine.precision=fp16 | Allowed: fp32, bf16
        engine.offload=cpu | Allowed: none, optimizer
        engine.compile=maybe | boolean
        engine.sequence_parallel=0 | greater than 0
        engine.whole_below=-1 | greater than or equal to 0
        ema.decay=1 | less than 1
        ema.decay=0 | greater than 0
        ema.sigma_rel=[0.5] | less than 0.28
        train.samples=0 | there is no init: expected 1 or more
        train.samples=-1 | greater than or equal to 0
        init={} | give exactly one of them
        init={run: a, diffusers: b} | give exactly one of them
        init={run: a, weights: emma} | got emma, expected ema
        train.samples=many | integer
        train.samples=1.5 | integer
        train.seed=-1 | greater than or equal to 0
        train.save_every_steps=0 | greater than 0
        train.keep_checkpoints=0 | greater than 0
        train.checkpoint_store=https://bucket/run | pattern
        train.checkpoint_store=s3:// | pattern
        guard.window=2 | greater than or equal to 8
        guard.on_nonfinite=ignore | Allowed: skip, rollback, stop
        guard.max_bad_steps=-1 | greater than or equal to 0
        data.token_budget=0 | greater than 0
        data.packs_per_step=2.5 | integer
        data.sources=[] | at least 1
        data.sources=shards | list
        data.sources.0.weight=0 | greater than 0
        data.sizes=[[1, 8]] | data.sizes.0.2 | missing
        data.sizes=[[1, 8, 0]] | greater than 0
        data.size_rule={pixels: [64], aspects: [wide]} | pattern
        data.max_bad_fraction=5 | less than or equal to 1
        data.num_workers=-1 | greater than or equal to 0
        data.cache={size_gb: 1} | data.cache.path | missing
        backbone.depth=0 | greater than 0
        backbone.patch_size=2 | tuple
        backbone.num_heads=5 | hidden_size / num_heads = 64 / 5
        backbone.num_heads=32 | at least 6
        backbone.num_classes=0 | greater than 0
        preview={prompts: [], size: [1, 8, 8]} | preview.prompts | at least 1
        preview={prompts: a, size: [1, 8, 8]} | preview.prompts | list
        preview={prompts: [a], size: [8, 8]} | preview.size.2 | missing
        preview={prompts: [a], size: [1, 8, 8], sampling: {guidance: {s: 3, w: 2}}} | exactly one of s | s=3.0, w=2.0
        preview={prompts: [a], size: [1, 8, 8], sampling: {guidance: {}}} | exactly one of s | s=None
        preview={prompts: [a], size: [1, 8, 8], sampling: {sampler: eulr}} | preview.sampling.sampler | did you mean euler
        validation={source: x, times: [0]} | validation.times.0 | greater than 0
        encoders.latents={name: vae} | encoders.latents.name | small_video_vae, pixels, diffusers
        encoders.latents={name: diffusers} | encoders.latents.path | missing
        encoders.text={name: t5} | encoders.text.name | Allowed: small, hf
        objective.name=rectified_flwo | did you mean rectified_flow
        objective.huber=-1 | greater than or equal to 0
        objective.condition_dropout=1 | less than 1
        objective={times: {name: uniform, mean: 1}} | unknown key objective.times.mean
        objective={times: {name: mode, scale: 2}} | objective.times.scale | less than or equal to 1.75
        objective={shift: {base_tokenz: 3}} | objective.shift.base_tokenz | did you mean base_tokens
        objective={path: {name: vp}, weighting: {name: min_snrr}} | objective.weighting.name | did you mean min_snr?
        objective={path: {name: vp, beta_start: 0.5}} | beta_end = 0.02 must not be below beta_start = 0.5
        objective={path: {name: ve, sigma_min: 50, sigma_max: 0.01}} | sigma_min = 50.0 must be below sigma_max = 0.01
        objective={name: variational, path: {ends: [5, -13]}} | got [5.0, -13.0], expected the lower end first
        objective={shift: {name: exponential, low_tokens: 256, high_tokens: 256}} | low_tokens = 256 must be below high_tokens = 256
        preview={prompts: [a], size: [1, 8, 8], sampling: {guidance: {interval: [0.8, 0.2]}}} | got [0.8, 0.2], expected the lower end first
        preview={prompts: [a], size: [1, 8, 8], sampling: {schedule: {name: karras, sigma_min: 80, sigma_max: 1}}} | sigma_min = 80.0 must
        objective={path: {name: trigflow}, prediction: noise} | objective.prediction=noise | predict velocity
        objective={name: ddpm, variance: learned} | backbone.learned_variance=False | objective.variance
        engine={gather_within: 2} | gather_within=2 needs zero_stage 3, got 1
        engine={compile: true, zero_stage: 3} | compile=true needs zero_stage 0, 1 or 2, got 3
        engine={offload: optimizer, zero_stage: 1} | offload=optimizer needs zero_stage 2 or 3, got 1
        optimizer=1e-4 | expected keys: betas, eps
        preview=[] | expected keys
        encoders.text=t5 | encoders.text is 't5' | expected keys: dtype
        out=5 | string
        out=null | string
    """,
    "distill": """
        teacher.rum=x | did you mean run
        teacher.step=-1 | greater than or equal to 0
        train.samples=0 | expected 1 or more
        teacher.weights=emma | did you mean ema
        teacher={run: runs/t/checkpoints/step-00000500, step: 400} | run names the checkpoint of step 500, and step is 400
        method.name=consistencyy | did you mean consistency
        method.name=dmd | Allowed: consistency, mean_flow
        method.phases=3 | phases=3 and student_steps=4
        method.q=1 | greater than 1
        method.solver=rk4 | Allowed: euler, heun
        method.skip=2 | less than or equal to 1
        method.critic={} | unknown key
        method={name: distribution_matching, guidance: {s: 2}, critic: {optimizer: {lr: 1}, ends: [0.9, 0.1]}} | lower end first
        method.guidance_range=[3, 2] | guidance_range=[3.0, 2.0] | expected low < high
        method.flow=data | flow=data and guidance s=2 | data cannot be guided
        method={name: distribution_matching, guidance: {s: 2}} | method.critic | missing
        method={name: moment_matching, guidance: {s: 2}} engine={zero_stage: 3} | engine.zero_stage=3 | stage 2 at most
        method={name: mean_flow, guidance: {s: 1}, derivative: difference} engine={precision: bf16} | method.derivative=difference
        diagnosis.noises=1 | greater than or equal to 2
        backbone={depth: 2} | unknown key backbone
    """,
    "encode": """
        sources=[] | at least 1
        sources.0.filtre=x | did you mean filter
        sizes=null | tuple
        sizes=[] | no size is allowed
        dtype=bfloat16 | Allowed: float16, float32
        batch_size=0 | greater than 0
        executor.name=slurm | did you mean slurm-array
        executor.share=3of4 | pattern
        max_bad_fraction=-0.1 | greater than or equal to 0
        train={samples: 3} | unknown key train
    """,
    "sample": """
        contestants.0.runn=x | did you mean run
        contestants.0.steps=0 | greater than 0
        contestants=[] | at least 1
        prompts=[] | at least 1
        weights=average | got average, expected ema, model, or sigma_rel=S
        weights=sigma_rel=2 | got sigma_rel=2, expected ema, model, or sigma_rel=S with 0 < S < 0.28
        size=[9, 32] | size.2 | missing
        labels=[-1] | greater than or equal to 0
        edit={name: inpaint, input: a.png} | exactly one of mask and region | mask=None, region=None
        edit={name: frames} | give first, last, or both
        edit={name: sdedit, input: a.png, strength: 0} | edit.strength | greater than 0
        edit={name: inpant, input: a.png} | edit.name | did you mean inpaint
    """,
    "evaluate": """
        metrics=[{name: fid}] | metrics.0.name | Allowed: adherence, positions
        metrics=[{name: frechet}] | metrics.0.features | missing
        metrics=[{name: frechet, features: {name: random_conv}}] samples=10 | at least 40 samples, got samples=10
        metrics=[{name: fidelity, features: {name: random_conv}}] | fidelity compares with the first contestant
        metrics=[{name: kernel, features: {name: random_conv}, subset: 2}] | greater than or equal to 8
        metrics=[{name: diversity, features: {name: random_conv}}] | per_caption to 2 or more
        clips={name: folder, size: [1, 8, 8]} | clips.path | missing
        clips={name: folder, path: x, size: [1, 8, 8]} | judges moving shapes alone
        samples=7 per_caption=2 | samples=7 is no multiple of per_caption=2
        seed=one | integer
        out=[] | string
    """,
}
"""`dotted.key=value` changes of a good config of that verb, and what must be said of them beside file, line, key and value."""
CASES = [(verb, *line.split(" | ")) for verb, lines in MISTAKES.items() for line in textwrap.dedent(lines).strip().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_mistake_is_named_with_file_line_key_value_and_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: tuple[str, ...]
) -> None:
    verb, changes, *parts = case
    values = yaml.safe_load(GOOD_OF[verb])
    for change in re.split(r"(?<=[}\]\w]) (?=\w+=)", changes):
        key, _, text = change.partition("=")
        section, last = values, key
        *parents, last = key.split(".")
        for name in parents:
            section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
        section[last] = value = yaml.safe_load(text)
        parts += [last] if isinstance(value, dict | list) else [last, str(value)]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main([verb, str(tmp_path / "run.yaml"), "--check"]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"error: \d problems? in {tmp_path}/run.yaml:\n  {tmp_path}/run.yaml", said), said
    assert not (missing := [part for part in parts if part not in said]), f"{missing} not in:\n{said}"


def test_the_table_of_mistakes_covers_the_roots() -> None:
    assert len(CASES) >= 100
    assert MISTAKES.keys() == GOOD_OF.keys()


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
