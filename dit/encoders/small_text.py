"""A small text encoder that ships with the project, for smoke runs, tests and examples on a CPU.

Words are hashed, so any text in any language has an embedding; those of the moving-shapes captions are trained. Two
transformer layers make the embeddings contextual: the "left" of "moving left" differs from that of "near the left".

Letters: B captions, S tokens of the longest one, S_i those of caption i, D width, K heads.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ASSET = Path(__file__).parent / "assets" / "small_text.safetensors"
MAX_WORDS = 255  # longer captions are cut, the end token comes on top


def words_of(caption: str) -> list[str]:
    """Split a caption into lower-case words and punctuation marks."""
    spaced = "".join(c if c.isalnum() or c in "'-_" else f" {c} " for c in caption.lower())
    return spaced.split()


def hash_word(word: str, buckets: int) -> tuple[int, int]:
    """Place a word in two of the buckets, by CRC-32 of its UTF-8 bytes; bucket 0 is kept for the end of the text.

    A word is the sum of two rows, so two words are the same only where both hashes meet (Svenstrup et al., 2017,
    https://arxiv.org/abs/1709.03933).
    """
    first, second = (1 + zlib.crc32(word.encode() + salt) % (buckets - 1) for salt in (b"", b"\x01again"))
    return first, second


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer with full attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm_attention(x)), "b s (three k d) -> three b k s d", three=3, k=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])  # B K S D/K
        x = x + self.out(rearrange(attended, "b k s d -> b s (k d)"))
        return x + self.mlp(self.norm_mlp(x))


class SmallTextEncoder(nn.Module):
    """Encode captions to contextual embeddings of their words and of an end token, each of unit variance."""

    positions: Tensor  # (MAX_WORDS + 1, D)

    def __init__(self, width: int = 64, buckets: int = 2048, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.width, self.buckets, self.depth, self.heads = width, buckets, depth, heads
        self.embedding = nn.Embedding(buckets, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # unit variance, whatever the weights
        self.register_buffer("positions", sinusoids(MAX_WORDS + 1, width), persistent=False)

    def tokenise(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hash the words: buckets (B, S, 2), and which of the S tokens are real (B, S)."""
        pairs = [[hash_word(word, self.buckets) for word in words_of(c)[:MAX_WORDS]] + [(0, 0)] for c in captions]
        longest = max(len(caption) for caption in pairs)
        tokens = torch.tensor([caption + [(0, 0)] * (longest - len(caption)) for caption in pairs])
        lengths = torch.tensor([len(caption) for caption in pairs])
        return tokens, torch.arange(longest) < lengths[:, None]

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Embed tokens (B, S, 2), real (B, S) -> (B, S, D); what stands at unreal tokens means nothing."""
        x = self.embedding(tokens).sum(2) + self.positions[: tokens.shape[1]]  # B S D
        for layer in self.layers:
            x = layer(x, real)
        return self.norm(x)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Encode captions to one (S_i, D) float32 each: its words, then an end token, which is all of an empty caption."""
        if isinstance(captions, str):
            raise TypeError("got one string, expected a list of captions")
        if not captions:
            return []
        tokens, real = (tensor.to(self.embedding.weight.device) for tensor in self.tokenise(captions))
        embeddings = self(tokens, real)
        return [embedding[mask] for embedding, mask in zip(embeddings, real, strict=True)]

    def save(self, path: Path, figures: dict[str, float]) -> None:
        """Write weights as fp16, and sizes and measured figures as JSON in the header."""
        header = {"width": self.width, "buckets": self.buckets, "depth": self.depth, "heads": self.heads, "figures": figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, path, metadata={"small_text": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path | None = None) -> SmallTextEncoder:
        """Read the encoder that ships with the project, or another file of `save`; frozen, float32, in eval mode."""
        with safe_open(path or ASSET, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("small_text", "null"))
            if header is None:
                raise ValueError(f"{path or ASSET}: got a safetensors file without the header 'small_text'")
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        encoder = cls(header["width"], header["buckets"], header["depth"], header["heads"])
        encoder.load_state_dict(weights)
        return encoder.eval().requires_grad_(False)


def sinusoids(count: int, width: int) -> Tensor:
    """Tabulate the positions 0 .. count - 1 (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.5)."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2)))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
