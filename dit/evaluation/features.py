"""Clips to feature vectors: random convolutions, any vision or video network of transformers, recovered attributes.

Letters: N clips, T frames, H rows, W columns, S places, D features. Videos are (N, T, H, W, 3) uint8, pixels (N, T, 3, H, W) float32 in
[0, 1]. Knows nothing of diffusion.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from data_pipelines import randomness
from data_pipelines.errors import UserError
from data_pipelines.extras import check_loaded
from dit.config.evaluation import AttributeFeatures, ClipScoreConfig, NetworkFeatures, RandomConvFeatures
from dit.evaluation import moving_shapes
from dit.evaluation.pixels import as_float

Facts = dict[str, Any]
"""Part of a protocol: all that a figure depends on, as JSON."""
_WEIGHTS_AND_SETTINGS = ("*.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt")


class Features(Protocol):
    """Clips (N, T, H, W, 3) uint8 to one vector each."""

    def __call__(self, videos: Tensor, /) -> Tensor:
        """(N, D) float32."""

    def maps(self, videos: Tensor, /) -> list[Tensor]:
        """(N, S, D) float32 of each layer: the places inside a clip."""

    def protocol(self) -> Facts:
        """All that the vectors depend on."""


def build_features(config: RandomConvFeatures | NetworkFeatures | AttributeFeatures, device: torch.device) -> Features:
    """The features that `config` names, computed on `device`."""
    return RecoveredAttributes() if isinstance(config, AttributeFeatures) else build_layers(config, device)


def build_layers(
    config: RandomConvFeatures | NetworkFeatures, device: torch.device, key: str = "metrics.features"
) -> "RandomConv | Network":
    """The frozen network of these features. key: where `config` stands, for errors."""
    match config:
        case RandomConvFeatures():
            return RandomConv(config.seed, device)
        case NetworkFeatures():
            return Network(config, device, key)
        case _:
            assert_never(config)


def of_frames(features: Features, videos: Tensor) -> Tensor:
    """Features of every frame as a clip of its own: (N, T, D)."""
    return features(videos.flatten(0, 1)[:, None]).view(*videos.shape[:2], -1)


class RecoveredAttributes:
    """Where clips of moving shapes lie in the space that the renderer draws from."""

    def __call__(self, videos: Tensor) -> Tensor:
        return torch.from_numpy(moving_shapes.recovered(videos.cpu().numpy()))

    def maps(self, videos: Tensor) -> list[Tensor]:
        raise NotImplementedError("a shape has no places; configs cannot ask for them")

    def protocol(self) -> Facts:
        return {"name": "attributes", "version": 1}


class RandomConv:
    """Two 3-D convolutions (3 x 3 x 3, 64 channels, ReLU) with normal weights of variance 2 / fan-in, drawn from `seed` on the CPU.

    A clip's vector is mean and standard deviation of every channel of the second over its places. Frames are taken as they are.
    """

    CHANNELS = 64

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        shapes = [(self.CHANNELS, channels, 3, 3, 3) for channels in (3, self.CHANNELS)]
        self.weights = [randomness.normal(s, "random conv", seed, i) * (2 / (27 * s[1])) ** 0.5 for i, s in enumerate(shapes)]
        self.hash = xxhash.xxh3_64_hexdigest(b"".join(weight.numpy().tobytes() for weight in self.weights))
        self.weights = [weight.to(device) for weight in self.weights]

    @torch.no_grad()
    def maps(self, videos: Tensor) -> list[Tensor]:
        return self.layers(as_float(videos.to(self.weights[0].device)))

    def layers(self, pixels: Tensor) -> list[Tensor]:
        """`maps` of pixels, with their gradient."""
        hidden = (pixels * 2 - 1).transpose(1, 2)  # (N, 3, T, H, W)
        layers = []
        for weight, stride in zip(self.weights, ((1, 2, 2), (2, 2, 2)), strict=True):
            hidden = F.conv3d(hidden, weight, stride=stride, padding=1).relu()  # (N, 64, t, h, w)
            layers.append(hidden.flatten(2).transpose(1, 2))
        return layers

    def __call__(self, videos: Tensor) -> Tensor:
        last = self.maps(videos)[-1]
        return torch.cat([last.mean(1), last.std(1, correction=0)], dim=1)

    def protocol(self) -> Facts:
        return {"name": "random_conv", "seed": self.seed, "weights": self.hash}


class Network:
    """A vision model takes every frame, and a clip's vector is the mean over its frames; a video model takes `num_frames` spread evenly.

    Frames are resized to the network's square by antialiased bicubic interpolation, whole, without crop, and normalised as its
    preprocessor_config.json says. Raises UserError if the folder does not hold such a model.
    """

    def __init__(self, config: NetworkFeatures, device: torch.device, key: str = "metrics.features") -> None:
        self.config, self.device = config, device
        self.model, self.prepare = load_vision(config.path, "AutoModel", f"{key}.path", device)
        self.model = getattr(self.model, "vision_model", self.model)
        settings: Any = self.model.config
        self.frames: int | None = getattr(settings, "num_frames", None)

    @torch.no_grad()
    def maps(self, videos: Tensor) -> list[Tensor]:
        return self.layers(videos)

    def layers(self, clips: Tensor) -> list[Tensor]:
        """`maps` of videos, or of pixels with their gradient."""
        batches = [self._hidden(part) for part in self._inputs(clips).split(self.config.batch_size)]
        layers = [torch.cat(layer) for layer in zip(*batches, strict=True)]  # (N T, S, D), of a video model (N, S, D)
        return [layer.unflatten(0, (len(clips), -1)).flatten(1, 2) for layer in layers]

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        last = [self._hidden(part)[-1] for part in self._inputs(videos).split(self.config.batch_size)]
        pooled = torch.cat([part[:, 0] if self.config.pool == "cls" else part.mean(1) for part in last])
        return pooled.unflatten(0, (len(videos), -1)).mean(1)

    def protocol(self) -> Facts:
        frames = "each, mean of the vectors" if self.frames is None else f"{self.frames} spread evenly"
        facts = {"weights": weights_of(self.config.path), "pool": self.config.pool, "frames": frames}
        return {"name": "network", **facts, **self.prepare.protocol()}

    def _inputs(self, clips: Tensor) -> Tensor:
        if self.frames is None:
            return clips.flatten(0, 1)  # (N T, H, W, 3)
        return clips[:, torch.linspace(0, clips.shape[1] - 1, self.frames).round().long()]

    def _hidden(self, inputs: Tensor) -> list[Tensor]:
        inputs = inputs.to(self.device)
        pixels = as_float(inputs) if inputs.dtype == torch.uint8 else inputs
        result = self.model(pixel_values=self.prepare(pixels), output_hidden_states=True)
        layers = [*result.hidden_states[1:-1], result.last_hidden_state]
        return [layer.flatten(2).transpose(1, 2) if layer.ndim == 4 else layer for layer in layers]


class ClipScore:
    """100 max(cosine, 0) of caption and frame in a CLIP model, mean over frames (Hessel et al. 2021, arXiv:2104.08718, with w = 100)."""

    def __init__(self, config: ClipScoreConfig, device: torch.device) -> None:
        import transformers

        self.config, self.device = config, device
        self.model, self.prepare = load_vision(config.path, "CLIPModel", "metrics.path", device)
        if not any(
            (Path(config.path) / name).is_file() for name in ("tokenizer.json", "vocab.json")
        ):  # transformers would make an empty one
            raise UserError(f"metrics.path: got {config.path!r}, expected a CLIP folder with its tokenizer (tokenizer.json or vocab.json)")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.path, local_files_only=True)

    @torch.no_grad()
    def __call__(self, videos: Tensor, captions: Sequence[str]) -> Tensor:
        """Score (N,) of videos under their captions."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        ids = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        text = F.normalize(self.model.text_projection(self.model.text_model(**ids).pooler_output), dim=-1)  # (N, D)
        parts = videos.flatten(0, 1).split(self.config.batch_size)
        seen = [self.model.vision_model(pixel_values=self.prepare(as_float(part.to(self.device)))).pooler_output for part in parts]
        frames = F.normalize(self.model.visual_projection(torch.cat(seen)), dim=-1).unflatten(0, videos.shape[:2])  # (N, T, D)
        return 100 * torch.einsum("ntd,nd->nt", frames, text).clamp(min=0).mean(1)

    def protocol(self) -> Facts:
        return {"weights": weights_of(self.config.path), "truncation": True, **self.prepare.protocol()}


