"""Training on two machines by torchrun: two network namespaces, which see each other through one cable only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch

from vitrail.predictions import read_predictions

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")

CONFIG = """
name: two_machines
test_best: true
data:
  class_path: datamodules.Wares
  init_args: {n_samples: 40, resolution: 16, image: {size: 16}, loader: {batch_size: 4}}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args: {backbone: test_efficientnet, pretrained: false}
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, num_nodes: 2, strategy: ddp, enable_progress_bar: false}
wandb: {mode: disabled}
"""


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True, timeout=30)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("the program ip is not installed (Debian's package iproute2)")
    names = [f"vitrail{os.getpid()}{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"network namespaces are not permitted here ({made.stderr.strip()[:80]})")
            stack.callback(ip, "netns", "delete", name)
        cable = ["name", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1]]
        if (made := ip("link", "add", *cable)).returncode:
            pytest.skip(f"virtual network cables are not permitted here ({made.stderr.strip()[:80]})")
        for name, address in zip(names, ADDRESSES, strict=True):
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0").returncode == 0
            for device in ("lo", "veth0"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield names


@pytest.mark.slow  # two programs of two processes each
def test_torchrun_trains_on_two_machines_as_one(machines: list[str], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(CONFIG, encoding="utf-8")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-id=42",
        "--rdzv-backend=c10d",
    ]
    fit = ["-m", "experiments", "fit", "--config", str(tmp_path / "two.yaml"), "--runs", str(tmp_path / "runs")]
    with ExitStack() as stack:
        programs = []
        for name, address in zip(machines, ADDRESSES, strict=True):
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            command = ["ip", "netns", "exec", name, sys.executable, *torchrun]
            # Neither finds itself by its name, which is that of the machine under both.
            is_host = int(address == ADDRESSES[0])
            command += [f"--rdzv-endpoint={ADDRESSES[0]}:29500", f"--rdzv-conf=is_host={is_host}"]
            command += [f"--local-addr={address}", *fit]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "veth0"}
            program = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(program.kill)
            programs.append(program)
        codes = [program.wait(280) for program in programs]
    logs = [(tmp_path / f"{name}.log").read_text(errors="replace")[-3000:] for name in machines]
    assert codes == [0, 0], "\n".join(logs)
    (run,) = (tmp_path / "runs" / "two_machines").glob("*")
    assert run.name == "job-42"
    record = json.loads((run / "run.json").read_text())
    # Each has half of the batches, and each sample of the test split counts once.
    train, test = record["data"]["samples"]["train"], record["data"]["samples"]["test"]
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == train // 2 // 4
    predictions = read_predictions(run / "predictions" / "test.parquet")
    assert len(set(predictions.sample_id.tolist())) == len(predictions.sample_id) == test
    assert pd.read_csv(run / "metrics.csv")["test/loss"].notna().sum() == 1
