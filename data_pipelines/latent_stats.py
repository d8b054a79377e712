"""Mean and standard deviation of the latents of a cache, channel by channel: what an encoder's scale and shift should undo."""

from dataclasses import dataclass

import numpy as np

from data_pipelines.decode import decode_npy
from data_pipelines.errors import UserError
from data_pipelines.progress import track
from data_pipelines.samples import LATENTS_EXTENSION, BadSample
from data_pipelines.sources import read_source
from data_pipelines.storage import read_members


@dataclass(frozen=True)
class LatentStats:
    """Per channel over all samples, frames and places; `bad` are samples that could not be read, with reasons."""

    samples: int
    positions: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bad: tuple[tuple[str, str], ...]

    @property
    def overall_mean(self) -> float:
        """Mean over the channels too."""
        return float(np.mean(self.mean))

    @property
    def overall_std(self) -> float:
        """Standard deviation over the channels too, their different means included."""
        return float(np.sqrt(np.mean(np.square(self.std)) + np.var(self.mean)))


def latent_stats(folder: str) -> LatentStats:
    """Read every sample of a cache once. Raises UserError if it holds no latents or their channels differ."""
    source = read_source(folder, config_key="DIR")
    samples, count = 0, 0
    mean = square = np.zeros(0)  # running mean and sum of squared deviations, in float64
    bad = []
    for shard in track(source.shards, "reading"):
        for entry in source.index(shard).entries:
            if entry.facts.kind != "latents":
                raise UserError(f"DIR = {folder!r}: {entry.key} holds no latents; expected a cache that `dit encode` wrote")
            try:
                members = read_members(shard.address, {LATENTS_EXTENSION: entry.members[LATENTS_EXTENSION]})
                latents = decode_npy(members[LATENTS_EXTENSION]).astype(np.float64)
            except BadSample as error:
                bad.append((f"{shard.name}/{entry.key}", error.reason))
                continue
            values = latents.reshape(len(latents), -1)  # C T*H*W
            mean, square = (np.zeros(len(values)), np.zeros(len(values))) if not samples else (mean, square)
            if len(values) != len(mean):
                raise UserError(f"DIR = {folder!r}: {entry.key} has {len(values)} channels, others {len(mean)}")
            here, own = values.shape[1], values.mean(axis=1)
            step = own - mean  # Chan, Golub and LeVeque 1979: join two sets by their means and sums of squares
            square = square + ((values - own[:, None]) ** 2).sum(axis=1) + step**2 * (count * here / (count + here))
            mean = mean + step * (here / (count + here))
            samples, count = samples + 1, count + here
    if not samples:
        raise UserError(f"DIR = {folder!r}: none of its {len(bad)} samples can be read: {bad[0][1] if bad else 'it is empty'}")
    std = np.sqrt(square / count)
    return LatentStats(samples, count, tuple(mean.tolist()), tuple(std.tolist()), tuple(bad))
