"""Edits of pictures and videos: options of `dit sample`. Inputs of another size are scaled to cover `size` and cropped in the middle."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_pipelines.config import Section


class Replacement(Section):
    """Works with any model: the known part is shown to the network noised to the level of the step, and steps are repeated so that the
    rest comes to fit it (RePaint, Lugmayr et al. 2022, arXiv:2201.09865)."""

    name: Literal["replacement"] = "replacement"
    repeats: PositiveInt = 10
    """How often each stretch of steps is gone; 1 is fast, and the unknown part hardly heeds the known one."""
    jump: PositiveInt = 4
    """Steps of a stretch."""


class TrainedMasks(Section):
    """For models trained with `objective.clean_tokens`: the known part is shown clean. No step is repeated."""

    name: Literal["trained_masks"]


class _Keeping(Section):
    known_by: Annotated[Replacement | TrainedMasks, Field(discriminator="name")] = Replacement()
    """How the network is told what is known."""


class Inpaint(_Keeping):
    """Make a part of a picture or video anew."""

    name: Literal["inpaint"]
    input: str
    """Image or video; of a video the first frames are taken."""
    mask: str | None = None
    """Image, or video with a picture for each frame, of the size of `input`: white where it is made anew."""
    region: Literal["centre", "left", "right", "top", "bottom"] | None = None
    """Instead of a mask: the middle half of both sides, or a half of the picture."""

    @model_validator(mode="after")
    def _one_mask(self) -> Self:
        if (self.mask is None) == (self.region is None):
            raise ValueError(f"give exactly one of mask and region, got mask={self.mask}, region={self.region}")
        return self


class Outpaint(_Keeping):
    """Continue a picture or video beyond its edges. It is not scaled."""

    name: Literal["outpaint"]
    input: str
    """Image or video smaller than `size`; of a video the first frames are taken."""
    place: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Row and column of `size` where its upper left corner lies; None for the middle."""


class Frames(_Keeping):
    """A video that begins or ends with what is given: image to video, first and last frame, or the way between two."""

    name: Literal["frames"]
    first: str | None = None
    """Image, or video, all of which is the beginning: 1 + k * s frames, if the codec stores s frames in one latent."""
    last: str | None = None
    """Image, or video, all of which is the end; an image is held for the s frames that share a latent."""

    @model_validator(mode="after")
    def _something_given(self) -> Self:
        if self.first is None and self.last is None:
            raise ValueError("give first, last, or both")
        return self


class Extend(_Keeping):
    """Continue a video: its last frames are the beginning of the next window, and so on."""

    name: Literal["extend"]
    input: str
    keep: PositiveInt
    """How many frames each window begins with: 1 + k * s, if the codec stores s frames in one latent, and fewer than `size` has."""
    windows: PositiveInt = 1
    """Each adds as many frames as `size` has, less `keep`."""


class SDEdit(Section):
    """Noise a picture or video and sample from there (Meng et al. 2022, arXiv:2108.01073)."""

    name: Literal["sdedit"]
    input: str
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The level t to start from, as on rectified flow; on other paths that of the same ratio of noise and signal. 1 starts from noise."""


class Invert(Section):
    """Find the noise that a picture or video comes from by the flow backwards, and sample from it under the prompts."""

    name: Literal["invert"]
    input: str
    caption: str = ""
    """What `input` shows. The way back is not guided."""
    solver: Literal["euler", "heun", "rk4"] = "heun"
    """Of the way back."""


EditConfig = Annotated[Inpaint | Outpaint | Frames | Extend | SDEdit | Invert, Field(discriminator="name")]
