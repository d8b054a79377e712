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
from dit.engine import copies
from dit.engine.deepspeed import ZeroShards
from dit.engine.guard import Guard, Verdict
from dit.engine.optimizer import AdamWithEMA, ema_kinds, lr_at, parameter_groups
from dit.engine.places import Place
from dit.engine.replicas import Replicas
from dit.engine.turns import Turns, is_of
from dit.runtime import distributed, faults


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + size) of a flattened parameter, as this rank holds them: float32 views by kind.

    Kinds are the weight ("model"), its averages if it is of the first network, and the two moments of Adam.
    """

    name: str
    start: int
    size: int
    views: Mapping[str, Tensor]


class Outcome(NamedTuple):
    """How an optimizer step ended. grad_norm: before clipping; not finite if a gradient is not. network: the one in turn."""

    grad_norm: float
    verdict: Verdict
    network: str


class Engine:
    """A module with its optimizer, its averaged weights and its place in the run.

    module: whole, on any device; call it directly. step: steps of the run so far, of them `taken` with effect on each network.
    samples_seen: samples of those steps. lr: of the last step.
    """

    def __init__(self, module: nn.Module, run: FitRun, accumulation: int, turns: Turns | None = None) -> None:
        buffers = sorted(module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)})
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        assert not buffers, f"buffers are not saved; make these parameters or compute them: {buffers}"
        assert not frozen, f"the engine trains every parameter, these are frozen: {frozen}"
        self.module = module
        self.run = run
        self.turns = turns or Turns.none(run.optimizer)
        self.step, self.samples_seen, self.lr = 0, 0, 0.0
        self.taken = dict.fromkeys(self.turns.optimizers, 0)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self.kinds = ("model", *ema_kinds(run.ema), "exp_avg", "exp_avg_sq")
        self.guard = Guard(run.guard)
        self._step_samples = 0
        groups = [
            {**group, "network": network, "betas": config.betas, "eps": config.eps}
            for network, config in self.turns.optimizers.items()
            for group in parameter_groups(module.get_submodule(network), config.weight_decay)
        ]
        assert sum(len(group["params"]) for group in groups) == len(self.shapes), "every parameter is of one network"
        self._optimizer = AdamWithEMA(groups, run.ema, self.turn)
        exact = {name: parameter.detach().float().flatten() for name, parameter in module.named_parameters()}
        if run.engine.precision == "bf16":
            module.bfloat16()  # before it moves, so that no device has to hold all of it in float32
        module.to(distributed.device())
        is_sharded = run.engine.offload != "none" or (run.engine.zero_stage > 0 and distributed.world_size() > 1)
        self._shards = (ZeroShards if is_sharded else Replicas)(module, self._optimizer, run, accumulation)  # one rank has nothing to shard
        self._optimizer.reset(self._shards.masters, {place.group for place in self._shards.places() if is_of(place.name, self.turns.first)})
        if run.engine.precision == "bf16":
            self._start_from(exact)  # the master weights were made of rounded ones
        self._take_turn()

    @property
    def turn(self) -> str:
        """The network that the next step trains."""
        return self.turns.of_step(self.step)

    @property
    def is_called_together(self) -> bool:
        """Whether ranks wait for each other inside the module, so that all must call it alike."""
        return self.run.engine.zero_stage == 3 or distributed.sequence_parallel() > 1

    @property
    def skipped(self) -> int:
        """Steps without effect."""
        return self.step - sum(self.taken.values())

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
        turn = self.turn
        config = self.turns.optimizers[turn]
        self.lr = lr_at(config, self.samples_seen, self.run.train.samples)
        self._optimizer.set_lr(self.lr)
        verdicts: list[Verdict] = []

        def decide(norm: float) -> bool:  # once for all groups of parameters
            if not verdicts:
                verdicts.append(self.guard.judge(loss, norm, turn))
            return verdicts[0].is_taken

        norm = self._shards.step(self.guard.max_norm(config.max_grad_norm, turn), decide)
        self.taken[turn] += decide(norm)  # DeepSpeed refuses a norm that is not finite without asking
        self.step += 1
        self._take_turn()
        faults.point("step.taken")
        return Outcome(norm, verdicts[0], turn)

    @contextmanager
    def ema_weights(self, kind: str = "ema") -> Iterator[nn.Module]:
        """Inside, the first network holds averaged weights; after, exactly the ones before. Called by all ranks.

        Under ZeRO stage 3 all ranks must also call the module, alike.
        """
        masters = self._shards.masters
        weights = [master.data for master in masters]
        try:
            for master in masters:
                master.data = self._optimizer.state[master].get(kind, master.data)
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

    def compare_copies(self) -> None:
        """Raise CopiesDiffer on all ranks unless what every rank holds whole is the same on all of them, to the last bit."""
        if distributed.world_size() > 1:
            copies.compare(self._shards.copies(), self.step)

    def restore(self, step: int, taken: Mapping[str, int], samples_seen: int) -> None:
        """Go on from `step`, after the fragments have been filled: publish the weights to the module of every rank."""
        self.step, self.taken, self.samples_seen = step, dict(taken), samples_seen
        masters = self._shards.masters
        for place in self._shards.places():
            network = next(network for network in taken if is_of(place.name, network))
            self._optimizer.state[masters[place.group]]["step"].fill_(taken[network])
        self._shards.publish()
        self._take_turn()

    def _take_turn(self) -> None:
        """Let gradients reach the network in turn, and no other: those go through the others to what is before them."""
        self._optimizer.turn = self.turn
        if len(self.taken) > 1:
            for network in self.taken:
                self.module.get_submodule(network).requires_grad_(network == self.turn)

    def _views(self, places: Iterable[Place]) -> Iterator[Fragment]:
        masters = self._shards.masters
        for place in places:
            master = masters[place.group]
            state = self._optimizer.state[master]
            sources = {"model": master.data, **{kind: state[kind] for kind in self.kinds[1:] if kind in state}}
            views = {kind: source.narrow(0, place.offset, place.size) for kind, source in sources.items()}
            yield Fragment(place.name, place.start, place.size, views)

    @torch.no_grad()
    def _start_from(self, weights: Mapping[str, Tensor]) -> None:
        for fragment in self.fragments():
            for kind in fragment.views.keys() - {"exp_avg", "exp_avg_sq"}:
                fragment.views[kind].copy_(weights[fragment.name].narrow(0, fragment.start, fragment.size))
        self._shards.publish()
