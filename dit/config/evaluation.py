"""What is measured, on which clips, and with which features."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from data_pipelines.config import Section, Size


class ShapesClips(Section):
    name: Literal["shapes"] = "shapes"
    """Clips of the renderer of moving shapes, for captions that were trained and for captions that were held out."""


class StoredClips(Section):
    name: Literal["shards", "folder"]
    """`shards`: indexed shards of pixels. `folder`: images or videos with .txt captions beside them, or in class folders."""
    path: str
    size: Size
    """Frames, height, width that clips are brought to, and that are sampled."""


class RandomConvFeatures(Section):
    """Two layers of random 3-D convolutions that are never trained: no weights to fetch, the same on every machine."""

    name: Literal["random_conv"]
    seed: NonNegativeInt = 0


class AttributeFeatures(Section):
    """Position, velocity, size, colour and shape as the checker of moving shapes recovers them."""

    name: Literal["attributes"]


class NetworkFeatures(Section):
    """Any vision or video model of transformers (DINOv2, CLIP, VideoMAE, ...)."""

    name: Literal["network"]
    path: str
    """Local folder with config.json, preprocessor_config.json and safetensors weights."""
    pool: Literal["cls", "mean"] = "cls"
    """First token of the last layer, or the mean over all: VideoMAE and convolutional networks have no first token that stands for all."""
    batch_size: PositiveInt = 32
    """Frames (of a video model: clips) at once."""


MapFeatures = Annotated[RandomConvFeatures | NetworkFeatures, Field(discriminator="name")]
Features = Annotated[RandomConvFeatures | NetworkFeatures | AttributeFeatures, Field(discriminator="name")]


class AdherenceConfig(Section):
    """Rates at which clips of moving shapes do what their captions say, by the exact checker."""

    name: Literal["adherence"] = "adherence"


class PositionsConfig(Section):
    """Whether start positions of moving shapes are as varied as the renderer's."""

    name: Literal["positions"]


class FeatureMetric(Section):
    name: str
    features: Features


class FrechetConfig(FeatureMetric):
    """Fréchet distance to the reference clips: FID or FVD where the features are theirs."""

    name: Literal["frechet"]
    extrapolate: bool = True
    """Remove the bias of finite samples by extrapolating to 1/N = 0."""


class KernelConfig(FeatureMetric):
    """Kernel distance (KID) to the reference clips: unbiased at any number of samples."""

    name: Literal["kernel"]
    subset: Annotated[int, Field(ge=8)] = 1000
    """Samples compared at once; bounds memory."""


class PrecisionRecallConfig(FeatureMetric):
    """Share of samples inside the reference's manifold, and of the reference inside the samples'."""

    name: Literal["precision_recall"]
    k: PositiveInt = 3


class DiversityConfig(FeatureMetric):
    """Mean distance of clips that were drawn for the same caption; needs per_caption of 2 or more."""

    name: Literal["diversity"]


class ClipScoreConfig(Section):
    """Likeness of frames and caption to a CLIP model: 100 max(cosine, 0), mean over frames."""

    name: Literal["clip_score"]
    path: str
    """Local folder of a transformers CLIP model with its tokenizer."""
    batch_size: PositiveInt = 32


class TemporalConfig(FeatureMetric):
    """Likeness of neighbouring frames, in features and after block matching. Read it beside the reference's: a still is perfect."""

    name: Literal["temporal"]
    features: MapFeatures
    block: PositiveInt = 8
    """Side of the squares that are matched, pixels."""
    radius: PositiveInt = 4
    """How far they are looked for, pixels."""


class FidelityConfig(FeatureMetric):
    """PSNR, SSIM and feature distance to the first contestant's clips of the same captions and noise."""

    name: Literal["fidelity"]
    features: MapFeatures


Metric = Annotated[
    AdherenceConfig
    | PositionsConfig
    | FrechetConfig
    | KernelConfig
    | PrecisionRecallConfig
    | DiversityConfig
    | ClipScoreConfig
    | TemporalConfig
    | FidelityConfig,
    Field(discriminator="name"),
]
