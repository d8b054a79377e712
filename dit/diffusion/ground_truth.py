"""Gaussian mixtures whose noised marginals, velocity, flow and likelihood are known in closed form: the truth that samplers are held to.

`python -m dit.diffusion.ground_truth` prints how near every sampler comes. A mixture is a denoiser of any path.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from data_pipelines.packed import Conditioning, PackedLatents, pack_conditioning
from dit.config.objective import SamplingConfig
from dit.config.path import VPPath
from dit.diffusion.clean_tokens import Told
from dit.diffusion.denoiser import Denoiser
from dit.diffusion.draws import noise_tokens
from dit.diffusion.editing import Known, complete
from dit.diffusion.paths import Coefficients, Path, build_path
from dit.diffusion.samplers import levels, sample
from dit.diffusion.times import RECTIFIED_FLOW

DETERMINISTIC = ("euler", "heun", "rk4", "ddim", "dpmpp_2m", "unipc")
STOCHASTIC = ("ancestral", "dpmpp_2m_sde", "euler_maruyama")


@dataclass(frozen=True)
class GaussianMixture:
    """Data of isotropic components: means (K, P), one standard deviation each (K,), weights (K,); tokens are independent draws."""

    means: Tensor
    stds: Tensor
    weights: Tensor
    path: Path = RECTIFIED_FLOW

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) in nats, (L,), for x (L, P) at t (L,)."""
        return self._log_parts(x, self._at(x, t)).logsumexp(1)

    def log_posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(component | x_t = x), (L, K)."""
        return self._log_parts(x, self._at(x, t)).log_softmax(1)

    def ends(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[latents | x_t = x] and E[noise | x_t = x], (L, P) each, for x (L, P) at t (L,)."""
        c = self._at(x, t)
        share = self._log_parts(x, c).softmax(1)[..., None]  # (L, K, 1)
        variances, means = self.stds.to(x).square(), self.means.to(x)
        total = (c.a.square() * variances + c.b.square())[..., None]  # (L, K, 1)
        offset = x[:, None] - c.a[..., None] * means  # (L, K, P)
        latents = means + (c.a * variances)[..., None] * offset / total
        return (share * latents).sum(1), (share * c.b[..., None] * offset / total).sum(1)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t(x), (L, P)."""
        return -self.ends(x, t)[1] / self._at(x, t).b

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[d x_t / d t | x_t = x], (L, P)."""
        c, (latents, noise) = self._at(x, t), self.ends(x, t)
        return c.da * latents + c.db * noise

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.velocity(x_t, cond.per_token(t))

    def draw(self, count: int, seed: int) -> Tensor:
        """(count, P) samples of the data, float32."""
        rng = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights.float(), count, replacement=True, generator=rng)
        return (self.means[which] + self.stds[which, None] * torch.randn(count, self.means.shape[1], generator=rng)).float()

    def _at(self, x: Tensor, t: Tensor) -> Coefficients:
        return Coefficients(*(part[:, None].to(x) for part in self.path.at(t)))  # (L, 1)

    def _log_parts(self, x: Tensor, c: Coefficients) -> Tensor:
        total = c.a.square() * self.stds.to(x).square() + c.b.square()  # (L, K)
        squared = (x[:, None] - c.a[..., None] * self.means.to(x)).square().sum(-1)
        return self.weights.to(x).log() - squared / (2 * total) - x.shape[1] / 2 * (2 * math.pi * total).log()


