"""`dit doctor`: is this machine, and this group of machines, fit for a run? One line an item, with the fix where it is not."""

import argparse
import importlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from data_pipelines import remote, storage
from data_pipelines.config_file import read_values
from data_pipelines.errors import UserError
from dit.runtime.meeting import meet

MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Packages whose module has another name."""
FREE_GIB, SHARED_GIB, FILES, SKEW_SECONDS, STALE_SECONDS = 10, 1, 4096, 2.0, 3600
MEGABYTES, REDUCTIONS = 16, 3


@dataclass(frozen=True)
class Item:
    """One finding. fix: what to do, None if all is well."""

    name: str
    finding: str
    fix: str | None = None


def main(argv: Sequence[str]) -> int:
    """Print every item of the first rank, and what is bad on the others; returns 0 if all are well, else 1."""
    parser = argparse.ArgumentParser(prog="dit doctor", description=__doc__, epilog="under torchrun or srun: all ranks and their network")
    parser.add_argument("config", nargs="?", help="YAML file of a run, whose folders are checked too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of it")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that ranks may be apart in starting (default: %(default)s)")
    options = parser.parse_args(argv)
    config: str | None = options.config
    is_first_here = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    items = [*_packages(), *_machine(), *_folders(config, options.overrides)] if is_first_here else []
    if any(item.fix for item in items if item.name in ("torch", "deepspeed")):
        return _report([items], [""])
    items += [_device(), meeting := Item("meeting", *meet(options.patience))]
    if not meeting.fix:
        items.append(meeting := _group(options.patience))
    if meeting.fix:
        code = _report([items], [""])
        sys.stdout.flush()
        os._exit(code)  # threads of the group may wait for the missing rank
    from dit.runtime import distributed

    ranks = distributed.gather_json({"items": [asdict(item) for item in items], "host": platform.node(), "time": time.time()})
    found = [[Item(**item) for item in rank["items"]] for rank in ranks]
    apart = max(rank["time"] for rank in ranks) - min(rank["time"] for rank in ranks)
    found[0].append(Item("clock", f"ranks within {apart:.1f} s", None if apart < SKEW_SECONDS else "mend the time service of the machines"))
    code = _report(found, [f"rank {number} on {rank['host']}: " for number, rank in enumerate(ranks)], distributed.rank() > 0)
    distributed.shutdown()
    return code


def _report(ranks: list[list[Item]], names: Sequence[str], silent: bool = False) -> int:
    """Print the items of the first rank, and of the others those that need a fix; 1 if any does."""
    lines = [("", item) for item in ranks[0]]
    lines += [(names[rank], item) for rank in range(1, len(ranks)) for item in ranks[rank] if item.fix]
    for name, item in lines:
        if not silent:
            print(f"{'BAD' if item.fix else 'ok '} {name}{item.name}: {item.finding}{f' -> {item.fix}' if item.fix else ''}")
    return int(any(item.fix for _, item in lines))


def _packages() -> Iterator[Item]:
    """Every package that the project needs: there, new enough, and whole enough to be imported."""
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed says on import that it found nothing else
    yield Item("python", platform.python_version(), None if sys.version_info >= (3, 11) else "install Python 3.11 or newer")
    try:
        lines = metadata.requires("dit") or []
    except metadata.PackageNotFoundError:
        lines = []
        yield Item("dit", "is not installed", "pip install -c constraints.txt -e . in the project's folder")
    for wanted in map(Requirement, lines):
        if wanted.marker is None or wanted.marker.evaluate():
            yield package(wanted)


def package(wanted: Requirement) -> Item:
    """Whether a package is installed, as new as wanted, and can be imported."""
    mend = f"pip install --force-reinstall '{wanted}'"
    try:
        found = metadata.version(wanted.name)
        if not wanted.specifier.contains(found, prereleases=True):
            return Item(wanted.name, f"{found}, {wanted.specifier} wanted", mend)
        importlib.import_module(MODULES.get(wanted.name, wanted.name.replace("-", "_")))
    except metadata.PackageNotFoundError:
        return Item(wanted.name, f"missing, {wanted.specifier} wanted", mend)
    except Exception as error:  # a broken package may raise anything
        return Item(wanted.name, f"{found} cannot be imported: {type(error).__name__}: {error}".splitlines()[0], mend)
    return Item(wanted.name, found)


def _machine() -> Iterator[Item]:
    """Disk, shared memory, open files, and locks of builds that died."""
    yield from _disk(Path("."), "disk")
    if (shared := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        fix = None if free >= SHARED_GIB else "loader processes need more: --shm-size=8g for containers, or data.num_workers=0"
        yield Item("/dev/shm", f"{free:.1f} GiB free", fix)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Item("open files", f"at most {limit}", None if limit >= FILES else f"ulimit -n {FILES}")
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    if locks := [str(lock) for lock in cache.glob("**/lock") if time.time() - lock.stat().st_mtime > STALE_SECONDS]:
        yield Item("kernel builds", f"{len(locks)} old locks, behind which builds wait for ever", f"rm {' '.join(locks)}")


def _disk(folder: Path, name: str) -> Iterator[Item]:
    """Room, the speed of a synced file, and the clock of the file system against this machine's."""
    probe = folder / f".doctor-{platform.node()}-{os.getpid()}"
    free, start = shutil.disk_usage(folder).free / 2**30, time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(1 << 20) * MEGABYTES)
            file.flush()
            os.fsync(file.fileno())
        speed, skew = MEGABYTES / (time.perf_counter() - start), probe.stat().st_mtime - time.time()
        probe.unlink()
    except OSError as error:
        yield Item(name, f"{folder.resolve()}: {error.strerror}", "mend the permissions, make room, or take another folder")
        return
    fix = None if free >= FREE_GIB else f"make room for checkpoints on the disk of {folder.resolve()}"
    yield Item(name, f"{free:.0f} GiB free", fix)
    fix = None if abs(skew) < SKEW_SECONDS else "the clocks of this machine and its file server differ: mend the time service"
    yield Item(f"{name}, 1 file", f"{speed:.0f} MB/s with sync, clock {skew:+.1f} s", fix)


