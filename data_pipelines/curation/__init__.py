"""Curation: from a file to candidates, through the stages that a config names."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import assert_never

import numpy as np

from data_pipelines.curation import pictures
from data_pipelines.curation.candidates import Candidate, Look, Score, Stage, cut, looked_at, scored
from data_pipelines.curation.config import (
    Aesthetic,
    Brightness,
    Captioner,
    Change,
    ClipScore,
    Contrast,
    Embedding,
    Filter,
    IngestConfig,
    Motion,
    PerceptualHash,
    Repeats,
    TextArea,
)
from data_pipelines.curation.duplicates import Sign, hashes, signed
from data_pipelines.extras import optional
from data_pipelines.samples import BadSample


def build_stages(config: IngestConfig) -> list[Stage]:
    """The stages after cutting, in their order, with their models loaded. Raises UserError for a missing package or model."""
    if config.scenes is not None:
        optional("scenedetect", "finding scenes (scenes:)")
    if any(stage.name == "motion" for stage in config.stages):
        optional("cv2", "the stage motion")
    stages = [_build_stage(stage) for stage in config.stages]
    return stages if config.duplicates is None else [*stages, partial(signed, sign=_build_sign(config.duplicates))]


def candidates_of(whole: Candidate, config: IngestConfig, stages: list[Stage]) -> Iterator[Candidate]:
    """Everything that a file may give, each with its scores and the reason if it is dropped."""
    try:
        cuts = list(cut(whole, config))
    except BadSample as error:
        yield replace(whole, dropped=error.reason)
        return
    candidates = looked_at(cuts) if stages else iter(cuts)
    for stage in stages:
        candidates = stage(candidates)
    for candidate in candidates:
        yield replace(candidate, look=None)


def _build_stage(config: Filter | Captioner) -> Stage:
    """Models are imported where a config asks for them: they need the extra `curate`."""
    score: Score
    match config:
        case Brightness():
            score = pictures.brightness
        case Contrast():
            score = pictures.contrast
        case Change():
            score = pictures.change
        case Repeats():
            score = pictures.repeats
        case Motion():
            from data_pipelines.curation import motion

            score = motion.motion
        case TextArea():
            from data_pipelines.curation import text_area

            score = text_area.TextArea()
        case ClipScore():
            from data_pipelines.curation import clip_model

            score = clip_model.ClipScore(config.model)
        case Aesthetic():
            from data_pipelines.curation import clip_model

            score = clip_model.Aesthetic(config.model, config.head)
        case Captioner():
            from data_pipelines.curation.captions import CaptionModel, captioned

            return partial(captioned, model=CaptionModel(config))
        case _:
            assert_never(config)
    return partial(scored, name=config.name, bounds=config, score=score)


def _build_sign(config: PerceptualHash | Embedding) -> Sign:
    if isinstance(config, PerceptualHash):
        return hashes
    from data_pipelines.curation.clip_model import clip_model

    model = clip_model(config.model)

    def sign(look: Look) -> bytes:
        return model.picture(look.middle).numpy().astype(np.dtype("<f2")).tobytes()

    return sign
