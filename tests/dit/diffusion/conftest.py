import pytest
import torch


@pytest.fixture(autouse=True)
def _draws_are_the_same_in_every_run() -> None:
    torch.manual_seed(0)
