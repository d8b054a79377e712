"""Facts of a sample from its bytes, by reading headers only: no pixels are decoded.

Knows nothing of shards.
"""

from collections.abc import Mapping

from data_pipelines.decode import image_size, npy_header
from data_pipelines.samples import IMAGE_EXTENSIONS, LATENTS_EXTENSION, BadSample, Facts, media_extension
from data_pipelines.video import examine


def probe(members: Mapping[str, bytes]) -> Facts:
    """Examine the content of a sample (extension -> bytes). Raises BadSample if it has none that can be used."""
    extension = media_extension(set(members))
    data = members[extension]
    if extension == LATENTS_EXTENSION:
        shape = npy_header(data).shape
        if len(shape) != 4 or 0 in shape:
            raise BadSample(f"latents of shape {shape}, expected (C, T, H, W)")
        return Facts("latents", shape[1], shape[2], shape[3], None)
    if extension in IMAGE_EXTENSIONS:
        height, width = image_size(data)
        return Facts("image", 1, height, width, None)
    seen = examine(data, extension)
    return Facts("video", len(seen.times), seen.height, seen.width, seen.fps)
