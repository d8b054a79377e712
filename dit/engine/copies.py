"""What every rank holds whole must be the same on all ranks, to the last bit. Compared now and then: a difference stops the run.

Memory, links and arithmetic that err in silence would otherwise train a model that no rank has.
"""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from data_pipelines.errors import UserError
from dit.runtime import distributed

BITS = {2: torch.int16, 4: torch.int32}


class CopiesDiffer(UserError):
    """Ranks hold different weights, and no step may be taken with them, nor a checkpoint written."""

    exit_code = 75


@torch.no_grad()
def compare(copies: Mapping[str, Tensor], step: int) -> None:
    """Raise CopiesDiffer on all ranks, naming them and the first that differs, unless every rank's `copies` are those of the others.

    A tensor is compared by the sum of its bit patterns as integers: exact, in any order, and changed by every single flipped bit.
    """
    sums = [tensor.view(BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in copies.values()]
    own = torch.stack(sums).tolist() if sums else []  # one wait for the device
    if len(set(distributed.gather_json(xxhash.xxh3_64_hexdigest(json.dumps(own).encode())))) == 1:
        return
    hosts, by_rank = distributed.gather_json(platform.node()), distributed.gather_json(own)
    name, held = next((name, held) for name, *held in zip(copies, *by_rank, strict=True) if len(set(held)) > 1)
    odd = odd_ones(held)
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in odd)
    among = "all alike" if len(odd) == len(held) else f"that of the other {len(held) - len(odd)}"
    raise CopiesDiffer(
        f"after step {step}: {name} of {named}: got other bits, expected {among}. Nothing of it was saved: start the same command to go on "
        "from the last checkpoint, which was compared as well. If a machine is named twice, take it out; if machines are of different "
        "kinds, use engine.zero_stage 1 to 3, where no two ranks compute the same weights"
    )


def odd_ones(held: Sequence[int]) -> list[int]:
    """Ranks that hold something else than most; all of them where no value is held by more than any other."""
    (usual, count), *others = Counter(held).most_common()
    return [rank for rank, value in enumerate(held) if value != usual or (others and others[0][1] == count)]
