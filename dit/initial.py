"""The weights that a run begins with, where they are not random: those of another run, or of a Wan transformer of diffusers."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_pipelines.config_file import load_run
from data_pipelines.errors import UserError
from dit.config import TrainRun
from dit.engine import durable
from dit.engine.checkpoint import load_weights, newest_valid
from dit.interop.wan import State, backbone_config, check_velocity, from_diffusers
from dit.runs import Encoders, TrainedRun
from dit.runtime import distributed

log = logging.getLogger(__name__)
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def has_begun(folder: Path, before: int | None = None) -> bool:
    """Whether the run in `folder` has a checkpoint to go on from, of a step below `before` if that is given."""
    return any(before is None or step < before for step in durable.published(folder / "checkpoints"))


def with_fixed_init(run: TrainRun) -> TrainRun:
    """Name the checkpoint of `init.run`: the one that this run began with, else the newest valid one. Called by all ranks."""
    init, resolved = run.init, Path(run.out) / "config.resolved.yaml"
    if init is None or init.run is None or init.step is not None:
        return run
    begun = load_run(TrainRun, str(resolved)).init if resolved.is_file() and has_begun(Path(run.out)) else None
    if begun is None:
        TrainedRun.open(init.run, "init.run")
        step = newest_valid(Path(init.run) / "checkpoints", distributed.rank(), distributed.world_size())
    else:
        step = begun.step
    return run.model_copy(update={"init": init.model_copy(update={"step": step})})


def load_initial(module: nn.Module, run: TrainRun, encoders: Encoders) -> None:
    """Give `module`, the whole network on the CPU, the weights that `run.init` names. Raises UserError if they do not fit."""
    if run.init is None:
        return
    if run.init.diffusers is not None:
        key, state = f"init.diffusers={run.init.diffusers}", _of_diffusers(run, Path(run.init.diffusers))
    else:
        assert run.init.run is not None
        key, state = f"init.run={run.init.run}", _of_run(run, run.init.run, encoders)
    _refuse_unlike(key, there=_shapes(state), here=_shapes(module.state_dict()))
    module.load_state_dict(state)
    log.info("weights at the start: %s", key)


def _of_run(run: TrainRun, path: str, encoders: Encoders) -> State:
    assert run.init is not None
    trained = TrainedRun.open(path, "init.run")
    trained.check_encoders(encoders)
    before, now = (f"{each.prediction} on {each.path!r}" for each in (trained.base.objective, run.objective))
    if before != now:
        log.warning("init.run=%s learned %s, and this run is to learn %s: that may take as long as from the beginning", path, before, now)
    return load_weights(trained.path, run.init.step, run.init.weights)


def _of_diffusers(run: TrainRun, folder: Path) -> State:
    check_velocity(run.objective)
    try:
        config = backbone_config(json.loads((folder / "config.json").read_text()))
        index = folder / INDEX
        files = sorted({*json.loads(index.read_text())["weight_map"].values()}) if index.is_file() else [INDEX.removesuffix(".index.json")]
        state = {name: tensor.float() for file in files for name, tensor in load_file(folder / file).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        expected = "the folder of a WanTransformer3DModel of diffusers, with config.json and safetensors"
        raise UserError(f"init.diffusers={folder}: expected {expected} ({error})") from error
    keys = {"hidden_size", "depth", "num_heads", "ffn_size", "patch_size", "frequency_size"}
    there, here = config.model_dump(include=keys), run.backbone.model_dump(include=keys)
    _refuse_unlike(f"init.diffusers={folder}", there=there, here=here)
    return from_diffusers(state, run.backbone)


def _shapes(state: State) -> dict[str, object]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _refuse_unlike(key: str, there: Mapping[str, object], here: Mapping[str, object]) -> None:
    unlike = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if unlike:
        lines = [f"  {name}: {there.get(name, 'none')} there, {here.get(name, 'none')} here" for name in unlike[:3]]
        more = f"\n  and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise UserError(f"{key} does not fit this run's backbone:\n" + "\n".join(lines) + more)
