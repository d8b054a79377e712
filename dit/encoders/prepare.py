"""From a raw pack to packed latents: what is not cached is encoded, what could not be read leaves a hole of weight 0."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.errors import UserError
from data_pipelines.loader import RawPack, RawSample
from data_pipelines.packed import Grid, PackedLatents, pack_conditioning, patchify
from dit.encoders.base import LatentCodec, TextEncoder


def prepare(pack: RawPack, codec: LatentCodec, text_encoder: TextEncoder, patch: Grid) -> PackedLatents:
    """Encode `pack` to tokens (L, C * pt * ph * pw) of the planned grids; cached latents and text are used as they are.

    The result is on the encoders' device if anything was encoded, else on the CPU. Raises UserError if cached latents or text
    have not the encoders' channels, or if some samples have labels and others none.
    """
    samples = pack.samples
    channels = codec.channels * patch[0] * patch[1] * patch[2]
    tokens = [
        torch.zeros(grid[0] * grid[1] * grid[2], channels) if latents is None else _tokens(sample, latents, grid, patch, codec)
        for sample, latents, grid in zip(samples, encode_samples(samples, codec), pack.grids, strict=True)
    ]
    texts = _texts(samples, text_encoder)
    device = next((tensor.device for tensor in [*tokens, *texts] if tensor.device.type != "cpu"), torch.device("cpu"))
    cond = pack_conditioning(pack.grids, [text.to(device) for text in texts], _labels(samples))
    packed = PackedLatents(
        tokens=torch.cat([part.to(device) for part in tokens]),  # (L, P)
        cond=cond,
        keys=tuple(sample.key for sample in samples),
        ids=tuple(sample.id for sample in samples),
        weights=torch.tensor([1.0 if sample.error is None else 0.0 for sample in samples]),
        place=pack.place,
    )
    return packed.to(device)


def pixels_to_video(pixels: Tensor) -> Tensor:
    """uint8 (T, H, W, 3) -> float32 (3, T, H, W) in [-1, 1]."""
    return pixels.permute(3, 0, 1, 2).float() / 127.5 - 1


def encode_samples(samples: Sequence[RawSample], codec: LatentCodec) -> list[Tensor | None]:
    """What the codec gives for each sample, (C or 2C, T, H, W), None for a hole. Videos of equal size are encoded together."""
    latents = [None if sample.error is not None or sample.latents is None else sample.latents.float() for sample in samples]
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if sample.error is None and sample.latents is None:
            assert sample.pixels is not None, f"{sample.id} has neither pixels nor latents nor an error"
            by_size[tuple(sample.pixels.shape)].append(i)
    for indices in by_size.values():
        videos = torch.stack([pixels_to_video(pixels) for i in indices if (pixels := samples[i].pixels) is not None])  # (B, 3, T, H, W)
        for i, encoded in zip(indices, codec.encode(videos), strict=True):
            latents[i] = encoded
    return latents


def _tokens(sample: RawSample, latents: Tensor, grid: Grid, patch: Grid, codec: LatentCodec) -> Tensor:
    if latents.shape[0] == 2 * codec.channels:
        mean, deviation = latents.chunk(2)  # C T H W
        latents = mean + deviation * randomness.normal(tuple(mean.shape), sample.key, "posterior").to(mean)
    if latents.shape[0] != codec.channels:
        raise UserError(
            f"{sample.id}: got cached latents of {latents.shape[0]} channels, expected {codec.channels} of the codec in "
            "encoders.latents. Encode the source again or change the codec."
        )
    size = tuple(cells * part for cells, part in zip(grid, patch, strict=True))
    assert latents.shape[1:] == size, f"{sample.id}: latents of {tuple(latents.shape[1:])}, planned {size}"
    return patchify(latents, patch)  # (t*h*w, pt*ph*pw*C)


def _texts(samples: Sequence[RawSample], text_encoder: TextEncoder) -> list[Tensor]:
    """(S_i, D) of each sample; a hole gets one zero row, which no loss depends on."""
    missing = [i for i, sample in enumerate(samples) if sample.error is None and sample.text is None]
    encoded = dict(zip(missing, text_encoder.encode([samples[i].caption for i in missing]), strict=True)) if missing else {}
    texts = []
    for i, sample in enumerate(samples):
        text = encoded.get(i, sample.text) if sample.error is None else torch.zeros(1, text_encoder.width)
        assert text is not None
        if text.shape[1] != text_encoder.width:
            raise UserError(
                f"{sample.id}: got cached text of width {text.shape[1]}, expected {text_encoder.width} of the encoder in "
                "encoders.text. Encode the source again or change the encoder."
            )
        texts.append(text.float())
    return texts


def _labels(samples: Sequence[RawSample]) -> Tensor | None:
    """(n,) class of each sample, 0 for a hole; None if there are no classes."""
    labels = {sample.id: sample.label for sample in samples if sample.error is None}
    unlabelled = [id for id, label in labels.items() if label is None]
    if len(unlabelled) == len(labels):
        return None
    if unlabelled:
        raise UserError(
            f"{unlabelled[0]}: got no class label, expected one as other samples have. Label every sample of the sources, or none."
        )
    return torch.tensor([labels.get(sample.id) or 0 for sample in samples])