class Prepare:
    """Pixels (..., 3, H, W) to a network's input (..., 3, side, side)."""

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.side, self.facts = side, {"mean": list(mean), "std": list(std)}
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        frames = pixels.flatten(0, -4)  # (M, 3, H, W)
        if frames.shape[2:] != (self.side, self.side):
            frames = F.interpolate(frames, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        return ((frames - self.mean) / self.std).unflatten(0, pixels.shape[:-3])

    def protocol(self) -> Facts:
        return {"resize": f"whole frame to {self.side} x {self.side}, antialiased bicubic", **self.facts}


def load_vision(path: str, kind: str, key: str, device: torch.device) -> tuple[Any, Prepare]:
    """The frozen transformers model of class `kind` in the folder `path`, and what prepares its input. Raises UserError with `key`."""
    import transformers

    try:
        settings = json.loads((Path(path) / "preprocessor_config.json").read_text())
        load = getattr(transformers, kind).from_pretrained
        model, found = load(path, local_files_only=True, use_safetensors=True, output_loading_info=True)
        vision = getattr(model.config, "vision_config", model.config)
        prepare = Prepare(_side(settings, vision.image_size), settings["image_mean"], settings["image_std"], device)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        expected = "a local folder with config.json (image_size), preprocessor_config.json (image_mean, image_std) and safetensors"
        raise UserError(f"{key}: got {path!r}, expected {expected}. It says: {error}") from error
    check_loaded(key, path, found, None if kind == "CLIPModel" else "pooler")  # of the others the pooler is not used
    return model.eval().requires_grad_(False).to(device), prepare


def _side(settings: Mapping[str, Any], of_positions: Any) -> int:
    """Pixels of a side as the model's own preprocessing crops them, else as its positions are: DINOv2 has those of 518 and crops 224."""
    crop = settings.get("crop_size")
    side = crop["height"] if isinstance(crop, dict) else crop or of_positions
    return int(side[0] if isinstance(side, list | tuple) else side)


def weights_of(path: str) -> str:
    """Fingerprint of all files in the folder `path` that decide what a network computes."""
    files = sorted(file for pattern in _WEIGHTS_AND_SETTINGS for file in Path(path).glob(pattern))
    return xxhash.xxh3_128_hexdigest("".join(f"{file.name}:{_checksum(file)};" for file in files).encode())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return str(hashlib.file_digest(file, xxhash.xxh3_128).hexdigest())  # type: ignore[arg-type]
