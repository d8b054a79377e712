"""Writing checkpoints of a run: while training goes on, at most one at a time, published only when every rank has written its share.

A second thread copies what this rank owns to host memory while the next step computes its gradients, and training waits for it only where
that step would change what is copied; then it writes, seals, publishes and deletes old ones. What goes wrong there is raised on all ranks
by the next `save` or `finish`. If the run has a store, a third thread uploads.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import StorageUnavailable, UserError
from dit.config import FitRun, TrainRun
from dit.engine import durable, tensors
from dit.engine.engine import Engine
from dit.engine.store import Store
from dit.runtime import distributed, faults

Position = dict[str, Any]
"""Where the data stream goes on; opaque here."""


class Saver:
    """Writes the checkpoints of `run`. Made, used and finished by all ranks; `with` finishes it."""

    def __init__(self, run: FitRun) -> None:
        self.root, self.train = Path(run.out) / "checkpoints", run.train
        self._group = distributed.side_group()
        self._buffers: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._copied, self._stream = Event(), torch.cuda.Stream() if torch.cuda.is_available() else None
        self._error: Exception | None = None
        self._store = Store(run) if run.train.checkpoint_store and distributed.rank() == 0 else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.finish()
        elif self._thread:
            self._thread.join(timeout=60)  # if all ranks are leaving, what was begun can be published

    def check_space(self, engine: Engine) -> None:
        """Raise UserError on all ranks unless the disk has room for the newest checkpoints that the run will keep, beside those that are
        there for ever."""
        every = self.train.keep_every_steps
        passing = [
            step for step in durable.published(self.root) if every is None or step % every
        ]  # retention makes room of the others never
        missing = self.train.keep_checkpoints + 1 - len(passing)
        self._check_space(sum(view.nbytes for f in engine.owned() for view in f.views.values()), max(1, missing), UserError)

    def save(self, engine: Engine, position: Position) -> None:
        """Write a checkpoint of `engine`. With train.async_save it returns at once, and `wait_copied` says when `engine` may change.

        Raises StorageUnavailable on all ranks, with nothing published, if this or the save before could not be written.
        """
        self.finish()
        faults.point("save.begun")
        views = {f"{kind}/{f.name}@{f.start}": view for f in engine.owned() for kind, view in f.views.items()}
        state = json.dumps(state_of(engine, position), indent=1)  # as of now: training goes on while it is written
        if not self.train.async_save:
            self._write(engine.step, views, state)
            return self.finish()
        self._copied.clear()
        computed = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._thread = Thread(target=self._write, args=(engine.step, views, state, computed), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_copied(self) -> None:
        """Wait until what is being saved may change."""
        if self._thread:
            self._copied.wait()

    def finish(self) -> None:
        """Wait until the last save is published; raises what went wrong with it."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Wait until the newest checkpoint is in the store of the run, if it has one. Raises StorageUnavailable, AccessDenied."""
        if self.train.checkpoint_store:
            distributed.on_first(lambda: self._store.settle() if self._store else None)

    @property
    def failures(self) -> dict[str, int]:
        """How many checkpoints could not be uploaded, if any, as "uploads_failed"; known to the first rank."""
        return {"uploads_failed": self._store.failed} if self._store and self._store.failed else {}

    def _copy(self, views: Mapping[str, Tensor], computed: torch.cuda.Event | None) -> None:
        """Fill buffers in host memory, the same each time. computed: when a GPU has what is to be copied; None on the CPU."""
        try:
            if self._buffers.keys() != views.keys():
                pinned = computed is not None
                self._buffers = {name: torch.empty(view.shape, dtype=view.dtype, pin_memory=pinned) for name, view in views.items()}
            with torch.cuda.stream(self._stream):  # None on the CPU: then it does nothing
                if computed:
                    computed.wait()
                for name, view in views.items():
                    self._buffers[name].copy_(view, non_blocking=True)
            if self._stream:
                self._stream.synchronize()
        finally:
            self._copied.set()

    def _write(self, step: int, views: Mapping[str, Tensor], state: str, computed: torch.cuda.Event | None = None) -> None:
        rank, world = distributed.rank(), distributed.world_size()
        staged = self.root / durable.staging_name(step)
        path = staged / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        try:
            if self.train.async_save:
                self._together(lambda: self._copy(views, computed))
                views = self._buffers
            faults.point("save.copied")
            self._check_space(sum(view.nbytes for view in views.values()), 1, StorageUnavailable)
            self._on_first(lambda: durable.stage(self.root, step))
            faults.point("save.staged")
            entries = self._together(lambda: tensors.write(path, views))
            faults.point("save.written")
            self._on_first(lambda: self._publish(staged, step, entries, state))
        except Exception as error:  # it belongs to the caller's thread, whatever it is
            if rank == 0:
                shutil.rmtree(staged, ignore_errors=True)
            self._error = error

    def _publish(self, staged: Path, step: int, entries: list[durable.Entry], state: str) -> None:
        path = staged / "state.json"
        with durable.naming(path):
            path.write_text(state + "\n")
        durable.publish(staged, self.root, step, [*entries, durable.seal(path)])
        durable.retain(self.root, self.train.keep_checkpoints, newest_valid=step, every=self.train.keep_every_steps)
        faults.point("save.retained")
        if self._store:
            self._store.offer(step)

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """Do `action` on every rank and return what each got; if any rank cannot, raise on all instead of waiting for it for ever."""
        try:
            outcome = {"got": action()}
        except Exception as error:  # whatever it is, the others must not wait
            outcome = {"error": f"rank {distributed.rank()}: {error}"}
        outcomes = distributed.gather_json(outcome, self._group)
        if errors := [outcome["error"] for outcome in outcomes if "error" in outcome]:
            raise StorageUnavailable(
                f"cannot write a checkpoint to {self.root}: {'; '.join(errors)}. Earlier ones are as they were; "
                "mend the disk of `out`, then start the same command"
            )
        return [outcome["got"] for outcome in outcomes]

    def _on_first(self, action: Callable[[], object]) -> None:
        def once() -> None:
            if distributed.rank() == 0:
                action()

        self._together(once)

    def _check_space(self, size: int, count: int, refusal: type[UserError]) -> None:
        def facts_here() -> tuple[int, int]:
            self.root.mkdir(parents=True, exist_ok=True)
            return size, shutil.disk_usage(self.root).free

        facts = self._together(facts_here)
        needed, free = count * sum(fact[0] for fact in facts), min(fact[1] for fact in facts)
        if free < needed:
            sizes = f"{needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free"
            what = "a checkpoint needs" if count == 1 else f"{count} checkpoints need"
            raise refusal(f"{self.root}: {what} {sizes}. Make room, lower train.keep_checkpoints, or change `out`")


def state_of(engine: Engine, position: Position) -> dict[str, Any]:
    """All of a checkpoint that is not a tensor."""
    return {
        "format": durable.FORMAT,
        "step": engine.step,
        "taken": engine.taken,
        "samples_seen": engine.samples_seen,
        "position": position,
        "guard": engine.guard.state(),
        "shapes": engine.shapes,
        "kinds": engine.kinds,
        "backbone": backbone_config(engine.run),
        "world_size": distributed.world_size(),
        "zero_stage": engine.run.engine.zero_stage,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
    }


def backbone_config(run: FitRun) -> dict[str, Any] | None:
    """The `backbone` section of a training run; a distillation has its teacher's, which its own config does not repeat."""
    return run.backbone.model_dump(mode="json") if isinstance(run, TrainRun) else None
