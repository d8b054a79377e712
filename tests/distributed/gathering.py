"""The process under test: rows of three processes, of which the second has none, come to the first one's memory; errors to all."""

import pytest
import torch

import data_pipelines.executors  # noqa: F401  # an error of the same exit code
from data_pipelines.errors import AccessDenied, UserError
from dit.runtime import distributed

distributed.init()
for dtype in (torch.uint8, torch.float32, torch.bool):
    rows = {0: torch.arange(6).view(2, 3), 2: torch.arange(6, 15).view(3, 3)}.get(distributed.rank())
    together = distributed.gather_rows(None if rows is None else rows.to(dtype))
    if distributed.rank() == 0:
        assert together is not None
        assert torch.equal(together, torch.arange(15).view(5, 3).to(dtype))
    else:
        assert together is None
assert distributed.gather_rows(None) is None


def fail(kind: type[UserError]) -> None:
    raise kind("a key")


for kind in (UserError, AccessDenied):
    with pytest.raises(UserError, match="a key") as caught:
        distributed.on_first(lambda kind=kind: fail(kind))
    assert caught.type is kind
