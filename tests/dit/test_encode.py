"""`dit encode` in shares and under real schedulers: the bytes of one process, and one record at the end."""

import importlib.util
import json
import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipelines.config import Source
from data_pipelines.filters import fields_of
from data_pipelines.plan import PlannedSample
from data_pipelines.readers import _Readers
from data_pipelines.rendered import ShapesSet, render
from data_pipelines.sources import read_source, read_sources
from data_pipelines.workers import WorkerLost
from dit.encode import _tasks
from tests.launch.slurm import WHY_NOT, Cluster
from tests.processes import ENVIRONMENT, Forks, python_m, wait_for


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_shares_make_the_cache_of_one_process(forks: Forks, encode_config: Path, latents: Path, tmp_path: Path) -> None:
    for share in (1, 0):
        assert not (tmp_path / "manifest.json").exists()
        forks.run("encode", str(encode_config), f"out={tmp_path}", f"executor.share={share}/2").ok()
    assert contents(tmp_path) == contents(latents)


def test_processes_share_what_is_missing_and_none_waits_for_another(
    forks: Forks, encode_config: Path, latents: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    shutil.copytree(latents, out)
    for name in ("manifest.json", *(file.name for number in (0, 2) for file in latents.glob(f"shard-{number:06d}*"))):
        (out / name).unlink()
    ranks = forks.start("encode", str(encode_config), f"out={out}", ranks=2)
    try:
        wait_for(lambda: any(out.glob(".shard-000002*.partial")), seconds=60)
        os.kill(ranks.pids[1], signal.SIGSTOP)  # as good as hours behind
        wait_for(lambda: ranks.poll() is not None or 0 in ranks.codes.values(), seconds=60)
        assert not (out / "manifest.json").exists()
        os.kill(ranks.pids[1], signal.SIGCONT)
        ranks.wait().ok()
    finally:
        ranks.send(signal.SIGKILL)
    assert contents(out) == contents(latents)


def test_a_share_that_fails_says_why_to_its_watcher(forks: Forks, encode_config: Path, tmp_path: Path) -> None:
    done = forks.run("encode", str(encode_config), f"out={tmp_path}", "executor.share=1/2", "sizes=[[9, 30, 30]]")
    assert done.code == 2
    assert "multiple of 4" in done.err
    ((item, code, reason),) = json.loads((tmp_path / "slurm" / "failed-1.json").read_text())
    assert (item, code) == ("1", 2)
    assert reason.startswith("sizes.0: ")


def test_a_reader_that_is_lost_costs_its_own_sample(clips: Path) -> None:
    (source,) = read_sources([Source(path=str(clips))])
    entries = {shard.address: source.entries(shard) for shard in source.shards}
    plans = [[PlannedSample(e.key, shard, e, (9, 32, 32), (0, 0, 0), 0, 0, 0) for e in some] for shard, some in entries.items()]
    tasks, readers = list(islice(_tasks(plans, 4), 3)), _Readers(3, None, None)
    for number, task in enumerate(tasks):  # each process is at another sample of another task
        readers.busy[number] = torch.tensor([task.number, number])
    assert readers.mend(tasks[1], WorkerLost(-signal.SIGKILL)).holes == {1: "ended its reader (SIGKILL)"}


def test_a_rule_gives_the_sizes(forks: Forks, encode_config: Path, latents: Path, tmp_path: Path) -> None:
    rule = "size_rule={pixels: [1024], aspects: ['1:1', '2:1'], max_frames: 9}"
    forks.run("encode", str(encode_config), "sizes=[]", rule, f"out={tmp_path}").ok()
    made = json.loads((tmp_path / "cache.json").read_text())
    assert made["sizes"] == [[t, *side] for t in (1, 5, 9) for side in ([20, 44], [32, 32])]
    shards = {name: data for name, data in contents(latents).items() if name.startswith("shard")}
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("shard")} == shards
    done = forks.run("encode", str(encode_config), "sizes=[]", f"out={tmp_path}/none")
    assert done.code == 2
    assert "give sizes, size_rule, or both" in done.err


