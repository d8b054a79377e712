"""The plan: each sample once an epoch, the same steps for every world size, any step from its position alone."""

import random
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import packing, randomness
from data_pipelines.config import DataConfig
from data_pipelines.errors import UserError
from data_pipelines.index import Entry, ShardIndex
from data_pipelines.plan import START, Plan, Position, check_world_size, cost_of_pack, deal, share, tokens_of
from data_pipelines.report import report
from data_pipelines.samples import Facts
from data_pipelines.sizes import choose_size
from data_pipelines.sources import Shard, SourceManifest

SIZES = [(1, 16, 16), (5, 16, 16), (9, 16, 32), (9, 32, 32)]


class Counted(dict):
    """Indexes by shard that count how often each was asked for."""

    reads = 0

    def get(self, address):
        Counted.reads += 1
        return self[address]


def source(name="src", weight=1.0, shards=7, samples=13, frames=(1, 5, 9)):
    """A source whose indexes are held in memory; facts vary with the sample."""
    indexes, items, facts = Counted(), [], Counter()
    for s in range(shards):
        kinds = [
            Facts("image" if frames[i % len(frames)] == 1 else "video", frames[i % len(frames)], 32, 32 + 32 * (i % 2), 8.0)
            for i in range(samples)
        ]
        entries = tuple(Entry(f"k{i}", {}, f, 0, {}) for i, f in enumerate(kinds))
        index = ShardIndex(f"s{s}.tar", 0, "", entries)
        indexes[f"{name}/s{s}.tar"] = index
        items.append(Shard(f"{name}/s{s}.tar", f"s{s}", samples, index.digest))
        facts.update(kinds)
    return SourceManifest(name, weight, tuple(items), facts, f"hash of {name}", (), indexes)


def config(**changes):
    values = {"sources": [{"path": "x"}], "token_budget": 24, "packs_per_step": 4, "sizes": SIZES, "window_shards": 2}
    return DataConfig(**{**values, **changes})


def grid_of(facts):
    return (facts.frames + 3) // 4, facts.height // 16, facts.width // 16


def make(seed=0, sources=None, **changes):
    return Plan(config(**changes), sources or [source()], grid_of, seed)


def steps(plan, count, start=START):
    position = start
    for _ in range(count):
        step = plan.step(position)
        yield step
        position = step.after


def ids_of(pack):
    return [s.id for s in pack]


def ids(step):
    return [[(s.id, s.epoch, s.key, s.size, s.grid) for s in pack] for pack in step.packs]


def test_each_sample_occurs_exactly_once_an_epoch():
    plan = make()
    seen = Counter()
    for step in steps(plan, 60):
        for sample in chain(*step.packs):
            seen[sample.epoch, sample.id] += 1
    whole = [epoch for epoch in range(3) if sum(e == epoch for e, _ in seen) == 91]
    assert whole == [0, 1, 2]
    assert set(seen.values()) == {1}


def test_packs_keep_the_budget_and_the_grids():
    for step in steps(make(), 20):
        assert len(step.packs) == 4
        assert step.samples == sum(map(len, step.packs))
        for pack in step.packs:
            assert 0 < sum(tokens_of(s.grid) for s in pack) <= 24
            assert all(s.grid == grid_of(Facts("video", *s.size, None)) for s in pack)


def test_the_order_depends_on_seed_and_epoch_and_keys_on_the_sample():
    a, again, b = (list(map(ids, steps(make(seed), 5))) for seed in (0, 0, 1))
    assert a == again
    assert a != b
    plan = make(window_shards=7)
    first, second = ([s.id for pack in plan.packs(epoch, 0) for s in pack] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)
    sample = plan.packs(1, 0)[0][0]
    assert sample.key == randomness.key(0, 1, sample.id)
    assert sample.id.startswith("src/s")
    assert sample.id.count("/") == 2


def test_the_stream_is_frozen():
    """A golden value: a change here changes every run."""
    first = make(seed=5).step(START)
    assert [s.id for s in first.packs[0]] == ["src/s5/k2", "src/s4/k11", "src/s5/k6", "src/s4/k3"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 25), st.integers(1, 3))
