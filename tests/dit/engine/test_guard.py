"""The judgement of steps: nothing that is no number is ever remembered, and a spike is measured against what is usual."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.config.engine import GuardConfig
from dit.engine.guard import Guard


def warm(config: GuardConfig, steps: int = 32) -> Guard:
    guard = Guard(config)
    for step in range(steps):
        assert guard.judge(1.0 + 0.01 * (step % 3), 0.5 + 0.02 * (step % 5)).action == "take"
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 0.5), (math.inf, 0.5), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_what_is_no_number_costs_one_step_and_leaves_no_trace(loss: float, norm: float, action: str) -> None:
    guard = warm(GuardConfig.model_validate({"on_nonfinite": action}))
    before = (guard.losses, guard.norms)
    assert guard.judge(loss, norm).action == action
    assert (guard.losses, guard.norms) == before
    assert guard.judge(1.0, 0.5).action == "take"


def test_a_spike_is_clipped_to_the_limit_and_does_not_raise_it() -> None:
    guard = warm(GuardConfig())
    limit = guard.max_norm(10.0)
    assert limit == pytest.approx(0.54 + 12 * 1.4826 * 0.02, rel=1e-6)  # median 0.54, deviations 0.04 0.02 0 0.02 0.04
    assert guard.max_norm(0.3) == 0.3
    assert guard.judge(1.0, 5000.0).action == "clip"
    assert max(guard.norms[""]) == limit
    assert guard.max_norm(10.0) == pytest.approx(limit, rel=0.2)


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
@pytest.mark.parametrize(("loss", "norm", "word"), [(1.0, 5000.0, "gradient norm 5000"), (90.0, 0.5, "loss 90")])
def test_a_spike_is_refused(action: str, loss: float, norm: float, word: str) -> None:
    verdict = warm(GuardConfig.model_validate({"on_spike": action})).judge(loss, norm)
    assert (verdict.action, verdict.is_taken) == (action, False)
    assert word in verdict.reason


def test_each_network_is_judged_by_its_own_steps() -> None:
    guard = warm(GuardConfig(on_spike="skip"))
    for _ in range(32):  # a thousand times larger, and usual for this network
        assert guard.judge(1000.0, 500.0, "critic").action == "take"
    assert guard.judge(1000.0, 500.0).action == "skip"
    assert guard.judge(1.0, 0.5).action == "take"
    again = Guard(guard.config)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.judge(1000.0, 1e6, "critic").action == "skip"


def test_nothing_is_a_spike_before_there_is_a_usual() -> None:
    guard = warm(GuardConfig(on_spike="stop"), steps=31)
    assert guard.max_norm(10.0) == 10.0
    assert guard.judge(1.0, 5000.0).action == "take"


def test_spikes_can_be_ignored() -> None:
    guard = warm(GuardConfig(on_spike="ignore"))
    assert guard.max_norm(10.0) == 10.0
    assert guard.judge(1e6, 5000.0).action == "take"


def test_too_many_bad_steps_in_a_window_stop_the_run() -> None:
    guard = warm(GuardConfig(max_bad_steps=2, window=8))
    assert [guard.judge(math.nan, 1.0).action for _ in range(3)] == ["skip", "skip", "stop"]
    guard = warm(GuardConfig(max_bad_steps=2, window=8))
    for _ in range(5):  # one in each window is no reason
        assert guard.judge(math.nan, 1.0).action == "skip"
        for _ in range(8):
            guard.judge(1.0, 0.5)


@given(st.lists(st.tuples(st.floats(), st.floats(min_value=0)), max_size=60), st.integers(0, 60))
def test_a_resumed_guard_judges_as_the_one_that_went_on(steps: list[tuple[float, float]], cut: int) -> None:
    config = GuardConfig(window=8, on_spike="skip")
    whole, first, second = Guard(config), Guard(config), Guard(config)
    expected = [whole.judge(*step) for step in steps]
    found = [first.judge(*step) for step in steps[:cut]]
    second.restore(json.loads(json.dumps(first.state())))
    assert found + [second.judge(*step) for step in steps[cut:]] == expected
    assert all(math.isfinite(value) for past in (whole.losses, whole.norms) for value in past.get("", []))
