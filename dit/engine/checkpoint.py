"""Checkpoints of an engine: what each rank owns, addressed by parameter and offset, so that any number of ranks can read it.

    checkpoints/step-00000500/
        rank-00000-of-00002.safetensors   1-D float32 tensors named `<kind>/<parameter>@<offset>`; kinds: model, ema, exp_avg, exp_avg_sq
        state.json                        step, samples seen, place in the data, shapes, backbone, versions
        manifest.json                     length and checksum of each file

Nothing here is read before it is verified, and nothing in memory changes before all ranks agree that it is valid.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipelines.errors import NoValidCheckpoint, UserError
from dit.config import FitRun, TrainRun
from dit.engine import durable
from dit.engine.deepspeed import KINDS, Engine
from dit.runtime import distributed

log = logging.getLogger(__name__)
Position = dict[str, Any]
"""Where the data stream goes on; opaque here."""


def save(engine: Engine, run_dir: Path, position: Position, keep: int) -> Path:
    """Write a checkpoint of `engine`, publish it, and delete old ones beyond `keep`. Called by all ranks.

    Raises UserError on all ranks, with nothing published, if the disk is too full or a file cannot be written.
    """
    root = run_dir / "checkpoints"
    tensors = {f"{kind}/{f.name}@{f.start}": view for f in engine.fragments() for kind, view in f.views.items()}
    is_first = distributed.rank() == 0
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _check_space(root, sum(distributed.gather_json(size)))
    staged = Path(_together(lambda: str(durable.stage(root, engine.step)) if is_first else None, root)[0])
    path = staged / f"rank-{distributed.rank():05d}-of-{distributed.world_size():05d}.safetensors"
    try:
        entries = _together(lambda: _write_tensors(path, tensors), root)
        _together(lambda: _publish(engine, root, staged, entries, position, keep) if is_first else None, root)
    except UserError:
        if is_first:
            shutil.rmtree(staged, ignore_errors=True)
        raise
    return durable.step_folder(root, engine.step)


def resume(engine: Engine, run_dir: Path) -> Position | None:
    """Bring `engine` to the newest valid checkpoint of `run_dir` and return where its data goes on; None if there is none at all.

    Called by all ranks. Raises NoValidCheckpoint if there are checkpoints and none is valid, UserError if it is of another model.
    """
    step = _newest_valid(run_dir / "checkpoints", distributed.rank(), distributed.world_size())
    if step is None:
        return None
    folder = durable.step_folder(run_dir / "checkpoints", step)
    state = json.loads((folder / "state.json").read_text())
    _check_same_model(state, engine, folder)
    with _Pieces(folder) as pieces:
        _fill(engine, pieces, folder)
    engine.restore(int(state["step"]), int(state["samples_seen"]))
    if distributed.rank() == 0:
        log.info("resumed from %s: step %d, %d samples seen", folder, engine.step, engine.samples_seen)
    position: Position = state["position"]
    return position


def load_weights(run_dir: Path, step: int | None, which: Literal["ema", "model"]) -> dict[str, Tensor]:
    """Float32 weights of checkpoint `step` of `run_dir` (None: the newest valid), whole and on the CPU; needs no process group.

    Raises UserError if there is no such checkpoint, NoValidCheckpoint if it, or all, are damaged.
    """
    root = Path(run_dir) / "checkpoints"
    have = durable.published(root)
    if not have or (step is not None and step not in have):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise UserError(f"{root} has no {wanted}; it has {sorted(have) or 'none'}")
    if step is None:
        step = _newest_valid(root, 0, 1)
        assert step is not None
    elif bad := durable.problems(durable.step_folder(root, step)):
        raise NoValidCheckpoint(f"checkpoint {step} of {root} is damaged:\n" + "\n".join(bad))
    folder = durable.step_folder(root, step)
    shapes: dict[str, list[int]] = json.loads((folder / "state.json").read_text())["shapes"]
    with _Pieces(folder) as pieces:
        whole = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
        missing = [name for name, flat in whole.items() if pieces.copy(which, name, 0, flat) != flat.numel()]
    assert not missing, f"{folder} is valid but lacks parts of {missing}"
    return {name: flat.view(shapes[name]) for name, flat in whole.items()}


@dataclass(frozen=True)
class _Piece:
    file: Any
    key: str
    start: int
    size: int


class _Pieces:
    """All tensors of a checkpoint folder, found by kind and parameter."""

    def __init__(self, folder: Path) -> None:
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob("rank-*.safetensors"))]
        self.by_name: dict[tuple[str, str], list[_Piece]] = {}

    def __enter__(self) -> "_Pieces":
        for file in self.files:
            file.__enter__()
            for key in file.keys():  # noqa: SIM118 (not a dict)
                address, start = key.rsplit("@", 1)
                kind, name = address.split("/", 1)
                size = file.get_slice(key).get_shape()[0]
                self.by_name.setdefault((kind, name), []).append(_Piece(file, key, int(start), size))
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self.files:
            file.__exit__(*error)

    def covered(self, kind: str, name: str, start: int, size: int) -> int:
        """How many elements of [start, start + size) of a flattened parameter are here."""
        pieces = self.by_name.get((kind, name), [])
        return sum(max(0, min(p.start + p.size, start + size) - max(p.start, start)) for p in pieces)

    def copy(self, kind: str, name: str, start: int, target: Tensor) -> int:
        """Fill `target` (size,), elements from `start` on of a flattened parameter; returns how many were here."""
        for p in self.by_name.get((kind, name), []):
            low, high = max(p.start, start), min(p.start + p.size, start + target.numel())
            if low < high:
                target[low - start : high - start].copy_(p.file.get_slice(p.key)[low - p.start : high - p.start])
        return self.covered(kind, name, start, target.numel())


def _newest_valid(root: Path, share: int, shares: int) -> int | None:
    """Newest step whose files pass; each rank reads its share of them, and the verdict is common. None if there is no checkpoint."""
    reasons: list[str] = []
    for step in durable.published(root) if shares == 1 else distributed.gather_json(durable.published(root))[0]:
        found = durable.problems(durable.step_folder(root, step), share, shares)
        bad = found if shares == 1 else sorted({line for lines in distributed.gather_json(found) for line in lines})
        if not bad:
            if reasons and share == 0:
                log.warning("FALLING BACK to checkpoint %d, newer ones are damaged:\n%s", step, "\n".join(reasons))
            return int(step)
        reasons += bad
    if reasons:
        listing = "\n".join(f"  {reason}" for reason in reasons)
        raise NoValidCheckpoint(f"{root} has checkpoints but none is valid:\n{listing}\nGive another `out` to train from scratch")
    return None


def _fill(engine: Engine, pieces: _Pieces, folder: Path) -> None:
    fragments = list(engine.fragments())
    short = [f"{kind}/{f.name}" for f in fragments for kind in KINDS if pieces.covered(kind, f.name, f.start, f.size) != f.size]
    lacking = sorted({name for names in distributed.gather_json(short) for name in names})
    if lacking:
        raise NoValidCheckpoint(f"{folder} is intact but incomplete, it lacks parts of {', '.join(lacking[:10])} ({len(lacking)} tensors)")
    for fragment in fragments:
        for kind in KINDS:
            pieces.copy(kind, fragment.name, fragment.start, fragment.views[kind])


def _together(action: Callable[[], Any], root: Path) -> list[Any]:
    """Do `action` on every rank and return what each got; if any rank cannot, raise on all instead of waiting for it for ever."""
    try:
        outcome = {"got": action()}
    except (OSError, SafetensorError) as error:
        outcome = {"error": f"rank {distributed.rank()}: {error}"}
    outcomes = distributed.gather_json(outcome)
    if errors := [outcome["error"] for outcome in outcomes if "error" in outcome]:
        raise UserError(f"cannot write a checkpoint to {root}: {'; '.join(errors)}. Earlier checkpoints are as they were; check `out`")
    return [outcome["got"] for outcome in outcomes]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> durable.Entry:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return durable.seal(path)


def _publish(engine: Engine, root: Path, staged: Path, entries: list[durable.Entry], position: Position, keep: int) -> None:
    state = staged / "state.json"
    state.write_text(json.dumps(_state(engine, position), indent=1) + "\n")
    durable.publish(staged, root, engine.step, [*entries, durable.seal(state)])
    durable.retain(root, keep, newest_valid=engine.step)


def _check_space(root: Path, needed: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free = min(distributed.gather_json(shutil.disk_usage(root).free))
    if free < needed:
        sizes = f"needs {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free"
        raise UserError(f"a checkpoint in {root} {sizes}. Make room, lower train.keep_checkpoints, or change `out`")


def _state(engine: Engine, position: Position) -> dict[str, Any]:
    backbone = backbone_config(engine.run)
    return {
        "format": durable.FORMAT,
        "step": engine.step,
        "samples_seen": engine.samples_seen,
        "position": position,
        "shapes": engine.shapes(),
        "backbone": backbone,
        "backbone_sha256": hashlib.sha256(json.dumps(backbone, sort_keys=True).encode()).hexdigest(),
        "world_size": distributed.world_size(),
        "zero_stage": engine.run.engine.zero_stage,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
    }


def backbone_config(run: FitRun) -> dict[str, Any] | None:
    """The `backbone` section of a training run; a distillation has its teacher's, which its own config does not repeat."""
    return run.backbone.model_dump(mode="json") if isinstance(run, TrainRun) else None


def _check_same_model(state: Mapping[str, Any], engine: Engine, folder: Path) -> None:
    there = {name: tuple(shape) for name, shape in state["shapes"].items()}
    here = engine.shapes()
    differ = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if not differ:
        return
    saved, now = state["backbone"] or {}, backbone_config(engine.run) or {}
    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    keys = [f"  backbone.{key}: {saved.get(key)} there, {now.get(key)} here" for key in changed]
    tensors = [f"  {name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here" for name in differ[:10]]
    why = "\n".join(tensors + (keys or ["  `backbone` is the same in both; the encoders decide the other sizes"]))
    raise UserError(f"{folder} is of another model ({len(differ)} tensors differ):\n{why}\nUse the same `backbone`, or give another `out`")
