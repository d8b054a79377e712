"""Checkpoints of an engine: what each rank owns, addressed by parameter and offset, so that any number of ranks can read it.

    checkpoints/step-00000500/
        rank-00000-of-00002.safetensors   1-D float32 tensors named `<kind>/<parameter>@<offset>`; kinds: model, ema, exp_avg, exp_avg_sq
        state.json                        step, samples seen, place in the data, shapes, backbone, versions
        manifest.json                     length and checksum of each file

Nothing here is read before it is verified, and nothing in memory changes before all ranks agree that it is valid.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import NoValidCheckpoint, UserError
from dit.engine import durable, profiles
from dit.engine.engine import Engine
from dit.engine.saver import Position, backbone_config
from dit.engine.tensors import Pieces
from dit.engine.turns import is_of
from dit.runtime import distributed, faults

log = logging.getLogger(__name__)
READERS = 4
"""Threads that fill tensors from files that verification has left in the page cache."""
OLD_KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
"""Of checkpoints that do not say what they hold."""


def resume(engine: Engine, run_dir: Path, before: int | None = None) -> Position | None:
    """Bring `engine` to the newest valid checkpoint of `run_dir` and return where its data goes on; None if there is none at all.

    before: take only checkpoints of earlier steps than this.

    Called by all ranks. Raises NoValidCheckpoint if there are checkpoints and none is valid, UserError if it is of another model.
    """
    if before is None and distributed.rank() == 0:
        durable.recover(run_dir / "checkpoints")
    distributed.barrier()
    step = newest_valid(run_dir / "checkpoints", distributed.rank(), distributed.world_size(), before)
    if step is None:
        return None
    folder = durable.step_folder(run_dir / "checkpoints", step)
    state = json.loads((folder / "state.json").read_text())
    _check_same_model(state, engine, folder)
    faults.point("load.verified")
    with Pieces(folder) as pieces:
        _fill(engine, pieces, folder)
    faults.point("load.filled")
    engine.restore(int(state["step"]), _taken(state), int(state["samples_seen"]))
    engine.guard.restore(state.get("guard"))
    faults.point("load.done")
    if distributed.rank() == 0:
        log.info("resumed from %s: step %d, %d samples seen", folder, engine.step, engine.samples_seen)
    position: Position = state["position"]
    return position


def load_weights(run_dir: Path, step: int | None, which: str) -> dict[str, Tensor]:
    """Float32 weights of checkpoint `step` of `run_dir` (None: the newest valid), whole and on the CPU; needs no process group.

    Of several networks that trained in turns, those of the one that the run is for, under its own names.
    which: "model", "ema", or "sigma_rel=S" for the average of that width, reconstructed from all averages of power-function
    profiles in this and earlier checkpoints unless it was kept. Raises UserError if there is no such checkpoint or average,
    NoValidCheckpoint if it, or all, are damaged.
    """
    root = Path(run_dir) / "checkpoints"
    have = durable.published(root)
    if not have or (step is not None and step not in have):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise UserError(f"{root} has no {wanted}; it has {sorted(have) or 'none'}")
    if step is None:
        step = newest_valid(root, 0, 1)
        assert step is not None
    elif bad := durable.problems(durable.step_folder(root, step)):
        raise NoValidCheckpoint(f"checkpoint {step} of {root} is damaged:\n" + "\n".join(bad))
    if not which.startswith("sigma_rel="):
        return _whole(durable.step_folder(root, step), which)
    width = float(which.removeprefix("sigma_rel="))
    total: dict[str, Tensor] = {}
    for weight, folder, kind in _nearest(root, [step, *(s for s in have if s < step)], width):
        for name, tensor in _whole(folder, kind).items():
            total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor.mul_(weight)
    return total


def newest_valid(root: Path, share: int, shares: int, before: int | None = None) -> int | None:
    """Newest step in `root` whose files pass, earlier than `before`; None if there is no checkpoint. NoValidCheckpoint if all are damaged.

    share, shares: rank and number of ranks that call it; each reads its share of the files, and the verdict is common.
    """
    reasons: list[str] = []
    have = [step for step in durable.published(root) if before is None or step < before]
    for step in have if shares == 1 else distributed.gather_json(have)[0]:
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


def _nearest(root: Path, steps: Sequence[int], width: float) -> list[tuple[float, Path, str]]:
    """Averages at `steps`, the first of which counts, and the coefficients that make the profile of `width` at that step of them."""
    kept: list[tuple[float, int, Path, str]] = []
    for step in steps:
        folder = durable.step_folder(root, step)
        if step != steps[0] and durable.problems(folder):
            continue
        state = json.loads((folder / "state.json").read_text())
        time = next(iter(_taken(state).values()))
        widths = [float(kind.removeprefix("ema_")) for kind in state.get("kinds", OLD_KINDS) if kind.startswith("ema_")]
        if step == steps[0] and width in widths:
            return [(1.0, folder, f"ema_{width:g}")]
        if time == 0:  # nothing was averaged yet: they are all the weights of the beginning, which no later profile reaches back to
            if step == steps[0] and widths:
                return [(1.0, folder, f"ema_{widths[0]:g}")]
            continue
        kept += [(profiles.gamma_of(each), time, folder, f"ema_{each:g}") for each in widths]
    if len(kept) < 2 or kept[0][2] != durable.step_folder(root, steps[0]):
        raise UserError(f"{root} cannot give sigma_rel={width:g}: train with two widths or more in ema.sigma_rel, such as [0.05, 0.1]")
    weights = profiles.combination([(gamma, time) for gamma, time, _, _ in kept], (profiles.gamma_of(width), kept[0][1]))
    return [(weight, folder, kind) for weight, (_, _, folder, kind) in zip(weights, kept, strict=True)]


def _taken(state: Mapping[str, Any]) -> dict[str, int]:
    """Steps of each network, the one that the run is for first; a checkpoint without it has one network, and says what was skipped."""
    return state.get("taken") or {"": int(state["step"]) - int(state.get("skipped", 0))}


def _whole(folder: Path, kind: str) -> dict[str, Tensor]:
    """All of one kind in a valid checkpoint, of the network that its run is for."""
    state = json.loads((folder / "state.json").read_text())
    network = next(iter(_taken(state)))
    shapes: dict[str, list[int]] = {name: shape for name, shape in state["shapes"].items() if is_of(name, network)}
    if kind not in state.get("kinds", OLD_KINDS):
        raise UserError(f"{folder} has no weights of kind {kind!r}; it has {', '.join(state.get('kinds', OLD_KINDS))}")
    with Pieces(folder) as pieces:
        whole = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
        missing = [name for name, flat in whole.items() if pieces.copy(kind, name, 0, flat) != flat.numel()]
    assert not missing, f"{folder} is valid but lacks parts of {missing}"
    return {name.removeprefix(f"{network}."): flat.view(shapes[name]) for name, flat in whole.items()}


def _fill(engine: Engine, pieces: Pieces, folder: Path) -> None:
    fragments = list(engine.fragments())
    short = [f"{kind}/{f.name}" for f in fragments for kind in f.views if pieces.covered(kind, f.name, f.start, f.size) != f.size]
    lacking = sorted({name for names in distributed.gather_json(short) for name in names})
    if lacking:
        raise NoValidCheckpoint(f"{folder} is intact but incomplete, it lacks parts of {', '.join(lacking[:10])} ({len(lacking)} tensors)")
    with ThreadPoolExecutor(READERS) as readers:
        copies = [readers.submit(pieces.copy, kind, f.name, f.start, view) for f in fragments for kind, view in f.views.items()]
    for copy in copies:
        copy.result()


def _check_same_model(state: Mapping[str, Any], engine: Engine, folder: Path) -> None:
    kinds = state.get("kinds", OLD_KINDS)
    if lacking := [kind for kind in engine.kinds if kind not in kinds]:
        missing, has = ", ".join(lacking), ", ".join(kinds)
        raise UserError(f"{folder} has no {missing}, it has {has}: an average cannot begin later, mend ema.sigma_rel")
    there = {name: tuple(shape) for name, shape in state["shapes"].items()}
    here = engine.shapes
    differ = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if not differ:
        return
    if all("critic.network.jump_embedder." in name for name in differ):
        raise UserError(f"{folder} is of a release whose critics were not told the student's last step; give another `out`")
    saved, now = state["backbone"] or {}, backbone_config(engine.run) or {}
    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    keys = [f"  backbone.{key}: {saved.get(key)} there, {now.get(key)} here" for key in changed]
    tensors = [f"  {name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here" for name in differ[:10]]
    why = "\n".join(tensors + (keys or ["  `backbone` is the same in both; the encoders decide the other sizes"]))
    raise UserError(f"{folder} is of another model ({len(differ)} tensors differ):\n{why}\nUse the same `backbone`, or give another `out`")
