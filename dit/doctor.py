"""`dit doctor`: is this machine, and this group of machines, fit for a run? One line an item, with the fix where it is not."""

import argparse
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from data_pipelines import storage
from data_pipelines.errors import UserError

MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Packages whose module has another name."""
FREE_GIB, SHARED_GIB, FILES, SKEW_SECONDS = 10, 1, 4096, 2.0
MEGABYTES, REDUCTIONS = 16, 3
PATIENCE = timedelta(seconds=90)


@dataclass(frozen=True)
class Item:
    """One finding. fix: what to do, None if all is well."""

    name: str
    finding: str
    fix: str | None = None


def main(argv: Sequence[str]) -> int:
    """Print every item, from every rank that has something to say; returns 0 if all are well, else 1."""
    parser = argparse.ArgumentParser(prog="dit doctor", description=__doc__, epilog="under torchrun or srun: all ranks, and the network")
    parser.add_argument("config", nargs="?", help="YAML file of a run, whose folders are checked too")
    arguments = [argument for argument in argv if not argument.startswith("--local_rank")]
    config = parser.parse_args(arguments).config
    items = _packages() if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0" else []
    is_broken = any(item.fix and item.name in ("torch", "deepspeed") for item in items)
    items += [*_machine(), *_config(config)]
    if is_broken:
        return _report([items], 0)
    items += _devices()
    group = _group()
    from dit.runtime import distributed

    if group.fix:
        return _report([[*items, group]], 0)
    ranks = distributed.gather_json({"items": [asdict(item) for item in items], "host": platform.node(), "time": time.time()})
    found = [[Item(**item) for item in rank["items"]] for rank in ranks]
    found[0] += [group, _clock([rank["time"] for rank in ranks])]
    code = _report(found, distributed.rank(), [rank["host"] for rank in ranks])
    distributed.shutdown()
    return code


def _report(ranks: list[list[Item]], rank: int, hosts: Sequence[str] = ("",)) -> int:
    """Print the items of the first rank, and of the others those that differ or need a fix; only on rank 0."""
    lines = [("", item) for item in ranks[0]]
    for number, items in enumerate(ranks[1:], start=1):
        lines += [(f"rank {number} on {hosts[number]}: ", item) for item in items if item.fix or item not in ranks[0]]
    if rank == 0:
        for place, item in lines:
            print(f"{'ok ' if item.fix is None else 'BAD'} {place}{item.name}: {item.finding}{f' -> {item.fix}' if item.fix else ''}")
    return int(any(item.fix for _, item in lines))


def _packages() -> list[Item]:
    """Python and every package that the project needs: there, new enough, and whole enough to be imported."""
    python = platform.python_version()
    items = [Item("python", python, None if sys.version_info >= (3, 11) else "install Python 3.11 or newer")]
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("dit") or []]
    except importlib.metadata.PackageNotFoundError:
        return [*items, Item("dit", "is not installed", "pip install -c constraints.txt -e . in the project's folder")]
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed says on import that it found nothing else
    for wanted in requirements:
        if wanted.marker is None or wanted.marker.evaluate():
            items.append(package(wanted))
    return items


def package(wanted: Requirement) -> Item:
    """Whether a package is installed, as new as wanted, and can be imported."""
    mend = f"pip install --force-reinstall '{wanted}'"
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Item(wanted.name, f"missing, {wanted.specifier} wanted", mend)
    if not wanted.specifier.contains(found, prereleases=True):
        return Item(wanted.name, f"{found}, {wanted.specifier} wanted", mend)
    try:
        importlib.import_module(MODULES.get(wanted.name, wanted.name.replace("-", "_")))
    except Exception as error:  # a broken package may raise anything
        return Item(wanted.name, f"{found} cannot be imported: {type(error).__name__}: {str(error).splitlines()[:1]}", mend)
    return Item(wanted.name, found)


def _machine() -> Iterator[Item]:
    """Disk, shared memory, open files, and locks of builds that died."""
    yield _free(Path("."), "disk")
    yield _speed(Path("."))
    if (shared := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        fix = None if free >= SHARED_GIB else "more shared memory for loader processes: --shm-size=8g for containers, or data.num_workers=0"
        yield Item("/dev/shm", f"{free:.1f} GiB free", fix)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Item("open files", f"at most {limit}", None if limit >= FILES else f"ulimit -n {FILES}")
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = [lock for lock in cache.glob("**/lock") if time.time() - lock.stat().st_mtime > 3600]
    if locks:
        yield Item("kernel builds", f"{len(locks)} old locks, behind which builds wait for ever", f"rm {' '.join(map(str, locks))}")


def _free(folder: Path, name: str) -> Item:
    free = shutil.disk_usage(folder).free / 2**30
    fix = None if free >= FREE_GIB else f"make room for checkpoints on the disk of {folder.resolve()}"
    return Item(name, f"{free:.0f} GiB free", fix)


def _speed(folder: Path) -> Item:
    """Write and sync a file, and compare the file system's clock with this machine's."""
    probe = folder / f".doctor-{platform.node()}-{os.getpid()}"
    try:
        start = time.perf_counter()
        with probe.open("wb") as file:
            file.write(os.urandom(1 << 20) * MEGABYTES)
            file.flush()
            os.fsync(file.fileno())
        seconds, skew = time.perf_counter() - start, probe.stat().st_mtime - time.time()
        probe.unlink()
    except OSError as error:
        return Item(f"writing {folder}", str(error.strerror), "mend the permissions, or run in another folder")
    fix = None if abs(skew) < SKEW_SECONDS else "the clocks of this machine and its file server differ: mend the time service"
    return Item(f"writing {folder}", f"{MEGABYTES / seconds:.0f} MB/s with sync, clock {skew:+.1f} s", fix)


def _config(path: str | None) -> Iterator[Item]:
    """The folders that a config names: what it reads can be listed, what it writes has room. S3 is asked as the run would ask it."""
    if path is None:
        return
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None
    for address in _addresses(values):
        start = time.perf_counter()
        try:
            count = len(storage.folder_files(address))
            text, fix = (
                f"{count} files, listed in {time.perf_counter() - start:.1f} s",
                None if count else "make it first, or change its path",
            )
        except (UserError, OSError) as error:
            text, fix = str(error), f"make it first, or change its path in {path}; for s3:// see AWS_PROFILE and AWS_ENDPOINT_URL"
        yield Item(address, text, fix)
    if isinstance(values, dict) and "out" in values and "://" not in str(values["out"]):
        folder = next(folder for folder in (Path(values["out"]), *Path(values["out"]).resolve().parents) if folder.is_dir())
        yield _free(folder, f"out={values['out']}")


def _addresses(values: Any) -> Iterator[str]:
    """Every `path` and `source` in a config."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key in ("path", "source") and isinstance(value, str):
                yield value
            else:
                yield from _addresses(value)
    elif isinstance(values, list):
        for value in values:
            yield from _addresses(value)


