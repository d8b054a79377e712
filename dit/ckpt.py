"""`dit ckpt`: list, verify, prune and export the checkpoints of a run."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_pipelines.errors import NoValidCheckpoint, UserError
from data_pipelines.progress import track
from dit.config import DistillRun, known_weights
from dit.engine import durable
from dit.engine.checkpoint import load_weights
from dit.interop.wan import channels_of, check_velocity, diffusers_config, original_config, to_diffusers, to_original, unlike_comfyui
from dit.runs import TrainedRun, make_folder
from dit.runtime.lease import lock_for_writing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
            return _export(arguments)


def _list(root: Path) -> int:
    for step in durable.published(root):
        folder = durable.step_folder(root, step)
        try:
            size = sum(path.stat().st_size for path in folder.iterdir())
            state = json.loads((folder / "state.json").read_text())
            made = f"{state['samples_seen']} samples, {state['world_size']} ranks, ZeRO stage {state['zero_stage']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            print(f"step {step}  unreadable: {error}")
            continue
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


def _export(arguments: argparse.Namespace) -> int:
    run, layout, weights = arguments.run, arguments.format, arguments.weights
    trained = TrainedRun.open(run, "RUN")
    config, objective = trained.base.backbone, trained.base.objective
    if layout != "safetensors":
        check_velocity(objective)
    state = {name: tensor.to(DTYPES[arguments.dtype]) for name, tensor in load_weights(trained.path, arguments.step, weights).items()}
    folder = make_folder(arguments.out, "--out")
    if layout == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        sizes = {"channels": channels_of(state, config), "text_width": state["text_embedder.0.weight"].shape[1]}
        to_layout, fields_of = (to_diffusers, diffusers_config) if layout == "diffusers" else (to_original, original_config)
        fields = fields_of(config, **sizes)
        save_file(to_layout(state, config), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        for note in _notes(trained, layout, sizes):
            print(f"note: {note}")
    print(f"wrote {weights} of {run} to {folder}: {len(state)} tensors, {sum(t.numel() for t in state.values()) / 1e6:.2f} M parameters")
    return 0


def _notes(trained: TrainedRun, layout: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """What whoever loads the file must know."""
    if getattr(trained.base.encoders.text, "pad", None) != "zeros_to_max_unmasked":
        yield "Wan's pipelines pad captions with zeros and attend to them; this model was trained without: give it prompt_embeds of its own"
    if isinstance(trained.run, DistillRun):
        sampling = trained.sampling
        yield f"a student: {sampling.sampler} sampler, {sampling.steps} steps, no guidance"
    if layout == "wan" and (unlike := unlike_comfyui(trained.base.backbone, **sizes)):
        yield f"ComfyUI takes other sizes for granted and will not load it: {'; '.join(unlike)}"


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
    layouts = "diffusers: a WanTransformer3DModel; wan: the names of Wan's own code, which ComfyUI reads (default: %(default)s)"
    export.add_argument("--format", choices=("safetensors", "diffusers", "wan"), default="safetensors", help=layouts)
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights written (default: %(default)s)")
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
