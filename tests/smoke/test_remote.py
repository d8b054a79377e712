"""The commands of a user on an S3 bucket, real processes against a real server that dies on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT, metrics, train_config, wait_for
from tests.rclone import KEY, SECRET, S3Server

STEPS, STEP_SAMPLES = 200, 16


@pytest.mark.slow
def test_from_a_bucket_to_a_model_through_the_death_of_the_server(tmp_path: Path, clips: Path, latents: Path) -> None:
    with S3Server(tmp_path / "buckets") as server:
        data = server.folder / "data"
        shutil.copytree(clips, data / "clips")
        access = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        environment = ENVIRONMENT | access | {"DIT_S3_PATIENCE": "4", "AWS_EC2_METADATA_DISABLED": "true"}

        def dit(*argv: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "dit", *argv]
            return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

        encode = {"sources": [{"path": "s3://data/clips"}], "sizes": [[9, 32, 32]], "out": str(tmp_path / "latents"), "batch_size": 8}
        (tmp_path / "encode.yaml").write_text(json.dumps(encode))
        out, err = (process := dit("encode", str(tmp_path / "encode.yaml"))).communicate(timeout=200)
        assert process.returncode == 0, out + err
        for shard in latents.glob("shard-*"):
            assert (tmp_path / "latents" / shard.name).read_bytes() == shard.read_bytes()
        shutil.copytree(tmp_path / "latents", data / "latents")

        length = {"train__samples": STEPS * STEP_SAMPLES, "train__log_every_steps": 50, "train__save_every_steps": 10}
        local = train_config(tmp_path / "local.yaml", tmp_path / "latents", **length)
        assert dit("train", str(local)).wait(200) == 0

        remote = train_config(tmp_path / "remote.yaml", Path("latents"), **length, data__num_workers=1)
        remote.write_text(remote.read_text().replace("path: latents", "path: s3://data/latents"))
        process = dit("train", str(remote))
        wait_for(lambda: len(metrics(tmp_path / "remote")) >= 12)
        server.process.kill()
        out, err = process.communicate(timeout=100)
        assert process.returncode == 75, out + err
        assert "error: s3://data/latents/shard-" in err
        assert "start the same command" in err
        assert "Traceback" not in err
        assert 12 <= len(metrics(tmp_path / "remote")) < STEPS

        server.start()
        out, err = (process := dit("train", str(remote), f"data.cache={{path: {tmp_path}/copies, size_gb: 1}}")).communicate(timeout=200)
        assert process.returncode == 0, out + err
        assert [(line["step"], line["loss"]) for line in metrics(tmp_path / "remote")] == [
            (line["step"], line["loss"]) for line in metrics(tmp_path / "local")
        ]
        assert len(list((tmp_path / "copies" / "shard-copies").glob("*.tar"))) == 3

        environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
        out, err = (process := dit("train", str(remote), f"out={tmp_path}/refused")).communicate(timeout=100)
        assert process.returncode == 5
        assert err.strip().splitlines()[-1].startswith("error: s3://data: access denied for key id TEST...")
