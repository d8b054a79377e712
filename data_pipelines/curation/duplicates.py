"""Near-duplicates: a signature for every candidate, and the groups that signatures form. The first of a group is kept."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.curation.config import Embedding, PerceptualHash
from data_pipelines.extras import optional
from data_pipelines.samples import BadSample
from data_pipelines.video import Frames

_HASHED = 32  # pixels, side of the picture whose lowest 8 x 8 frequencies are hashed
_BITS = 64
_BLOCK = 4096  # embeddings compared at once

Signed = tuple[str, str]  # which file, signature
Sign = Callable[[Look], bytes]


def signed(candidates: Iterable[Candidate], sign: Sign) -> Iterator[Candidate]:
    """Give every candidate its signature."""
    for candidate in candidates:
        if candidate.dropped is None and candidate.look is not None:
            try:
                candidate = replace(candidate, signature=sign(candidate.look).hex())
            except BadSample as error:
                candidate = replace(candidate, dropped=error.reason)
        yield candidate


def perceptual_hash(frame: Frames) -> int:
    """64 bits: which of the lowest 8 x 8 DCT coefficients of the grey picture lie above their median (Zauner 2010)."""
    grey = np.asarray(Image.fromarray(frame).convert("L").resize((_HASHED, _HASHED), Image.Resampling.BOX), np.float64)
    k, n = np.arange(8)[:, None], np.arange(_HASHED)[None]
    basis = np.cos(np.pi * k * (2 * n + 1) / (2 * _HASHED))  # 8 32
    coefficients = (basis @ grey @ basis.T).round(6).ravel()  # 64
    above = coefficients > np.median(coefficients[1:])  # the first is the mean brightness
    return int("".join("1" if bit else "0" for bit in above), 2)


def hashes(look: Look) -> bytes:
    """The perceptual hashes of the first, middle and last frame, 8 bytes each."""
    return b"".join(perceptual_hash(frame).to_bytes(8, "big") for frame in (look.frames[0], look.middle, look.frames[-1]))


def find_duplicates(items: Sequence[Signed], config: PerceptualHash | Embedding) -> dict[int, int]:
    """Number of every item that is a near-duplicate -> number of the earlier, kept item that it is like."""
    return _by_hash(items, config) if isinstance(config, PerceptualHash) else _by_embedding(items, config)


def _by_hash(items: Sequence[Signed], config: PerceptualHash) -> dict[int, int]:
    """Hashes that differ in at most d bits are equal in one of d + 1 bands: only items that share a band are compared."""
    bands = config.max_distance + 1
    edges = [_BITS * band // bands for band in range(bands + 1)]
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    codes: list[tuple[int, int, int]] = []
    found: dict[int, int] = {}
    for number, (file, signature) in enumerate(items):
        first, middle, last = (int(signature[at : at + 16], 16) for at in (0, 16, 32))
        codes.append((first, middle, last))
        places = [(band, middle >> edges[band] & (1 << edges[band + 1] - edges[band]) - 1) for band in range(bands)]
        near = (other for place in places for other in kept[place] if config.within_file or items[other][0] != file)
        alike = [other for other in near if all((a ^ b).bit_count() <= config.max_distance for a, b in zip(codes[other], codes[number]))]
        if alike:
            found[number] = min(alike)
        else:
            for place in places:
                kept[place].append(number)
    return found


def _by_embedding(items: Sequence[Signed], config: Embedding) -> dict[int, int]:
    if not items:
        return {}
    faiss = optional("faiss", "duplicates by embedding")
    vectors = np.stack([np.frombuffer(bytes.fromhex(signature), "<f2") for _, signature in items]).astype(np.float32)
    faiss.normalize_L2(vectors)  # half precision left them a little off
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    found: dict[int, int] = {}
    for start in range(0, len(items), _BLOCK):
        limits, _, near = index.range_search(vectors[start : start + _BLOCK], config.min_similarity)
        for number in range(start, min(start + _BLOCK, len(items))):
            others = sorted(near[limits[number - start] : limits[number - start + 1]].tolist())
            earlier = (o for o in others if o < number and o not in found and (config.within_file or items[o][0] != items[number][0]))
            if (first := next(earlier, None)) is not None:
                found[number] = first
    return found
