"""Frozen encoders: captions to text tokens, pixels to latents."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from data_pipelines.config import Section, Size

DType = Literal["float32", "bfloat16"]


class SmallTextConfig(Section):
    name: Literal["small"] = "small"
    """The text encoder that ships with the project."""
    path: str | None = None
    """Other weights of the same architecture."""


class HFTextConfig(Section):
    name: Literal["hf"]
    """Any transformers encoder: T5, UMT5, CLIP or another `AutoModel`."""
    path: str
    """Local folder, or a hub name (a local folder never touches the network)."""
    max_tokens: PositiveInt = 512
    """Captions are cut here."""
    pad: Literal["packed", "zeros_to_max_unmasked"] = "packed"
    """`packed`: real tokens only. `zeros_to_max_unmasked`: zero rows up to max_tokens, attended to, as Wan was trained."""
    width: PositiveInt | None = None
    """Channels of a text token, checked when the encoder is loaded; `dit plan` then needs no weights."""
    dtype: DType = "float32"


class SmallVAEConfig(Section):
    name: Literal["small_video_vae"] = "small_video_vae"
    """The causal video autoencoder that ships with the project: 4 frames x 4 x 4 pixels a latent."""
    path: str | None = None


class PixelsConfig(Section):
    name: Literal["pixels"]
    """No autoencoder: latents are the pixels in [-1, 1]."""


class DiffusersVAEConfig(Section):
    name: Literal["diffusers"]
    """AutoencoderKL, AutoencoderKLWan, AutoencoderKLLTXVideo or AutoencoderDC."""
    path: str
    """Local folder (with config.json), or a hub name."""
    subfolder: str | None = None
    posterior: Literal["mean", "sample"] = "mean"
    """`sample`: latents are drawn from the posterior anew in every epoch, by the sample's key; a cache then holds mean and deviation."""
    channels: PositiveInt | None = None
    """Of a latent; checked, like `stride`, when the codec is loaded; with both `dit plan` needs no weights."""
    stride: Size | None = None
    """Frames, rows and columns that one latent covers."""
    dtype: DType = "float32"


class EncodersConfig(Section):
    text: Annotated[SmallTextConfig | HFTextConfig, Field(discriminator="name")] = SmallTextConfig()
    latents: Annotated[SmallVAEConfig | PixelsConfig | DiffusersVAEConfig, Field(discriminator="name")] = SmallVAEConfig()