def _devices() -> list[Item]:
    """The GPU of this rank multiplies matrices, or there is none."""
    import torch

    from dit.runtime import distributed

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout
        fix = (
            f"torch {torch.__version__} does not see the GPUs of nvidia-smi: install its CUDA build, or a newer driver" if driver else None
        )
        return [Item("GPU", "none, computing on the CPU", fix)]
    device = distributed.device()
    try:
        ones = torch.ones(1024, 1024, device=device)
        is_right = bool((ones @ ones == 1024).all())
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return [Item(f"GPU {device}", str(error).splitlines()[0], "reset or replace it; CUDA_VISIBLE_DEVICES leaves it out")]
    fix = (
        None if is_right and free > 0.9 * total else "wrong product: replace it" if not is_right else "another process uses it: nvidia-smi"
    )
    return [Item(f"GPU {torch.cuda.get_device_name(device)}", f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free", fix)]


def _group() -> Item:
    """The ranks find each other, and an all-reduce between them is right."""
    import torch

    from dit.runtime import distributed

    distributed.TIMEOUT = PATIENCE
    try:
        distributed.init()
        ranks = distributed.world_size()
        ones = torch.full((MEGABYTES << 18,), distributed.rank() + 1.0, device=distributed.device())
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(REDUCTIONS):
            total = float(distributed.all_reduce_sum(ones.clone())[-1])
        seconds = (time.perf_counter() - start) / REDUCTIONS
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cause = f"every rank must reach {place}; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network interface"
        return Item("ranks", str(error).splitlines()[0], cause)
    if ranks == 1:
        return Item("ranks", "one; to check what is between several, run this under torchrun or srun")
    fix = None if total == ranks * (ranks + 1) / 2 else "wrong sum: check the network and the GPUs of these machines"
    backend = torch.distributed.get_backend()
    return Item("ranks", f"{ranks} over {backend}, all-reduce of {MEGABYTES} MB in {1000 * seconds:.0f} ms", fix)


def _clock(times: Sequence[float]) -> Item:
    """How far the clocks of the ranks are apart, as read after one collective."""
    apart = max(times) - min(times)
    fix = None if apart < SKEW_SECONDS else "mend the time service of these machines: S3 and logs need one time"
    return Item("clock", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, ranks within {apart:.1f} s", fix)
