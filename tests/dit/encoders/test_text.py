import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from data_pipelines.errors import UserError
from dit.config.encoders import HFTextConfig
from dit.encoders import build_text_encoder

CAPTIONS = ["a red disc moves left", "", "a cross"]
SIZES = {
    "vocab_size": 16,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}
WORDS = ["[PAD]", "[EOS]", "[UNK]", "a", "red", "disc", "cross", "moves", "left"]


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    fast.save_pretrained(folder)


def t5_config() -> T5Config:
    return T5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.5)


def clip_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(**SIZES, eos_token_id=1)


def whole_clip() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    return CLIPModel(CLIPConfig(text_config=clip_text_config().to_dict(), vision_config=vision))


def umt5() -> PreTrainedModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(**SIZES))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: T5EncoderModel(t5_config()),
    "umt5": umt5,
    "clip": lambda: CLIPTextModel(clip_text_config()),
    "bert": bert,
}


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def config(folder: Path, **options: object) -> HFTextConfig:
    return HFTextConfig.model_validate({"name": "hf", "path": str(folder), "max_tokens": 8, **options})


@pytest.mark.parametrize("kind", MODELS)
def test_packed_text_holds_the_models_own_states_without_padding(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    encoder = build_text_encoder(config(save(model, tmp_path)))
    texts = encoder.encode(CAPTIONS)
    assert encoder.width == 24
    assert [tuple(text.shape) for text in texts] == [(6, 24), (1, 24), (3, 24)]  # words and the end token
    ids = torch.tensor([[WORDS.index(word) for word in ("a", "cross", "[EOS]")]])
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(texts[2], expected, atol=1e-5, rtol=0)
    assert not texts[0].requires_grad
    assert all(text.dtype == torch.float32 for text in texts)


def test_wan_padding_is_zero_rows_to_the_maximum(tmp_path: Path) -> None:
    folder = save(MODELS["umt5"](), tmp_path)
    packed = build_text_encoder(config(folder)).encode(CAPTIONS)
    padded = build_text_encoder(config(folder, pad="zeros_to_max_unmasked")).encode(CAPTIONS)
    for short, long in zip(packed, padded, strict=True):
        assert long.shape == (8, 24)
        assert torch.equal(long[: len(short)], short)
        assert not long[len(short) :].any()


def test_long_captions_are_cut(tmp_path: Path) -> None:
    encoder = build_text_encoder(config(save(MODELS["t5"](), tmp_path), max_tokens=4))
    assert [len(text) for text in encoder.encode(["a red disc moves left", "a"])] == [4, 2]


@pytest.mark.parametrize("whole", [lambda: T5ForConditionalGeneration(t5_config()), whole_clip])
def test_of_a_whole_model_the_text_encoder_is_taken(whole: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = whole()
    encoder = build_text_encoder(config(save(model, tmp_path)))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())  # type: ignore[attr-defined]
    assert 0 < parameters < model.num_parameters() / 1.5
    assert encoder.encode(["a cross"])[0].shape == (3, 24)


def test_a_pipeline_folder_gives_its_text_encoder_and_tokenizer(tmp_path: Path) -> None:
    MODELS["umt5"]().save_pretrained(tmp_path / "text_encoder")
    save_tokenizer(tmp_path / "tokenizer")
    assert build_text_encoder(config(tmp_path)).encode(["a cross"])[0].shape == (3, 24)


def test_it_is_frozen(tmp_path: Path) -> None:
    encoder = build_text_encoder(config(save(MODELS["t5"](), tmp_path)))  # with dropout of one half, were it in training mode
    assert torch.equal(encoder.encode(["a disc"])[0], encoder.encode(["a disc"])[0])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())  # type: ignore[attr-defined]


def test_fingerprint_names_weights_padding_precision_and_vocabulary(tmp_path: Path) -> None:
    first, second = save(MODELS["t5"](), tmp_path / "a"), save(MODELS["t5"](), tmp_path / "b")
    fingerprint = build_text_encoder(config(first)).fingerprint()
    assert fingerprint == build_text_encoder(config(first)).fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["class"] == "T5EncoderModel"
    others = [config(second), config(first, pad="zeros_to_max_unmasked"), config(first, max_tokens=4), config(first, dtype="bfloat16")]
    assert all(build_text_encoder(other).fingerprint() != fingerprint for other in others)
    tokenizer = first / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"red": 4', '"redder": 4'))
    assert build_text_encoder(config(first)).fingerprint() != fingerprint


@pytest.mark.parametrize("damage", ["missing", "empty", "pickled"])
def test_an_unusable_path_is_named(damage: str, tmp_path: Path) -> None:
    if damage == "empty":
        (tmp_path / "there").mkdir()
    elif damage == "pickled":
        save(MODELS["t5"](), tmp_path / "there")
        (tmp_path / "there" / "model.safetensors").rename(tmp_path / "there" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"encoders\.text\.path"):
        build_text_encoder(config(tmp_path / "there"))


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoders.text.max_tokens: got 512, expected at most 20"):
        build_text_encoder(config(save(MODELS["clip"](), tmp_path), max_tokens=512))


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    """transformers would draw what is missing, in every process anew."""
    folder = save(umt5(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"encoders.text.path: the weights in .* lack 1 tensors of the model, such as encoder.block.1.layer.0"
    ):
        build_text_encoder(config(folder))


def test_a_tokenizer_without_tokens_of_its_own_gives_the_empty_caption_its_end_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert().eval()
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", unk_token="[UNK]").save_pretrained(tmp_path)
    encoder = build_text_encoder(config(tmp_path))
    assert [len(text) for text in encoder.encode(CAPTIONS)] == [5, 1, 2]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1]])).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode([""])[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(CAPTIONS)[1], expected, atol=1e-5, rtol=0)
