"""The discrete-time objective: L_simple, a learned variance by the hybrid loss, and the variational bound in bits per dimension.

Sources: Ho et al. 2020, arXiv:2006.11239, eqs. 5 and 14; Nichol & Dhariwal 2021, arXiv:2102.09672, eqs. 15 and 16.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from data_pipelines import randomness
from data_pipelines.packed import Conditioning, PackedLatents
from dit.config.objective import DDPMConfig
from dit.config.path import Quantity
from dit.diffusion.chain import Posterior, Variance, gaussian_kl, log_variance, posterior
from dit.diffusion.denoiser import Denoiser, ask
from dit.diffusion.objectives import drop_conditions, noised
from dit.diffusion.paths import Path, VariancePreserving, betas_of, on_tokens
from dit.diffusion.times import uniforms
from dit.runtime.losses import Losses


class DDPM:
    """L_simple at a step of the chain drawn for each sample; with a learned variance also one term of the bound.

    The bound moves the variance only: its mean is detached. null_text, null_label: as for the other objectives.
    """

    def __init__(self, config: DDPMConfig, null_text: Tensor, null_label: int | None) -> None:
        self.config = config
        self.path = VariancePreserving.of_betas(betas_of(config.path), config.path.zero_terminal_snr)
        self.null_text, self.null_label = null_text, null_label
        self.probabilities = step_probabilities(self.path, config.times == "importance")  # (T,)

    def __call__(self, denoiser: Denoiser, batch: PackedLatents, progress: float) -> Losses:
        """Loss of each sample, zero for holes. denoiser: the raw network, one call of it."""
        config, path, channels = self.config, self.path, batch.tokens.shape[1]
        steps = torch.searchsorted(self.probabilities.cumsum(0), uniforms(batch.keys, None)).clamp(max=path.steps - 1)
        weight = 1 / (path.steps * self.probabilities[steps])  # (n,), 1 for uniform steps
        x_t, noise, t = noised(batch, (steps + 1) / path.steps, path)
        cond = drop_conditions(batch.cond, batch.keys, config.condition_dropout, self.null_text, self.null_label)
        answer = ask(denoiser, path, x_t, t, cond).float()
        target = path.target(config.prediction, batch.tokens, noise, t, batch.cond)
        loss = batch.cond.per_sample((answer[:, :channels] - target).square())
        if config.variance == "learned":
            detached = torch.cat([answer[:, :channels].detach(), answer[:, channels:]], dim=1)
            bits = bound_terms(path, detached, config.prediction, "learned", batch, x_t, steps + 1)
            loss = loss + config.bound_weight * path.steps * bits
        return Losses(loss * weight.to(loss) * batch.weights, t)


def step_probabilities(path: VariancePreserving, importance: bool) -> Tensor:
    """How often each step 1 .. T is drawn, (T,) float64: evenly, or as sqrt(E L_t^2) of the bound on unit Gaussian data.

    Nichol & Dhariwal estimate E L_t^2 from past losses; a fixed table keeps a run independent of its history.
    """
    if not importance:
        return torch.full((path.steps,), 1 / path.steps, dtype=torch.float64)
    i = torch.arange(1, path.steps + 1, dtype=torch.float64)
    c, back = path.at(i / path.steps), _step_back(path, i)
    term = (back.of_latents * c.b).square() / back.small  # |latents - predicted|^2 is b^2 there: Var(latents | x_t)
    return term / term.sum()


def bound_terms(
    path: VariancePreserving, answer: Tensor, prediction: Quantity, variance: Variance, batch: PackedLatents, x_t: Tensor, steps: Tensor
) -> Tensor:
    """The term L_(i-1) of the bound at steps i (n,) in 1 .. T: (n,) bits per dimension.

    answer: (L, P) or (L, 2 P), the raw network at x_t (L, P). The last term, at i = 1, is the density of the latents.
    """
    cond, channels = batch.cond, x_t.shape[1]
    t = (steps.double() / path.steps).to(x_t.device)
    back = _step_back(path, steps.double().to(x_t.device))
    x, latents = x_t.double(), batch.tokens.double()
    predicted = path.convert(answer[:, :channels].double(), prediction, "latents", x, t, cond)
    on_token = Posterior(*(on_tokens(part, cond, x) for part in back))
    log_var = log_variance(on_token, variance, answer[:, channels:].double() if variance == "learned" else None)
    offset = on_token.of_latents * (predicted - latents)  # of the means: their part in x_t is the same
    terms = gaussian_kl(offset, on_token.small.log(), torch.zeros_like(offset), log_var)
    density = (math.log(2 * math.pi) + log_var + (predicted - latents).square() * (-log_var).exp()) / 2
    first = cond.per_token((steps == 1).to(x_t.device))[:, None]
    return cond.per_sample(torch.where(first, density, terms)) / math.log(2)


@torch.no_grad()
def variational_bound(
    network: Denoiser, path: VariancePreserving, prediction: Quantity, variance: Variance, batch: PackedLatents
) -> tuple[Tensor, Tensor]:
    """Bits per dimension of each sample by one pass over the whole chain: terms L_0 .. L_(T-1), (T, n), and the prior's, (n,).

    Their sum bounds -log2 p(latents) / dimensions, a density. Noise of each step is drawn by the sample's key.
    """
    terms = []
    for step in range(1, path.steps + 1):
        steps = torch.full((len(batch.keys),), step)
        fresh = replace(batch, keys=tuple(randomness.key(key, "bound", step) for key in batch.keys))
        x_t, _, t = noised(fresh, steps / path.steps, path)
        answer = ask(network, path, x_t, t, batch.cond).float()
        terms.append(bound_terms(path, answer, prediction, variance, batch, x_t, steps))
    return torch.stack(terms), prior_bits(path, batch.tokens, batch.cond)


def prior_bits(path: Path, latents: Tensor, cond: Conditioning) -> Tensor:
    """KL(q(x_1 | latents) | N(0, I)) in bits per dimension, (n,)."""
    c = path.at(torch.ones(len(cond.grids), dtype=torch.float64, device=latents.device))
    x = latents.double()
    zero = torch.zeros_like(x)
    return cond.per_sample(gaussian_kl(on_tokens(c.a, cond, x) * x, 2 * on_tokens(c.b, cond, x).log(), zero, zero)) / math.log(2)


def _step_back(path: VariancePreserving, i: Tensor) -> Posterior:
    """The posterior from step i to i - 1; the variance at i = 1, which would be 0, is that at i = 2, as published."""
    back = posterior(path, i / path.steps, (i - 1) / path.steps)
    second = posterior(path, torch.full_like(i, 2 / path.steps), torch.full_like(i, 1 / path.steps)).small
    return back._replace(small=torch.where(i == 1, second, back.small))
