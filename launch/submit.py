"""Render and submit Slurm jobs: `python -m launch.submit CONFIG --site site.yaml [--dry-run] [key=value ...] [site.key=value ...]`.

The config of the run and the site are checked here, before anything waits in a queue. `--sweep FILE` makes an array: each line of
the file holds the overrides of one task. Submitting the same command again goes on where the run stands.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.config_file import load_run
from data_pipelines.errors import UserError
from dit.config import DistillRun, EncodeRun, TrainRun
from launch import attempts, slurm
from launch.slurm import Site

VERBS: dict[str, Any] = {"train": TrainRun, "distill": DistillRun, "encode": EncodeRun}


def rendered(verb: str, config: str, overrides: Sequence[str], sweep: Sequence[Sequence[str]], site: Site) -> str:
    """The batch script for `config`, for each line of `sweep` if there are any. Raises UserError for whatever a run would refuse."""
    runs = []
    for line in sweep or [[]]:
        changes = [*overrides, *line]
        run = load_run(VERBS[verb], config, changes)
        runs.append((Path(run.out), (verb, config, *changes)))
        _check_processes(run, site)
        if "://" in run.out:
            raise UserError(f"out={run.out}: expected a folder that all nodes see; the supervisor and the ranks meet there")
    if len({folder for folder, _ in runs}) < len(runs):
        raise UserError("two tasks of the sweep have one `out`: give each line its own, as in out=runs/lr1e-3 optimizer.lr=1e-3")
    grace = max(round(attempts.grace(folder, site.grace_seconds)) for folder, _ in runs)
    if grace >= (limit := seconds(site.time_limit)):
        raise UserError(
            f"site.time_limit={site.time_limit} leaves no time to train: {grace} s of its {limit} s are for the last checkpoint"
        )
    return slurm.script(site, runs[0][0].name if len(runs) == 1 else Path(config).stem, Path.cwd(), runs, grace)


def seconds(limit: str) -> int:
    """Seconds of a time limit as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours_first = bool(dash) or len(parts) == 3
    units = (3600, 60, 1) if hours_first else (60, 1)
    return int(days or 0) * 86_400 + sum(part * unit for part, unit in zip(parts, units))


def submit(text: str, logs: Path) -> str:
    """Hand the script to sbatch; its answer. Raises UserError if it refuses."""
    logs.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UserError("there is no sbatch on this machine: submit from a login node of the cluster, or look at --dry-run") from None
    if done.returncode:
        raise UserError(
            f"sbatch refused the job: {done.stderr.strip()}; the script is what --dry-run prints, its options come from the site"
        )
    return done.stdout.strip()


def _check_processes(run: TrainRun | DistillRun | EncodeRun, site: Site) -> None:
    data = getattr(run, "data", None)
    processes = site.nodes * site.tasks
    shared = 1 if isinstance(run, EncodeRun) else run.engine.sequence_parallel
    if processes % shared or (data is not None and data.packs_per_step % (processes // shared)):
        together = f", {shared} to a pack (engine.sequence_parallel)" if shared > 1 else ""
        packs = "packs" if data is None else f"data.packs_per_step={data.packs_per_step}"
        raise UserError(f"{packs} cannot be shared by site.nodes={site.nodes} x {site.tasks} ranks = {processes}{together}: change either")


def _sweep(path: str | None) -> list[list[str]]:
    if path is None:
        return []
    try:
        lines = [shlex.split(line, comments=True) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--sweep {path}: {error}; expected a file of overrides, one task a line") from None
    if not (tasks := [line for line in lines if line]):
        raise UserError(f"--sweep {path} has no line with overrides")
    return tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, render, submit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m launch.submit", description=__doc__, formatter_class=raw)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="key=value of the run; site.key=value of the site")
    parser.add_argument("--site", required=True, help="YAML file of the cluster, see launch/site.yaml")
    parser.add_argument("--verb", choices=VERBS, default="train")
    parser.add_argument("--sweep", help="file of overrides, one task of an array a line")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    options = parser.parse_intermixed_args(argv)
    try:
        site_changes = [change.removeprefix("site.") for change in options.overrides if change.startswith("site.")]
        overrides = [change for change in options.overrides if not change.startswith("site.")]
        site = load_run(Site, options.site, site_changes)
        text = rendered(options.verb, options.config, overrides, _sweep(options.sweep), site)
        print(text if options.dry_run else submit(text, Path(site.logs)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
