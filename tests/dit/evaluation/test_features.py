"""Features of networks against transformers' own preprocessing and outputs, on tiny models with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    VideoMAEConfig,
    VideoMAEModel,
)

from data_pipelines import moving_shapes as ms
from data_pipelines.errors import UserError
from dit.config.evaluation import AttributeFeatures, ClipScoreConfig, NetworkFeatures, RandomConvFeatures
from dit.evaluation.distances import frechet_unbiased
from dit.evaluation.features import ClipScore, Network, RandomConv, build_features, of_frames
from dit.evaluation.pixels import as_float
from tests.dit.encoders.test_text import save_tokenizer

CPU = torch.device("cpu")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def dinov2(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    return save(folder, Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8)))


@pytest.fixture(scope="module")
def videos() -> Tensor:
    return torch.from_numpy(np.stack([ms.draw(3, index).video for index in range(48)]))


def inputs_of(videos: Tensor) -> Tensor:
    return (as_float(videos).flatten(0, 1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_an_image_network_sees_every_frame(tmp_path: Path, videos: Tensor) -> None:
    path = dinov2(tmp_path / "dino")
    network = Network(NetworkFeatures(name="network", path=str(path), batch_size=7), CPU)
    output = Dinov2Model.from_pretrained(path).eval()(pixel_values=inputs_of(videos[:2]), output_hidden_states=True)
    expected = output.last_hidden_state[:, 0].view(2, 9, 32).detach()
    torch.testing.assert_close(of_frames(network, videos[:2]), expected)
    torch.testing.assert_close(network(videos[:2]), expected.mean(1))
    maps = network.maps(videos[:2])
    assert [tuple(layer.shape) for layer in maps] == [(2, 9 * 17, 32)] * 2
    torch.testing.assert_close(maps[0], output.hidden_states[1].detach().view(2, 9 * 17, 32))
    pooled = Network(NetworkFeatures(name="network", path=str(path), pool="mean"), CPU)(videos[:2])
    torch.testing.assert_close(pooled, output.last_hidden_state.detach().view(2, 9 * 17, 32).mean(1))


@pytest.mark.parametrize(("crop", "side"), [({"height": 24, "width": 24}, 24), (16, 16), (None, 32)])
def test_frames_are_as_large_as_the_preprocessing_crops_them(tmp_path: Path, crop: object, side: int) -> None:
    """DINOv2 has positions of 518 pixels and is used at 224."""
    path = dinov2(tmp_path / "dino")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_size": crop}))
    assert f"{side} x {side}" in str(Network(NetworkFeatures(name="network", path=str(path)), CPU).protocol()["resize"])


def test_a_convolutional_network_is_pooled_over_places(tmp_path: Path, videos: Tensor) -> None:
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32)).eval()
    network = Network(NetworkFeatures(name="network", path=str(save(tmp_path, model)), pool="mean"), CPU)
    expected = model(pixel_values=inputs_of(videos[:1])).pooler_output.flatten(1).mean(0)
    torch.testing.assert_close(network(videos[:1])[0], expected.detach())


def test_a_video_network_sees_frames_spread_evenly(tmp_path: Path, videos: Tensor) -> None:
    torch.manual_seed(0)
    model = VideoMAEModel(VideoMAEConfig(**SMALL, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)).eval()
    network = Network(NetworkFeatures(name="network", path=str(save(tmp_path, model)), pool="mean"), CPU)
    frames = inputs_of(videos[:3]).view(3, 9, 3, 32, 32)[:, [0, 3, 5, 8]]
    expected = model(pixel_values=frames).last_hidden_state.mean(1)
    torch.testing.assert_close(network(videos[:3]), expected.detach())
    assert "4 spread evenly" in str(network.protocol())


def test_frames_are_resized_whole_like_pillow_does(tmp_path: Path, videos: Tensor) -> None:
    torch.manual_seed(0)
    network = Network(
        NetworkFeatures(name="network", path=str(save(tmp_path, Dinov2Model(Dinov2Config(**SMALL, image_size=16, patch_size=8))))), CPU
    )
    seen = network.prepare(as_float(videos[0])) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    pillow = [np.asarray(Image.fromarray(frame.numpy()).resize((16, 16), Image.Resampling.BICUBIC)) / 255 for frame in videos[0]]
    np.testing.assert_allclose(seen.permute(0, 2, 3, 1).numpy(), np.stack(pillow), atol=1.5 / 255)  # pillow rounds to bytes, twice


def test_the_fingerprint_follows_weights_and_preprocessing(tmp_path: Path) -> None:
    paths = [dinov2(tmp_path / "a"), dinov2(tmp_path / "b", seed=1), dinov2(tmp_path / "c"), dinov2(tmp_path / "d")]
    settings = paths[3] / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.5", "0.6"))
    prints = [Network(NetworkFeatures(name="network", path=str(path)), CPU).protocol() for path in paths]
    assert prints[0] == prints[2]
    assert prints[0]["weights"] != prints[1]["weights"]
    assert prints[0]["weights"] != prints[3]["weights"]


@pytest.mark.parametrize("lost", ["preprocessor_config.json", "config.json", "model.safetensors"])
def test_a_folder_that_is_no_network_is_refused(tmp_path: Path, lost: str) -> None:
    path = dinov2(tmp_path / "dino")
    (path / lost).unlink()
    with pytest.raises(UserError, match=r"metrics.features.path: got .*dino"):
        Network(NetworkFeatures(name="network", path=str(path)), CPU)


def test_a_network_whose_weights_are_not_whole_is_refused(tmp_path: Path) -> None:
    path = dinov2(tmp_path / "dino")
    tensors = load_file(path / "model.safetensors")
    del tensors["encoder.layer.1.norm1.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors of the model, such as encoder.layer.1.norm1.weight"):
        Network(NetworkFeatures(name="network", path=str(path)), CPU)


def test_a_network_whose_file_is_cut_is_refused(tmp_path: Path) -> None:
    file = dinov2(tmp_path / "dino") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"metrics.features.path: got .*dino.* expected a local folder"):
        Network(NetworkFeatures(name="network", path=str(file.parent)), CPU)


def test_clip_score_is_the_cosine_of_transformers(tmp_path: Path, videos: Tensor) -> None:
    torch.manual_seed(4)
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 20, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8}, projection_dim=24)).eval()
    save(tmp_path, model)
    save_tokenizer(tmp_path)
    captions = ["a red disc moves left", "a cross"]
    score = ClipScore(ClipScoreConfig(name="clip_score", path=str(tmp_path), batch_size=5), CPU)
    tokens = score.tokenizer(captions, padding=True, return_tensors="pt")
    output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=inputs_of(videos[:2]))
    cosines = output.logits_per_image.detach().view(2, 9, 2) / model.logit_scale.exp().item()
    expected = 100 * torch.stack([cosines[0, :, 0], cosines[1, :, 1]]).clamp(min=0).mean(1)
    torch.testing.assert_close(score(videos[:2], captions), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(videos[:2], captions[::-1]), expected, rtol=1e-3)
    assert expected.min() > 1
    for tokenizer in tmp_path.glob("tokenizer*"):
        tokenizer.unlink()
    with pytest.raises(UserError, match=r"metrics.path: got .* expected a CLIP folder with its tokenizer"):
        ClipScore(ClipScoreConfig(name="clip_score", path=str(tmp_path)), CPU)


@pytest.mark.parametrize("kind", ["random_conv", "image", "video"])
def test_layers_of_pixels_are_the_maps_of_videos_and_have_a_gradient(kind: str, tmp_path: Path, videos: Tensor) -> None:
    """Along a random direction, against a central difference in the pixels, in float64: rectifiers have kinks."""
    network: RandomConv | Network = RandomConv(0, CPU)
    if kind != "random_conv":
        torch.manual_seed(0)
        sizes = {**SMALL, "image_size": 16, "patch_size": 8, "num_frames": 4, "tubelet_size": 2}
        path = dinov2(tmp_path) if kind == "image" else save(tmp_path, VideoMAEModel(VideoMAEConfig(**sizes)))
        network = Network(NetworkFeatures(name="network", path=str(path), batch_size=7), CPU)
    for layer, expected in zip(network.layers(as_float(videos[:2])), network.maps(videos[:2]), strict=True):
        assert torch.equal(layer, expected)
    if isinstance(network, RandomConv):
        network.weights = [weight.double() for weight in network.weights]
    else:
        network.model.double()

    def total(pixels: Tensor) -> Tensor:
        return torch.stack([layer.sin().mean() for layer in network.layers(pixels)]).sum()

    pixels = (0.1 + 0.8 * as_float(videos[:2]).double()).requires_grad_()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(total(pixels), pixels)
    with torch.no_grad():
        ahead, behind = (total(pixels + way * direction) for way in (1e-6, -1e-6))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-3)


def test_random_convolutions_are_fixed_and_depend_on_the_seed(videos: Tensor) -> None:
    first, again, other = (RandomConv(seed, CPU) for seed in (0, 0, 1))
    assert first.protocol() == again.protocol()
    assert first.protocol() == {"name": "random_conv", "seed": 0, "weights": "fc3bd07c8d4921d7"}
    assert first.protocol()["weights"] != other.protocol()["weights"]
    torch.testing.assert_close(first(videos[:4]), again(videos[:4]))
    assert first(videos[:4]).shape == (4, 128)
    assert (first(videos[:1]) - other(videos[:1])).norm() > 0.1 * first(videos[:1]).norm()
    assert first(videos[:2, :1]).shape == (2, 128)  # images


@pytest.mark.parametrize(
    ("config", "count"),
    [(RandomConvFeatures(name="random_conv"), 240), (AttributeFeatures(name="attributes"), 48)],
    ids=lambda x: str(x)[:12],
)
def test_features_tell_broken_videos_from_whole_ones(config: RandomConvFeatures | AttributeFeatures, count: int) -> None:
    features = build_features(config, CPU)
    videos, fresh = (torch.from_numpy(np.stack([ms.draw(seed, index).video for index in range(count)])) for seed in (3, 4))
    red = fresh.clone()
    red[..., 1:] = 15
    broken = {"shuffled": fresh[:, [0, 7, 2, 5, 4, 3, 6, 1, 8]], "still": fresh[:, :1].expand(-1, 9, -1, -1, -1), "red": red}
    reference = features(videos)
    halves = [reference[::2], reference[1::2]]

    def distance(clips: Tensor) -> float:
        seen = features(clips)
        return frechet_unbiased([seen[::2], seen[1::2]], halves)

    floor = distance(fresh)
    for name, clips in broken.items():
        assert distance(clips) > 3 * max(floor, 0.001), name
