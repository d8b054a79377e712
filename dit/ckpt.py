"""`dit ckpt`: list, verify, prune and export the checkpoints of a run."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from data_pipelines.errors import NoValidCheckpoint, UserError
from data_pipelines.progress import track
from dit.config import known_weights
from dit.engine import durable
from dit.engine.checkpoint import load_weights
from dit.interop.wan import channels_of, diffusers_config, to_diffusers
from dit.runs import TrainedRun, make_folder
from dit.runtime.lease import lock_for_writing


def main(argv: Sequence[str]) -> int:
    """Run one of the four commands."""
    arguments = _parser().parse_args(argv)
    root = Path(arguments.run) / "checkpoints"
    if not durable.published(root):
        raise UserError(f"{root} has no checkpoint")
    match arguments.command:
        case "ls":
            return _list(root)
        case "verify":
            return _verify(root)
        case "prune":
            return _prune(root, arguments.keep, arguments.every)
        case _:
            return _export(arguments.run, arguments.step, arguments.weights, arguments.format, arguments.out)


def _list(root: Path) -> int:
    for step in durable.published(root):
        folder = durable.step_folder(root, step)
        size = sum(path.stat().st_size for path in folder.iterdir())
        try:
            state = json.loads((folder / "state.json").read_text())
            made = f"{state['samples_seen']} samples, {state['world_size']} ranks, ZeRO stage {state['zero_stage']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            made = f"unreadable: {error}"
        print(f"step {step}  {size / 2**20:.1f} MiB  {made}")
    return 0


def _verify(root: Path) -> int:
    steps = durable.published(root)
    bad = {step: durable.problems(durable.step_folder(root, step)) for step in track(steps, f"verifying {root}")}
    for step in steps:
        print(f"step {step}: " + ("valid" if not bad[step] else "DAMAGED\n  " + "\n  ".join(bad[step])))
    if all(bad.values()):
        raise NoValidCheckpoint(f"{root}: none of {len(steps)} checkpoints is valid")
    return 0


def _prune(root: Path, keep: int, every: int | None) -> int:
    if writer := lock_for_writing(root.parent):
        raise UserError(f"{root.parent} is being written by {writer}, which prunes by itself (train.keep_checkpoints)")
    valid = next((step for step in durable.published(root) if not durable.problems(durable.step_folder(root, step))), None)
    if valid is None:
        raise NoValidCheckpoint(f"{root}: no checkpoint is valid, so none is deleted; see dit ckpt verify")
    deleted = durable.retain(root, keep, newest_valid=valid, every=every)
    print(f"deleted {len(deleted)} checkpoints {sorted(deleted)}; kept {sorted(durable.published(root))}")
    return 0


def _export(run: str, step: int | None, weights: str, layout: str, out: str) -> int:
    trained = TrainedRun.open(run, "RUN")
    state = load_weights(trained.path, step, weights)
    folder = make_folder(out, "--out")
    if layout == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        config = trained.base.backbone
        width = state["text_embedder.0.weight"].shape[1]
        fields = diffusers_config(config, channels=channels_of(state, config), text_width=width)
        save_file(to_diffusers(state, config), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    print(f"wrote {weights} of {run} to {folder}: {len(state)} tensors, {sum(t.numel() for t in state.values()) / 1e6:.2f} M parameters")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dit ckpt", description="Look after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subs = {
        name: commands.add_parser(name, help=text, description=text)
        for name, text in (
            ("ls", "list them"),
            ("verify", "read every file and compare it with its manifest; exit code 4 if none is valid"),
            ("prune", "delete old ones, never the newest that is valid"),
            ("export", "write the weights of one for other programs"),
        )
    }
    for sub in subs.values():
        sub.add_argument("run", metavar="RUN", help="run directory")
    subs["prune"].add_argument("--keep", type=_positive, required=True, help="how many of the newest stay")
    subs["prune"].add_argument("--every", type=_positive, help="steps that are multiples of this stay too")
    export = subs["export"]
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest valid)")
    export.add_argument(
        "--weights", type=_weights, default="ema", help="ema, model, or sigma_rel=S, see ema.sigma_rel (default: %(default)s)"
    )
    export.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors", help="diffusers: a WanTransformer3DModel")
    return parser


def _weights(text: str) -> str:
    try:
        return known_weights(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number
