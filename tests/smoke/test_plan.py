"""`dit plan`: the report of a config with a rule of sizes and a filter, and its errors."""

from pathlib import Path

from tests.processes import Forks, train_config

RULE = {"pixels": [1024, 256], "aspects": ["1:1", "2:1"], "max_frames": 9}


def test_a_plan_with_sizes_by_rule_and_a_filter(forks: Forks, tmp_path: Path, clips: Path) -> None:
    changes = {"data__sources": [{"path": str(clips), "filter": "frames == 9 and caption_length % 2 == 0"}], "data__size_rule": RULE}
    config = train_config(tmp_path / "rule.yaml", clips, **changes)
    report = forks.run("plan", str(config)).ok().out
    assert "x video [9, 32, 32]" in report
    assert "x filter: not caption_length % 2 == 0" in report
    sides = ["8, 16", "16, 16", "24, 40", "32, 32"]  # multiples of 8: four pixels a latent, two latents a token
    unused = ", ".join(f"[{frames}, {side}]" for frames in (1, 5, 9) for side in sides if (frames, side) != (9, "32, 32"))
    assert f"allowed, but no sample takes it: {unused}\n" in report
    assert "balance by ranks (mean / max of predicted cost): 1: 1.000" in report
    assert not (tmp_path / "rule").exists()


def test_a_field_that_no_sample_has_names_key_and_nearest(forks: Forks, tmp_path: Path, clips: Path) -> None:
    config = train_config(tmp_path / "typo.yaml", clips, data__sources=[{"path": str(clips), "filter": "frame > 3"}], data__size_rule=RULE)
    done = forks.run("plan", str(config))
    assert done.code == 2
    assert "data.sources[0].filter = 'frame > 3': no sample has a field frame (did you mean frames?)" in done.err
