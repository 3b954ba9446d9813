from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from datamodules import Wares
from evaluation.__main__ import main
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.few_shot import Shots, build_head, solve_head
from lightning_modules.options import FewShotOptions, TowerOptions
from tests.support.models import tiny_trainer, write_clip

DATA = {"n_samples": 150, "views": 1, "resolution": 32, "image": {"size": 32}, "prompts": "photo"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few_shot") / "wares.yaml"
    path.write_text(yaml.safe_dump({"data": {"class_path": "datamodules.Wares", "init_args": DATA}}))
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """A CLIP of random weights that has been tested."""
    data, folder = Wares(**DATA), config.parent / "runs" / "clip" / "20260101-000000"  # type: ignore[arg-type]  # a YAML
    data.prepare_data()
    task = DualEncoder(
        TowerOptions(model=str(write_clip(config.parent / "clip"))),
        data.class_names,
        data.class_prompts,
        image_size=32,
    )
    trainer = tiny_trainer(folder)
    trainer.test(task, data, verbose=False)
    trainer.save_checkpoint(folder / "checkpoints" / "best.ckpt")
    (folder / "config.yaml").write_text("name: clip\n", encoding="utf-8")
    return folder


def test_a_cell_is_the_accuracy_of_the_method_on_the_shots_of_the_data_set(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ["--backbone", "test_resnet", "--pretrained", "false", "--image-size", "32"]
    torch.manual_seed(1)
    # The YAML's own shots do not limit those of the table.
    more = ["--shots", "1", "3", "--seeds", "2", "--json", "--data.init_args.shots", "1"]
    assert main(["few-shot", "--config", str(config), *encoder, *more]) == 0
    scores, _ = json.loads(capsys.readouterr().out)
    assert [(one["method"], one["shots"]) for one in scores] == [
        (method, shots) for method in ("prototypes", "linear_probe") for shots in (1, 3)
    ]
    torch.manual_seed(1)
    from lightning_modules.encoders.image import ImageEncoder

    network = ImageEncoder("test_resnet", 32, pretrained=False).eval()
    for seed in (0, 1):
        data = Wares(**{**DATA, "shots": 3, "seed": seed})  # type: ignore[arg-type]  # as a YAML has it
        data.prepare_data()
        with torch.no_grad():
            train, test = (
                [(F.normalize(network(batch["image"]), dim=-1), batch["label"]) for batch in data.eval_dataloader(one)]
                for one in ("train", "test")
            )
            image, label = (torch.cat(part) for part in zip(*train, strict=True))
            head = build_head(FewShotOptions(method="prototypes"), len(data.class_names), image.shape[1])
            solve_head(head, Shots(image, label, torch.arange(len(label))))
            right = torch.cat([head(features).argmax(dim=1) == own for features, own in test])
        assert scores[1]["values"][seed] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_zero_shot_is_the_baseline_of_a_dual_encoder(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["few-shot", "--config", str(config), "--run", str(run), "--seeds", "2", "--markdown"]
    chosen = ["--methods", "tip_adapter", "linear_probe", "--shots", "2", "4"]
    assert main([*arguments, *chosen]) == 0
    first, second = capsys.readouterr().out.split("difference to zero_shot")
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows] == ["method", "---", "zero_shot", "tip_adapter", "linear_probe"]
    assert rows[2][1] == rows[2][2].rstrip(" |")
    assert "± 0.000" in rows[2][1]
    assert second.count("| tip_adapter |") == 1
    data = Wares(**DATA)  # type: ignore[arg-type]  # as a YAML has it
    data.prepare_data()
    task = load_task(run / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        hits = [
            task.predict_step(batch, 0)["logits"]["class"].argmax(dim=1) == batch["label"]
            for batch in data.eval_dataloader("test")
        ]
    assert rows[2][1].split()[0] == f"{float(torch.cat(hits).float().mean()):.3f}"


def test_base_to_novel_has_both_halves_and_their_mean(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["few-shot", "--config", str(config), "--run", str(run), "--seeds", "2", "--base-to-novel", "--json"]
    assert main([*arguments, "--methods", "linear_probe", "lp_plus_plus", "--shots", "4", "--select", "val"]) == 0
    [(zero_shot, probe, blended)] = json.loads(capsys.readouterr().out)
    assert probe["novel"]["values"] == [0.0, 0.0]  # it knows nothing of classes without shots
    assert probe["base"]["mean"] > 0
    assert zero_shot["base"]["values"][0] == zero_shot["base"]["values"][1]
    assert probe["harmonic_mean"]["mean"] == 0
    for base, novel, mean in zip(
        *(blended[name]["values"] for name in ("base", "novel", "harmonic_mean")), strict=True
    ):
        assert mean == pytest.approx(2 * base * novel / max(base + novel, 1e-9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either the --run of a model, or the --backbone"),
        (["--backbone", "test_resnet", "--shots", "0"], "must be at least 1"),
        (["--backbone", "test_resnet", "--pretrained", "false", "--methods", "maple"], "--methods: must be among"),
        (["--backbone", "test_resnet", "--pretrained", "false", "--methods", "coop"], "coop needs a text tower"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["few-shot", "--config", str(config), *arguments]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
