"""Train the small encoders that ship with the project, from the procedural renderer alone.

    python -m dit.train_small_encoders vae     # about 12 minutes on one CPU core
    python -m dit.train_small_encoders text    # about 1 minute

Writes `small_vae.safetensors` or `small_text.safetensors` and prints the figures that the tests hold it to. The text
encoder that ships is the result of the second line; the autoencoder had `vae --minutes 8.5` (4,500 steps on a shared
core), then `vae --start FILE --minutes 5` (1,500 steps).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines import moving_shapes
from dit.encoders import small_text, small_vae
from dit.encoders.small_text import SmallTextEncoder
from dit.encoders.small_vae import SmallVideoVAE
from dit.evaluation.moving_shapes import check_batch, summarise

TRAIN_SEED, EVALUATION_SEED = 0, 1  # of the stream of moving shapes


# --- what both trainings share ----------------------------------------------------------------------------------


def train(parameters: list[nn.Parameter], losses: Iterator[Tensor], steps: int, minutes: float, peak_rate: float) -> None:
    """Minimise a stream of losses with AdamW, warm-up and cosine decay; `minutes` shortens the schedule if need be."""
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    began = last_print = time.monotonic()
    progress = 0.0
    for step, loss in enumerate(losses):
        rate = peak_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        elapsed = time.monotonic() - began
        progress = min(1, max((step + 1) / steps, elapsed / (60 * minutes)))
        if time.monotonic() - last_print > 10 or progress == 1:
            last_print = time.monotonic()
            remaining = elapsed * (1 - progress) / progress
            print(f"step {step + 1}/{steps}  {progress:4.0%}  loss {loss.item():.4f}  ETA {remaining:.0f} s", flush=True)
        if progress == 1:
            return


# --- the video autoencoder --------------------------------------------------------------------------------------


def to_tensor(videos: np.ndarray) -> Tensor:
    """Turn (N, T, H, W, 3) in [0, 1] or uint8 into (N, 3, T, H, W) in [-1, 1]."""
    scaled = videos.astype(np.float32) / (255 if videos.dtype == np.uint8 else 1)
    return torch.from_numpy(scaled * 2 - 1).permute(0, 4, 1, 2, 3).contiguous()


def to_uint8(videos: Tensor) -> np.ndarray:
    """Turn (N, 3, T, H, W) in [-1, 1] into (N, T, H, W, 3) uint8."""
    return ((videos.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def dead_leaves(generator: np.random.Generator) -> np.ndarray:
    """Paint up to 24 moving shapes of any colour over a gradient: (T, H, W, 3) in [0, 1].

    The dead-leaves model has much of the statistics of natural images (Lee, Mumford & Huang, 2001,
    https://doi.org/10.1023/A:1011109015675); here the leaves move.
    """
    frames, side = moving_shapes.FRAMES, moving_shapes.SIDE
    corners = generator.random((2, 2, 3)) * generator.random()
    ramp = np.linspace(0, 1, side)
    rows = corners[0][None] * (1 - ramp)[:, None, None] + corners[1][None] * ramp[:, None, None]  # H 2 3
    still = rows[:, None, 0] * (1 - ramp)[None, :, None] + rows[:, None, 1] * ramp[None, :, None]  # H W 3
    video = np.repeat(still[None], frames, axis=0)
    for _ in range(int(2 ** generator.uniform(0, 4.6))):
        start, velocity = generator.uniform(0, side, 2), generator.normal(0, 0.7, 2)
        centres = start + velocity * np.arange(frames)[:, None]
        shape = moving_shapes.SHAPES[generator.integers(3)]
        alpha = moving_shapes.coverage(shape, 1.5 * 8 ** generator.random(), centres)[..., None]
        video = video * (1 - alpha) + alpha * generator.random(3)
    return video


def drifting_texture(generator: np.random.Generator) -> np.ndarray:
    """Drift a picture with the power spectrum of natural images, 1/f^2, at constant speed: (T, H, W, 3) in [0, 1]."""
    frames, side = moving_shapes.FRAMES, moving_shapes.SIDE
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :]
    frequency = np.sqrt(fx**2 + fy**2)
    amplitude = 1 / np.maximum(frequency, 1 / side) ** generator.uniform(0.8, 1.6)
    spectrum = np.fft.fft2(generator.normal(size=(3, side, side))) * amplitude
    velocity = generator.normal(0, 0.7, 2)
    drift = np.exp(-2j * np.pi * (fx * velocity[0] + fy * velocity[1]) * np.arange(frames)[:, None, None])
    grey_to_colour = np.eye(3) * 0.3 + generator.random((3, 3))
    video = np.einsum("cd,dthw->thwc", grey_to_colour, np.fft.ifft2(spectrum[:, None] * drift).real)
    return np.clip(generator.random(3) * 0.6 + 0.2 + video / video.std() * generator.uniform(0.05, 0.3), 0, 1)


def training_videos(batch: int, first: int) -> Iterator[Tensor]:
    """Yield (batch, 3, T, H, W): seven of eight are moving shapes of the training split, the rest anything at all."""
    index = first
    while True:
        videos = []
        for _ in range(batch):
            generator = np.random.Generator(np.random.Philox(key=TRAIN_SEED, counter=np.array([0, 1, index, 0], dtype=np.uint64)))
            match index % 16:
                case 7:
                    videos.append(dead_leaves(generator))
                case 15:
                    videos.append(drifting_texture(generator))
                case _:
                    videos.append(moving_shapes.draw(TRAIN_SEED, index).video / 255)
            index += 1
        yield to_tensor(np.stack(videos))


LATENT_NOISE = 0.15  # std of the noise on latents in training: neighbouring latents must decode to similar videos
PIXEL_WEIGHT = 100  # of the mean square error of pixels, against the two below
SCALE_PENALTY = 0.01  # of the mean square of latents
TAIL_PENALTY = 0.002  # of their mean fourth power: spreads what a small shape needs over more latents, nearer to a Gaussian


def vae_losses(codec: SmallVideoVAE, first: int, batch: int = 8) -> Iterator[Tensor]:
    """Yield reconstruction losses; noise and scale penalty are the KL term of a VAE whose posterior variance is fixed."""
    for video in training_videos(batch, first):
        latents = codec.raw_encode(video)
        decoded = codec.raw_decode(latents + LATENT_NOISE * torch.randn_like(latents))
        penalty = SCALE_PENALTY * latents.square().mean() + TAIL_PENALTY * latents.pow(4).mean()
        yield PIXEL_WEIGHT * F.mse_loss(decoded, video) + penalty


def psnr(decoded: Tensor, video: Tensor) -> float:
    """Average the peak signal-to-noise ratio over clips, in decibels; both (N, 3, T, H, W) in [-1, 1]."""
    errors = (decoded - video).square().mean((1, 2, 3, 4))
    return float((10 * torch.log10(4 / errors)).mean())


def drawn_clips(seed: int, count: int, split: moving_shapes.Split) -> tuple[np.ndarray, list[moving_shapes.Attributes]]:
    """Draw clips: videos (N, T, H, W, 3) uint8 and their attributes."""
    clips = [moving_shapes.draw(seed, index, split) for index in range(count)]
    return np.stack([clip.video for clip in clips]), [clip.attributes for clip in clips]


@torch.no_grad()
def measure_latents(codec: SmallVideoVAE, count: int = 1024) -> None:
    """Set the latent statistics of the codec from training clips."""
    videos, _ = drawn_clips(TRAIN_SEED, count, "train")
    latents = torch.cat([codec.raw_encode(to_tensor(chunk)) for chunk in np.array_split(videos, 16)])
    codec.latent_mean.copy_(latents.mean((0, 2, 3, 4)))
    codec.latent_std.copy_(latents.std((0, 2, 3, 4)))


@torch.no_grad()
def vae_figures(codec: SmallVideoVAE, count: int = 512) -> dict[str, float]:
    """Measure reconstructions of clips never trained on, held-out combinations included."""
    figures: dict[str, float] = {}
    for split in ("train", "held_out"):
        videos, attributes = drawn_clips(EVALUATION_SEED, count, split)
        video = to_tensor(videos)
        latents = torch.cat([codec.encode(chunk) for chunk in video.split(64)])
        decoded = torch.cat([codec.decode(chunk) for chunk in latents.split(64)])
        noisy = torch.cat([codec.decode(chunk + 0.1 * torch.randn_like(chunk)) for chunk in latents.split(64)])
        figures[f"{split}/psnr"] = psnr(decoded, video)
        figures[f"{split}/psnr_with_latent_noise_0.1"] = psnr(noisy, video)
        summary = summarise(check_batch(to_uint8(decoded), attributes))
        figures |= {f"{split}/adherence_{name}": rate for name, rate in summary.items() if isinstance(rate, float)}
    figures["latents/largest"] = float(latents.abs().max())
    figures["latents/kurtosis"] = float(latents.pow(4).mean() / latents.square().mean() ** 2)
    return figures


def train_vae(path: Path, minutes: float, steps: int, start: Path | None) -> dict[str, float]:
    """Train the video autoencoder, from the weights of `start` if given; write it; return its figures as read back."""
    codec = SmallVideoVAE.load(start).requires_grad_(True) if start else SmallVideoVAE()
    print(f"{sum(p.numel() for p in codec.parameters()):,} parameters")
    train(list(codec.parameters()), vae_losses(codec, first=10**6 if start else 0), steps, minutes, peak_rate=1.5e-3)
    measure_latents(codec)
    codec.save(path, figures={})
    codec.save(path, figures=vae_figures(SmallVideoVAE.load(path)))
    return vae_figures(SmallVideoVAE.load(path))


# --- the text encoder -------------------------------------------------------------------------------------------

ATTRIBUTE_VALUES = {
    "shape": moving_shapes.SHAPES,
    "colour": tuple(moving_shapes.PALETTE),
    "size": tuple(moving_shapes.RADII),
    "direction": tuple(moving_shapes.HEADINGS),
    "speed": tuple(moving_shapes.SPEEDS),
    "position": moving_shapes.ROWS + moving_shapes.COLUMNS,
}


def attribute_labels(attributes: list[moving_shapes.Attributes]) -> Tensor:
    """Number the values of every attribute: (N, 6)."""
    return torch.tensor([[values.index(getattr(a, name)) for name, values in ATTRIBUTE_VALUES.items()] for a in attributes])


class Probe(nn.Module):
    """Linear readout of a token: all attributes of its caption, and its own word."""

    def __init__(self, width: int, buckets: int) -> None:
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(width, len(values)) for values in ATTRIBUTE_VALUES.values())
        self.word = nn.Linear(width, buckets)

    def loss(self, embeddings: Tensor, labels: Tensor, words: Tensor) -> Tensor:
        """Average the cross-entropies: embeddings (B, S, D), labels (B, 6), words (B, S)."""
        tokens = embeddings.shape[1]
        readouts = [
            F.cross_entropy(head(embeddings).flatten(0, 1), label.repeat_interleave(tokens))
            for head, label in zip(self.attributes, labels.T, strict=True)
        ]
        own_word = F.cross_entropy(self.word(embeddings).flatten(0, 1), words.flatten())
        return sum(readouts) / len(readouts) + 0.2 * own_word

    def correct(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Tell which attributes are read correctly from each token: (B, S, 6)."""
        predictions = [head(embeddings).argmax(-1) for head in self.attributes]  # 6 of (B, S)
        return torch.stack(predictions, dim=-1) == labels[:, None]


def text_losses(encoder: SmallTextEncoder, probe: Probe, batch: int = 192) -> Iterator[Tensor]:
    """Yield the losses of random captions of the training split, a fresh batch each."""
    attributes = list(moving_shapes.all_attributes("train"))
    tokens, real = encoder.tokenise([moving_shapes.caption(a) for a in attributes])
    labels = attribute_labels(attributes)
    generator = torch.Generator().manual_seed(TRAIN_SEED)
    while True:
        rows = torch.randint(len(attributes), (batch,), generator=generator)
        yield probe.loss(encoder(tokens[rows], real[rows]), labels[rows], tokens[rows, :, 0])


@torch.no_grad()
def text_figures(encoder: SmallTextEncoder, probe: Probe) -> dict[str, float]:
    """Measure how many attributes a linear probe reads from the embeddings of every caption."""
    figures: dict[str, float] = {}
    for split in ("train", "held_out"):
        attributes = list(moving_shapes.all_attributes(split))
        embeddings = torch.stack(encoder.encode([moving_shapes.caption(a) for a in attributes]))
        correct = probe.correct(embeddings, attribute_labels(attributes)).double()
        figures |= {f"{split}/{name}": float(correct[:, :, i].mean()) for i, name in enumerate(ATTRIBUTE_VALUES)}
        figures[f"{split}/end_token"] = float(correct[:, -1].mean())
        figures[f"{split}/std"] = float(embeddings.std())
    return figures


def train_text(path: Path, minutes: float, steps: int, start: Path | None) -> dict[str, float]:
    """Train the text encoder, from the weights of `start` if given; write it; return its figures as read back."""
    encoder = SmallTextEncoder.load(start).requires_grad_(True) if start else SmallTextEncoder()
    probe = Probe(encoder.width, encoder.buckets)
    print(f"{sum(p.numel() for p in encoder.parameters()):,} parameters")
    train([*encoder.parameters(), *probe.parameters()], text_losses(encoder, probe), steps, minutes, peak_rate=1e-3)
    encoder.save(path, figures={})
    encoder.save(path, figures=text_figures(SmallTextEncoder.load(path), probe))
    return text_figures(SmallTextEncoder.load(path), probe)


# --- command line -----------------------------------------------------------------------------------------------

Training = Callable[[Path, float, int, Path | None], dict[str, float]]


def main() -> None:
    """Parse the command line, train one encoder, print its figures."""
    # One thread: the tensors are small, and the result does not depend on the number of cores.
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m dit.train_small_encoders", description=__doc__.splitlines()[0])
    parser.add_argument("encoder", choices=("vae", "text"))
    parser.add_argument("--steps", type=int, help="default: 6000 for vae, 800 for text")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="shorten the schedule to fit; the result then depends on the machine"
    )
    parser.add_argument("--start", type=Path, help="go on from the weights of this file, with clips not yet seen")
    parser.add_argument("--out", type=Path, default=small_vae.ASSET.parent, help="folder to write to (default: the assets of the package)")
    arguments = parser.parse_args()
    torch.manual_seed(TRAIN_SEED)
    trainings: dict[str, tuple[Training, Path, int]] = {
        "vae": (train_vae, small_vae.ASSET, 6000),
        "text": (train_text, small_text.ASSET, 800),
    }
    run, asset, steps = trainings[arguments.encoder]
    path = arguments.out / asset.name
    figures = run(path, arguments.minutes, arguments.steps or steps, arguments.start)
    print(json.dumps(figures, indent=2))
    print(f"wrote {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
