"""The knobs of ingest and curation. Torch-free."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.config import Section

Side = Annotated[int, Field(ge=1, le=16384)]
Distance = Annotated[int, Field(ge=0, le=7)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Scenes(Section):
    """Where videos are cut into scenes, by PySceneDetect, before scenes are cut into clips."""

    detector: Literal["content", "adaptive"] = "content"
    """content: a jump in hue, saturation and brightness; adaptive: a jump that stands out from its surroundings, for shaking cameras."""
    threshold: PositiveFloat | None = None
    """Size of the jump; None: 27 for content, 3 for adaptive."""
    min_seconds: PositiveFloat = 0.5
    """Shorter scenes are joined with their neighbour."""
    margin_frames: Annotated[int, Field(ge=0)] = 0
    """Frames left out on either side of every cut, for cross-fades."""

    @property
    def jump(self) -> float:
        """The threshold that holds."""
        return self.threshold or {"content": 27.0, "adaptive": 3.0}[self.detector]


class Bounds(Section):
    """A score of every clip, kept in the index; clips outside the bounds are dropped. Without bounds it is only kept."""

    min: float | None = None
    """Clips below are dropped."""
    max: float | None = None
    """Clips above are dropped."""

    def verdict(self, name: str, score: float) -> str | None:
        """Why a clip with this score is dropped, None if it is kept."""
        if self.min is not None and score < self.min:
            return f"{name} below {self.min:g}"
        return f"{name} above {self.max:g}" if self.max is not None and score > self.max else None


class Brightness(Bounds):
    """Mean brightness (0 to 1) of the darkest frame looked at: black and fading clips are low."""

    name: Literal["brightness"]


class Contrast(Bounds):
    """Standard deviation of brightness (0 to 0.5) in the flattest frame looked at: pictures of one colour are 0."""

    name: Literal["contrast"]


class Change(Bounds):
    """Mean difference (0 to 1) of consecutive frames: still pictures are 0. Images have none."""

    name: Literal["change"]


class Repeats(Bounds):
    """Fraction of the frames looked at that repeat the frame before. Images have none."""

    name: Literal["repeats"]


class Motion(Bounds):
    """Mean optical flow (OpenCV DIS), in heights or widths of the picture, whichever is less, a second. Images have none."""

    name: Literal["motion"]


class TextArea(Bounds):
    """Fraction of the middle frame that is covered by text, found by rapidocr."""

    name: Literal["text_area"]


class ClipScore(Bounds):
    """Cosine (-1 to 1) of the middle frame and the caption in a CLIP model. Clips without caption have none."""

    name: Literal["clip_score"]
    model: str
    """Folder of a CLIP model in the layout of transformers."""


class Aesthetic(Bounds):
    """A learned score of the middle frame: affine layers on its normalised CLIP embedding."""

    name: Literal["aesthetic"]
    model: str
    """Folder of a CLIP model in the layout of transformers."""
    head: str
    """Safetensors file with the `weight` and `bias` of each layer, applied in the order of their names."""


class Captioner(Section):
    """Captions, for clips that have none, by an image-to-text model of transformers that sees the middle frame."""

    name: Literal["captioner"]
    model: str
    """Folder of the model and its processor in the layout of transformers."""
    prompt: str = ""
    """Text that the caption goes on from."""
    max_tokens: PositiveInt = 64


Filter = Brightness | Contrast | Change | Repeats | Motion | TextArea | ClipScore | Aesthetic
Stage = Annotated[Filter | Captioner, Field(discriminator="name")]


class PerceptualHash(Section):
    """Near-duplicates by 64 bits of the coarse structure of the first, middle and last frame."""

    name: Literal["perceptual_hash"]
    max_distance: Distance = 4
    """Bits in which two frames of duplicates may differ: another size or JPEG quality costs up to 4, another picture 12 and more."""
    within_file: bool = False
    """Whether clips of one video are compared with each other too."""


class Embedding(Section):
    """Near-duplicates by the CLIP embedding of the middle frame, found by faiss."""

    name: Literal["embedding"]
    model: str
    """Folder of a CLIP model in the layout of transformers."""
    min_similarity: Fraction = 0.95
    """Cosine from which on two clips are duplicates."""
    within_file: bool = False
    """Whether clips of one video are compared with each other too."""


class IngestConfig(Section):
    captions: str | None = None
    """sidecar (the files' own), class-name, or any text ({class} is replaced); None: class-name if there are classes and no sidecar."""
    shard_samples: PositiveInt = 1000
    """Samples of a shard."""
    clip_frames: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (9,)
    """Lengths of clips. A scene is cut into as many of the longest as it holds, the rest into the next shorter."""
    clips_per_scene: PositiveInt | None = None
    """At most this many clips of a scene, evenly spread; None for all."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Rate that videos are resampled to; None keeps theirs."""
    size: tuple[Side, Side] | None = None
    """Height and width that pictures are scaled and cropped to; None keeps theirs."""
    scenes: Scenes | None = None
    """None takes a video as one scene."""
    stages: tuple[Stage, ...] = ()
    """Filters and the captioner, in this order: what one drops, the next does not look at, so put the cheap ones first."""
    duplicates: Annotated[PerceptualHash | Embedding, Field(discriminator="name")] | None = None
    """How near-duplicates are found; of each group the first in the order of the shards is kept."""

    @model_validator(mode="after")
    def _one_stage_of_a_name(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages {names}: each may be given once")
        return self
