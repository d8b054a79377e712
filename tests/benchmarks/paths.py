"""Five paths and predictions on the demo's moving shapes under one budget: `python tests/benchmarks/paths.py [--samples 32000]`.

Renders and encodes the demo set, trains each by `dit train` and judges all by one `dit evaluate`, which prints the table. What is done is
not done again. Every method draws ln(b / a) from one normal distribution in training and visits the same values of it in sampling, by DDIM,
whose steps depend on b / a alone: what differs is the network's input, target and label of t. A sixth predicts the noise under the weight
of the others, so that its target is all that it has of its own. See docs/results/paths.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

LEVELS = "{name: log_normal, mean: 1.386, std: 1.0}"
"""Of b / a: on rectified flow a logit-normal t with shift 4, as in configs/demo/train.yaml, for t / (1 - t) = 4 exp(n)."""
SAMPLING = {
    "sampler": "ddim",
    "steps": 16,
    "schedule": {"name": "karras", "sigma_min": 0.25, "sigma_max": 80.0},
    "guidance": {"s": 3.0},
}
METHODS = {
    "rectified_flow": "path: {name: rectified_flow}, prediction: velocity",
    "vp_eps": "path: {name: vp}, prediction: noise",
    "vp_eps_weighted": "path: {name: vp}, prediction: noise, weighting: {name: constant, space: v}",
    "vp_v": "path: {name: vp}, prediction: v",
    "edm": "path: {name: edm}, prediction: edm, weighting: {name: edm}",
    "trigflow": "path: {name: trigflow}, prediction: v",
}

STEP = ("data.token_budget=768", "optimizer.lr=5e-3", "ema.decay=0.997")
"""Of 32 clips and what goes with it, as the table was made; the demo's own step may become another."""


def command(*arguments: str) -> None:
    """Run a command of the project, or end with its exit code."""
    if code := subprocess.run([sys.executable, "-m", *arguments], check=False).returncode:
        raise SystemExit(code)


def main() -> None:
    """Make the data, train every method, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32_000, help="training clips of each method (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=120, help="judged clips of each kind of captions (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/paths"), help="folder of all results (default: %(default)s)")
    options = parser.parse_args()
    out, judged = options.out, []
    runs = out / str(options.samples)  # of one budget: a longer run does not go on from a shorter one, whose rate has fallen
    if not (out / "shards" / "manifest.json").is_file():
        command("data_pipelines", "shapes", f"{out}/shards", "--clips", "3072", "--split", "train", "--shard-samples", "512")
    command("dit", "encode", "configs/demo/encode.yaml", f"sources=[{{path: {out}/shards}}]", f"out={out}/latents")
    for name in options.methods:
        objective = f"objective={{name: diffusion, times: {LEVELS}, {METHODS[name]}}}"
        data, budget = f"data.sources=[{{path: {out}/latents}}]", f"train.samples={options.samples}"
        changes = (data, budget, *STEP, objective, "validation=null", "preview=null")
        command("dit", "train", "configs/demo/train.yaml", f"out={runs}/{name}", *changes)
        judged.append({"run": f"{runs}/{name}", "sampling": SAMPLING})
    contestants, metrics = f"contestants={json.dumps(judged)}", "metrics=[{name: adherence}]"
    command("dit", "evaluate", "configs/demo/evaluate.yaml", f"out={runs}/evaluation", f"samples={options.clips}", contestants, metrics)


if __name__ == "__main__":
    main()
