"""A real Slurm on this machine, without systemd: munged, slurmctld and two slurmd on ports of their own, all in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.processes import ENVIRONMENT, free_port, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
WHY_NOT = f"no {', '.join(MISSING)}: apt-get install slurm-wlm slurm-client munge" if MISSING else "needs root" if os.geteuid() else ""
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
SlurmctldPort={controller}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=1,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=5
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=2 RealMemory=4000
PartitionName=main Nodes=node[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=node[1-2] State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Two nodes of two cores; partition `high` preempts `main` after a minute's grace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**ENVIRONMENT, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        for name in ("munge", "run", "log", "state", "spool/node1", "spool/node2"):
            (self.root / name).mkdir(parents=True)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.root / "munge").chmod(0o700)
        ports = {name: free_port() for name in ("controller", "node1", "node2")}
        (self.root / "slurm.conf").write_text(CONFIG.format(root=self.root, host=socket.gethostname().split(".")[0], **ports))
        run, log = self.root / "run", self.root / "log"
        files = (f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={self.root}/munge/seed")
        self.tell("munged", f"--key-file={key}", f"--socket={run}/munge.socket", *files, "--force")
        self.tell("slurmctld")
        self.tell("slurmd", "-N", "node1")
        self.tell("slurmd", "-N", "node2")
        wait_for(lambda: self.tell("sinfo", "--noheader", "--states=idle", "--partition=main", "--format=%D") == "2", 60)
        return self

    def __exit__(self, *error: object) -> None:
        self.tell("scancel", "--user=root", "--full")
        time.sleep(1)
        for path in (self.root / "run").glob("*.pid"):
            if path.name.startswith(("slurm", "munged")):
                try:
                    os.kill(int(path.read_text()), signal.SIGTERM)
                except ProcessLookupError:
                    continue

    def tell(self, *command: str) -> str:
        """What a Slurm command answers."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job, by the names of `scontrol show job`."""
        pieces = self.tell("scontrol", "show", "job", number).split()
        return dict(piece.split("=", 1) for piece in pieces if "=" in piece)
