"""Run directories: opening one for writing, reading one that exists, and the networks inside it.

config.resolved.yaml  encoders.json  env.json  command.txt  [teacher.resolved.yaml]  data.txt  metrics.jsonl  status.json
checkpoints/  samples/  tensorboard/
"""

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipelines.config import Section
from data_pipelines.config_file import load_run, replace_file, save_resolved
from data_pipelines.errors import UserError
from data_pipelines.packed import Grid
from dit.config import Contestant, DistillRun, TrainRun
from dit.config.distillation import ConsistencyConfig
from dit.config.encoders import EncodersConfig
from dit.config.objective import Guidance, SamplingConfig
from dit.diffusion import RECTIFIED_FLOW, equip
from dit.diffusion import Path as FlowPath
from dit.distillation import build_student_sampling, student_backbone, traits_of
from dit.encoders import LatentCodec, TextEncoder, build_latent_codec, build_text_encoder
from dit.engine import durable
from dit.engine.checkpoint import load_weights
from dit.engine.store import Store
from dit.models import build_backbone
from dit.runtime import distributed
from dit.runtime.lease import lock_for_writing

log = logging.getLogger(__name__)
FIXED_KEYS = ("init", "backbone", "encoders", "objective", "method", "teacher", "data", "train.seed")
"""Parts of a run that may not change when it is resumed: they decide what its samples and its weights are."""
FIXED_FROM_THE_BEGINNING = ("init", "backbone", "encoders", "objective")
"""Of a run that has weights and has trained nothing yet."""
FREE_KEYS = (
    "backbone.activation_checkpointing",
    "backbone.attention_backend",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.sample_seconds",
    "data.worker_gib",
    "data.cache",
    "method.critic.optimizer",
)
ENCODERS_FILE = "encoders.json"
"""In a run directory: fingerprints of the encoders that its weights were trained with."""


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders of a run and the embedding of the empty caption."""

    text: TextEncoder
    latents: LatentCodec
    null_text: Tensor

    @classmethod
    def load(cls, config: EncodersConfig, device: torch.device) -> "Encoders":
        """Build both encoders on `device`."""
        text = build_text_encoder(config.text, device)
        latents = build_latent_codec(config.latents, device)
        return cls(text, latents, text.encode([""])[0])

    def fingerprints(self) -> dict[str, Mapping[str, object]]:
        """What both are, as JSON."""
        return {"latents": self.latents.fingerprint(), "text": self.text.fingerprint()}

    def latent_size(self, size: Grid, key: str) -> Grid:
        """Frames, height, width of the latents of a video of `size`. Raises UserError that names `key`, where the size was given."""
        try:
            return self.latents.latent_size(size)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


@dataclass(frozen=True)
class TrainedRun:
    """A run directory as read: its config, and the training run with the backbone and encoders that its weights have."""

    path: Path
    run: TrainRun | DistillRun
    base: TrainRun

    @classmethod
    def open(cls, path: str, key: str) -> "TrainedRun":
        """Read the run directory `path`. Raises UserError that names `key`, the config key it came from."""
        folder = Path(path)
        resolved = folder / "config.resolved.yaml"
        if not resolved.is_file():
            raise UserError(
                f"{key}={path} is not a run directory: it has no config.resolved.yaml. Expected the `out` of a dit train or dit distill"
            )
        if (folder / "teacher.resolved.yaml").is_file():
            student, teacher = load_run(DistillRun, str(resolved)), load_run(TrainRun, str(folder / "teacher.resolved.yaml"))
            backbone = student_backbone(student.method, teacher.backbone)
            return cls(folder, student, teacher.model_copy(update={"backbone": backbone}))
        run = load_run(TrainRun, str(resolved))
        return cls(folder, run, run)

    def encoders(self) -> Encoders:
        """The encoders that its weights were trained with, on this process's device. Raises UserError if the files are others now."""
        encoders = Encoders.load(self.base.encoders, distributed.device())
        self.check_encoders(encoders)
        return encoders

    def check_encoders(self, encoders: Encoders) -> None:
        """Raise UserError unless its weights were trained with `encoders`."""
        _check_encoders(self.path, encoders)

    def sampling_for(self, contestant: Contestant, section: str = "contestants.") -> SamplingConfig:
        """The sampler that `contestant` asks for, else this run's own. section: where its keys stand in the config.

        Raises UserError for a guidance or a number of steps that a student has not learned.
        """
        sampling = contestant.sampling or self.sampling
        if isinstance(self.run, DistillRun) and isinstance(self.run.method, ConsistencyConfig) and self.run.method.guidance_range:
            (low, high), asked = self.run.method.guidance_range, sampling.guidance
            if not low <= asked.scale <= high or asked != Guidance(s=asked.s, w=asked.w):
                raise UserError(
                    f"{self.path} is a student that takes the scale of guidance as an input, from s={low:g} to {high:g}, and is asked for "
                    f"{asked!r}: give {section}sampling.guidance.s in that range, and no other option of guidance"
                )
        sampling = sampling.model_copy(update={"steps": contestant.steps}) if contestant.steps else sampling
        if isinstance(self.run, DistillRun) and not traits_of(self.run.method).any_steps and sampling.steps != self.sampling.steps:
            raise UserError(
                f"{self.path} is a student of {self.run.method.name} that knows its own {self.sampling.steps} steps alone, and is asked "
                f"for {sampling.steps}: remove {section}{'steps' if contestant.steps else 'sampling'}"
            )
        return sampling

    @property
    def flow(self) -> FlowPath | None:
        """The path that its network is sampled on; None for that of its objective. Students live on rectified flow, as they were taught."""
        return RECTIFIED_FLOW if isinstance(self.run, DistillRun) else None

    @property
    def sampling(self) -> SamplingConfig:
        """How this run's weights want to be sampled: a student ships its own, a teacher takes its preview's settings."""
        if isinstance(self.run, DistillRun):
            return build_student_sampling(self.run.method)
        return self.run.preview.sampling if self.run.preview else SamplingConfig()

    def backbone(self, encoders: Encoders, step: int | None, weights: str, device: torch.device) -> nn.Module:
        """The network with the weights of checkpoint `step` (None: newest valid), frozen, on `device`."""
        network = build_backbone(self.base.backbone, channels=encoders.latents.channels, text_width=encoders.text.width)
        module = equip(network, self.base.objective)
        module.load_state_dict(load_weights(self.path, step, weights))
        return module.eval().requires_grad_(False).to(device)


