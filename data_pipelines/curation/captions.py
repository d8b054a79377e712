"""Captions by an image-to-text model of transformers, read from a folder."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipelines.curation.candidates import Candidate
from data_pipelines.curation.config import Captioner
from data_pipelines.errors import UserError
from data_pipelines.extras import check_loaded, optional
from data_pipelines.video import Frames


class CaptionModel:
    """Greedy captions: the same picture has the same caption."""

    def __init__(self, config: Captioner) -> None:
        transformers = optional("transformers", "the stage captioner")
        if not (Path(config.model) / "config.json").is_file():
            raise UserError(f"captioner model = {config.model!r}: no config.json in it; expected a folder in the layout of transformers")
        try:
            self.processor: Any = transformers.AutoProcessor.from_pretrained(config.model, local_files_only=True)
            load = transformers.AutoModelForImageTextToText.from_pretrained
            model, found = load(config.model, local_files_only=True, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"captioner model = {config.model!r}: cannot be read ({error})") from error
        check_loaded("captioner model", config.model, found, spared=None)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = model.eval().to(self.device)
        self.config = config

    @torch.inference_mode()
    def caption(self, frame: Frames) -> str:
        """(h, w, 3) uint8 -> text."""
        texts = {"text": self.config.prompt} if self.config.prompt else {}
        inputs = self.processor(images=Image.fromarray(frame), return_tensors="pt", **texts).to(self.device)
        tokens = self.model.generate(**inputs, max_new_tokens=self.config.max_tokens, do_sample=False, num_beams=1)
        return str(self.processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()


def captioned(candidates: Iterable[Candidate], model: CaptionModel) -> Iterator[Candidate]:
    """Give a caption to candidates that have none."""
    for candidate in candidates:
        if candidate.dropped is None and candidate.look is not None and not candidate.caption:
            candidate = replace(candidate, caption=model.caption(candidate.look.middle), caption_from=model.config.model)
        yield candidate