@dataclass(frozen=True)
class ProductMixture:
    """x = Q y with independent coordinates y_d, each a mixture of two Gaussians: D dimensions, 2^D unequal modes, unit variance.

    Noise is isotropic, so the flow moves each y_d alone, and in one dimension it keeps quantiles: its map is F_s^-1(F_t(y_d)).
    means, weights: (D, 2). stds: (D, 1). rotation: Q (D, D), orthogonal. All float64.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    rotation: Tensor
    path: Path

    @classmethod
    def standard(cls, path: Path = RECTIFIED_FLOW, dimensions: int = 8) -> "ProductMixture":
        """Weights from 0.29 to 0.48, components 9 to 5 of their standard deviations apart, a fixed random Q."""
        rng = torch.Generator().manual_seed(8)
        rotation, _ = torch.linalg.qr(torch.randn(dimensions, dimensions, dtype=torch.float64, generator=rng))
        place = torch.linspace(0, 1, dimensions, dtype=torch.float64)[:, None]
        weight, apart = 0.29 + 0.19 * place, 9 - 4 * place
        std = (1 + weight * (1 - weight) * apart.square()).rsqrt()
        means = torch.cat([-apart * (1 - weight), apart * weight], dim=1) * std  # weighted, their mean is 0
        return cls(means, std, torch.cat([weight, 1 - weight], dim=1), rotation, path)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        c = Coefficients(*(cond.per_token(part.to(x_t))[:, None] for part in self.path.at(t)))
        a, b, means, variances = c.a[..., None], c.b[..., None], self.means.to(x_t), self.stds.to(x_t).square()
        y = x_t @ self.rotation.to(x_t)
        offset, total = y[..., None] - a * means, a.square() * variances + b.square()  # (L, D, 2), (L, D, 1)
        share = (self.weights.to(x_t).log() - offset.square() / (2 * total)).softmax(-1)
        latents, noise = means + a * variances * offset / total, b * offset / total
        return (c.da * (share * latents).sum(-1) + c.db * (share * noise).sum(-1)) @ self.rotation.to(x_t).T

    def log_prob(self, x: Tensor, t: float) -> Tensor:
        """log p_t(x) in nats, (L,), for x (L, D)."""
        y, (centres, std) = x @ self.rotation, self._at(t)
        log_density = -((y[..., None] - centres) / std).square() / 2 - (std * math.sqrt(2 * math.pi)).log()
        return (self.weights.log() + log_density).logsumexp(-1).sum(1)

    def flow_map(self, x: Tensor, t: float, s: float) -> Tensor:
        """Where the probability flow takes x (L, D) from level t to s, to machine precision."""
        return self._quantile(self._cdf(x @ self.rotation, t), s) @ self.rotation.T

    def distance(self, x: Tensor) -> float:
        """Mean over the coordinates y_d of the Wasserstein-2 distance of the samples x (L, D) to the data."""
        y = (x.double() @ self.rotation).sort(dim=0).values
        u = (torch.arange(len(y), dtype=torch.float64)[:, None] + 0.5) / len(y)
        return float((y - self._quantile(u.expand_as(y), 0.0)).square().mean(0).sqrt().mean())

    def draw(self, count: int, seed: int) -> Tensor:
        """(count, D) samples of the data, float64."""
        u = torch.rand(count, len(self.means), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return self._quantile(u, 0.0) @ self.rotation.T

    def _at(self, t: float) -> tuple[Tensor, Tensor]:
        c = self.path.at(torch.tensor(t, dtype=torch.float64))
        return c.a * self.means, (c.a.square() * self.stds.square() + c.b.square()).sqrt()  # (D, 2), (D, 1)

    def _cdf(self, y: Tensor, t: float) -> Tensor:
        centres, std = self._at(t)
        return (self.weights * torch.special.ndtr((y[..., None] - centres) / std)).sum(-1)  # (L, D)

    def _quantile(self, u: Tensor, t: float) -> Tensor:
        centres, std = self._at(t)
        reach = (centres.abs() + 10 * std).max()
        low, high = -reach.expand_as(u), reach.expand_as(u)
        for _ in range(64):
            middle = (low + high) / 2
            below = self._cdf(middle, t) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class TokenMixture:
    """Samples of D tokens of one channel each, jointly a mixture: means (K, D), one standard deviation (K,) and weight (K,) of each.

    As a denoiser it takes a level of each token, so it draws p(unknown | known) exactly where it is told the known tokens.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    path: Path = RECTIFIED_FLOW

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        count = self.means.shape[1]
        c = Coefficients(*(cond.per_token(part.to(x_t)).view(-1, 1, count) for part in self.path.at(t)))  # (n, 1, D)
        means, variances = self.means.to(x_t), self.stds.to(x_t).square()[:, None]  # (K, D), (K, 1)
        total, offset = c.a.square() * variances + c.b.square(), x_t.view(-1, 1, count) - c.a * means  # (n, K, D)
        share = (self.weights.to(x_t).log() - (offset.square() / total + total.log()).sum(-1) / 2).softmax(1)[..., None]
        latents, noise = means + c.a * variances * offset / total, c.b * offset / total
        return (c.da * (share * latents).sum(1, keepdim=True) + c.db * (share * noise).sum(1, keepdim=True)).view(-1, 1)

    @classmethod
    def standard(cls, path: Path = RECTIFIED_FLOW) -> "TokenMixture":
        """Pairs: where the first is 0.9, the second is near 1.5 (41 %), -0.9 (51 %) or -1.2; alone its mean is -0.3."""
        means = torch.tensor([[1.0, 1.5], [-0.2, -1.2], [0.8, -0.9]], dtype=torch.float64)
        parts = torch.tensor([[0.5, 0.6, 0.4], [0.3, 0.4, 0.3]], dtype=torch.float64)
        return cls(means, parts[0], parts[1], path)

    def given(self, known: Tensor) -> "TokenMixture":
        """The mixture of the last tokens given that the first ones are `known` (D1,): p(unknown | known)."""
        offset = (known - self.means[:, : len(known)]) / self.stds[:, None]
        weights = (self.weights.log() - offset.square().sum(1) / 2 - len(known) * self.stds.log()).softmax(0)
        return TokenMixture(self.means[:, len(known) :], self.stds, weights, self.path)

    def quantiles(self, count: int) -> Tensor:
        """The quantiles (i + 1/2) / count of the one token of this mixture, (count,) float64."""
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        parts = replace(ProductMixture.standard(dimensions=1), means=self.means.T.double(), stds=self.stds[None].double(), path=self.path)
        return replace(parts, weights=self.weights[None].double())._quantile(u[:, None], 0.0)[:, 0]


