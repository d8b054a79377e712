"""Latents that a trained model draws for the captions of samples, in place of those of their clips: data that a guided teacher made."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.packed import Grid, check_patch, pack_conditioning, unpack
from data_pipelines.randomness import key
from data_pipelines.raw import RawSample
from dit.config import Drawn
from dit.drawing import Opened, check_weak, draw_tokens, weak_network
from dit.encoders.base import hash_of_weights
from dit.runs import Encoders
from dit.runtime import distributed


@dataclass(frozen=True)
class Drawer:
    """A model of a run, with the sampler that it draws by."""

    config: Drawn
    opened: Opened
    encoders: Encoders
    network: nn.Module

    @classmethod
    def load(cls, config: Drawn) -> "Drawer":
        """Raises UserError for a run that is none or has no checkpoint. Called by all ranks."""
        opened = Opened.of(config, "drawn.")
        encoders = opened.trained.encoders()
        return cls(config, opened, encoders, opened.network(encoders, config.weights))

    def fingerprint(self) -> Mapping[str, object]:
        """All that the latents depend on beside captions, classes, sizes and ids."""
        sampling = self.opened.sampling
        if sampling.guidance.weak:
            check_weak(sampling.guidance.weak, self.encoders, self.opened.trained.base)
        return {
            "weights": hash_of_weights(self.network),
            "step": self.opened.step,
            "sampling": sampling.model_dump(mode="json"),
            "weak": (weak := sampling.guidance.weak) and hash_of_weights(weak_network(weak, self.encoders)[0]),
            "seed": self.config.seed,
        }

    def check_size(self, size: Grid, name: str) -> None:
        """Raise UserError that names `name` unless the model can draw clips of `size` (frames, height, width)."""
        check_patch(self.encoders.latent_size(size, name), self.opened.trained.base.backbone.patch_size)

    def __call__(self, samples: Sequence[RawSample], texts: Sequence[Tensor], sizes: Sequence[Grid]) -> list[Tensor]:
        """Latents (C, T, H, W) for each sample. texts: (S, D) of each. sizes: of each clip. Those of equal size are drawn together.

        Raises UserError for a sample without a class, if the model has classes.
        """
        base, by_size = self.opened.trained.base, defaultdict[Grid, list[int]](list)
        for number, size in enumerate(sizes):
            by_size[size].append(number)
        drawn: dict[int, Tensor] = {}
        for size, own in by_size.items():
            grid = check_patch(self.encoders.latents.latent_size(size), base.backbone.patch_size)
            cond = pack_conditioning([grid] * len(own), [texts[i] for i in own], self._labels([samples[i] for i in own]))
            keys = [key("drawn", self.config.seed, samples[i].id) for i in own]
            tokens = draw_tokens(self.network, self.encoders, base, cond, self.opened.sampling, keys, self.opened.trained.flow)
            drawn |= dict(zip(own, unpack(tokens, cond, base.backbone.patch_size), strict=True))
        return [drawn[number] for number in range(len(samples))]

    def _labels(self, samples: Sequence[RawSample]) -> Tensor | None:
        classes = self.opened.trained.base.backbone.num_classes
        if classes is None:
            return None
        for sample in samples:
            if sample.label is None or not 0 <= sample.label < classes:
                raise UserError(
                    f"{sample.id}: got class {sample.label}, expected 0 to {classes - 1} as drawn.run={self.config.run} has them"
                )
        return torch.tensor([sample.label for sample in samples], device=distributed.device())
