"""Run a command as `dit` does: when it is done, the process is in no group, whose threads could outlive the interpreter."""

import sys

import torch.distributed as dist

from dit.cli import main

assert main(sys.argv[1:]) == 0
assert not dist.is_initialized()
