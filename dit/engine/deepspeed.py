"""The training engine: a module sharded by DeepSpeed ZeRO, with one function that owns "an optimizer step happened".

Knows nothing of diffusion, of data or of files. Under `bf16` the module holds bfloat16 weights and computes in what its layers
choose; the master weights, sums of gradients, moments and averages that each rank keeps for its share are float32 in any case.
"""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit.config import FitRun
from dit.engine.optimizer import AdamWithEMA, lr_at, parameter_groups
from dit.runtime import distributed

BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced, or weights gathered, in one message."""
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
"""What a parameter consists of, all float32: its weight, its average, and the two moments of Adam."""


class NonFinite(RuntimeError):
    """Loss or gradients are infinite or no number. The weights are those of the last good step."""


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that this rank owns: elements [start, start + size) of the flattened parameter, views by kind."""

    name: str
    start: int
    size: int
    views: Mapping[str, Tensor]


def ds_config(run: FitRun, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `run` with `accumulation` micro-batches a step on each rank. Pure."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # a pack; samples are weighted by the loss
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # AdamWithEMA is elementwise, so any partition of it is exact
        "zero_optimization": {
            "stage": run.engine.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": False,
        },
        "bf16": {"enabled": run.engine.precision == "bf16", "check_grad_overflow": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


class Engine:
    """A module with its optimizer, its averaged weights and its place in the run.

    module: call it directly. step: optimizer steps taken. samples_seen: samples of those steps.
    """

    def __init__(self, module: nn.Module, run: FitRun, accumulation: int) -> None:
        buffers = sorted(module.state_dict().keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)})
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        assert not buffers, f"buffers are not saved; make these parameters or compute them: {buffers}"
        assert not frozen, f"the engine trains every parameter, these are frozen: {frozen}"
        self.module = module
        self.run = run
        self.step = 0
        self.samples_seen = 0
        self._step_samples = 0
        self._optimizer = AdamWithEMA(parameter_groups(module, run.optimizer.weight_decay), run.optimizer, run.ema.decay)
        exact = {name: parameter.detach().float().flatten() for name, parameter in module.named_parameters()}
        self._engine = _initialize(module, self._optimizer, ds_config(run, accumulation))
        self._zero = self._engine.optimizer
        self._optimizer.reset()
        if run.engine.precision == "bf16":
            self._start_from(exact)  # DeepSpeed made the master weights of rounded ones

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def backward(self, loss_sum: Tensor, step_samples: int) -> None:
        """Accumulate the gradient of `loss_sum`, the summed loss of this rank's pack, over a global step of `step_samples`.

        After all packs of all ranks, the gradient is that of the mean loss of the global step.
        """
        from deepspeed.runtime.utils import register_output_backward_hooks

        to_mean = distributed.world_size() / step_samples  # ZeRO averages over ranks what here is a sum
        loss = loss_sum * to_mean
        # DeepSpeed prepares a backward pass by hooks on what its own forward returns; the module is called directly, so hook the loss.
        register_output_backward_hooks(loss, self._engine._backward_prologue)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._step_samples = step_samples
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; the last one of the step is counted by optimizer_step

    def optimizer_step(self) -> float:
        """Take the step whose gradients have accumulated; returns their norm before clipping.

        Learning rate, weights, averages and counters change here and nowhere else.
        Raises NonFinite on every rank, with nothing changed, if the gradients are not finite.
        """
        assert self._engine.is_gradient_accumulation_boundary(), "optimizer_step before the last pack of the step"
        seen = self.samples_seen + self._step_samples
        self._optimizer.set_lr(lr_at(self.run.optimizer, seen, self.run.train.samples))
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):  # DeepSpeed has skipped the step then, on all ranks
            raise NonFinite(f"step {self.step + 1}: the gradients are not finite")
        self.step += 1
        self.samples_seen = seen
        return grad_norm

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Inside, the module holds the averaged weights; after, exactly the ones before. Called by all ranks."""
        partitions = self._partitions()
        weights = [partition.data for partition in partitions]
        try:
            for partition in partitions:
                partition.data = self._optimizer.state[partition]["ema"]
            self._zero.update_lp_params()
            yield self.module
        finally:
            for partition, data in zip(partitions, weights, strict=True):
                partition.data = data
            self._zero.update_lp_params()

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of each parameter; over all ranks every element exactly once."""
        partitions = self._partitions()
        for name, parameter in self.module.named_parameters():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            partition = partitions[mapping.param_group_index]
            sources = {"model": partition.data, **{kind: self._optimizer.state[partition][kind] for kind in KINDS[1:]}}
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            views = {kind: source.narrow(0, here.start, here.numel) for kind, source in sources.items()}
            yield Fragment(name, there.start, there.numel, views)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}

    def restore(self, step: int, samples_seen: int) -> None:
        """Go on from `step`, after the fragments have been filled: publish the weights to the module of every rank."""
        for partition in self._partitions():
            self._optimizer.state[partition]["step"].fill_(step)
        self._zero.update_lp_params()
        self.step, self.samples_seen = step, samples_seen

    def _start_from(self, weights: Mapping[str, Tensor]) -> None:
        for fragment in self.fragments():
            for kind in ("model", "ema"):
                fragment.views[kind].copy_(weights[fragment.name].narrow(0, fragment.start, fragment.size))
        self._zero.update_lp_params()

    def _partitions(self) -> list[Tensor]:
        """The flat float32 weights that this rank owns, one tensor a parameter group."""
        is_bf16_stage_1 = hasattr(self._zero, "fp32_groups_flat_partition")  # another class, by DeepSpeed's choice
        partitions: list[Tensor] = self._zero.fp32_groups_flat_partition if is_bf16_stage_1 else self._zero.single_partition_of_fp32_groups
        return partitions


def _initialize(module: nn.Module, optimizer: AdamWithEMA, config: dict[str, Any]) -> Any:
    import deepspeed  # seconds to import, and after the environment of `distributed.init`

    with redirect_stdout(io.StringIO()):  # one of its optimizers prints memory statistics unasked
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine
