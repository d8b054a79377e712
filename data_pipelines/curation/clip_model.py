"""A CLIP model (Radford et al. 2021) of transformers, read from a folder: embeddings, the cosine with a caption, learned scores."""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, normalize

from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.decode import fit
from data_pipelines.errors import UserError
from data_pipelines.extras import check_loaded, optional
from data_pipelines.video import Frames

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, where the folder states none


class ClipModel:
    """Embeddings of pictures and texts, of length 1."""

    def __init__(self, folder: str) -> None:
        transformers = optional("transformers", "a CLIP model")
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise UserError(f"model = {folder!r}: no config.json in it; expected the folder of a CLIP model in the layout of transformers")
        try:
            load = transformers.CLIPModel.from_pretrained
            model, found = load(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"model = {folder!r}: not a CLIP model that can be read ({error})") from error
        check_loaded("model", folder, found, spared=None)
        self.model: Any = model.eval()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        stated = path / "preprocessor_config.json"
        settings = json.loads(stated.read_text()) if stated.is_file() else {}
        self.mean, self.std = settings.get("image_mean", _MEAN), settings.get("image_std", _STD)

    @torch.inference_mode()
    def picture(self, frame: Frames) -> Tensor:
        """(h, w, 3) uint8 -> (width,) float32."""
        side = self.model.config.vision_config.image_size
        pixels = torch.from_numpy(fit(frame, side, side, key=None).astype(np.float32) / 255)  # side side 3
        pixels = ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)[None].to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return normalize(self.model.visual_projection(pooled).float(), dim=-1)[0].cpu()

    @torch.inference_mode()
    def text(self, caption: str) -> Tensor:
        """Text, cut at the length of the model -> (width,) float32."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(caption[: limit * 40], truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        pooled = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return normalize(self.model.text_projection(pooled).float(), dim=-1)[0].cpu()


@lru_cache(maxsize=2)
def clip_model(folder: str) -> ClipModel:
    """The model in a folder, loaded once for all stages that use it."""
    return ClipModel(folder)


class ClipScore:
    """Callable as a score."""

    def __init__(self, folder: str) -> None:
        self.model = clip_model(folder)

    def __call__(self, candidate: Candidate, look: Look) -> float | None:
        """Cosine of the middle frame and the caption."""
        return float(self.model.picture(look.middle) @ self.model.text(candidate.caption)) if candidate.caption else None


class Aesthetic:
    """Callable as a score: affine layers on the embedding, as the public aesthetic predictors are."""

    def __init__(self, folder: str, head: str) -> None:
        self.model = clip_model(folder)
        try:
            tensors = load_file(head)
        except (OSError, ValueError) as error:
            raise UserError(f"head = {head!r}: cannot be read ({error}); expected a safetensors file") from error
        names = sorted((n for n in tensors if n.endswith("weight")), key=lambda n: [int(part) for part in re.findall(r"\d+", n)])
        self.layers = [(tensors[name].float(), tensors[name.removesuffix("weight") + "bias"].float()) for name in names]
        widths = [self.model.model.config.projection_dim, *(len(bias) for _, bias in self.layers)]
        if not self.layers or widths[-1] != 1 or any(weight.shape[1] != width for (weight, _), width in zip(self.layers, widths)):
            shapes = [tuple(weight.shape) for weight, _ in self.layers]
            raise UserError(f"head = {head!r}: layers {shapes} do not lead from an embedding of {widths[0]} to one score")

    def __call__(self, _: Candidate, look: Look) -> float:
        """The score of the middle frame."""
        values = self.model.picture(look.middle)
        for weight, bias in self.layers:
            values = linear(values, weight, bias)
        return float(values)
