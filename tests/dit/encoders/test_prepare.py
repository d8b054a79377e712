from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.loader import RawPack, RawSample
from data_pipelines.packed import Grid, unpack
from dit.config.encoders import PixelsConfig, SmallTextConfig, SmallVAEConfig
from dit.encoders import LatentCodec, build_latent_codec, build_text_encoder, prepare
from dit.encoders.base import Fingerprint
from dit.encoders.pixels import PixelCodec
from dit.encoders.prepare import encode_samples, pixels_to_video

PATCH = (1, 2, 2)
TEXT = build_text_encoder(SmallTextConfig())


class CountingCodec(PixelCodec):
    """Pixels as latents; counts the videos of each call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, video: Tensor) -> Tensor:
        self.batches.append(len(video))
        return super().encode(video)

    def fingerprint(self) -> Fingerprint:
        return {**super().fingerprint(), "class": "CountingCodec"}


def raw(index: int, size: Grid, caption: str = "a red disc") -> RawSample:
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
    return RawSample(id=f"shard/{index}", key=1000 + index, caption=caption, pixels=pixels)


def pack(samples: list[RawSample], grids: list[Grid]) -> RawPack:
    return RawPack(tuple(samples), tuple(grids))


def test_pixels_span_minus_one_to_one_channels_first() -> None:
    pixels = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
    pixels[1, 2, 3, 0] = 255
    video = pixels_to_video(pixels)
    assert video.shape == (3, 2, 3, 4)
    assert (float(video[0, 1, 2, 3]), float(video[1, 1, 2, 3])) == (1.0, -1.0)


def test_samples_come_out_as_they_went_in_with_equal_sizes_encoded_together() -> None:
    samples = [raw(0, (1, 4, 4)), raw(1, (3, 2, 4), "a cross"), raw(2, (1, 4, 4), "")]
    codec = CountingCodec()
    packed = prepare(pack(samples, [(1, 2, 2), (3, 1, 2), (1, 2, 2)]), codec, TEXT, PATCH)
    assert codec.batches == [2, 1]
    assert packed.tokens.shape == (4 + 6 + 4, 12)
    for sample, latents in zip(samples, unpack(packed.tokens, packed.cond, PATCH), strict=True):
        assert sample.pixels is not None
        torch.testing.assert_close(latents, sample.pixels.permute(3, 0, 1, 2) / 127.5 - 1)
    for text, caption in zip(packed.cond.text.split(packed.cond.text_lengths), ["a red disc", "a cross", ""], strict=True):
        torch.testing.assert_close(text, TEXT.encode([caption])[0])
    assert (packed.keys, packed.ids) == ((1000, 1001, 1002), ("shard/0", "shard/1", "shard/2"))
    assert packed.weights.tolist() == [1, 1, 1]
    assert packed.cond.labels is None


def test_what_is_cached_is_not_encoded_again() -> None:
    latents, text = torch.randn(3, 1, 4, 4).half(), torch.randn(5, TEXT.width).half()
    cached = RawSample(id="cache/0", key=7, caption="unused", latents=latents, text=text)
    codec = CountingCodec()
    packed = prepare(pack([cached, raw(1, (1, 4, 4))], [(1, 2, 2)] * 2), codec, TEXT, PATCH)
    assert codec.batches == [1]
    assert torch.equal(unpack(packed.tokens, packed.cond, PATCH)[0], latents.float())
    assert torch.equal(packed.cond.text[:5], text.float())


class Uncertain(CountingCodec):
    """Pixels as the mean of a posterior of deviation 0.5."""

    def encode(self, video: Tensor) -> Tensor:
        mean = super().encode(video)
        return torch.cat([mean, torch.full_like(mean, 0.5)], 1)


def test_latents_are_drawn_from_a_posterior_by_the_sample_s_key_cached_or_not() -> None:
    online = [raw(i, (1, 4, 4)) for i in range(200)]
    cached = [replace(s, pixels=None, latents=moments) for s, moments in zip(online, encode_samples(online, Uncertain()), strict=True)]
    mixed = prepare(pack([*cached[:100], *online[100:]], [(1, 2, 2)] * 200), Uncertain(), TEXT, PATCH)
    assert torch.equal(mixed.tokens, prepare(pack(online, [(1, 2, 2)] * 200), Uncertain(), TEXT, PATCH).tokens)
    mean = prepare(pack(online, [(1, 2, 2)] * 200), CountingCodec(), TEXT, PATCH).tokens
    noise = (mixed.tokens - mean) / 0.5  # (800, 12) standard normal: 9600 draws
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    again = prepare(pack([replace(cached[0], key=cached[0].key + 1), online[1]], [(1, 2, 2)] * 2), Uncertain(), TEXT, PATCH)
    assert not torch.equal(again.tokens[:4], mixed.tokens[:4])  # the next epoch draws anew
    assert torch.equal(again.tokens[4:], mixed.tokens[4:8])


def test_a_hole_keeps_its_place_without_weight() -> None:
    hole = RawSample(id="shard/9", key=9, error="truncated")
    labelled = replace(raw(1, (1, 4, 4)), label=3)
    packed = prepare(pack([hole, labelled], [(2, 2, 2), (1, 2, 2)]), CountingCodec(), TEXT, PATCH)
    assert packed.cond.lengths == (8, 4)
    assert not packed.tokens[:8].any()
    assert packed.tokens[8:].any()
    assert packed.weights.tolist() == [0, 1]
    assert packed.cond.text_lengths[0] == 1
    assert not packed.cond.text[0].any()
    assert packed.cond.labels is not None
    assert packed.cond.labels.tolist() == [0, 3]


def test_labels_are_for_all_or_for_none() -> None:
    samples = [raw(0, (1, 4, 4)), replace(raw(1, (1, 4, 4)), label=3)]
    with pytest.raises(UserError, match="shard/0: got no class label"):
        prepare(pack(samples, [(1, 2, 2)] * 2), CountingCodec(), TEXT, PATCH)


@pytest.mark.parametrize(
    ("cached", "message"),
    [
        ({"latents": torch.zeros(8, 1, 4, 4)}, "latents of 8 channels, expected 3"),
        ({"latents": torch.zeros(3, 1, 4, 4), "text": torch.zeros(2, 5)}, f"text of width 5, expected {TEXT.width}"),
    ],
)
def test_a_cache_of_other_encoders_is_refused(cached: dict[str, Tensor], message: str) -> None:
    sample = RawSample(id="cache/0", key=7, **cached)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        prepare(pack([sample], [(1, 2, 2)]), CountingCodec(), TEXT, PATCH)


def test_the_encoders_of_the_project_fit_their_contracts() -> None:
    codec: LatentCodec = build_latent_codec(SmallVAEConfig())
    size = (5, 8, 12)
    t, h, w = codec.latent_size(size)
    packed = prepare(pack([raw(0, size)], [(t, h, w)]), codec, TEXT, (1, 1, 1))
    assert packed.tokens.shape == (t * h * w, codec.channels)
    video = codec.decode(torch.stack(unpack(packed.tokens, packed.cond, (1, 1, 1))))
    assert video.shape == (1, 3, *size)
    with pytest.raises(UserError, match=r"got 6 frames, expected 1 \+ 4k"):
        codec.latent_size((6, 8, 8))
    fingerprints = [encoder.fingerprint() for encoder in (codec, TEXT, build_latent_codec(PixelsConfig(name="pixels")))]
    assert [fingerprint["class"] for fingerprint in fingerprints] == ["SmallVideoVAE", "SmallTextEncoder", "PixelCodec"]
    assert codec.fingerprint() == build_latent_codec(SmallVAEConfig()).fingerprint()


def test_missing_weights_of_the_projects_encoders_are_named() -> None:
    with pytest.raises(UserError, match=r"encoders\.text\.path: got 'nowhere'"):
        build_text_encoder(SmallTextConfig(path="nowhere"))
    with pytest.raises(UserError, match=r"encoders\.latents\.path"):
        build_latent_codec(SmallVAEConfig(path=__file__))
