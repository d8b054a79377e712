"""The process group: who this process is, on which device, and the few collectives that the system uses.

Must not know what is trained. Everything answers for a single process as well, also when `init` was never called.
"""

import json
import logging
import math
import os
import re
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.errors import UserError

MEETING = timedelta(minutes=30)
"""For all ranks to come."""
TIMEOUT = timedelta(hours=6)
"""More than anything that one rank does while the others wait, as drawing previews. A rank that is stuck is found in minutes by the
supervisor, and one that is gone ends the others at once."""
_pack_group: Any = None
"""This process and those that compute its packs with it; None if it does so alone."""


def init(sequence_parallel: int = 1) -> None:
    """Join the process group that torchrun, the deepspeed launcher or srun describe in the environment, or make one of a single process.

    NCCL on CUDA, gloo on the CPU. Does nothing when the group exists. sequence_parallel: how many neighbouring ranks compute a pack
    together. Raises UserError unless that divides the number of processes.
    """
    global _pack_group
    if not dist.is_initialized():
        _join()
    if rest := world_size() % sequence_parallel:
        raise UserError(
            f"world size % engine.sequence_parallel = {world_size()} % {sequence_parallel} = {rest}, expected 0: run on a multiple of "
            f"{sequence_parallel} processes, or change engine.sequence_parallel"
        )
    _pack_group = dist.new_subgroups(sequence_parallel, timeout=TIMEOUT)[0] if sequence_parallel > 1 else None


def init_if_launched() -> None:
    """Join the process group if a launcher started several processes; a process that is alone needs none, nor DeepSpeed."""
    name = "WORLD_SIZE" if "RANK" in os.environ else "SLURM_STEP_NUM_TASKS"  # a size alone is no launcher's, and nobody would come
    if int(os.environ.get(name, "1")) > 1:
        init()


def _join() -> None:
    describe_processes()
    _set_threads()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(device())
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = _import_deepspeed(on_cuda)
    backend = "nccl" if on_cuda else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=MEETING)
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.group.WORLD)


def rank() -> int:
    """Number of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sequence_parallel() -> int:
    """How many processes compute a pack together."""
    return 1 if _pack_group is None else dist.get_world_size(_pack_group)


def sequence_rank() -> int:
    """Number of this process among those that compute its packs."""
    return rank() % sequence_parallel()


def data_rank() -> int:
    """Number of the packs of this process among the shares of a step."""
    return rank() // sequence_parallel()


def data_world_size() -> int:
    """Into how many shares the packs of a step are dealt."""
    return world_size() // sequence_parallel()


def share(count: int) -> range:
    """Which of `count` pieces of work this process does: successive ones, the first process the first, and never fewer than another."""
    first, end = (math.ceil(count * number / world_size()) for number in (rank(), rank() + 1))
    return range(first, end)


def gather_rows(rows: Tensor | None) -> Tensor | None:
    """The rows (n, ...) of every process, in the order of ranks, on the CPU of the first; None elsewhere, and where none has any.

    rows: None if this process has none. The rows of one process at a time are on a device.
    """
    facts = gather_json(None if rows is None else [len(rows), list(rows.shape[1:]), str(rows.dtype).removeprefix("torch.")])
    parts = []
    for source, fact in enumerate(facts):
        if fact is None:
            continue
        length, shape, dtype = fact
        part = rows if source == rank() else torch.empty(length, *shape, dtype=getattr(torch, dtype))
        assert part is not None
        if world_size() > 1:
            part = part.to(device()).contiguous()
            dist.broadcast(part, source)
        if rank() == 0:
            parts.append(part.cpu())
    return torch.cat(parts) if parts else None


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Deal the rows of x to the processes that compute this pack, send[i] to number i; returns those received, receive[i] from number i."""
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), list(receive), list(send), group=_pack_group)
    return received


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all processes."""
    all_reduce_sum(torch.zeros(1, device=device())).cpu()


def side_group() -> Any:
    """A group of all processes beside the main one, on the CPU: for a second thread to talk in. Made by all ranks; None if alone."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size() > 1 else None


def gather_json(value: object, group: Any = None) -> list[Any]:
    """What every process says, as JSON, in the order of ranks; the same list everywhere. group: a side group, or the main one."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    place = torch.device("cpu") if dist.get_backend(group) == "gloo" else device()
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(place)
    lengths = [torch.zeros(1, dtype=torch.int64, device=place) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(encoded)], device=place), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(encoded, (0, longest - len(encoded)))
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]


def gather_in_pack(value: object) -> list[Any]:
    """What the processes that compute this pack say, as `gather_json` does."""
    return gather_json(value, _pack_group) if sequence_parallel() > 1 else [value]


def on_first(action: Callable[[], Any]) -> Any:
    """Do `action` on the first rank and return on all what it returned, as JSON; a UserError that it raises is raised on all."""
    outcome: dict[str, Any] = {}
    if rank() == 0:
        try:
            outcome = {"got": action()}
        except UserError as error:
            outcome = {"code": error.exit_code, "text": str(error)}
    outcome = gather_json(outcome)[0]
    if "text" in outcome:
        kinds: list[type[UserError]] = [UserError, *UserError.__subclasses__()]  # some have its code too, and arguments of their own
        raise next((kind for kind in kinds if kind.exit_code == outcome["code"]), UserError)(outcome["text"])
    return outcome["got"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators start from `seed`, so that every process builds the same weights; after, they are as before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # of several on a node, this process has one
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def shutdown() -> None:
    """Leave the process group."""
    global _pack_group
    _pack_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_processes() -> None:
    """Fill RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from whatever launcher there is."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = {"LOCAL_RANK": env["RANK"], "LOCAL_WORLD_SIZE": env.get("LOCAL_SIZE", env["WORLD_SIZE"])}
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # SLURM_NTASKS is also set in a batch script that runs a single process
        found = _from_slurm(env["SLURM_STEP_NODELIST"], env["SLURM_JOB_ID"], env["SLURM_STEP_ID"])
    else:
        found = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        found["MASTER_PORT"] = str(_free_port())
    for name, value in found.items():
        env.setdefault(name, value)


def _from_slurm(nodes: str, job: str, step: str) -> dict[str, str]:
    env = os.environ
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", env["SLURM_STEP_TASKS_PER_NODE"])[0],
        "MASTER_ADDR": first_node(nodes),
        "MASTER_PORT": str(20_000 + (int(job) * 31 + int(step)) % 10_000),
    }


def first_node(nodes: str) -> str:
    """First name of a Slurm node list such as `gpu[03-07,12],login1`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    assert match, f"no node in {nodes!r}"
    return "".join(part or "" for part in match.groups())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _set_threads() -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))


def _import_deepspeed(on_cuda: bool) -> Any:
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the import sets its own level
    if not on_cuda:
        # On the CPU DeepSpeed compiles a C++ extension when the group starts: minutes, and for ever behind a stale lock file.
        # It asks this table first; a table without any op keeps it from compiling, and from probing the compiler as well.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed
