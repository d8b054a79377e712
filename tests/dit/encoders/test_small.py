"""The small encoders that ship with the project: contract, causality, and the figures they are held to."""

import numpy as np
import pytest
import torch

from data_pipelines import moving_shapes as ms
from dit.encoders import small_text, small_vae
from dit.encoders.small_text import SmallTextEncoder, hash_word, words_of
from dit.encoders.small_vae import SmallVideoVAE
from dit.evaluation.moving_shapes import check_batch, summarise
from dit.train_small_encoders import attribute_labels, drawn_clips, psnr, to_tensor, to_uint8

FRESH_SEED = 20  # neither the training's nor the training's own evaluation


@pytest.fixture(scope="module")
def codec():
    return SmallVideoVAE.load()


@pytest.fixture(scope="module")
def text_encoder():
    return SmallTextEncoder.load()


# --- files ------------------------------------------------------------------------------------------------------


def test_the_assets_are_small():
    assert small_vae.ASSET.stat().st_size + small_text.ASSET.stat().st_size <= 2 * 1024**2
    assert sum(p.numel() for p in SmallVideoVAE.load().parameters()) <= 700_000


def test_a_saved_encoder_loads_as_it_was(tmp_path, codec, text_encoder):
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    codec.save(tmp_path / "vae.safetensors", figures={})
    assert torch.equal(SmallVideoVAE.load(tmp_path / "vae.safetensors").encode(video), codec.encode(video))
    text_encoder.save(tmp_path / "text.safetensors", figures={})
    again = SmallTextEncoder.load(tmp_path / "text.safetensors")
    assert torch.equal(again.encode(["a red disc"])[0], text_encoder.encode(["a red disc"])[0])
    with pytest.raises(ValueError, match="small_vae"):
        SmallVideoVAE.load(tmp_path / "text.safetensors")


# --- the video autoencoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "height", "width"), [(9, 32, 32), (1, 32, 32), (5, 48, 20), (13, 16, 64)])
def test_shapes(codec, frames, height, width):
    video = torch.rand(2, 3, frames, height, width) * 2 - 1
    latents = codec.encode(video)
    assert codec.stride == (4, 4, 4)
    assert latents.shape == (2, codec.channels, 1 + (frames - 1) // 4, height // 4, width // 4)
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 32), (1, 3, 9, 30, 32), (1, 1, 9, 32, 32), (3, 9, 32, 32)])
def test_what_does_not_fit_the_grid_is_refused(codec, shape):
    with pytest.raises(ValueError, match="expected"):
        codec.encode(torch.zeros(shape))


def test_it_is_causal_in_time(codec):
    torch.manual_seed(0)
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    changed = torch.cat([video[:, :, :5], -video[:, :, 5:]], dim=2)
    latents, other = codec.encode(video), codec.encode(changed)
    torch.testing.assert_close(latents[:, :, :2], other[:, :, :2], rtol=0, atol=1e-5)
    assert (latents[:, :, 2] - other[:, :, 2]).abs().max() > 0.1
    # A video's first latent is that of its first frame as an image, and decoding is causal as well.
    torch.testing.assert_close(latents[:, :, :1], codec.encode(video[:, :, :1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents)[:, :, :5], codec.decode(latents[:, :, :2]), rtol=0, atol=1e-5)


def test_latents_are_normalised(codec):
    videos, _ = drawn_clips(FRESH_SEED, 256, "train")
    latents = codec.encode(to_tensor(videos))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.1
    np.testing.assert_allclose(latents.std((0, 2, 3, 4)).numpy(), 1, atol=0.1)
    assert torch.equal(latents, codec.encode(to_tensor(videos)))  # deterministic


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_reconstructions_are_faithful(codec, split):
    videos, attributes = drawn_clips(FRESH_SEED, 256, split)
    decoded = codec.decode(codec.encode(to_tensor(videos)))
    assert psnr(decoded, to_tensor(videos)) >= 30
    summary = summarise(check_batch(to_uint8(decoded), attributes))
    names = ("shape", "colour", "size", "position", "direction", "speed", "render", "smooth", "all")
    assert min(summary[name] for name in names) >= 0.99, summary


def test_a_single_image_is_faithful_too(codec):
    videos, _ = drawn_clips(FRESH_SEED, 64, "train")
    image = to_tensor(videos[:, :1])
    assert psnr(codec.decode(codec.encode(image)), image) >= 30


# --- the text encoder -------------------------------------------------------------------------------------------


def test_any_text_is_accepted(text_encoder):
    captions = ["", "a red disc", "Ein Kätzchen, das spielt!", "一只红色的猫", "🦊" * 3, "word " * 1000]
    embeddings = text_encoder.encode(captions)
    assert [e.shape[0] for e in embeddings[:2]] == [1, 4]
    assert embeddings[-1].shape[0] == small_text.MAX_WORDS + 1
    for embedding in embeddings:
        assert embedding.dtype == torch.float32
        assert embedding.shape[1] == text_encoder.width
        assert embedding.isfinite().all()
    assert text_encoder.encode([]) == []
    with pytest.raises(TypeError):
        text_encoder.encode("a red disc")


def test_words_are_hashed_apart(text_encoder):
    words = {word for text in ms.all_captions() for word in words_of(text)} | {f"word{n}" for n in range(20_000)}
    assert len({hash_word(word, text_encoder.buckets) for word in words}) > 0.99 * len(words)
    assert all(0 < bucket < text_encoder.buckets for word in words for bucket in hash_word(word, text_encoder.buckets))
    assert words_of("A cat, it's RED.") == ["a", "cat", ",", "it's", "red", "."]


def test_the_batch_does_not_change_an_embedding(text_encoder):
    alone = text_encoder.encode(["a red disc"])[0]
    together = text_encoder.encode(["a red disc", "a small red square moving left slowly near the top"])[0]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_embeddings_are_contextual_and_ordered(text_encoder):
    left = text_encoder.encode(["a small red disc moving up slowly near the left", "a small red disc moving left slowly near the top"])
    assert (left[0][9] - left[1][5]).abs().mean() > 0.1  # the same word in two places
    dog, man = text_encoder.encode(["dog bites man", "man bites dog"])
    assert (dog[-1] - man[-1]).abs().mean() > 0.01


def test_embeddings_have_unit_variance_and_differ(text_encoder):
    embeddings = torch.stack(text_encoder.encode(ms.all_captions()))
    np.testing.assert_allclose(embeddings.std(-1).numpy(), 1, atol=0.05)
    ends = embeddings[:, -1]
    distances = torch.cdist(ends, ends) + 1e3 * torch.eye(len(ends))
    assert distances.min() > 0.5


def test_a_linear_readout_finds_every_attribute_of_held_out_captions(text_encoder):
    """Least squares on the training captions' mean token reads the captions that the encoder never saw."""
    features, labels = {}, {}
    for split in ("train", "held_out"):
        attributes = list(ms.all_attributes(split))
        mean = torch.stack([e.mean(0) for e in text_encoder.encode([ms.caption(a) for a in attributes])]).double()
        features[split] = torch.cat([mean, torch.ones(len(mean), 1)], dim=1)
        labels[split] = attribute_labels(attributes)
    for column in range(6):
        one_hot = torch.nn.functional.one_hot(labels["train"][:, column]).double()
        weights = torch.linalg.lstsq(features["train"], one_hot).solution
        found = (features["held_out"] @ weights).argmax(1)
        assert (found == labels["held_out"][:, column]).double().mean() >= 0.999
