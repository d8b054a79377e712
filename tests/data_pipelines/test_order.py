"""The order hash: step -> (sample ids, noise, holes) is the same for any ranks, workers and accumulation, however often it was killed."""

import hashlib
import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import randomness
from data_pipelines.config import DataConfig
from data_pipelines.index import index_path, read_index
from data_pipelines.loader import StepStream
from data_pipelines.plan import START, Position, open_plan

STEPS = 9
"""More than two epochs of the samples below."""


@dataclass(frozen=True)
class Segment:
    """One start of a run: its shape, the steps it takes, and how many of them were not yet in a checkpoint when it was killed."""

    world_size: int
    workers: int
    steps: int
    lost: int


def plan_of(folder, workers):
    config = DataConfig(
        sources=[{"path": str(folder), "weight": 1.5}],
        token_budget=9, packs_per_step=4, sizes=[(1, 8, 8), (1, 16, 8)], window_shards=2, num_workers=workers,
    )  # fmt: skip
    return open_plan(config, lambda facts: (1, facts.height // 8, facts.width // 8), 5)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, write_shards):
    """Four shards of eight samples in two shapes; three samples are damaged, one shard is cut off."""
    folder = tmp_path_factory.mktemp("order") / "s"
    paths = [write_shards(folder, number, 8, side) for number, side in enumerate((8, 16, 8, 16))]
    for path, keys in ((paths[0], ("0-001", "0-006")), (paths[1], ("1-003",))):
        data = bytearray(path.read_bytes())
        for entry in read_index(index_path(str(path))).entries:
            if entry.key in keys:
                data[entry.members["png"].offset + 40] ^= 1
        path.write_bytes(data)
    last = read_index(index_path(str(paths[3]))).entries[-1]
    with paths[3].open("r+b") as file:
        file.truncate(last.members["png"].offset + 10)
    return folder


def run(folder, segments):
    """One line a step, of the whole run: what a hash of the order is made of."""
    state, committed = (START, []), []
    for segment in segments:
        plan = plan_of(folder, segment.workers)
        lines, start, left_out = [], state[0], list(state[1])
        streams = [StepStream(plan, rank, segment.world_size, start, frozenset(left_out)) for rank in range(segment.world_size)]
        states = [state]
        for _ in range(segment.steps):
            parts = [next(stream) for stream in streams]
            bad = {id for part in parts for id, _ in part.bad}
            left_out += sorted(bad - set(left_out))
            for stream in streams:
                stream.leave_out(bad)
            packs = [[(s.id, _noise(s), s.error) for s in pack.samples] for part in parts for pack in part.packs]
            lines.append(hashlib.sha256(json.dumps(sorted(packs)).encode()).hexdigest())
            states.append(json.loads(json.dumps((parts[0].position, left_out))))
        for stream in streams:
            stream.close()
        kept = segment.steps - segment.lost
        state = (Position(*states[kept][0]), states[kept][1])
        committed += lines[:kept]
    return committed


def _noise(sample):
    return hashlib.sha256(randomness.normal((4,), sample.key, "noise").numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def reference(damaged):
    lines = run(damaged, [Segment(1, 0, STEPS, 0)])
    assert len(set(lines)) == STEPS
    return lines


@st.composite
def schedules(draw):
    left, segments = STEPS, []
    while left:
        steps = draw(st.integers(1, left))
        lost = draw(st.integers(0, steps - 1))
        segments.append(Segment(draw(st.sampled_from([1, 2, 4])), 0, steps, lost))
        left -= steps - lost
    return segments


@settings(max_examples=20, deadline=None)
@given(schedules())
def test_any_ranks_accumulation_and_kills_give_the_same_order(damaged, reference, segments):
    assert run(damaged, segments) == reference


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(1, 1, 4, 1), Segment(2, 2, 6, 0)],
        [Segment(1, 3, 5, 0), Segment(1, 4, 4, 0)],
    ],
)
def test_any_workers_give_the_same_order(damaged, reference, segments):
    assert run(damaged, segments) == reference


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(schedules(), st.data())
def test_any_schedule_with_workers_gives_the_same_order(damaged, reference, segments, data):
    shaped = [Segment(s.world_size, data.draw(st.integers(0, 4)), s.steps, s.lost) for s in segments]
    assert run(damaged, shaped) == reference


def test_holes_are_in_the_order_and_stay_out_once_they_were_found(damaged):
    stream = StepStream(plan_of(damaged, 0), 0, 1)
    first, later = {}, set()
    for _ in range(STEPS):
        step = next(stream)
        later |= {why for id, why in step.bad if id in first}
        first |= {id: why for id, why in step.bad if id not in first}
        stream.leave_out(id for id, _ in step.bad)
    found = {id.rpartition("/")[2]: why[:8] for id, why in first.items()}
    assert found == {"0-001": "checksum", "0-006": "checksum", "1-003": "checksum", "3-007": "shard is"}
    assert later == {"on the skip list"}


def test_what_was_read_ahead_is_left_out_all_the_same(damaged):
    plan = plan_of(damaged, 1)
    coming = plan.step(plan.step(START).after).packs[0][0].id
    with StepStream(plan, 0, 1) as stream:
        next(stream)
        stream.leave_out([coming])
        assert dict(next(stream).bad)[coming] == "on the skip list"
