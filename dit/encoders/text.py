"""Text encoders: any transformers encoder by folder or hub name, and the small one that ships with the project.

Weights are read from safetensors only and code that comes with a model is never run.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.extras import check_loaded
from dit.config.encoders import HFTextConfig
from dit.encoders.base import CODE_VERSION, Fingerprint, check_declared, device_of, frozen, hash_of_weights, load_own
from dit.encoders.small_text import SmallTextEncoder


class SmallText(nn.Module):
    """The text encoder that ships with the project: words in context, and an end token."""

    def __init__(self, path: str | None) -> None:
        super().__init__()
        self.model = load_own(SmallTextEncoder.load, path, "encoders.text.path")
        self.width = self.model.width

    def fingerprint(self) -> Fingerprint:
        return {"class": "SmallTextEncoder", "weights": hash_of_weights(self.model), "version": CODE_VERSION}

    def encode(self, captions: list[str]) -> list[Tensor]:
        return self.model.encode(captions)


class HFTextEncoder(nn.Module):
    """Last hidden states of a T5, UMT5, CLIP or other encoder of the transformers library.

    `packed` gives the real tokens alone. `zeros_to_max_unmasked` appends zero rows up to max_tokens, which a model then attends
    to: the convention of Wan. Raises UserError if the path, its files or max_tokens do not fit.
    """

    def __init__(self, config: HFTextConfig) -> None:
        super().__init__()
        self.config = config
        self.model, self.tokenizer = _load(config)
        settings: Any = self.model.config
        self.width: int = settings.hidden_size
        check_declared("encoders.text.width", config.width, self.width)
        positions = getattr(settings, "max_position_embeddings", None)
        if positions is not None and config.max_tokens > positions:
            raise UserError(
                f"encoders.text.max_tokens: got {config.max_tokens}, expected at most {positions}, the positions of {config.path}"
            )

    @cached_property
    def _empty(self) -> int:
        """The token of an empty caption, where the tokenizer adds none of its own: those of GPT-2's kind do not."""
        ids = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id)
        found = next((each for each in ids if each is not None), None)
        if found is None:
            raise UserError(
                f"encoders.text.path: the tokenizer in {self.config.path} has no end, start or padding token for an empty caption"
            )
        return int(found)

    @cached_property
    def _hash(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hash_of_weights(self.model) + xxhash.xxh3_64_hexdigest(repr(vocabulary).encode())

    def fingerprint(self) -> Fingerprint:
        name, config = type(self.model).__name__, self.config
        facts: Fingerprint = {"pad": config.pad, "max_tokens": config.max_tokens, "dtype": config.dtype}
        return {"class": name, "weights": self._hash, **facts, "version": CODE_VERSION}

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        if not captions:
            return []
        rows = self.tokenizer(captions, truncation=True, max_length=self.config.max_tokens)["input_ids"]
        rows = [ids or [self._empty] for ids in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        device = device_of(self.model)
        ids, real = batch["input_ids"].to(device), batch["attention_mask"].to(device)  # (B, S)
        hidden = self.model(input_ids=ids, attention_mask=real).last_hidden_state.float()  # (B, S, D)
        return [self._pad(states[mask]) for states, mask in zip(hidden, real.bool(), strict=True)]

    def _pad(self, states: Tensor) -> Tensor:
        if self.config.pad == "packed":
            return states
        padded = states.new_zeros(self.config.max_tokens, self.width)
        padded[: len(states)] = states
        return padded


def _load(config: HFTextConfig) -> tuple[Any, Any]:
    """The frozen model and its tokenizer."""
    import transformers

    local = Path(config.path).expanduser().exists()
    model_path, tokenizer_path = _parts(Path(config.path).expanduser()) if local else (config.path, config.path)
    try:
        settings = transformers.AutoConfig.from_pretrained(model_path, local_files_only=local)
        cls = _class_of(transformers, settings)
        options = {"dtype": getattr(torch, config.dtype), "use_safetensors": True, "output_loading_info": True}
        model, found = cls.from_pretrained(model_path, local_files_only=local, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=local)
    except (OSError, ValueError) as error:
        expected = "a local folder with config.json, safetensors weights and a tokenizer, or a hub name that can be reached"
        raise UserError(f"encoders.text.path: got {config.path!r}, expected {expected}. transformers says: {error}") from error
    check_loaded("encoders.text.path", config.path, found)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any token will do
    return frozen(model), tokenizer


def _parts(folder: Path) -> tuple[str, str]:
    """Where model and tokenizer are: in one folder, or in two folders of a diffusers pipeline."""
    if (folder / "text_encoder").is_dir():
        return str(folder / "text_encoder"), str(folder / "tokenizer")
    return str(folder), str(folder)


def _class_of(transformers: Any, settings: Any) -> Any:
    """AutoModel would load the decoder of T5 and the vision tower of CLIP as well."""
    match settings.model_type:
        case "t5":
            return transformers.T5EncoderModel
        case "umt5":
            return transformers.UMT5EncoderModel
        case "clip" | "clip_text_model":
            return transformers.CLIPTextModel
        case _ if settings.is_encoder_decoder:
            raise ValueError(f"{settings.model_type} models have a decoder; only T5 and UMT5 of that kind are supported")
        case _:
            return transformers.AutoModel