def points(count: int, text_width: int = 4) -> Conditioning:
    """Conditioning of `count` samples of one token each, with one zero text token."""
    return pack_conditioning([(1, 1, 1)] * count, [torch.zeros(1, text_width)] * count)


def pack_of_points(latents: Tensor, first_key: int) -> PackedLatents:
    """Samples of one token each: latents (n, P), keys counted from `first_key`."""
    count = len(latents)
    ids = tuple(f"point/{i}" for i in range(count))
    return PackedLatents(latents, points(count), tuple(range(first_key, first_key + count)), ids, torch.ones(count))


def _print_edits(count: int) -> None:
    """How far the second tokens of `count` pairs end from p(second | first = 0.9), by what the network is told of the first."""
    truth, value = TokenMixture.standard(), torch.tensor([0.9], dtype=torch.float64)
    known = Known(torch.tensor([0.9, 0.0], dtype=torch.float64).repeat(count)[:, None], torch.tensor([True, False]).repeat(count))
    cond, quantiles = pack_conditioning([(2 * count, 1, 1)], [torch.zeros(1, 4)]), truth.given(value).quantiles(count)
    told = Told(truth, RECTIFIED_FLOW, known.latents, known.mask)
    print("\n| second token of a pair, given the first | steps | repeats | jump | Wasserstein-2 |\n|---|---|---|---|---|")
    rows: list[tuple[str, Denoiser, str, int, float, int, int]] = [
        ("told clean tokens", told, "heun", 40, 1.0, 1, 1),
        ("replacement", truth, "ancestral", 40, 0.3, 1, 4),
        ("replacement", truth, "ancestral", 40, 0.3, 10, 4),
    ]
    for name, denoiser, sampler, steps, k, repeats, jump in rows:
        sampling = SamplingConfig.model_validate({"sampler": sampler, "steps": steps})
        drawn = complete(denoiser, known, cond, [0], levels(sampling, k), sampling, RECTIFIED_FLOW, repeats, jump)[1::2, 0]
        error = float((drawn.sort().values - quantiles).square().mean().sqrt())
        print(f"| {name} | {steps} | {repeats} | {jump} | {error:.4f} |")


def main(count: int = 1000, steps: tuple[int, ...] = (10, 20, 50)) -> None:
    """Print how far each sampler ends from the exact flow map, and its samples from the data, for the exact velocity; then edits."""
    cond, noise = pack_conditioning([(1, count, 1)], [torch.zeros(1, 4)]), noise_tokens([0], [count], 8, "start noise")
    floor = ProductMixture.standard().distance(ProductMixture.standard().draw(count, 1))
    print(f"Mixture of 256 modes in 8 dimensions, {count} samples, exact velocity; Wasserstein-2 of real samples: {floor:.4f}\n")
    print("| sampler | path | steps | RMSE to the flow map | Wasserstein-2 to the data |\n|---|---|---|---|---|")
    for name, path in (("rectified_flow", RECTIFIED_FLOW), ("vp", build_path(VPPath(name="vp")))):
        mixture = ProductMixture.standard(path)
        truth = mixture.flow_map(noise.double() * path.at(torch.tensor(1.0)).b, 1.0, 0.0)
        for sampler, number in product(DETERMINISTIC + STOCHASTIC, steps):
            config = SamplingConfig.model_validate({"sampler": sampler, "steps": number})
            drawn = sample(mixture, cond, [0], 8, config, 1.0, path)
            error = f"{float((drawn - truth).square().mean().sqrt()):.4f}" if sampler not in STOCHASTIC else "-"
            print(f"| {sampler} | {name} | {number} | {error} | {mixture.distance(drawn):.4f} |")
    _print_edits(2 * count)


if __name__ == "__main__":
    main()
