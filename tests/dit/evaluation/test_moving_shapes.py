"""The checker against controls whose result is known: truth passes, everything else fails as it should."""

from dataclasses import fields, replace

import numpy as np
import pytest

from data_pipelines import moving_shapes as ms
from dit.evaluation.moving_shapes import Adherence, check_batch, judge, observe, recovered, relative_starts, summarise

COUNT = 512


@pytest.fixture(scope="module")
def clips():
    return [ms.draw(11, index, "held_out" if index % 4 == 0 else "train") for index in range(COUNT)]


@pytest.fixture(scope="module")
def videos(clips):
    return np.stack([clip.video for clip in clips])


@pytest.fixture(scope="module")
def attributes(clips):
    return [clip.attributes for clip in clips]


@pytest.fixture(scope="module")
def observations(videos):
    return observe(videos)


def test_the_truth_is_perfect_on_every_attribute(observations, attributes):
    summary = summarise([judge(seen, wanted) for seen, wanted in zip(observations, attributes, strict=True)])
    assert {name: rate for name, rate in summary.items() if isinstance(rate, float) and rate != 1.0} == {}
    assert summary["count"] == COUNT


def test_the_measured_trajectory_is_the_rendered_one(observations, clips):
    for seen, clip in zip(observations, clips, strict=True):
        expected = ms.trajectory(clip.attributes, clip.start)
        # A pixel that is covered in part counts at its own centre: a few hundredths of a pixel.
        np.testing.assert_allclose(seen.centre, expected.mean(0), atol=0.05)
        np.testing.assert_allclose(seen.velocity, expected[1] - expected[0], atol=0.02)
        assert seen.jitter < 0.05
        assert seen.local_residual < 0.02


def test_all_attributes_of_the_grammar_are_told_apart():
    """Every caption once, and each attribute changed alone is noticed alone."""
    middle = {name: tuple(np.mean(ms.start_region(a), axis=0)) for name, a in enumerate(ms.ALL_ATTRIBUTES)}
    chosen = range(0, 864, 7)
    videos = np.stack([ms.render(ms.ALL_ATTRIBUTES[n], middle[n]) for n in chosen])
    alternatives = {"shape": ms.SHAPES, "colour": tuple(ms.PALETTE), "size": tuple(ms.RADII), "speed": tuple(ms.SPEEDS)}
    for n, seen in zip(chosen, observe(videos), strict=True):
        truth = ms.ALL_ATTRIBUTES[n]
        assert judge(seen, truth).all
        for name, values in {**alternatives, "position": ms.positions(truth.direction)}.items():
            for value in set(values) - {getattr(truth, name)}:
                verdict = judge(seen, replace(truth, **{name: value}))
                assert [f.name for f in fields(Adherence) if not getattr(verdict, f.name)] == [name]


def test_shuffled_captions_score_near_chance(observations, attributes):
    order = np.random.default_rng(0).permutation(COUNT)
    summary = summarise([judge(seen, attributes[n]) for seen, n in zip(observations, order, strict=True)])
    chance = {"shape": 1 / 3, "colour": 1 / 6, "size": 1 / 2, "direction": 1 / 4, "speed": 1 / 2}
    for name, rate in chance.items():
        assert abs(summary[name] - rate) < 0.09, (name, summary[name])  # 4 standard errors of a half over 512 clips
    assert summary["all"] < 0.02


def test_small_noise_passes_and_strong_noise_fails(videos, attributes):
    generator = np.random.default_rng(0)
    part, wanted = videos[:128] / 255, attributes[:128]
    weak = summarise(check_batch(part + generator.normal(0, 0.05, part.shape), wanted))
    assert weak["all"] == 1.0
    strong = summarise(check_batch(part + generator.normal(0, 0.2, part.shape), wanted))
    assert strong["render"] == 0.0
    assert strong["all"] == 0.0


def test_the_mean_video_fails_everything(videos, attributes):
    mean = np.broadcast_to(videos.mean(0) / 255, (32, *videos.shape[1:]))
    assert summarise(check_batch(mean, attributes[:32]))["all"] == 0.0


