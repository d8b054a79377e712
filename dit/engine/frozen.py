"""A network that is only asked, such as a teacher: in the precision of the run, and under ZeRO stage 3 a share of it on every rank."""

import io
from contextlib import redirect_stdout

from torch import nn

from dit.config.engine import EngineConfig
from dit.runtime import distributed


def place_frozen(module: nn.Module, config: EngineConfig) -> nn.Module:
    """Make `module`, whole on the CPU of every rank, ready to be called. Under stage 3 all ranks then call it, alike."""
    module = module.eval().requires_grad_(False)
    if config.precision == "bf16":
        module = module.bfloat16()
    if config.zero_stage < 3 or distributed.world_size() == 1:
        return module.to(distributed.device())
    import deepspeed  # seconds to import, and after the environment of `distributed.init`

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": config.whole_below},
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": None,
    }
    with redirect_stdout(io.StringIO()):
        deepspeed.initialize(model=module, config=settings)  # without an optimizer: weights are shared, and gathered as layers need them
    return module


def frozen_bytes(config: EngineConfig, parameters: int, ranks: int) -> int:
    """Bytes of the weights of such a network on one rank."""
    return (-(-parameters // ranks) if config.zero_stage == 3 else parameters) * (2 if config.precision == "bf16" else 4)
