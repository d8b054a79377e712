"""Memory that packs are handed over in: used again, and never while something is left of the pack in it."""

import torch

from data_pipelines.config import DataConfig
from data_pipelines.loader import StepStream
from data_pipelines.parcels import Slots
from data_pipelines.plan import START, open_plan


def pictures(stream, steps):
    return [step.packs[0].samples[0].pixels for _, step in zip(range(steps), stream)]


def test_what_is_held_stays_and_what_is_dropped_makes_room(shapes):
    values = {"sources": [{"path": str(shapes)}], "token_budget": 40, "packs_per_step": 1, "sizes": [(9, 32, 32)], "window_shards": 2}
    plans = [open_plan(DataConfig(**values, num_workers=workers), lambda facts: (3, 2, 2), 0) for workers in (0, 1)]
    with StepStream(plans[0], 0, 1) as plain, StepStream(plans[1], 0, 1) as stream:
        expected, held = pictures(plain, 6), pictures(stream, 6)
        places = [next(stream).packs[0].samples[0].pixels.untyped_storage().data_ptr() for _ in range(30)]
        assert all(map(torch.equal, held, expected))
    assert len(set(places)) < 8
    assert not set(places) & {picture.untyped_storage().data_ptr() for picture in held}


def test_a_pack_of_holes_alone_arrives(shapes):
    values = {"sources": [{"path": str(shapes)}], "token_budget": 12, "packs_per_step": 1, "sizes": [(9, 32, 32)], "num_workers": 1}
    plan = open_plan(DataConfig(**values), lambda facts: (3, 2, 2), 0)
    first = plan.step(START).packs[0][0].id
    with StepStream(plan, 0, 1, skip=frozenset({first})) as stream:
        assert [next(stream).bad, next(stream).bad] == [[(first, "on the skip list")], []]


def test_a_slot_grows_when_it_is_free_and_there_are_only_so_many():
    rank, worker = Slots(shared=True), Slots(shared=True)
    worker.taken = rank.taken  # as after the way to a worker
    slot, _ = worker.take(100)
    view = rank.receive(slot)[20:30]
    assert (slot.number, slot.fresh is None) == (0, False)
    assert worker.take(10)[0].number == 1
    del view
    again, memory = worker.take(100)
    assert (again.number, again.fresh) == (0, None)
    del memory
    rank.receive(again)
    slot, memory = worker.take(1000)
    assert (slot.number, slot.fresh is None, len(memory) >= 1000) == (0, False, True)
    whole = rank.receive(slot)
    memory[:] = 3
    assert (whole == 3).all()
    assert [worker.take(1)[0].number for _ in range(70)].count(None) == 70 - 62
