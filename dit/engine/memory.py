"""What a rank of the engine holds, in closed form: bytes of every kind of state for P parameters over N ranks. Imports no torch.

Under `bf16` weights are 2 bytes; master weights, sums of gradients, moments and averages are 4 in any case.
"""

from typing import NamedTuple

from dit.config.engine import EMAConfig, EngineConfig

BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced, or weights gathered, in one message."""
LIVE_ELEMENTS = 1_000_000_000
"""Weights that stage 3 keeps gathered at a time: DeepSpeed's default."""


class StateBytes(NamedTuple):
    """Bytes on one rank at the end of a backward pass. host: of the four kinds before, if they are offloaded, on top."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    buffers: int
    host: int

    @property
    def device(self) -> int:
        """All but what lies in host memory."""
        return sum(self) - self.host


def state_bytes(
    engine: EngineConfig, ema: EMAConfig, parameters: int, ranks: int, *, critic: int | None = None, on_gpu: bool = True
) -> StateBytes:
    """What the engine holds of a trained network, and of a `critic` of so many parameters that trains in turns with it, if there is one:
    no average is kept of that.

    buffers: of messages and of gathered weights, at most; none on the CPU.

    Stage 0, and one rank: everything. 1: master weights, moments and averages are shared; gradients stay whole in bf16, in fp32 until they
    are reduced. 2: gradients are shared too. 3: weights too, with a copy in each group of `gather_within`, but those below
    `whole_below`, which are left out here; and of the network whose turn it is not, DeepSpeed makes gradients of zeros, as its weights.
    """
    averaged, parameters = parameters, parameters + (critic or 0)
    stage = engine.zero_stage if ranks > 1 or engine.offload != "none" else 0
    is_bf16, kinds = engine.precision == "bf16", 1 + len(ema.sigma_rel)
    shared = -(-parameters // ranks) if stage else parameters
    weights = (shared if stage == 3 else parameters) * (2 if is_bf16 else 4)
    if stage == 3 and engine.gather_within > 1:
        weights += -(-parameters // engine.gather_within) * (2 if is_bf16 else 4)
    if stage == 0 and not is_bf16:
        weights = 0  # views of the master weights
    gradients = 4 * (shared if stage > 1 or (stage == 1 and not is_bf16) else parameters)
    if stage == 3 and critic is not None and engine.offload == "none":
        gradients += -(-max(averaged, critic) // ranks) * (2 if is_bf16 else 4)
    optimizer, averages = 12 * shared, 4 * kinds * (-(-averaged // ranks) if stage else averaged)
    buffers = 0
    if on_gpu and ranks > 1:
        buffers = 4 * min(parameters, BUCKET_ELEMENTS) * 2
        buffers += min(parameters, LIVE_ELEMENTS) * (2 if is_bf16 else 4) if stage == 3 else 0
    if engine.offload == "none":
        return StateBytes(weights, gradients, optimizer, averages, buffers, 0)
    staged = 2 if is_bf16 and stage == 2 else 0  # gradients in bf16 on their way
    return StateBytes(weights, 0, 0, 0, buffers, optimizer + averages + (8 + staged) * shared)
