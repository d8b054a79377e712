"""ZeRO stage 0, and all stages of a single rank: every rank holds everything, and gradients are summed in one message a group.

DeepSpeed's stage 0 cannot accumulate bfloat16 gradients in float32 and applies gradients that are no number.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dit.config import FitRun
from dit.engine.optimizer import AdamWithEMA
from dit.engine.places import Place
from dit.runtime import distributed


class Replicas:
    """A module whose float32 weights and gradients lie in flat tensors, one a parameter group, the same on all ranks."""

    def __init__(self, module: nn.Module, optimizer: AdamWithEMA, run: FitRun, accumulation: int) -> None:
        self._optimizer, self._accumulation, self._seen = optimizer, accumulation, 0
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups: list[list[nn.Parameter]] = [group["params"] for group in optimizer.param_groups]
        self.masters = [torch.cat([p.detach().float().flatten() for p in group]) for group in groups]
        self._placed: list[tuple[nn.Parameter, Place]] = []
        if run.engine.precision == "bf16":
            module.bfloat16()
        for number, (group, master) in enumerate(zip(groups, self.masters, strict=True)):
            master.grad, offset = torch.zeros_like(master), 0
            for p in group:
                self._placed.append((p, Place(names[p], 0, p.numel(), number, offset)))
                _collect_gradient(p, master.grad.narrow(0, offset, p.numel()).view(p.shape))
                offset += p.numel()
            optimizer.param_groups[number]["params"] = [master]
        self.publish()

    def places(self) -> Iterator[Place]:
        """Where `masters` hold which parameter: all of it."""
        return (place for _, place in self._placed)

    def owned(self) -> Iterator[Place]:
        """This rank's even share of `places`, which it writes to checkpoints."""
        rank, world = distributed.rank(), distributed.world_size()
        for place in self.places():
            size = len(self.masters[place.group])
            mine = place.cut(size * rank // world, size * (rank + 1) // world)
            if mine.size > 0:
                yield mine

    def copies(self) -> dict[str, Tensor]:
        """What every rank holds alike, by kind and name: everything."""
        found: dict[str, Tensor] = {f"published/{place.name}": p for p, place in self._placed}
        for place in self.places():
            master = self.masters[place.group]
            for kind, whole in {"model": master, **self._optimizer.state[master]}.items():
                if kind != "step":
                    found[f"{kind}/{place.name}"] = whole.narrow(0, place.offset, place.size)
        return found

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, whose mean over ranks is meant."""
        loss.backward()
        self._seen += 1

    @property
    def is_complete(self) -> bool:
        """Whether all packs of the step have been seen."""
        return self._seen == self._accumulation

    @torch.no_grad()
    def step(self, max_norm: float, decide: Callable[[float], bool]) -> float:
        """Take the step if `decide(gradient norm)`, the same on all ranks; returns the norm before clipping. Gradients are gone after."""
        gradients = [master.grad for group in self._optimizer.groups_in_turn for master in group["params"]]
        for gradient in gradients:
            distributed.all_reduce_sum(gradient)
        world = distributed.world_size()
        norm = nn.utils.get_total_norm(gradients) / world
        if decide(float(norm)):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / world  # one pass for the mean over ranks and for clipping
            for gradient in gradients:
                gradient.mul_(factor)
            self._optimizer.step()
            self.publish()
        for gradient in gradients:
            gradient.zero_()
        self._seen = 0
        return float(norm)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the module the weights that `masters` hold."""
        for p, place in self._placed:
            weights = self.masters[place.group].narrow(0, place.offset, place.size).view(p.shape)
            if p.dtype == weights.dtype:
                p.data = weights  # a view: an optimizer step changes the module
            else:
                p.copy_(weights)


def _collect_gradient(p: nn.Parameter, collected: Tensor) -> None:
    """Have the gradients of `p` added up in `collected`: in place, or by a hook if `p` is of another type."""
    if p.dtype == collected.dtype:
        p.grad = collected
        return

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        collected.add_(parameter.grad)
        parameter.grad = None

    p.register_post_accumulate_grad_hook(move)
