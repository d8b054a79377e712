"""The doctor finds what is ill: packages and folders. Real processes."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dit.doctor import package
from tests.processes import Forks


def test_packages_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version, text in (("whole", "2.1", ""), ("broken", "1.0", "raise OSError('libwhat.so.13: not there')"), ("old", "0.9", "")):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert package(Requirement("whole>=2")).fix is None
    assert "cannot be imported: OSError: libwhat.so.13: not there" in package(Requirement("broken")).finding
    assert package(Requirement("old>=1.5")).finding == "0.9, >=1.5 wanted"
    assert package(Requirement("nowhere>=1")).fix == "pip install --force-reinstall 'nowhere>=1'"


def test_two_healthy_ranks(forks: Forks, latents: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"out: {tmp_path}/out\ndata: {{sources: [{{path: {latents}}}]}}\n")
    done = forks.run("doctor", str(config), ranks=2).ok()
    assert "BAD" not in done.out
    for words in (
        "ok  torch: ",
        "ok  deepspeed: ",
        "ok  disk: ",
        f"ok  {latents}: ",
        "ok  meeting: 2 ranks, each reaches the others",
        "ok  ranks: 2 over gloo, all-reduce of 16 MB",
        "ok  clock: ",
    ):
        assert done.out.count(words) == 1, done.out


def test_what_is_missing_is_named_with_its_fix(forks: Forks, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {sources: [{path: /no/such/folder}]}\n")
    done = forks.run("doctor", str(config))
    assert done.code == 1, done.err
    assert "BAD /no/such/folder: " in done.out
    assert f"change `path` in {config}" in done.out
    assert "ok  torch: " in done.out
    assert "Traceback" not in done.err


def test_folders_of_the_base_and_of_the_command_line_are_looked_at(forks: Forks, tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "base.yaml").write_text(f"data: {{sources: [{{path: /no/such/folder}}]}}\nteacher: {{run: {teacher}}}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\n")
    said = forks.run("doctor", str(tmp_path / "run.yaml")).out
    assert "BAD /no/such/folder: " in said
    assert f"ok  {teacher}: " in said
    assert "BAD" not in forks.run("doctor", str(tmp_path / "run.yaml"), f"data.sources=[{{path: {teacher}}}]").ok().out
    assert "BAD /no/such/run: " in forks.run("doctor", str(tmp_path / "run.yaml"), "teacher.run=/no/such/run").out


def test_what_is_no_config_is_said(forks: Forks, tmp_path: Path) -> None:
    """And a launcher's own argument in front of the verb is not taken for one."""
    config = tmp_path / "run.yaml"
    for content, words in ((b"", "expected a mapping of sections, got NoneType"), (b"\xff\xfe\x00", "can't decode")):
        config.write_bytes(content)
        done = forks.run("--local_rank=0", "doctor", str(config))
        assert done.code == 2
        assert words in done.err
        assert "Traceback" not in done.err


def test_a_rank_that_does_not_come_is_named(forks: Forks) -> None:
    done = forks.start("doctor", "--patience", "1", ranks=2, absent=1).wait()
    assert done.code == 1, done.err
    assert "BAD meeting: rank 1 did not come within 1 s; here: 0 of 2 -> start it, and see that its host reaches 127.0.0.1:" in done.out
    assert "Traceback" not in done.err


def test_a_meeting_place_where_nobody_is(forks: Forks) -> None:
    done = forks.start("doctor", "--patience", "1", ranks=2, absent=0).wait()
    assert done.code == 1, done.err
    assert "BAD meeting: no answer from 127.0.0.1:" in done.out
    assert "Traceback" not in done.err