def test_a_complete_cache_is_compared_under_every_executor(forks: Forks, encode_config: Path, latents: Path) -> None:
    done = forks.run("encode", str(encode_config), "executor.name=slurm-array", "dtype=float32")
    assert done.code == 2
    assert "dtype: float16 there, float32 here" in done.err


def captions(folder: Path) -> list[str]:
    source = read_source(str(folder))
    return [entry.key for shard in source.shards for entry in source.entries(shard)]


def test_sources_count_in_their_order(forks: Forks, encode_config: Path, clips: Path, tmp_path: Path) -> None:
    """Shards are numbered over all sources: begun with A, B, a cache does not go on with B, A."""
    other = tmp_path / "other"
    render(other, ShapesSet(8, 5, "train", 8))
    both, turned = (f"sources=[{{path: {a}}}, {{path: {b}}}]" for a, b in ((clips, other), (other, clips)))
    out = f"out={tmp_path}/latents"
    forks.run("encode", str(encode_config), both, out, "executor.share=0/2").ok()
    done = forks.run("encode", str(encode_config), turned, out)
    assert done.code == 2
    assert "holds a cache that was made differently" in done.err
    assert "sources" in done.err


def test_what_a_filter_or_a_size_leaves_out(forks: Forks, encode_config: Path, clips: Path, tmp_path: Path) -> None:
    some = f"sources=[{{path: {clips}, filter: 'caption_length > 50'}}]"
    said = forks.run("encode", str(encode_config), some, f"out={tmp_path}/some").ok().out
    source = read_source(str(clips))
    wanted = [entry.key for shard in source.shards for entry in source.entries(shard) if fields_of(entry)["caption_length"] > 50]
    assert 0 < len(wanted) < 48
    assert captions(tmp_path / "some") == wanted
    assert f"{48 - len(wanted)} samples left out by filter" in said
    short = tmp_path / "short"
    render(short, ShapesSet(8, 5, "train", 8))
    said = forks.run("encode", str(encode_config), f"sources=[{{path: {short}}}]", "sizes=[[13, 32, 32]]", f"out={tmp_path}/none").ok().out
    assert "left out 8 samples in all" in said  # they can be read, so no budget of damage is spent


def test_what_is_no_source_of_pictures(forks: Forks, encode_config: Path, clips: Path, latents: Path, tmp_path: Path) -> None:
    for source, words in ((f"{{path: {latents}}}", "is a latent cache"), (f"{{path: {clips}, weight: 2}}", "sources.0.weight=2")):
        done = forks.run("encode", str(encode_config), f"sources=[{source}]", f"out={tmp_path}/latents")
        assert done.code == 2
        assert words in done.err
        assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_an_array_makes_the_cache_of_one_process(
    encode_config: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cluster(tmp_path / "cluster") as slurm:
        monkeypatch.setitem(ENVIRONMENT, "SLURM_CONF", slurm.environment["SLURM_CONF"])
        out = f"out={tmp_path}/latents"
        array = ("executor.name=slurm-array", "executor.tasks=2", "executor.slurm_options=[--cpus-per-task=1]")
        assert "3/3 shards" in python_m("dit", "encode", str(encode_config), out, *array).ok().out
        assert contents(tmp_path / "latents") == contents(latents)
        refused = python_m("dit", "encode", str(encode_config), f"out={tmp_path}/bad", *array, "sizes=[[9, 30, 30]]")
        assert refused.code == 2
        assert "1 (exit code 2): sizes.0: " in refused.err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray: the extra ray is not installed")
def test_ray_makes_the_cache_of_one_process(encode_config: Path, latents: Path, tmp_path: Path) -> None:
    assert "RAY_ADDRESS" not in os.environ
    python_m("dit", "encode", str(encode_config), f"out={tmp_path}", "executor.name=ray", "executor.tasks=2", "num_workers=1").ok()
    assert contents(tmp_path) == contents(latents)
