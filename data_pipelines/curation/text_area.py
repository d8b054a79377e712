"""Text in pictures: the detector of rapidocr, whose model comes with its package; nothing is read, only found."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.extras import optional

# One thread, as every stage: what uses a machine with many cores is many processes.
_PARAMS = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1}


class TextArea:
    """Callable as a score."""

    def __init__(self) -> None:
        self.finder: Any = optional("rapidocr", "the stage text_area").RapidOCR(params=_PARAMS)

    def __call__(self, _: Candidate, look: Look) -> float:
        """Fraction of the middle frame that lies in boxes of text."""
        found = self.finder(np.ascontiguousarray(look.middle[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
        height, width = look.middle.shape[:2]
        mask = Image.new("1", (width, height))
        for box in () if found.boxes is None else found.boxes:
            ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in box], fill=1)
        return float(np.asarray(mask).mean())