def _folders(config: str | None, overrides: Sequence[str]) -> Iterator[Item]:
    """The folders that a config names: what it reads can be listed, as the run would, also in S3; what it writes has room."""
    if config is None:
        return
    values = read_values(config, overrides)
    for key, address in _addresses(values):
        if key == "out":
            if (path := storage.local_path(address)) is not None:
                yield from _disk(next(folder for folder in (path, *path.resolve().parents) if folder.is_dir()), f"out={address}")
            continue
        try:
            may_be_empty = key == "checkpoint_store"
            count = len(remote.list_tree(address) if may_be_empty else storage.folder_files(address))
            fix = None if count or may_be_empty else f"it is empty: make it, or change `{key}` in {config}"
            yield Item(address, f"{count} files", fix)
        except (UserError, OSError) as error:
            yield Item(address, str(error), f"make it first, or change `{key}` in {config}; for s3:// see AWS_PROFILE, AWS_ENDPOINT_URL")


def _addresses(values: Any) -> Iterator[tuple[str, str]]:
    """Every `path`, `source`, `run`, `out` and `checkpoint_store` in a config, but those of encoders, which may be names of a model hub."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if key == "encoders":
            continue
        if key in ("path", "source", "run", "out", "checkpoint_store") and isinstance(value, str):
            yield key, value
        elif isinstance(value, dict | list):
            yield from _addresses(value)


def _device() -> Item:
    """The GPU of this rank multiplies matrices, or there is none."""
    import torch

    from dit.runtime import distributed

    if not torch.cuda.is_available():
        blind = f"torch {torch.__version__} sees none of nvidia-smi: install its CUDA build or a newer driver"
        return Item("GPU", "none, computing on the CPU", blind if Path("/proc/driver/nvidia").exists() else None)
    device = distributed.device()
    try:
        is_right = bool((torch.ones(1024, 1024, device=device) @ torch.ones(1024, 1024, device=device) == 1024).all())
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return Item(f"{device}", str(error).splitlines()[0], "reset or replace it; CUDA_VISIBLE_DEVICES leaves it out")
    fix = "its products are wrong: replace it" if not is_right else "another process uses it: nvidia-smi" if free < 0.9 * total else None
    return Item(f"{device}", f"{torch.cuda.get_device_name(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free", fix)


def _group(patience: float) -> Item:
    """The ranks find each other, and an all-reduce between them is right."""
    import torch

    from dit.runtime import distributed

    distributed.TIMEOUT = timedelta(seconds=patience)
    try:
        distributed.init()
        ranks = distributed.world_size()
        ones = torch.full((MEGABYTES << 18,), distributed.rank() + 1.0, device=distributed.device())
        distributed.barrier()
        start = time.perf_counter()
        total = [float(distributed.all_reduce_sum(ones.clone())[-1]) for _ in range(REDUCTIONS)][-1]
    except (RuntimeError, ValueError) as error:
        reach = "every rank must reach {MASTER_ADDR}:{MASTER_PORT}; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network interface"
        return Item("ranks", str(error).splitlines()[0], reach.format_map(os.environ))
    if ranks == 1:
        return Item("ranks", "one; to check what is between several, run this under torchrun or srun")
    milliseconds = 1000 * (time.perf_counter() - start) / REDUCTIONS
    fix = None if total == ranks * (ranks + 1) / 2 else "the sum is wrong: check the network and the GPUs of these machines"
    return Item("ranks", f"{ranks} over {torch.distributed.get_backend()}, all-reduce of {MEGABYTES} MB in {milliseconds:.0f} ms", fix)
