"""The plan: which samples form every global step, as a pure function of (manifest hash, config, seed, epoch, position).

An epoch is cut into windows of `window_shards` shards, in an order drawn from (seed, epoch). A window is planned on its own:
its samples are ordered by hashes of (seed, epoch, id), given their sizes, and packed so that all packs of the window are alike
in tokens and in cost. The packs of all windows, one after another without end, are the stream; a step is the next
`packs_per_step` of them and may reach across windows and epochs. So packs that are left at the end of a window simply begin
the next step, nothing but `Position` is carried from step to step, and any step can be planned from its position alone at the
price of one window (two where the step crosses).

Every rank computes the same plan and reads its share of it. Knows nothing of bytes, pixels, models or processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

import xxhash

from data_pipelines import packing, randomness
from data_pipelines.config import DataConfig, Size
from data_pipelines.errors import UserError
from data_pipelines.index import Entry, uncollected
from data_pipelines.packed import Grid, InStep
from data_pipelines.samples import Facts
from data_pipelines.sizes import choose_size
from data_pipelines.sources import Shard, SourceManifest, read_sources

GridOf = Callable[[Facts], Grid | None]
"""The token grid (t, h, w) of a sample as it will be delivered: pixels of the size chosen, or latents. None: no place."""

CostOf = Callable[[Grid, int], float]
"""Predicted cost of a sample, in any unit, by its token grid and the length of its caption in characters."""

_WINDOWS_KEPT = 2  # a step that crosses a window needs two
_EMPTY_EPOCHS = 1000  # in a row, before small weights are called a mistake


class Position(NamedTuple):
    """Where a step begins: the whole state of the stream, at any world size and worker count.

    data: the manifest hash of the plan that it belongs to, empty for any.
    """

    epoch: int
    window: int
    pack: int
    data: str = ""


START = Position(0, 0, 0)


@dataclass(frozen=True)
class PlannedSample:
    """One sample at one place of the stream. size: what raw pixels are brought to, None for latents.

    id: "source/shard/key". repeat: how often the sample occurred in this epoch before (source weights above 1).
    cost: predicted, in the unit of the plan's `CostOf`.
    """

    id: str
    shard: str
    entry: Entry
    size: Size | None
    grid: Grid
    seed: int
    epoch: int
    repeat: int
    cost: float = 0.0

    @property
    def key(self) -> int:
        """The 63-bit key of every random draw made for this sample."""
        again = (self.repeat,) if self.repeat else ()
        return randomness.key(self.seed, self.epoch, self.id, *again)


PlannedPack = tuple[PlannedSample, ...]


@dataclass(frozen=True)
class PlannedStep:
    """One global step: its packs in order, and where the next step begins."""

    packs: tuple[PlannedPack, ...]
    after: Position

    @property
    def samples(self) -> int:
        """Samples of the step over all ranks."""
        return sum(map(len, self.packs))

    def place(self, pack: PlannedPack) -> InStep:
        """Where one of its packs lies in the step."""
        before = self.packs[: self.packs.index(pack)]
        return InStep(sum(map(len, before)), self.samples, randomness.key(self.packs[0][0].key, "step"))


class Place(NamedTuple):
    """How a sample enters the stream; without a grid it does not, for `reason`."""

    size: Size | None
    grid: Grid | None
    reason: str


class Plan:
    """The stream of a config: `step(position)` for any position. Raises UserError if nothing fits, or something cannot."""

    def __init__(
        self, config: DataConfig, sources: Sequence[SourceManifest], grid_of: GridOf, seed: int, cost_of: CostOf | None = None
    ) -> None:
        self.config, self.sources, self.seed = config, tuple(sources), seed
        self._grid_of, self._cost_of = grid_of, lru_cache(maxsize=1 << 16)(cost_of or (lambda grid, _: float(tokens_of(grid))))
        self.place = lru_cache(maxsize=None)(self._place)
        self.packs = lru_cache(maxsize=_WINDOWS_KEPT)(self._packs)
        self._shards = [(source, shard) for source in self.sources for shard in source.shards]
        self.windows = -(-len(self._shards) // config.window_shards)
        """Windows of an epoch."""
        self._order = lru_cache(maxsize=_WINDOWS_KEPT)(self._order_of_shards)
        self._check_places()

    @cached_property
    def manifest_hash(self) -> str:
        """Hash of the content of all sources and of what is left out of them."""
        return xxhash.xxh3_128_hexdigest("\n".join(source.hash for source in self.sources).encode())

    def step(self, position: Position) -> PlannedStep:
        """Plan the step that begins at `position`. Costs the same at any position."""
        packs: list[PlannedPack] = []
        epoch, window, pack, data = position
        if data not in ("", self.manifest_hash):
            raise UserError("the data of this run changed since it was saved: shards, their indexes, or data.skip_list; give another `out`")
        if min(epoch, window, pack) < 0 or window >= self.windows or pack > len(self.packs(epoch, window)):
            raise UserError(f"the stream has no {position}: the data of this run changed since it was saved (keys under data)")
        while len(packs) < self.config.packs_per_step:
            available = self.packs(epoch, window)
            taken = available[pack : pack + self.config.packs_per_step - len(packs)]
            packs += taken
            pack += len(taken)
            if pack == len(available):
                epoch, window, pack = (epoch, window + 1, 0) if window + 1 < self.windows else (epoch + 1, 0, 0)
                if not packs and epoch - position[0] > _EMPTY_EPOCHS:
                    raise UserError(f"no sample was drawn in {_EMPTY_EPOCHS} epochs: raise data.sources[i].weight")
        return PlannedStep(tuple(packs), Position(epoch, window, pack, self.manifest_hash))

    def shards(self, epoch: int, window: int) -> list[tuple[SourceManifest, Shard]]:
        """The shards of one window; the window after the last is the first of the next epoch."""
        size = self.config.window_shards
        epoch, window = epoch + window // self.windows, window % self.windows
        return self._order(epoch)[window * size : (window + 1) * size]

    @uncollected()
    def _packs(self, epoch: int, window: int) -> tuple[PlannedPack, ...]:
        """Every pack of one window."""
        samples = chain.from_iterable(self._samples(source, shard, epoch) for source, shard in self.shards(epoch, window))
        shuffled = sorted(samples, key=lambda s: (randomness.key(self.seed, epoch, "order", s.id, s.repeat), s.id))
        tokens, costs = [tokens_of(sample.grid) for sample in shuffled], [sample.cost for sample in shuffled]
        packs = packing.balance(tokens, costs, self.config.token_budget)
        packs.sort(key=lambda pack: randomness.key(self.seed, epoch, "pack", shuffled[pack[0]].key))  # they are filled longest first
        return tuple(tuple(shuffled[number] for number in pack) for pack in packs)

    def _order_of_shards(self, epoch: int) -> list[tuple[SourceManifest, Shard]]:
        """Shuffled, and each source spread evenly over the epoch, so that windows have about the same mix."""
        order: list[tuple[float, SourceManifest, Shard]] = []
        for source in self.sources:
            shards = sorted(source.shards, key=lambda shard: randomness.key(self.seed, epoch, "shard", source.name, shard.name))
            first = randomness.uniform(self.seed, epoch, "source", source.name)
            order += [((number + first) / len(shards), source, shard) for number, shard in enumerate(shards)]
        return [(source, shard) for _, source, shard in sorted(order, key=lambda item: (item[0], item[1].name))]

    def _samples(self, source: SourceManifest, shard: Shard, epoch: int) -> Iterator[PlannedSample]:
        for entry in source.entries(shard):
            size, grid, _ = self.place(entry.facts)
            if grid is not None:
                name = f"{source.name}/{shard.name}/{entry.key}"
                cost = self._cost_of(grid, entry.caption_length)
                for repeat in range(self._occurrences(source.weight, epoch, name)):
                    yield PlannedSample(name, shard.address, entry, size, grid, self.seed, epoch, repeat, cost)

    def _occurrences(self, weight: float, epoch: int, name: str) -> int:
        """floor(weight), plus one more with the probability of the rest."""
        whole = int(weight)
        return whole + (weight > whole and randomness.uniform(self.seed, epoch, name, "occurrence") < weight - whole)

    def _place(self, facts: Facts) -> Place:
        """Size and grid of a sample, the same for all samples with the same facts."""
        size: Size | None = None
        if facts.kind != "latents":
            size = choose_size(facts.frames, facts.height, facts.width, self.config.sizes)
            if size is None:
                return Place(None, None, f"{facts.frames} frames are fewer than any of data.sizes has")
            facts = Facts(facts.kind, *size, facts.fps)
        grid = self._grid_of(facts)
        return Place(size, grid, "" if grid else f"no token grid for {facts.kind} of {[facts.frames, facts.height, facts.width]}")

    def _check_places(self) -> None:
        found = {facts for source in self.sources for facts in source.facts}
        if not self.config.sizes and any(facts.kind != "latents" for facts in found):
            raise UserError("data.sizes is empty, but the sources hold raw images or videos; give the allowed [frames, height, width]")
        places = {facts: self.place(facts) for facts in found}
        reasons = sorted({place.reason for place in places.values() if place.grid is None})
        if len(reasons) and all(place.grid is None for place in places.values()):
            raise UserError(f"no sample of data.sources has a place in the stream: {'; '.join(reasons)}; change data.sizes")
        largest = max((place.grid for place in places.values() if place.grid is not None), key=tokens_of)
        if (tokens := tokens_of(largest)) > self.config.token_budget:
            t, h, w = largest
            raise UserError(
                f"data.token_budget = {self.config.token_budget}, but the largest sample takes {t} x {h} x {w} = {tokens} tokens; "
                f"raise data.token_budget to at least {tokens} or remove its size from data.sizes"
            )


def open_plan(config: DataConfig, grid_of: GridOf, seed: int, cost_of: CostOf | None = None) -> Plan:
    """Read the sources of `config` and plan them. cost_of: None counts tokens."""
    return Plan(config, read_sources(config.sources, config.skip_list), grid_of, seed, cost_of)


def tokens_of(grid: Grid) -> int:
    """Tokens of a sample: t * h * w."""
    t, h, w = grid
    return t * h * w


def cost_of_pack(pack: PlannedPack) -> float:
    """Predicted cost of a pack."""
    return sum(sample.cost for sample in pack)


def share(packs: Sequence[PlannedPack], rank: int, world_size: int) -> Sequence[PlannedPack]:
    """The packs of a step that one rank reads. The one place that decides it: the shares are disjoint and cover the step."""
    return [packs[number] for number in deal([cost_of_pack(pack) for pack in packs], world_size)[rank]]


def deal(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Numbers of the packs of each rank, equally many, by falling cost.

    Dealt there and back: what ranks compute at the same time is about equal, and so are their sums.
    """
    falling = sorted(range(len(costs)), key=lambda number: -costs[number])
    rows = [falling[start : start + world_size] for start in range(0, len(falling), world_size)]
    return [[row[rank if number % 2 == 0 else -1 - rank] for number, row in enumerate(rows)] for rank in range(world_size)]


def check_world_size(config: DataConfig, world_size: int, ranks_of_a_pack: int = 1) -> None:
    """Raise UserError unless every rank, or every `ranks_of_a_pack` of them together, get the same number of packs."""
    shares = world_size // ranks_of_a_pack
    if rest := config.packs_per_step % shares:
        processes = [n * ranks_of_a_pack for n in range(1, config.packs_per_step + 1) if config.packs_per_step % n == 0]
        by = f"({world_size} / {ranks_of_a_pack})" if ranks_of_a_pack > 1 else f"{world_size}"
        name = "(world size / engine.sequence_parallel)" if ranks_of_a_pack > 1 else "world size"
        raise UserError(
            f"data.packs_per_step % {name} = {config.packs_per_step} % {by} = {rest}, expected 0; "
            f"run on {' or '.join(map(str, processes))} processes, or set data.packs_per_step to a multiple of {shares}"
        )
