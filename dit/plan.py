"""`dit plan`: what `dit train` would do with the data of the same config, without training."""

from dit.config import TrainRun
from dit.runs import Encoders
from dit.runtime import distributed
from dit.stream import Stream


def main(run: TrainRun) -> int:
    """Print the report that a training prints before its first step."""
    encoders = Encoders.load(run.encoders, distributed.device())
    print(Stream(run.data, encoders, run.backbone, run.train.seed).describe(run.train.samples))
    return 0
