"""A run without torch for tests of launchers: counts steps in `RUN/steps.txt`, saves every third, resumes, obeys SIGTERM.

python counting.py RUN TOTAL SECONDS [FAULT STEP]: the last rank does FAULT when STEP steps are done, once (a marker file), or always
where the fault begins with "always-".
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from dit.runtime import heartbeat


def fault(name: str) -> None:
    match name.removeprefix("always-"):
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hold":
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait":
            time.sleep(1000)
        case code:
            heartbeat.end(int(code))
            sys.exit(int(code))


def main(run: Path, total: int, seconds: float, name: str = "", at: int = -1) -> int:
    heartbeat.start()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    saved, taken, marker = run / "saved.txt", run / "steps.txt", run / "fault-happened"
    step = int(saved.read_text()) if saved.exists() else 0
    state = "done"
    port = os.environ.get("MASTER_PORT")
    while step < total:
        heartbeat.beat(step, "step")
        if name and step == at and rank == ranks - 1 and (name.startswith("always") or not marker.exists()):
            marker.touch()
            fault(name)
        time.sleep(seconds)
        step += 1
        votes = [run / f"at-{port}-{other}-{step % 2}" for other in range(ranks)]  # two in turn: nobody is two steps ahead of another
        votes[rank].write_text(f"{step} {'stop' if stop else 'on'}\n")
        while len(said := [vote.read_text().split() for vote in votes if vote.exists()]) < ranks or any(
            words[:1] != [str(step)] or len(words) < 2 for words in said
        ):  # as a collective waits
            time.sleep(0.005)
        must_stop = any(words[1] == "stop" for words in said)
        if rank == 0:
            with taken.open("a") as file:
                file.write(f"{step}\n")
        if (must_stop or step % 3 == 0) and rank == 0:
            saved.write_text(str(step))
        if must_stop and step < total:
            state = "interrupted"
            break
    if rank == 0:
        (run / "status.json").write_text(json.dumps({"state": state, "step": step}))
    heartbeat.end(0)
    return 0


if __name__ == "__main__":
    folder, total, seconds, *rest = sys.argv[1:]
    sys.exit(main(Path(folder), int(total), float(seconds), *(rest[:1]), *(int(at) for at in rest[1:])))