def test_a_step_follows_from_its_position_alone(seed, window_shards, packs_per_step, cut, shards):
    options = {"window_shards": window_shards, "packs_per_step": packs_per_step, "sources": [source(shards=shards)]}
    walked = list(steps(make(seed, **options), cut + 3))
    start = walked[cut - 1].after if cut else START
    assert list(map(ids, steps(make(seed, **options), 3, start))) == list(map(ids, walked[cut:]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step_without_gap_or_overlap(world_size):
    for step in steps(make(), 10):
        shares = [share(step.packs, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in shares} == {4 // world_size}
        assert sorted(map(ids_of, chain(*shares))) == sorted(map(ids_of, step.packs))


def test_resuming_reads_no_more_indexes_than_a_step_needs():
    sources = [source(shards=40)]
    far = list(steps(make(sources=sources), 150))[-1].after
    assert far.epoch > 1
    costs = []
    for start in (START, far, Position(1000, 3, 0)):
        plan = make(sources=sources)
        before = Counted.reads
        plan.step(start)
        costs.append(Counted.reads - before)
    assert max(costs) <= 4  # two windows of two shards


def test_a_position_of_other_data_is_refused():
    for position in (Position(0, 99, 0), Position(0, 0, 999), Position(-1, 0, 0)):
        with pytest.raises(UserError, match="the data of this run changed"):
            make().step(position)


def test_weights_repeat_and_thin_out_samples():
    sources = [source("often", 2.25, shards=30), source("seldom", 0.25, shards=30)]
    plan = make(sources=sources, window_shards=60)
    count = Counter(s.id for pack in plan.packs(0, 0) for s in pack)
    often, seldom = ([n for id, n in count.items() if id.startswith(name)] for name in ("often", "seldom"))
    assert set(often) == {2, 3}
    assert len(often) == 390
    assert 60 < sum(n == 3 for n in often) < 135
    assert 60 < len(seldom) < 135
    other = Counter(s.id for pack in plan.packs(1, 0) for s in pack)
    assert other != count
    twins = [s for pack in plan.packs(0, 0) for s in pack if s.id == "often/s0/k0"]
    assert len({s.key for s in twins}) == len(twins) >= 2


def test_weights_so_small_that_nothing_comes_end_in_an_error():
    with pytest.raises(UserError, match="weight"):
        make(sources=[source(weight=1e-12, shards=1, samples=1)]).step(START)


def test_what_cannot_run_is_said_at_the_start():
    with pytest.raises(UserError, match=r"data\.token_budget = 11, .* 3 x 2 x 2 = 12 tokens; .* at least 12"):
        make(token_budget=11)
    with pytest.raises(UserError, match=r"data\.sizes is empty"):
        make(sizes=[])
    with pytest.raises(UserError, match=r"no sample .* 5 frames are fewer.*data\.sizes"):
        make(sources=[source(frames=(5,))], sizes=[(9, 16, 16)])
    with pytest.raises(UserError, match=r"4 % 3 = 1.* 1 or 2 or 4 processes.*multiple of 3"):
        check_world_size(config(), 3)
    with pytest.raises(UserError, match=r"\(world size / engine.sequence_parallel\) = 4 % \(6 / 2\) = 1.* 2 or 4 or 8 processes"):
        check_world_size(config(), 6, 2)


def test_what_has_no_place_is_dropped_and_counted():
    plan = Plan(config(sizes=[(5, 16, 16)]), [source(shards=2, samples=12)], grid_of, 0)
    dropped = report(plan).dropped
    assert dropped == {"1 frames are fewer than any of data.sizes has": 8}
    none = Plan(config(), [source(shards=2, samples=12)], lambda facts: grid_of(facts) if facts.frames > 1 else None, 0)
    assert report(none).dropped == {"no token grid for image of [1, 16, 16]": 8}
    assert {s.size[0] for pack in none.packs(0, 0) for s in pack} == {5, 9}


def test_the_report_adds_up():
    plan = make()
    summary = report(plan)
    packs = [pack for window in range(plan.windows) for pack in plan.packs(0, window)]
    assert summary.exact
    assert summary.packs_per_epoch == len(packs)
    assert summary.samples == 91
    assert summary.sizes == {"image [1, 16, 16]": 35, "video [5, 16, 16]": 28, "video [9, 16, 32]": 14, "video [9, 32, 32]": 14}
    tokens = sum(tokens_of(s.grid) for pack in packs for s in pack)
    assert summary.fill == pytest.approx(tokens / (24 * len(packs)))
    assert "91 samples an epoch" in str(summary)


def test_the_report_says_how_long_and_how_even_the_run_will_be():
    sources = [source(shards=40)]
    plan = Plan(config(packs_per_step=8, window_shards=8), sources, grid_of, 0, lambda grid, _: tokens_of(grid) ** 2)
    summary = report(plan, run_samples=1300)
    assert summary.epochs == pytest.approx(1300 / 520)
    assert "the run is 2.5 epochs" in str(summary)
    assert summary.balance[1] == 1.0
    assert 0.5 < summary.balance[8] < summary.balance[2] < 1  # the more packs a rank has, the more its sums are alike
    costs = [cost_of_pack(pack) for window in range(plan.windows) for pack in plan.packs(0, window)]
    by_hand = [costs[i : i + 16] for i in range(0, len(costs) - 15, 16)]  # 16 ranks take a pack each
    assert summary.balance[16] == pytest.approx(sum(sum(step) / 16 for step in by_hand) / sum(map(max, by_hand)))
    assert max(summary.balance) == 64  # there are no 128 packs
    lines = str(summary).splitlines()
    assert any("balance by ranks" in line and " 8: " in line and " 16: " not in line for line in lines)
    assert any("on other ranks" in line and "16: " in line for line in lines)


def test_windows_hold_every_source_in_its_share():
    plan = make(sources=[source("many", shards=30), source("few", shards=10)], window_shards=8)
    for window in range(plan.windows):
        shards = {s.shard for pack in plan.packs(0, window) for s in pack}
        assert sum(shard.startswith("few") for shard in shards) in (1, 2, 3)
    orders = [[s.shard for pack in plan.packs(epoch, 0) for s in pack] for epoch in (0, 1)]
    assert set(orders[0]) != set(orders[1])


def test_latents_keep_their_own_size():
    cached = source(shards=1)
    facts = Facts("latents", 3, 4, 4, None)
    entries = (Entry("k", {}, facts, 0, {}),)
    index = ShardIndex("s.tar", 0, "", entries)
    cached = SourceManifest("c", 1.0, (Shard("c/s.tar", "s", 1, index.digest),), {facts: 1}, "h", (), {"c/s.tar": index})
    plan = Plan(config(sizes=[]), [cached], lambda f: (f.frames, f.height // 2, f.width // 2), 0)
    (sample,) = plan.packs(0, 0)[0]
    assert sample.size is None
    assert sample.grid == (3, 2, 2)


# --- packing and sizes ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=300))
def test_packing_keeps_every_item_within_the_budget(tokens):
    packs = packing.balance(tokens, [n + n * n / 25 for n in tokens], 50)
    assert sorted(chain(*packs)) == list(range(len(tokens)))
    used = [sum(tokens[i] for i in pack) for pack in packs]
    assert all(0 < n <= 50 for n in used)


def test_items_of_one_length_fill_packs_to_the_last_token():
    packs = packing.balance([48] * 3072, [1.0] * 3072, 768)
    assert [len(pack) for pack in packs] == [16] * 192


def test_packing_fills_well_where_sizes_are_mixed():
    tokens = [n for _ in range(400) for n in (7, 16, 33)]
    packs = packing.balance(tokens, [n + n * n / 25 for n in tokens], 100)
    assert sum(tokens) / (100 * len(packs)) > 0.95


LENGTHS = [256] * 20 + [1024] * 15 + [1280] * 5 + [4032, 9360] * 4 + [14040, 20280, 32760]
"""Tokens of images and clips in the shares that a mixed training set has them in."""


def test_packs_of_a_window_are_alike_in_cost_although_lengths_are_mixed():
    lengths = random.Random(0).choices(LENGTHS, k=4000)
    costs = [n * (1 + n / 14000) for n in lengths]  # attention is half of the cost at 14,000 tokens
    packs = packing.balance(lengths, costs, 131072)
    sums = [sum(costs[i] for i in pack) for pack in packs]
    assert sum(sums) / len(sums) / max(sums) > 0.99
    assert sum(lengths) / (131072 * len(packs)) > 0.98
    by_tokens = packing.balance(lengths, [float(n) for n in lengths], 131072)  # what packing by tokens alone would do
    sums = [sum(costs[i] for i in pack) for pack in by_tokens]
    assert sum(sums) / len(sums) / max(sums) < 0.97


def test_another_order_gives_other_packs_and_equal_costs_are_no_trouble():
    first, second = (packing.balance([12] * n, [7e15 / 3] * n, 40) for n in (90, 91))
    assert [len(pack) for pack in first] == [3] * 30
    assert len(second) == 31
    a, b = ({frozenset(pack) for pack in packing.balance(lengths, lengths, 8000)} for lengths in (LENGTHS[:40], LENGTHS[39::-1]))
    assert {frozenset(39 - i for i in pack) for pack in a} != b


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=64), st.integers(1, 8))
def test_packs_are_dealt_once_and_about_equal(costs, world_size):
    costs = (costs * world_size)[: len(costs) // world_size * world_size or world_size]
    costs += costs[:1] * (-len(costs) % world_size)
    shares = deal(costs, world_size)
    assert sorted(chain(*shares)) == list(range(len(costs)))
    assert {len(part) for part in shares} == {len(costs) // world_size}
    sums = [sum(costs[i] for i in part) for part in shares]
    assert max(sums) - min(sums) <= max(costs) - min(costs) + 1e-6  # of dealing there and back
    for column in zip(*shares, strict=True):
        rest = [costs[i] for part in shares for i in part if i not in column]
        low, high = min(costs[i] for i in column), max(costs[i] for i in column)
        assert all(c <= low or c >= high for c in rest)  # what is computed at the same time is nearest in cost


@pytest.mark.parametrize(
    ("have", "taken"),
    [
        ((1, 64, 64), (1, 16, 16)),  # an image
        ((8, 64, 64), (5, 16, 16)),  # the longest that it has
        ((100, 64, 64), (9, 32, 32)),  # then the nearest aspect
        ((100, 64, 100), (9, 16, 32)),
        ((0, 64, 64), None),
    ],
)
def test_sizes(have, taken):
    assert choose_size(*have, SIZES) == taken


def test_among_equal_aspects_the_largest_that_needs_no_enlarging():
    allowed = [(1, 32, 32), (1, 128, 128), (1, 64, 64)]
    assert [choose_size(1, side, side, allowed) for side in (16, 32, 100, 128, 999)] == [
        (1, 32, 32), (1, 32, 32), (1, 64, 64), (1, 128, 128), (1, 128, 128),
    ]  # fmt: skip
