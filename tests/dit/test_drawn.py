"""Latents that a trained model draws for captions: those of its sampler, whoever makes them, and never mixed up with others."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.packed import pack_conditioning, patchify
from data_pipelines.randomness import key
from dit.diffusion import ClassifierFreeGuidance, build_denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.samplers import euler, schedule
from dit.runs import Encoders, TrainedRun
from tests.processes import Forks, distill_config, metrics

TWO_STEPS = "drawn.sampling={steps: 2, shift: 3.0, guidance: {s: 2.5}}"


@pytest.fixture(scope="module")
def drawn(forks: Forks, encode_config: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips' captions with latents of the teacher, in two shares."""
    folder = tmp_path_factory.mktemp("drawn") / "clips"
    for share in (1, 0):
        forks.run("encode", str(encode_config), f"drawn.run={teacher}", TWO_STEPS, f"out={folder}", f"executor.share={share}/2").ok()
    return folder


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members of every sample by its id."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(f"clips/{path.stem}/{name}", {})[extension] = file.read()
    return found


def test_they_are_what_the_sampler_makes_of_the_noise_of_an_id(drawn: Path, latents: Path, teacher: Path) -> None:
    made, encoded = samples(drawn), samples(latents)
    assert {id: one["txt"] for id, one in made.items()} == {id: one["txt"] for id, one in encoded.items()}
    assert len(made) == 48
    trained = TrainedRun.open(str(teacher), "teacher")
    encoders = Encoders.load(trained.base.encoders, torch.device("cpu"))
    network = build_denoiser(trained.base.objective, trained.backbone(encoders, None, "ema", torch.device("cpu")))
    guided = ClassifierFreeGuidance(network, encoders.null_text, 2.5, None)
    for id in [*made][::9]:
        cond = pack_conditioning([(3, 4, 4)], encoders.text.encode([made[id]["txt"].decode()]), None)
        noise = noise_tokens([key("drawn", 0, id)], cond.lengths, 4 * encoders.latents.channels, "start noise")
        with torch.no_grad():
            expected = euler(guided, noise, schedule(2, 3.0), cond)
        found = torch.from_numpy(np.load(io.BytesIO(made[id]["latents.npy"]))).float()
        torch.testing.assert_close(patchify(found, (1, 2, 2)), expected, rtol=2e-3, atol=2e-3)  # stored as float16


def test_a_student_learns_from_them(forks: Forks, drawn: Path, teacher: Path, tmp_path: Path) -> None:
    data = {"sources": [{"path": str(drawn)}], "token_budget": 192, "packs_per_step": 4, "num_workers": 0}
    method = {"name": "adversarial", "guidance": {"s": 2.5}, "critic": {"blocks": [0, 1], "optimizer": {"lr": 1e-3}}}
    config = distill_config(tmp_path / "student.yaml", teacher, data=data, method=method)
    forks.run("distill", str(config)).ok()
    judged = [line["judged_data"] for line in metrics(tmp_path / "student") if "judged_data" in line]
    assert len(judged) == 3
    assert np.isfinite(judged).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("drawn.seed=1",), "drawn"),
        (("drawn=null",), "drawn"),
        (("drawn.sampling.steps=3",), "drawn"),
        (("encoders={latents: {name: small_video_vae}}",), "remove `encoders`"),
        (("drawn.run=/nowhere",), "drawn.run=/nowhere is not a run directory"),
        (("drawn.step=7",), "7"),
        (("sizes=[[9, 36, 32]]",), "do not divide into patches"),
    ],
    ids=["seed", "none", "sampler", "encoders", "no run", "no step", "no patches"],
)
def test_what_does_not_fit_is_refused(
    changes: tuple[str, ...], said: str, forks: Forks, encode_config: Path, drawn: Path, teacher: Path
) -> None:
    done = forks.run("encode", str(encode_config), f"drawn.run={teacher}", TWO_STEPS, f"out={drawn}", *changes)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
