"""The training engine: a module, sharded or replicated, with one function that owns "an optimizer step happened".

Knows nothing of diffusion, of data or of files. Under `bf16` the module holds bfloat16 weights and computes in what its layers
choose; the master weights, sums of gradients, moments and averages that each rank keeps for its share are float32 in any case.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dit.config import FitRun
from dit.engine.deepspeed import ZeroShards
from dit.engine.guard import Guard, Verdict
from dit.engine.optimizer import AdamWithEMA, ema_kinds, lr_at, parameter_groups
from dit.engine.places import Place
from dit.engine.replicas import Replicas
from dit.runtime import distributed, faults


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + size) of a flattened parameter, as this rank holds them: float32 views by kind.

    Kinds are the weight ("model"), its averages, and the two moments of Adam.
    """

    name: str
    start: int
    size: int
    views: Mapping[str, Tensor]


class Outcome(NamedTuple):
    """How an optimizer step ended. grad_norm: before clipping; not finite if a gradient is not."""

    grad_norm: float
    verdict: Verdict


class Engine:
    """A module with its optimizer, its averaged weights and its place in the run.

    module: whole, on any device; call it directly. step: steps of the run so far, `skipped` of them without effect. samples_seen: samples
    of those steps.
    """

    def __init__(self, module: nn.Module, run: FitRun, accumulation: int) -> None:
        buffers = sorted(module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)})
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        assert not buffers, f"buffers are not saved; make these parameters or compute them: {buffers}"
        assert not frozen, f"the engine trains every parameter, these are frozen: {frozen}"
        self.module = module
        self.run = run
        self.step = self.skipped = self.samples_seen = 0
        self.shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self.kinds = ("model", *ema_kinds(run.ema), "exp_avg", "exp_avg_sq")
        self.guard = Guard(run.guard)
        self._step_samples = 0
        self._optimizer = AdamWithEMA(parameter_groups(module, run.optimizer.weight_decay), run.optimizer, run.ema)
        exact = {name: parameter.detach().float().flatten() for name, parameter in module.named_parameters()}
        if run.engine.precision == "bf16":
            module.bfloat16()  # before it moves, so that no device has to hold all of it in float32
        module.to(distributed.device())
        is_sharded = run.engine.offload != "none" or (run.engine.zero_stage > 0 and distributed.world_size() > 1)
        self._shards = (ZeroShards if is_sharded else Replicas)(module, self._optimizer, run, accumulation)  # one rank has nothing to shard
        self._optimizer.reset(self._shards.masters)
        if run.engine.precision == "bf16":
            self._start_from(exact)  # the master weights were made of rounded ones

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def backward(self, loss_sum: Tensor, step_samples: int) -> None:
        """Accumulate the gradient of `loss_sum`, the summed loss of this rank's pack, over a global step of `step_samples`.

        After all packs of all ranks, the gradient is that of the mean loss of the global step.
        """
        # Averaged over ranks what here is a sum; ranks that compute a pack together each have its whole loss and a part of its gradient.
        self._shards.backward(loss_sum * (distributed.data_world_size() / step_samples))
        self._step_samples = step_samples

    def optimizer_step(self, loss: float) -> Outcome:
        """End the step whose gradients have accumulated and whose mean loss over all ranks is `loss`.

        Learning rate, weights, averages and counters change here and nowhere else. If the guard does not trust the step, weights,
        moments and averages stay as they are on all ranks, and it counts as skipped.
        """
        assert self._shards.is_complete, "optimizer_step before the last pack of the step"
        self.samples_seen += self._step_samples
        self._optimizer.set_lr(lr_at(self.run.optimizer, self.samples_seen, self.run.train.samples))
        verdicts: list[Verdict] = []

        def decide(norm: float) -> bool:  # once for all groups of parameters
            if not verdicts:
                verdicts.append(self.guard.judge(loss, norm))
            return verdicts[0].is_taken

        norm = self._shards.step(self.guard.max_norm(self.run.optimizer.max_grad_norm), decide)
        if not decide(norm):  # DeepSpeed refuses a norm that is not finite without asking
            self.skipped += 1
        self.step += 1
        faults.point("step.taken")
        return Outcome(norm, verdicts[0])

    @contextmanager
    def ema_weights(self, kind: str = "ema") -> Iterator[nn.Module]:
        """Inside, the module holds averaged weights; after, exactly the ones before. Called by all ranks.

        Under ZeRO stage 3 all ranks must also call the module, alike.
        """
        masters = self._shards.masters
        weights = [master.data for master in masters]
        try:
            for master in masters:
                master.data = self._optimizer.state[master][kind]
            self._shards.publish()
            yield self.module
        finally:
            for master, data in zip(masters, weights, strict=True):
                master.data = data
            self._shards.publish()

    def fragments(self) -> Iterator[Fragment]:
        """All that this rank holds."""
        return self._views(self._shards.places())

    def owned(self) -> Iterator[Fragment]:
        """What this rank saves; over all ranks every element exactly once."""
        return self._views(self._shards.owned())

    def restore(self, step: int, skipped: int, samples_seen: int) -> None:
        """Go on from `step`, after the fragments have been filled: publish the weights to the module of every rank."""
        for master in self._shards.masters:
            self._optimizer.state[master]["step"].fill_(step - skipped)
        self._shards.publish()
        self.step, self.skipped, self.samples_seen = step, skipped, samples_seen

    def _views(self, places: Iterable[Place]) -> Iterator[Fragment]:
        masters = self._shards.masters
        for place in places:
            master = masters[place.group]
            sources = {"model": master.data, **{kind: self._optimizer.state[master][kind] for kind in self.kinds[1:]}}
            views = {kind: source.narrow(0, place.offset, place.size) for kind, source in sources.items()}
            yield Fragment(place.name, place.start, place.size, views)

    @torch.no_grad()
    def _start_from(self, weights: Mapping[str, Tensor]) -> None:
        for fragment in self.fragments():
            for kind in ("model", *ema_kinds(self.run.ema)):
                fragment.views[kind].copy_(weights[fragment.name].narrow(0, fragment.start, fragment.size))
        self._shards.publish()
