"""A module sharded by DeepSpeed ZeRO, stages 1 to 3: the only place that knows DeepSpeed.

Three of its optimizers hold the float32 weights of this rank, each in its own way; all are flat tensors, one a parameter group or more.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.errors import UserError
from dit.config import FitRun
from dit.engine.memory import BUCKET_ELEMENTS
from dit.engine.optimizer import AdamWithEMA
from dit.engine.places import Place
from dit.runtime import distributed


def ds_config(run: FitRun, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `run` with `accumulation` micro-batches a step on each rank. Pure."""
    zero: dict[str, Any] = {
        "stage": run.engine.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": False,
        "contiguous_gradients": torch.cuda.is_available(),  # one more copy, which keeps the memory of a GPU in one piece
        "use_multi_rank_bucket_allreduce": torch.cuda.is_available(),  # on gloo, sums sent to the rank that owns them are half the bytes
        "stage3_param_persistence_threshold": run.engine.whole_below,
        "zero_hpz_partition_size": run.engine.gather_within,
    }
    if run.engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a pack; samples are weighted by the loss
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # AdamWithEMA is elementwise, so any partition of it is exact
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": run.engine.precision == "bf16", "check_grad_overflow": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


class ZeroShards:
    """What ZeRO gives this rank of a module. masters: its share of the float32 weights, flat."""

    def __init__(self, module: nn.Module, optimizer: AdamWithEMA, run: FitRun, accumulation: int) -> None:
        import deepspeed  # seconds to import, and after the environment of `distributed.init`

        if rest := distributed.world_size() % run.engine.gather_within:
            raise UserError(
                f"world size % engine.gather_within = {distributed.world_size()} % {run.engine.gather_within} = {rest}, expected 0: "
                "change either; the processes of one node are usual"
            )
        with redirect_stdout(io.StringIO()):  # one of its optimizers prints memory statistics unasked
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config(run, accumulation))
        self._zero: Any = self._engine.optimizer
        self._module, self._stage = module, run.engine.zero_stage
        self.publish()  # stage 3 would gather small weights at the first call of their module, and a learned schedule is never called

    @property
    def masters(self) -> list[Tensor]:
        """Flat float32 weights that this rank owns."""
        names = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups")  # a class each
        masters: list[Tensor] = next(getattr(self._zero, name) for name in names if hasattr(self._zero, name))
        return masters

    def places(self) -> Iterator[Place]:
        """Where `masters` hold which elements of which parameter; over all ranks every element exactly once."""
        for name, parameter in self._module.named_parameters():
            if self._stage == 3:
                group, offset, share = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = share * self._engine.global_rank
                if (size := min(share, parameter.ds_numel - start)) > 0:  # type: ignore[attr-defined]  # the last are padded
                    yield Place(name, start, size, group, offset)
            elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Place(name, there.start, there.numel, mapping.param_group_index, here.start)

    def owned(self) -> Iterator[Place]:
        """All of `places`: no two ranks hold the same."""
        return self.places()

    def copies(self) -> dict[str, Tensor]:
        """What every rank holds alike: the weights that its module computes with, under stage 3 the small ones that stay gathered."""
        named = self._module.named_parameters()
        return {f"published/{name}": p for name, p in named if self._stage < 3 or p.ds_persist}  # type: ignore[attr-defined]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, whose mean over ranks is meant."""
        from deepspeed.runtime.utils import register_output_backward_hooks

        # DeepSpeed prepares a backward pass in its own forward and by hooks on what that returns; the module is called directly.
        self._zero.clear_backward_seen_flag()
        register_output_backward_hooks(loss, self._engine._backward_prologue)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self.is_complete:
            self._engine.step()  # counts the micro-batch; the last one of the step is counted by `step`

    @property
    def is_complete(self) -> bool:
        """Whether all packs of the step have been seen."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, max_norm: float, decide: Callable[[float], bool]) -> float:
        """Take the step if `decide(gradient norm)`, the same on all ranks; returns the norm before clipping. Gradients are gone after.

        DeepSpeed refuses a norm that is not finite by itself.
        """
        self._zero.clip_grad = max_norm
        self._engine.optimizer.optimizer.admit = lambda: decide(float(self._zero._global_grad_norm))
        self._engine.step()
        return float(self._zero._global_grad_norm)

    def publish(self) -> None:
        """Give the module of every rank the weights that `masters` hold."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        self._zero.invalidate_secondary_tensor()  # the copies within groups of ranks
        for group in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self._zero.persistent_parameters:  # small ones, which stay gathered
            persistent[0].all_gather(persistent)
