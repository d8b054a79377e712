"""The data of a run as its verb sees it: plan, packs, and their encoding, with stale caches refused."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from data_pipelines import decode
from data_pipelines.config import DataConfig, Source
from data_pipelines.errors import UserError
from data_pipelines.loader import RawPack, StepPacks, StepStream
from data_pipelines.packed import Grid, PackedLatents, check_patch
from data_pipelines.plan import START, Plan, Position, open_plan
from data_pipelines.report import report
from data_pipelines.samples import Facts
from data_pipelines.sources import read_source
from data_pipelines.storage import read_file
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.engine import ValidationConfig
from dit.diffusion import held_out_loss
from dit.encoders import prepare
from dit.models.flops import forward_flops
from dit.runs import Encoders
from dit.runtime import distributed

CACHE_FILE = "cache.json"
"""In a folder of cached latents: fingerprints of the encoders that made them."""
DONE_FILE = "manifest.json"
"""Beside it, written last: how much the cache holds."""


class Stream:
    """Packs of a run on this rank, from sources of pixels or of cached latents."""

    def __init__(self, config: DataConfig, encoders: Encoders, backbone: SpatioTemporalDiTConfig, seed: int) -> None:
        self.config, self.encoders, self.backbone, self.patch = config, encoders, backbone, backbone.patch_size
        for index, source in enumerate(config.sources):
            check_cache(source, encoders, f"data.sources.{index}.path")
        self.plan = open_plan(config, self._grid_of, seed)
        self.packs_per_rank = config.packs_per_step // distributed.world_size()

    def steps(self, start: dict[str, int] | None) -> Iterator[StepPacks]:
        """Global steps from `start` (None: the beginning), this rank's share of each."""
        return StepStream(self.plan, distributed.rank(), distributed.world_size(), Position(**start) if start else START)

    def encode(self, pack: RawPack) -> PackedLatents:
        """Latents and text of a pack, on this rank's device; what is cached is taken as it is."""
        return prepare(self._with_classes(pack), self.encoders.latents, self.encoders.text, self.patch).to(distributed.device())

    def training_flops(self, pack: RawPack) -> float:
        """Floating-point operations of the forward and backward pass over a pack; a caption is counted as it is long in words."""
        words = [len(sample.text) if sample.text is not None else len(sample.caption.split()) + 1 for sample in pack.samples]
        sizes = {"channels": self.encoders.latents.channels, "text_width": self.encoders.text.width}
        return 3.0 * forward_flops(self.backbone, pack.grids, words, **sizes)

    def describe(self) -> str:
        """What will be trained on, before the first step."""
        return str(report(self.plan))

    def held_out(self, config: ValidationConfig) -> Callable[[nn.Module], dict[str, float]]:
        """A function that measures the loss at fixed noise on the first samples of a source that training does not see."""
        source = Source(path=config.source)
        check_cache(source, self.encoders, "validation.source")
        data = self.config.model_copy(update={"sources": [source], "packs_per_step": 1, "num_workers": 0})
        stream = StepStream(Plan(data, [read_source(config.source, config_key="validation.source")], self._grid_of, 0), 0, 1)
        packs: list[PackedLatents] = []
        while sum(len(pack.keys) for pack in packs) < config.samples:
            packs.append(self.encode(next(stream).packs[0]))
        stream.close()

        @torch.no_grad()
        def measure(denoiser: nn.Module) -> dict[str, float]:
            losses = held_out_loss(denoiser, packs, config.times)
            return {"loss": sum(losses.values()) / len(losses)} | {f"loss_t/{t:g}": loss for t, loss in losses.items()}

        return measure

    def _grid_of(self, facts: Facts) -> Grid | None:
        """Tokens (t, h, w) of a sample as the plan will deliver it."""
        size = (facts.frames, facts.height, facts.width)
        return check_patch(size if facts.kind == "latents" else self.encoders.latent_size(size, "data.sizes"), self.patch)

    def _with_classes(self, pack: RawPack) -> RawPack:
        """The pack with the labels that the backbone takes: none of them if it has no classes, else all of them in range."""
        classes = self.backbone.num_classes
        if classes is None:
            return replace(pack, samples=tuple(replace(sample, label=None) for sample in pack.samples))
        for sample in pack.samples:
            if sample.error is None and (sample.label is None or sample.label >= classes):
                got = "no class label" if sample.label is None else f"class label {sample.label}"
                raise UserError(
                    f"{sample.id}: got {got}, expected 0 to {classes - 1} (backbone.num_classes={classes}). Label every sample of "
                    "data.sources and validation.source, or change backbone.num_classes (null leaves labels out)"
                )
        return pack


def check_cache(source: Source, encoders: Encoders, key: str) -> None:
    """Raise UserError if `source` is a latent cache that other encoders made, naming the field that differs."""
    made = _read_json(f"{source.path.rstrip('/')}/{CACHE_FILE}")
    if made is None:
        return
    for part, now in (
        ("latents", encoders.latents.fingerprint()),
        ("text", encoders.text.fingerprint()),
        ("preprocessing", preprocessing()),
    ):
        then = made.get(part, {})
        for field in sorted(then.keys() | now.keys()):
            if then.get(field) != now.get(field):
                where = "this version of the code" if part == "preprocessing" else f"this run's encoders.{part}"
                raise UserError(
                    f"{key}={source.path} was encoded by another encoder: {part}.{field} is {then.get(field)} there "
                    f"and {now.get(field)} in {where}. Encode the source again, or use the encoders that made it"
                )
    if _read_json(f"{source.path.rstrip('/')}/{DONE_FILE}") is None:
        raise UserError(f"{key}={source.path} is an unfinished cache (no {DONE_FILE}); `dit encode` with the config that began it goes on")


def preprocessing() -> dict[str, int]:
    """What a cache depends on beside its encoders: how bytes become pixels."""
    return {"version": decode.VERSION}


def _read_json(address: str) -> dict[str, Any] | None:
    """A record of a cache, local or remote; None if there is none."""
    try:
        record = json.loads(read_file(address))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{address} is damaged ({error}); encode the source again") from error
    return record if isinstance(record, dict) else {}