def make_folder(path: str, key: str) -> Path:
    """Make the folder `path` of the config key `key`. Raises UserError if that is impossible."""
    if "://" in path:
        raise UserError(f"{key}={path}: expected a local folder; see train.checkpoint_store for a copy of a run in a store")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file of that name, no permission, a full disk
        raise UserError(f"{key}={path}: this folder cannot be made ({error.strerror}); give another `{key}`") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{key}={path}: no permission to write there; give another `{key}`")
    return Path(path)


def null_label(base: TrainRun) -> int | None:
    """The label that means "no class", or None for a model without classes."""
    return base.backbone.num_classes


def open_for_writing(run: TrainRun | DistillRun, base: TrainRun, description: str, encoders: Encoders) -> Path:
    """Make the run directory, or check that the one which exists belongs to the same run; record config, versions and command.

    description: what will be trained on, printed and kept as data.txt. Until the first checkpoint a run has nothing that another
    config would spoil, so one that failed at its start can be mended in place.
    """
    folder = make_folder(run.out, "out")
    if writer := distributed.on_first(lambda: lock_for_writing(folder)):
        raise UserError(f"out={folder} is being written by {writer}: wait for it, end it, or give another `out`")
    resolved = folder / "config.resolved.yaml"
    if run.train.checkpoint_store:
        distributed.on_first(lambda: _bring_from_store(run))
    if resolved.is_file() and durable.published(folder / "checkpoints"):
        has_learned = durable.published(folder / "checkpoints") != [0]
        _refuse_another_run(load_run(type(run), str(resolved)), run, folder, "out", FIXED_KEYS if has_learned else FIXED_FROM_THE_BEGINNING)
        _check_encoders(folder, encoders)
    distributed.barrier()  # every rank has read the old config before one writes the new
    if distributed.rank() == 0:
        for name in ("checkpoints", "samples", "tensorboard"):
            (folder / name).mkdir(exist_ok=True)
        save_resolved(run, resolved)
        replace_file(folder / ENCODERS_FILE, json.dumps(encoders.fingerprints(), indent=1) + "\n")
        if isinstance(run, DistillRun):
            save_resolved(base, folder / "teacher.resolved.yaml")
        (folder / "command.txt").write_text(shlex.join(sys.argv) + "\n")
        (folder / "data.txt").write_text(description + "\n")
        print(description, flush=True)
        (folder / "env.json").write_text(json.dumps(_environment(), indent=1) + "\n")
    return folder


def _check_encoders(folder: Path, encoders: Encoders) -> None:
    """Raise UserError unless the run in `folder` was trained with `encoders`. A run of an earlier release does not say."""
    file = folder / ENCODERS_FILE
    try:
        made = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete it if the encoders of this run are what they were") from error
    for part, then in made.items():
        now = encoders.fingerprints()[part]
        for field in sorted(then.keys() | now.keys()):
            if then.get(field) != now.get(field):
                raise UserError(
                    f"{folder} was trained with another encoder: {part}.{field} was {then.get(field)} and is {now.get(field)} now. "
                    f"Give back what encoders.{part} of its config names, or name a copy of it in {folder}/config.resolved.yaml"
                )


def _bring_from_store(run: TrainRun | DistillRun) -> None:
    """Have the newest checkpoint of the run in its directory. Raises UserError if the store holds another run."""
    store = Store(run)
    if (theirs := store.config()) is not None:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(theirs)
            file.flush()
            _refuse_another_run(load_run(type(run), file.name), run, store.address, "train.checkpoint_store")
    store.bring()


def _refuse_another_run(old: Section, new: Section, place: Path | str, key: str, keys: tuple[str, ...] = FIXED_KEYS) -> None:
    before, now = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    fixed = [key for key in changed if _is_of(key, keys) and not _is_of(key, FREE_KEYS)]
    if fixed:
        lines = "\n".join(f"  {key}: {before.get(key)} there, {now.get(key)} here" for key in fixed)
        raise UserError(
            f"{place} holds another run, which cannot go on under this config:\n{lines}\nGive another `{key}`, or delete what is there"
        )


def _is_of(key: str, sections: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _environment() -> dict[str, object]:
    packages = ("torch", "deepspeed", "transformers", "diffusers", "webdataset", "safetensors", "numpy", "av")
    versions = {name: _version(name) for name in packages}
    ask = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git here
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "packages": versions, "commit": commit or None, "device": device}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
