"""The data of a run as its verb sees it: plan, packs, and their encoding, with stale caches refused."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines import decode, randomness
from data_pipelines.config import DataConfig, Size, Source
from data_pipelines.errors import UserError
from data_pipelines.loader import RawPack, RawSample, StepPacks, StepStream
from data_pipelines.packed import Grid, PackedLatents, check_patch
from data_pipelines.plan import START, Plan, Position, check_world_size, open_plan
from data_pipelines.report import report
from data_pipelines.samples import Facts
from data_pipelines.sizes import expand
from data_pipelines.sources import read_source
from data_pipelines.storage import read_file
from dit.config.backbone import SpatioTemporalDiTConfig
from dit.config.engine import ValidationConfig
from dit.encoders import prepare
from dit.engine.held_out import HeldOut
from dit.models.flops import forward_flops
from dit.runs import Encoders
from dit.runtime import distributed

log = logging.getLogger(__name__)
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
        self.config = config = config.model_copy(update={"sizes": allowed_sizes(config, encoders.latents.stride, self.patch, self._tokens)})
        self.plan = open_plan(config, self._grid_of, seed, self._cost_of)
        check_world_size(config, distributed.world_size(), distributed.sequence_parallel())
        self.packs_per_rank = config.packs_per_step // distributed.data_world_size()

    def steps(self, start: Mapping[str, Any] | None) -> "Steps":
        """Global steps from `start` as a checkpoint holds it (None: the beginning), this rank's share of each."""
        place = {key: value for key, value in (start or {}).items() if key in Position._fields}
        position = Position(**place) if place else START
        return Steps(self.plan, distributed.data_rank(), distributed.data_world_size(), position, frozenset(left_out(start)))

    def encode(self, pack: RawPack) -> PackedLatents:
        """Latents and text of a pack, on this rank's device; what is cached is taken as it is."""
        return prepare(self._with_classes(pack), self.encoders.latents, self.encoders.text, self.patch).to(distributed.device())

    def training_flops(self, pack: RawPack) -> float:
        """Floating-point operations of the forward and backward pass over a pack; a caption is counted as it is long in words."""
        words = [len(sample.text) if sample.text is not None else len(sample.caption.split()) + 1 for sample in pack.samples]
        return 3.0 * self._forward_flops(pack.grids, words)

    def describe(self, samples: int) -> str:
        """What a run of `samples` will be trained on, before the first step."""
        return str(report(self.plan, samples))

    def held_out(
        self, config: ValidationConfig, losses_of: Callable[[nn.Module, Sequence[PackedLatents], Sequence[float]], Tensor]
    ) -> Callable[[nn.Module], HeldOut]:
        """A function that measures the losses at fixed noise on the first samples of a source that training does not see.

        losses_of(network, packs, levels): (levels, n), NaN for holes.
        """
        source = Source(path=config.source)
        check_cache(source, self.encoders, "validation.source")
        if distributed.rank() == 0 and source.path.rstrip("/") in {own.path.rstrip("/") for own in self.config.sources}:
            log.warning("validation.source=%s is a source of training too: its loss says nothing of unseen samples", source.path)
        data = self.config.model_copy(update={"sources": [source], "packs_per_step": 1, "num_workers": 0})
        stream = StepStream(Plan(data, [read_source(config.source, config_key="validation.source")], self._grid_of, 0, self._cost_of), 0, 1)
        packs, seen = list[PackedLatents](), set[str]()
        while len(seen) < config.samples:
            pack = self.encode(next(stream).packs[0])
            if seen & set(pack.ids):  # the second epoch: a sample counts once
                log.warning("validation.source=%s has %d samples, validation.samples asks for %d", config.source, len(seen), config.samples)
                break
            packs.append(pack)
            seen |= set(pack.ids)
        stream.close()

        real = torch.cat([pack.weights for pack in packs]).bool().cpu()
        if not real.any():
            raise UserError(f"validation.source={config.source}: not one of its first {len(real)} samples can be read")
        keys, grids = [key for pack in packs for key in pack.keys], [grid for pack in packs for grid in pack.cond.grids]
        shapes = ["x".join(map(str, grid)) for grid, is_real in zip(grids, real, strict=True) if is_real]
        samples = f"{randomness.key('held out', *keys, *real.tolist()):016x}"

        @torch.no_grad()
        def measure(network: nn.Module) -> HeldOut:
            return HeldOut(losses_of(network, packs, config.times)[:, real], config.times, shapes, samples)

        return measure

    def _grid_of(self, facts: Facts) -> Grid | None:
        """Tokens (t, h, w) of a sample as the plan will deliver it."""
        size = (facts.frames, facts.height, facts.width)
        return check_patch(size, self.patch) if facts.kind == "latents" else self._tokens(size)

    def _tokens(self, size: Size) -> Grid:
        """Tokens (t, h, w) of a clip of `size` pixels."""
        return check_patch(self.encoders.latent_size(size, "data.sizes"), self.patch)

    def _cost_of(self, grid: Grid, caption_length: int) -> float:
        """Operations of a sample, by which packs and ranks are balanced; a word is taken to be six characters."""
        return float(self._forward_flops([grid], [caption_length // 6 + 1]))

    def _forward_flops(self, grids: Sequence[Grid], words: Sequence[int]) -> int:
        sizes = {"channels": self.encoders.latents.channels, "text_width": self.encoders.text.width}
        return forward_flops(self.backbone, grids, words, **sizes)

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


class Steps(StepStream):
    """Steps as this rank and those that compute its packs with it have read them: what one of them could not read is a hole for all."""

    def __next__(self) -> StepPacks:
        """The next step; the first of the ranks that share it names its holes."""
        batch = super().__next__()
        if distributed.sequence_parallel() == 1:
            return batch
        reasons = {name: reason for bad in distributed.gather_in_pack(batch.bad) for name, reason in bad}
        packs = [replace(pack, samples=tuple(_without(sample, reasons) for sample in pack.samples)) for pack in batch.packs]
        bad = [(sample.id, sample.error) for pack in packs for sample in pack.samples if sample.error is not None]
        return replace(batch, packs=packs, bad=bad if distributed.sequence_rank() == 0 else [])


def _without(sample: RawSample, reasons: Mapping[str, str]) -> RawSample:
    return sample if sample.error is not None or sample.id not in reasons else RawSample(sample.id, sample.key, error=reasons[sample.id])


def left_out(start: Mapping[str, Any] | None) -> list[str]:
    """Ids that were unusable before the checkpoint that holds `start`."""
    return list((start or {}).get("left_out", ()))


def allowed_sizes(config: DataConfig, stride: Size, patch: Size, tokens: Callable[[Size], Grid]) -> list[Size]:
    """The sizes that `config` allows: those it names, and those of its rule that fit into a pack. tokens: of a size."""
    if config.size_rule is None:
        return config.sizes
    step, height, width = (a * b for a, b in zip(stride, patch, strict=True))
    found = expand(config.size_rule, (1 + step - stride[0], step), (height, width), "data.size_rule")
    return sorted({*config.sizes, *(size for size in found if prod(tokens(size)) <= config.token_budget)})


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
