"""The model-based stages on tiny random models that are written here: against transformers itself and against plain arithmetic."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipelines.__main__ import main
from data_pipelines.curation.candidates import Candidate, Look
from data_pipelines.curation.captions import CaptionModel, captioned
from data_pipelines.curation.clip_model import Aesthetic, ClipModel, ClipScore
from data_pipelines.curation.config import Captioner
from data_pipelines.errors import UserError
from data_pipelines.raw_files import Place, RawFile
from data_pipelines.sources import read_source

transformers = pytest.importorskip("transformers")
FRAME = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
LOOK = Look((FRAME,), (0,))
WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "small", "red", "disc", "blue", "dog"]


def tokenizer(folder, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(single=f"{WORDS[0]} $A {WORDS[1]}", special_tokens=[(WORDS[0], 0), (WORDS[1], 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=WORDS[0], eos_token=WORDS[1], pad_token=WORDS[1], unk_token="a", **special
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model of a few thousand weights, in the layout of transformers."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=12, initializer_factor=3.0
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer(folder)
    return folder


def candidate(caption="a small red disc"):
    return Candidate("k", RawFile("k.png", Place("k.png")), caption=caption, look=LOOK)


def test_clip_embeddings_and_scores_are_those_of_transformers(clip):
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    words = transformers.AutoTokenizer.from_pretrained(clip)("a small red disc", return_tensors="pt")
    # Pillow alone: shorter side to 32, centre crop, the constants of the CLIP paper's code
    scaled = Image.fromarray(FRAME).resize((45, 32), Image.Resampling.BICUBIC).crop((6, 0, 38, 32))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((np.asarray(scaled) / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
    ours = ClipModel(str(clip))
    torch.testing.assert_close(ours.picture(FRAME), out.image_embeds[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.text("a small red disc"), out.text_embeds[0], atol=1e-5, rtol=1e-4)
    cosine = float(out.logits_per_image.detach() / model.logit_scale.exp().detach())
    assert ClipScore(str(clip))(candidate(), LOOK) == pytest.approx(cosine, abs=1e-5)
    assert ClipScore(str(clip))(candidate(None), LOOK) is None
    assert ClipScore(str(clip))(candidate("red " * 50_000), LOOK) is not None  # cut at the length of the model


def test_the_aesthetic_head_is_its_layers_in_order(clip, tmp_path):
    torch.manual_seed(1)
    first, second = torch.nn.Linear(12, 5), torch.nn.Linear(5, 1)
    layers = {"layers.2": first, "layers.10": second}  # by number, not by letter
    tensors = {f"{name}.{kind}": getattr(layer, kind).data for name, layer in layers.items() for kind in ("weight", "bias")}
    save_file(tensors, tmp_path / "h.safetensors")
    with torch.no_grad():
        expected = float(second(first(ClipModel(str(clip)).picture(FRAME))))
    assert Aesthetic(str(clip), str(tmp_path / "h.safetensors"))(candidate(), LOOK) == pytest.approx(expected, abs=1e-5)
    save_file({"layers.0.weight": torch.zeros(1, 7), "layers.0.bias": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="do not lead from an embedding of 12"):
        Aesthetic(str(clip), str(tmp_path / "wrong.safetensors"))
    with pytest.raises(UserError, match=r"no config\.json"):
        ClipModel(str(tmp_path))


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A BLIP captioner of a few thousand weights."""
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(2)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "sep_token_id": 1, "pad_token_id": 1}
    text = small | ids | {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 24, "initializer_range": 1.0}
    config = transformers.BlipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8})
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(pictures, tokenizer(folder)).save_pretrained(folder)
    return folder


def test_captions_are_given_to_those_without_and_say_where_they_come_from(captioner):
    model = CaptionModel(Captioner(name="captioner", model=str(captioner), max_tokens=6))
    had, none, dropped = captioned(
        [candidate(), candidate(None), Candidate("d", RawFile("d.png", Place("d")), dropped="dark", look=LOOK)], model
    )
    assert (had.caption, had.caption_from) == ("a small red disc", None)
    assert none.caption_from == str(captioner)
    assert none.caption == model.caption(FRAME)
    assert set(none.caption.split()) <= set(WORDS)
    assert dropped.caption is None
    processor = transformers.BlipProcessor.from_pretrained(captioner)
    blip = transformers.BlipForConditionalGeneration.from_pretrained(captioner).eval()
    tokens = blip.generate(**processor(images=Image.fromarray(FRAME), return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert none.caption == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def test_a_whole_curation_with_models(clip, captioner, tmp_path):
    pytest.importorskip("faiss")
    folder = tmp_path / "src"
    folder.mkdir()
    pictures = np.random.default_rng(3).integers(0, 256, (5, 6, 8, 3), np.uint8)
    for i, small in enumerate(pictures):
        Image.fromarray(small).resize((48, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a dog")
    Image.open(folder / "2.png").save(folder / "2 again.jpg", quality=95)
    save_file({"weight": torch.randn(1, 12), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    (tmp_path / "c.yaml").write_text(f"""
stages:
  - {{name: aesthetic, model: {clip}, head: {tmp_path}/head.safetensors}}
  - {{name: captioner, model: {captioner}, max_tokens: 5}}
  - {{name: clip_score, model: {clip}, min: -1}}
duplicates: {{name: embedding, model: {clip}, min_similarity: 0.9995}}
""")
    assert main(["ingest", str(folder), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]) == 0
    source = read_source(str(tmp_path / "out"))
    entries = [entry for shard in source.shards for entry in source.index(shard).entries]
    assert len(entries) == 5
    assert all({"aesthetic", "clip_score"} < set(entry.meta) for entry in entries)
    assert all(entry.caption_length for entry in entries if entry.meta["file"] == "0.txt")
    record = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert [reason for _, reason in record["skipped"]] == ["near-duplicate"]
    assert "2" in record["skipped"][0][0]
