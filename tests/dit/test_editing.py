"""Pixels of edits: what is read, what of it is known in the latents, and what is refused. No network."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import TypeAdapter

from data_pipelines.errors import UserError
from data_pipelines.video import write_mp4
from dit.config.editing import EditConfig
from dit.config.encoders import EncodersConfig
from dit.config.objective import SamplingConfig
from dit.editing import Edit, check_edit, extend, read_edit
from dit.runs import Encoders, TrainedRun

SIZE, PATCH = (9, 32, 32), (1, 2, 2)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders.load(EncodersConfig(), torch.device("cpu"))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    """video.mp4 of 13 frames, short.mp4 of 4, image.png, wide.png, mask.png (a box of 16 x 24), everything.png, nothing.png."""
    path = tmp_path_factory.mktemp("inputs")
    write_mp4(path / "video.mp4", pixels, 8, lossless=True)
    write_mp4(path / "short.mp4", pixels[:4], 8, lossless=True)
    write_mp4(path / "small.mp4", pixels[:9, :16, :24], 8, lossless=True)
    Image.fromarray(pixels[0]).save(path / "image.png")
    Image.fromarray(pixels[0, :, :16]).save(path / "half.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, :24] = 255
    Image.fromarray(mask).save(path / "mask.png")
    for name, value in (("everything", 255), ("nothing", 0)):
        Image.fromarray(np.full_like(mask, value)).save(path / f"{name}.png")
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return path


def read(folder: Path, encoders: Encoders, size: tuple[int, int, int] = SIZE, **values: Any) -> Edit:
    paths = {key: str(folder / values[key]) for key in ("input", "mask", "first", "last") if key in values}
    edit = read_edit(TypeAdapter(EditConfig).validate_python(values | paths), size, encoders)
    if values["name"] != "extend":
        edit.tokens(encoders, PATCH, 1)
    return edit


def test_a_token_is_known_if_all_its_pixels_are(folder: Path, encoders: Encoders, pixels: np.ndarray) -> None:
    edit = read(folder, encoders, name="inpaint", input="video.mp4", mask="mask.png")
    assert torch.equal(edit.videos[0], torch.from_numpy(pixels[:9]))
    anew = torch.zeros(SIZE, dtype=torch.bool)
    anew[:, 8:24, :24] = True
    assert torch.equal(edit.known, ~anew)
    mask = edit.tokens(encoders, PATCH, 1).mask.view(3, 4, 4)  # tokens of 8 x 8 pixels
    assert torch.equal(~mask, anew[[0, 4, 8], ::8, ::8])
    edit.known[6, 31, 31] = False  # in the frames 5 .. 8 of the third latent
    changed = edit.tokens(encoders, PATCH, 1).mask.view(3, 4, 4)
    assert (changed != mask).nonzero().tolist() == [[2, 3, 3]]


def test_what_is_hidden_says_nothing(folder: Path, encoders: Encoders) -> None:
    edit = read(folder, encoders, name="inpaint", input="video.mp4", region="centre")
    other = Edit(edit.config, torch.where(edit.known[..., None], edit.videos, 255 - edit.videos), edit.known)
    one, two = edit.tokens(encoders, PATCH, 2), other.tokens(encoders, PATCH, 2)
    assert torch.equal(one.latents, two.latents)
    assert int(one.mask.sum()) == 2 * 3 * 12
    assert not one.latents[~one.mask].any()
    assert one.latents[one.mask].abs().min(1).values.max() > 0


@pytest.mark.parametrize(
    ("values", "frames"),
    [
        ({"first": "image.png"}, [0]),
        ({"first": "image.png", "last": "image.png"}, [0, 5, 6, 7, 8]),  # held: four frames share a latent
        ({"last": "short.mp4"}, [5, 6, 7, 8]),
    ],
)
def test_first_and_last_frames(folder: Path, encoders: Encoders, values: dict[str, str], frames: list[int], pixels: np.ndarray) -> None:
    edit = read(folder, encoders, name="frames", **values)
    assert edit.known.flatten(1).all(1).nonzero()[:, 0].tolist() == frames
    assert torch.equal(edit.known.flatten(1).all(1), edit.known.flatten(1).any(1))
    mask = edit.tokens(encoders, PATCH, 1).mask.view(3, 16)
    assert mask.all(1).tolist() == ["first" in values, False, "last" in values]
    given = torch.from_numpy(pixels[:4] if "short.mp4" in values.values() else pixels[[0] * 4])
    if "last" in values:
        assert torch.equal(edit.videos[0, 5:], given)
    if "first" in values:
        assert torch.equal(edit.videos[0, 0], given[0])


def test_outpainting_puts_the_input_where_it_is_told(folder: Path, encoders: Encoders, pixels: np.ndarray) -> None:
    edit = read(folder, encoders, name="outpaint", input="small.mp4", place=[16, 0])
    assert torch.equal(edit.videos[0, :, 16:, :24], torch.from_numpy(pixels[:9, :16, :24]))
    assert int(edit.known.sum()) == 9 * 16 * 24
    assert edit.tokens(encoders, PATCH, 1).mask.view(3, 4, 4)[:, 2:, :3].all()


@pytest.mark.parametrize(
    "values",
    [
        {"name": "inpaint", "input": "video.mp4", "mask": "mask.png"},
        {"name": "inpaint", "input": "video.mp4", "region": "centre"},
        {"name": "outpaint", "input": "small.mp4"},
        {"name": "frames", "first": "image.png"},
        {"name": "frames", "last": "image.png"},
        {"name": "frames", "first": "image.png", "last": "short.mp4"},
    ],
    ids=lambda values: "-".join(values),
)
def test_pasted_pixels_are_those_given_bit_for_bit(folder: Path, encoders: Encoders, values: dict[str, Any]) -> None:
    edit = read(folder, encoders, **values)
    drawn = torch.randint(0, 256, (3, *SIZE, 3), dtype=torch.uint8)
    pasted = edit.paste(drawn)
    assert 0 < int(edit.known.sum()) < edit.known.numel()
    assert torch.equal(pasted[:, edit.known], edit.videos[0][edit.known].expand(3, -1, -1))
    assert torch.equal(pasted[:, ~edit.known], drawn[:, ~edit.known])


def test_extension_goes_on_from_the_last_frames_of_each_sample(folder: Path, encoders: Encoders, pixels: np.ndarray) -> None:
    edit = read(folder, encoders, name="extend", input="video.mp4", keep=5, windows=2)
    seen: list[tuple[Edit, list[int]]] = []

    def window(own: Edit, keys: list[int]) -> torch.Tensor:
        seen.append((own, keys))
        drawn = torch.stack([torch.full((*SIZE, 3), 10 * len(seen) + number, dtype=torch.uint8) for number in range(2)])
        return own.paste(drawn)

    videos = extend(window, edit, [7, 8])
    assert videos.shape == (2, 13 + 2 * 4, 32, 32, 3)
    assert torch.equal(videos[:, :13], torch.from_numpy(pixels).expand(2, -1, -1, -1, -1))
    assert videos[:, :, 0, 0, 0][:, 13:].tolist() == [[10] * 4 + [20] * 4, [11] * 4 + [21] * 4]
    (first, first_keys), (second, second_keys) = seen
    assert torch.equal(first.videos[:, :5], videos[:, 8:13])
    assert torch.equal(second.videos[:, :5], videos[:, 12:17])
    assert first.known.flatten(1).all(1).tolist() == [True] * 5 + [False] * 4
    assert len({*first_keys, *second_keys}) == 4


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"name": "inpaint", "input": "short.mp4", "region": "left"}, ["edit.input", "short.mp4", "4 frames", "at least 9"]),
        ({"name": "inpaint", "input": "image.png", "region": "left"}, ["edit.input", "1 frames", "at least 9"]),
        ({"name": "inpaint", "input": "video.mp4", "mask": "half.png"}, ["edit.mask", "1 x 32 x 16", "32 x 32"]),
        ({"name": "inpaint", "input": "video.mp4", "mask": "video.mp4"}, ["edit.mask", "13 x 32 x 32", "1 or 9 frames"]),
        ({"name": "inpaint", "input": "video.mp4", "mask": "everything.png"}, ["no token is known", "4 frames of 8 x 8"]),
        ({"name": "inpaint", "input": "video.mp4", "mask": "nothing.png"}, ["every token is known", "4 frames of 8 x 8"]),
        ({"name": "inpaint", "input": "nowhere.mp4", "region": "left"}, ["edit.input", "nowhere.mp4"]),
        ({"name": "inpaint", "input": "none.png", "region": "left"}, ["edit.input", "none.png", "No such file"]),
        ({"name": "inpaint", "input": "broken.png", "region": "left"}, ["edit.input", "broken.png"]),
        ({"name": "inpaint", "input": "x.tar", "region": "left"}, ["edit.input", "x.tar", "mp4", "png"]),
        ({"name": "outpaint", "input": "video.mp4"}, ["every token is known"]),
        ({"name": "outpaint", "input": "small.mp4", "place": [20, 0]}, ["edit.input", "16 x 24", "[20, 0]", "[32, 32]"]),
        ({"name": "outpaint", "input": "small.mp4", "place": [5, 5]}, []),
        ({"name": "frames", "first": "short.mp4"}, ["edit.first", "4 frames", "1 + 4k"]),
        ({"name": "frames", "first": "video.mp4"}, ["13 frames", "nothing is left"]),
        ({"name": "extend", "input": "video.mp4", "keep": 4}, ["edit.keep", "1 + 4k"]),
        ({"name": "extend", "input": "video.mp4", "keep": 9}, ["edit.keep=9", "9 frames"]),
        ({"name": "extend", "input": "short.mp4", "keep": 5}, ["edit.input", "4 frames", "edit.keep=5"]),
    ],
)
def test_inputs_that_do_not_fit_are_refused(folder: Path, encoders: Encoders, values: dict[str, Any], parts: list[str]) -> None:
    if not parts:
        read(folder, encoders, **values)
        return
    with pytest.raises(UserError) as caught:
        read(folder, encoders, **values)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_what_is_given_is_where_the_network_is(folder: Path) -> None:
    """A codec without weights leaves its latents where the pixels are."""
    encoders = Encoders.load(EncodersConfig.model_validate({"latents": {"name": "pixels"}}), torch.device("cpu"))
    elsewhere = Encoders(encoders.text, encoders.latents, encoders.null_text.to("meta"))
    edit = read_edit(TypeAdapter(EditConfig).validate_python({"name": "sdedit", "input": str(folder / "image.png")}), (1, 32, 32), encoders)
    known = edit.tokens(elsewhere, PATCH, 1)
    assert known.latents.device.type == known.mask.device.type == "meta"


def test_of_a_posterior_the_mean_is_given(folder: Path, tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path)
    tokens = []
    for posterior in ("mean", "sample"):
        latents = {"name": "diffusers", "path": str(tmp_path), "posterior": posterior}
        encoders = Encoders.load(EncodersConfig.model_validate({"latents": latents}), torch.device("cpu"))
        tokens.append(read(folder, encoders, (1, 32, 32), name="sdedit", input="image.png").tokens(encoders, PATCH, 2).latents)
    assert torch.equal(*tokens)


def test_a_student_of_jumps_is_not_inverted_by_its_jumps(teacher: Path) -> None:
    trained = TrainedRun.open(str(teacher), "run")
    jumping = trained.base.model_copy(update={"backbone": trained.base.backbone.model_copy(update={"jumps": True})})
    student = TrainedRun(trained.path, jumping, jumping)
    for solver in ("euler", "heun", "rk4"):
        config = TypeAdapter(EditConfig).validate_python({"name": "invert", "input": "a.png", "solver": solver})
        check_edit(config, trained, SamplingConfig(), "contestants.0")
        with nullcontext() if solver != "euler" else pytest.raises(UserError, match=r"^edit.solver=euler .* use edit.solver heun"):
            check_edit(config, student, SamplingConfig(), "contestants.0")