def test_a_still_video_has_neither_direction_nor_speed(videos, attributes):
    still = np.broadcast_to(videos[:64, 4:5], videos[:64].shape)
    summary = summarise(check_batch(still, attributes[:64]))
    assert summary["shape"] == 1.0
    assert summary["direction"] == 0.0
    assert summary["speed"] == 0.0
    averaged = np.broadcast_to(videos[:64].mean(1, keepdims=True) / 255, videos[:64].shape)
    assert summarise(check_batch(averaged, attributes[:64]))["all"] == 0.0


def test_shuffled_frames_are_not_smooth(videos, attributes):
    shuffled = videos[:64, [4, 0, 7, 2, 8, 5, 1, 6, 3]]
    summary = summarise(check_batch(shuffled, attributes[:64]))
    assert summary["smooth"] == 0.0
    assert summary["all"] == 0.0


def test_reversed_video_fails_in_direction_alone(videos, attributes):
    summary = summarise(check_batch(videos[:64, ::-1], attributes[:64]))
    assert summary["direction"] == 0.0
    assert all(summary[name] == 1.0 for name in ("shape", "colour", "size", "position", "speed", "render", "smooth"))


def test_a_second_shape_is_no_clean_picture(videos, attributes):
    other = ms.render(ms.parse("a large red disc moving down slowly near the right"), (25.0, 9.0))
    both = np.maximum(videos[:64], other)
    assert summarise(check_batch(both, attributes[:64]))["all"] < 0.1


def test_an_empty_video_fulfils_nothing(attributes):
    empty = np.zeros((ms.FRAMES, ms.SIDE, ms.SIDE, 3), np.uint8)
    assert check_batch(empty[None], attributes[:1]) == [Adherence(*[False] * 8)]


def test_uint8_and_float_videos_are_judged_alike(videos):
    assert [o.shape for o in observe(videos[:8])] == [o.shape for o in observe(videos[:8].astype(np.float64) / 255)]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((9, 16, 16, 3), np.uint8), "shape"),
        (np.full((9, 32, 32, 3), -0.9), r"\[-1, 1\]"),
        (np.full((9, 32, 32, 3), np.nan), "NaN"),
        (np.zeros((9, 32, 32, 3), np.int64), "dtype"),
    ],
)
def test_what_is_no_video_is_refused(video, message, attributes):
    with pytest.raises(ValueError, match=message):
        check_batch(video[None], attributes[:1])


def test_the_summary_averages_what_it_says():
    perfect, blind = Adherence(*[True] * 8), Adherence(*[False] * 8)
    red_only = replace(blind, colour=True)
    summary = summarise([perfect, perfect, red_only, blind])
    assert summary["colour"] == 0.75
    assert summary["shape"] == 0.5
    assert summary["all"] == 0.5
    assert summary["mean"] == (0.5 + 0.75 + 0.5 + 0.5) / 4
    with pytest.raises(ValueError):
        summarise([])


def test_the_recovered_space_holds_the_truth(videos, clips):
    vectors = recovered(videos[:64])
    for vector, clip in zip(vectors, clips):
        expected, a = ms.trajectory(clip.attributes, clip.start), clip.attributes
        np.testing.assert_allclose(vector[:2] * 8, expected.mean(0), atol=0.05)
        np.testing.assert_allclose(vector[2:4], expected[1] - expected[0], atol=0.02)
        np.testing.assert_allclose(vector[4:8], [ms.RADII[a.size] / 2, *ms.PALETTE[a.colour]], rtol=1e-6)
        assert [name for name, is_it in zip(ms.SHAPES, vector[8:], strict=True) if is_it] == [a.shape]
    nothing = recovered(np.full_like(videos[:1], 15))[0]
    np.testing.assert_allclose(nothing, [2, 2, 0, 0, 0, *ms.BACKGROUND, 0, 0, 0], rtol=1e-6)


def test_relative_starts_are_the_renderers(videos, clips, attributes):
    starts = relative_starts(np.concatenate([videos[:64], np.zeros_like(videos[:1])]), [*attributes[:64], attributes[0]])
    assert np.isnan(starts[64]).all()
    for start, clip in zip(starts[:64], clips):
        low, high = ms.start_region(clip.attributes)
        np.testing.assert_allclose(low + start * (high - low), clip.start, atol=0.1)
