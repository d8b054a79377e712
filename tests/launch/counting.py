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
    places = [run / f"at-{os.environ.get('MASTER_PORT')}-{other}" for other in range(ranks)]
    while step < total:
        heartbeat.beat(step, "step")
        if name and step == at and rank == ranks - 1 and (name.startswith("always") or not marker.exists()):
            marker.touch()
            fault(name)
        time.sleep(seconds)
        step += 1
        places[rank].write_text(str(step))
        while any(not place.exists() or int(place.read_text() or "0") < step for place in places):  # as a collective waits
            time.sleep(0.005)
        if rank == 0:
            with taken.open("a") as file:
                file.write(f"{step}\n")
        if (stop or step % 3 == 0) and rank == 0:
            saved.write_text(str(step))
        if stop and step < total:
            state = "interrupted"
            break
    if rank == 0:
        (run / "status.json").write_text(json.dumps({"state": state, "step": step}))
    heartbeat.end(0)
    return 0


if __name__ == "__main__":
    folder, total, seconds, *rest = sys.argv[1:]
    sys.exit(main(Path(folder), int(total), float(seconds), *(rest[:1]), *(int(at) for at in rest[1:])))
