"""Near-duplicates: found under the changes that make them, against a comparison of all pairs, and the first is kept."""

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_pipelines.__main__ import main
from data_pipelines.curation.config import Embedding, PerceptualHash
from data_pipelines.curation.duplicates import find_duplicates, perceptual_hash
from data_pipelines.video import write_mp4

RANDOM = np.random.default_rng(1)


def picture(seed):
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC)


def distance(a, b):
    return (perceptual_hash(np.asarray(a)) ^ perceptual_hash(np.asarray(b))).bit_count()


def test_the_hash_survives_scaling_light_and_compression_but_not_another_picture(tmp_path):
    original = picture(0)
    original.save(tmp_path / "a.jpg", quality=30)
    with Image.open(tmp_path / "a.jpg") as again:
        assert distance(original, again) <= 4
    assert distance(original, original.resize((60, 40), Image.Resampling.LANCZOS)) <= 4
    assert distance(original, ImageEnhance.Brightness(original).enhance(0.7)) <= 4
    others = [distance(original, picture(seed)) for seed in range(1, 40)]
    assert min(others) > 10
    assert np.mean(others) == pytest.approx(32, abs=3)  # unrelated bits
    assert distance(original, original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 10


def naive(items, limit, within):
    found = {}
    for i, (file, signature) in enumerate(items):
        for j in range(i):
            if j in found or (items[j][0] == file and not within):
                continue
            pairs = [(int(items[j][1][k : k + 16], 16), int(signature[k : k + 16], 16)) for k in (0, 16, 32)]
            if all((a ^ b).bit_count() <= limit for a, b in pairs):
                found[i] = j
                break
    return found


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("within", [True, False])
def test_bands_find_what_a_comparison_of_all_pairs_finds(limit, within):
    bases = RANDOM.integers(0, 2**63, (12, 3))
    items = []
    for i in range(300):
        flips = [sum(1 << int(bit) for bit in RANDOM.choice(64, RANDOM.integers(0, 6), replace=False)) for _ in range(3)]
        code = [int(word) ^ flip for word, flip in zip(bases[RANDOM.integers(12)], flips)]
        items.append((f"file {i % 40}", "".join(f"{word:016x}" for word in code)))
    expected = naive(items, limit, within)
    assert find_duplicates(items, PerceptualHash(name="perceptual_hash", max_distance=limit, within_file=within)) == expected
    assert limit < 3 or len(expected) > 10


def test_embeddings_are_compared_by_their_angle():
    pytest.importorskip("faiss")
    angles = np.radians([0, 10, 25, 90, 93, 3])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype("<f2")
    items = [(file, vector.tobytes().hex()) for file, vector in zip("aabcda", vectors)]
    config = Embedding(name="embedding", model="-", min_similarity=float(np.cos(np.radians(20))))
    # b at 25 is near a at 10; d is near c; the last is near only to others of its own file
    assert find_duplicates(items, config) == {2: 1, 4: 3}
    assert find_duplicates(items, config.model_copy(update={"within_file": True})) == {1: 0, 4: 3, 5: 0}


@pytest.mark.parametrize(("within", "samples"), [("false", 2), ("true", 1)])
def test_spans_of_one_video_are_one_file(tmp_path, within, samples):
    still = np.repeat(np.asarray(picture(0))[None], 20, 0)
    write_mp4(tmp_path / "a.mp4", still, 10, lossless=True)
    (tmp_path / "m.csv").write_text("path,start,end\na.mp4,0,1\na.mp4,1,2\n")
    duplicates = f"duplicates={{name: perceptual_hash, within_file: {within}}}"
    assert main(["ingest", str(tmp_path / "m.csv"), str(tmp_path / "out"), "--clip-frames", "9", duplicates]) == 0
    assert json.loads((tmp_path / "out" / "ingest.json").read_text())["samples"] == samples


def test_copies_in_a_folder_are_left_out_and_named(tmp_path, capsys):
    folder = tmp_path / "src"
    folder.mkdir()
    for seed in range(6):
        picture(seed).save(folder / f"{seed}.png")
    picture(3).resize((120, 80), Image.Resampling.BICUBIC).save(folder / "three again.jpg", quality=60)
    assert main(["ingest", str(folder), str(tmp_path / "out"), "duplicates={name: perceptual_hash}"]) == 0
    record = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert record["samples"] == 6
    ((what, reason),) = record["skipped"]
    assert reason == "near-duplicate"
    assert {what} <= {"3.png (like three again.jpg)", "three again.jpg (like 3.png)"}
