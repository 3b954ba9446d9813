"""Weights in four bits by bitsandbytes itself, where it is installed (``pip install -e '.[quantized]'``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evaluation.efficiency import parameter_count
from experiments.train.cli import main
from tests.experiments.conftest import only_run
from tests.lightning_modules.generative.tiny_answers import TEXTS, images, tiny_answerer
from tests.support.models import write_qwen2_vl
from tests.support.plain_figures import plain_figures

# Not imported to see whether it is there: it brings torch's compiler, a tenth of what collecting all tests takes.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `quantized`)"
)

EXPERIMENT = {
    "test_best": True,
    "data": {
        "class_path": "datamodules.Wares",
        "init_args": {"n_samples": 60, "views": 1, "resolution": 32, "image": {"size": 32}},
    },
    "model": {
        "class_path": "lightning_modules.GenerativeClassifier",
        "init_args": {
            "answers": {"questions": {"colour": "What colour is it?"}},
            "memory": {"four_bit": True, "gradient_checkpointing": True},
            "lora": {"rank": 4},
        },
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    "wandb": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Sides that blocks of 64 weights divide, as those of real models.
    positions = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "rope_parameters": positions}
    return write_qwen2_vl(tmp_path_factory.mktemp("model"), texts=TEXTS, vision={"embed_dim": 64}, **sizes)


def test_answers_are_about_those_of_whole_weights(folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    whole, small = (tiny_answerer(folder, memory={"four_bit": four}, lora={}) for four in (False, True))
    for task in (whole, small):
        task.load_pretrained()
        task.eval()
    assert sum(isinstance(module, Linear4bit) for module in small.modules()) > 10
    assert parameter_count(small) == parameter_count(whole)
    with torch.no_grad():
        for name, expected in whole(images(3)).items():
            found = small(images(3))[name]
            assert not torch.equal(found, expected)
            torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_adapters_are_trained_on_four_bits_and_alone_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    experiment = yaml.safe_load(yaml.safe_dump(EXPERIMENT))
    experiment["model"]["init_args"]["model"] = str(folder)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment))
    with plain_figures():
        assert main(["fit", "--config", str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    run = only_run(tmp_path / "runs")
    assert (run / "predictions" / "test.parquet").exists()
    weights = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    adapters = [value for name, value in weights.items() if "lora_B" in name]
    assert adapters
    assert all(value.dtype == torch.float32 and value.abs().max() > 0 for value in adapters)
    assert not [name for name in weights if name.startswith("vlm.model.") and "lora_" not in name]
