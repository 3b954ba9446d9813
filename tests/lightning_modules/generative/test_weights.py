from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.encoders.transformers import configuration_from_values
from lightning_modules.generative.weights import (
    build_vision_language,
    checked_configuration,
    checked_memory,
    files_digest,
    image_statistics,
    load_vision_language,
)
from lightning_modules.options import MemoryOptions
from tests.support.models import write_bert, write_clip, write_qwen2_vl
from vitrail.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("model"))


def test_the_digest_is_of_the_weights_and_not_of_their_files(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, tmp_path / "model-1.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, tmp_path / "model-2.safetensors")
    assert files_digest(str(tmp_path)) == files_digest(str(folder))
    old = tmp_path / "old"
    old.mkdir()
    torch.save(weights, old / "pytorch_model.bin")
    assert files_digest(str(old)) == files_digest(str(folder))
    changed = weights[names[3]].clone().flatten()
    changed[-1] += 1e-6
    save_file({**weights, names[3]: changed.view_as(weights[names[3]])}, tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").unlink()
    assert files_digest(str(tmp_path)) != files_digest(str(folder))
    with pytest.raises(UserError, match="no weights that can be read safely"):
        files_digest(str(tmp_path / "nowhere"))


def test_other_kinds_of_models_are_refused(folder: Path, tmp_path: Path) -> None:
    for other in (write_clip(tmp_path / "clip"), write_bert(tmp_path / "bert")):
        with pytest.raises(UserError, match="not an image-text-to-text model"):
            checked_configuration(str(other), pretrained=True)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    values["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="sliding window"):
        checked_configuration(str(tmp_path), pretrained=True)


def test_the_default_model_is_known_without_a_network() -> None:
    configuration = checked_configuration("Qwen/Qwen2-VL-2B-Instruct", pretrained=False)
    with torch.device("meta"):
        model = build_vision_language(configuration, MemoryOptions(), empty=True)
    # 2.2 billion parameters, as its model card says.
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_208_985_600


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_precision_that_is_asked_for(folder: Path, precision: Any) -> None:
    configuration = checked_configuration(str(folder), pretrained=True)
    model = load_vision_language(str(folder), configuration, MemoryOptions(precision=precision), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, precision)}


def test_statistics_are_the_folders_or_those_of_clip(folder: Path, tmp_path: Path) -> None:
    assert image_statistics(str(folder)) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert image_statistics(str(tmp_path))[0][0] == pytest.approx(0.48145466)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="image_mean and image_std"):
        image_statistics(str(tmp_path))


def test_memory_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any
    for wrong, message in (({"bits": 4}, "unknown key 'bits'"), ({"precision": "int8"}, "must be one of float32")):
        with pytest.raises(UserError, match=message):
            checked_memory(wrong, pretrained=True)
    monkeypatch.setattr("lightning_modules.generative.weights.find_spec", lambda name: object())
    assert checked_memory(MemoryOptions(four_bit=True), pretrained=True).four_bit
    with pytest.raises(UserError, match="nothing to quantise"):
        checked_memory(MemoryOptions(four_bit=True), pretrained=False)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_are_one_line() -> None:
    with pytest.raises(UserError, match=r"memory\.four_bit: needs bitsandbytes, which is not installed; pip install"):
        checked_memory(MemoryOptions(four_bit=True), pretrained=True)


def test_four_bit_weights_are_asked_of_the_library(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed over; the quantisation itself is the library's, and needs it."""
    from transformers import AutoModelForImageTextToText

    calls: list[dict[str, Any]] = []
    read = AutoModelForImageTextToText.from_pretrained

    def remember(directory: str, **arguments: Any) -> Any:
        calls.append(arguments)
        if "quantization_config" not in arguments:
            return read(directory, **arguments)
        report: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return build_vision_language(arguments["config"], MemoryOptions(), empty=True), report

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", remember)
    configuration = configuration_from_values(json.loads((folder / "config.json").read_text()))
    load_vision_language(
        str(folder), configuration, MemoryOptions(four_bit=True, precision="bfloat16"), torch.device("cuda:1")
    )
    [_, given] = calls
    asked = given["quantization_config"]
    assert asked.load_in_4bit
    assert asked.bnb_4bit_quant_type == "nf4"
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16
    assert given["device_map"] == {"": torch.device("cuda:1")}
    # A cut weight is named before anything is quantized.
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "up_proj" in name)
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of another shape \(\S*up_proj\.weight is \(63, 32\), not \(64, 32\)\)"):
        load_vision_language(str(tmp_path), configuration, MemoryOptions(four_bit=True), torch.device("cuda:1"))
    assert len(calls) == 3
