"""Sizes by rule: as near to area and aspect as the grid of codec and patch lets them be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import SizeRule
from data_pipelines.errors import UserError
from data_pipelines.sizes import choose_size, expand


def test_a_rule_gives_every_aspect_at_every_area_and_frame_count():
    rule = SizeRule(pixels=[256 * 256], aspects=["16:9", "1:1", "9:16"], max_frames=9)
    sizes = [(192, 336), (256, 256), (336, 192)]
    assert expand(rule, (1, 4), (16, 16), "k") == sorted((f, *side) for f in (1, 5, 9) for side in sizes)
    explicit = SizeRule(pixels=[256 * 256], aspects=["1:1"], max_frames=9, frame_step=8, multiple=128)
    assert expand(explicit, (1, 4), (16, 16), "k") == [(1, 256, 256), (9, 256, 256)]


@given(st.integers(1000, 10**6), st.integers(1, 21), st.integers(1, 21), st.sampled_from([8, 16, 32]))
def test_sides_keep_the_area_and_are_within_one_multiple_of_it(pixels, w, h, multiple):
    rule = SizeRule(pixels=[pixels], aspects=[f"{w}:{h}"])
    try:
        ((_, height, width),) = expand(rule, (1, 4), (multiple, multiple), "k")
    except UserError:
        assert min(math.sqrt(pixels * h / w), math.sqrt(pixels * w / h)) < multiple
        return
    assert height * width <= pixels
    assert height % multiple == width % multiple == 0
    assert abs(height - math.sqrt(pixels * h / w)) < multiple
    assert abs(width - math.sqrt(pixels * w / h)) < multiple


@given(st.integers(1, 200), st.integers(1, 4000), st.integers(1, 4000))
def test_every_sample_has_a_place(frames, height, width):
    sizes = expand(SizeRule(pixels=[64 * 64, 128 * 128], max_frames=81), (1, 4), (16, 16), "k")
    chosen = choose_size(frames, height, width, sizes)
    assert chosen[0] == min(81, (frames - 1) // 4 * 4 + 1)


def test_an_area_too_small_names_its_key():
    with pytest.raises(UserError, match=r"data\.size_rule\.pixels = 100 holds no frame of 1:1"):
        expand(SizeRule(pixels=[100], aspects=["1:1"]), (1, 4), (16, 16), "data.size_rule")
