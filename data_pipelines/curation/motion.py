"""Motion: dense inverse search optical flow (Kroeger et al. 2016) by OpenCV."""

import numpy as np

from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.decode import fit
from data_pipelines.extras import optional

_SIDE = 128  # pixels, shorter side


def motion(candidate: Candidate, look: Look) -> float | None:
    """Mean length of the flow between consecutive frames, in shorter sides of the picture a second."""
    if not look.pairs or candidate.fps is None:
        return None
    cv2 = optional("cv2", "the stage motion")
    cv2.setNumThreads(1)
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    height, width = look.frames[0].shape[:2]
    scale = _SIDE / min(height, width)  # small pictures are enlarged: the search needs patches of 8 pixels at several scales
    grey = {id(f): cv2.cvtColor(fit(f, round(height * scale), round(width * scale), key=None), cv2.COLOR_RGB2GRAY) for f in look.frames}
    lengths = [np.linalg.norm(flow.calc(grey[id(a)], grey[id(b)], None), axis=-1).mean() for a, b in look.pairs]
    return float(np.mean(lengths)) / _SIDE * candidate.fps
