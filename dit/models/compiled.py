"""The blocks of a backbone, compiled. Applied from outside; the model does not know."""

import logging

import torch

from data_pipelines.errors import UserError
from dit.models.blocks import Attention, attend
from dit.models.dit import SpatioTemporalDiT
from dit.runtime import distributed

log = logging.getLogger(__name__)


def compile_blocks(backbone: SpatioTemporalDiT) -> None:
    """Compile the blocks of `backbone` in place: one set of graphs for all of them, made when they are first called.

    Other numbers of samples or tokens make it once more, then for any. Attention stays as it is, for its segments differ from pack to
    pack. Raises UserError, with what the compiler says, where nothing can be compiled.
    """
    if backbone.config.activation_checkpointing == "selective":
        raise UserError(
            "engine.compile=true and backbone.activation_checkpointing=selective: a compiled block decides itself what it keeps; "
            "set the latter to none or full, or the former to false"
        )
    if distributed.rank() == 0:
        log.info("compiling the blocks (engine.compile): the first steps take seconds on a GPU and minutes on a CPU longer")
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=distributed.device()))
    except Exception as error:
        needed = "Triton" if torch.cuda.is_available() else "a C++ compiler (g++, or the one that the variable CXX names)"
        raise UserError(f"engine.compile: nothing can be compiled here, it takes {needed}: {error}; or set it to false") from error
    as_it_is = torch.compiler.disable(attend)  # one object: another for each block would be another graph for each
    for module in backbone.blocks.modules():
        if isinstance(module, Attention):
            module.attend = as_it_is
    for block in backbone.blocks:
        block.compile()
