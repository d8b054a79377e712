"""Compiled blocks against the same blocks as they are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipelines.errors import UserError
from data_pipelines.packed import pack_conditioning
from dit.config import SpatioTemporalDiTConfig
from dit.models import SpatioTemporalDiT, build_backbone, compile_blocks
from tests.processes import ENVIRONMENT

ROUNDING = 1e-5
"""Relative to the largest element: float32, with fused operations in another order."""
COMPILE = """
from data_pipelines.errors import UserError
from dit.config import SpatioTemporalDiTConfig
from dit.models import build_backbone, compile_blocks
try:
    compile_blocks(build_backbone(SpatioTemporalDiTConfig(hidden_size=48, depth=1, num_heads=4, ffn_size=96), channels=4, text_width=8))
except UserError as error:
    print(error)
"""


def backbone(**options: object) -> SpatioTemporalDiT:
    sizes: dict[str, object] = {"hidden_size": 48, "depth": 3, "num_heads": 4, "ffn_size": 96}
    torch.manual_seed(0)
    model = build_backbone(SpatioTemporalDiTConfig.model_validate(sizes | options), channels=4, text_width=8)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of compiling, on an idle machine
def test_compiled_blocks_are_the_same_blocks() -> None:
    cond = pack_conditioning(((2, 4, 4), (1, 3, 5)), [torch.randn(3, 8), torch.randn(1, 8)])
    given = torch.randn(sum(cond.lengths), 16), torch.rand(2), cond
    results = []
    for is_compiled in (False, True):
        model = backbone()
        if is_compiled:
            compile_blocks(model)
        answer = model(*given)
        answer.square().sum().backward()
        results.append([answer, *(p.grad for p in model.parameters())])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 < graphs < 10, "three blocks should share their graphs"


@pytest.mark.slow
def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # what was compiled before needs none
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert "engine.compile: nothing can be compiled here, it takes a C++ compiler" in done.stdout, done.stdout + done.stderr


def test_two_that_decide_what_is_kept_are_refused() -> None:
    with pytest.raises(UserError, match="activation_checkpointing=selective"):
        compile_blocks(backbone(activation_checkpointing="selective"))
