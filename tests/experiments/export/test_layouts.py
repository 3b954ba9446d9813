"""Exports in other libraries' layouts, loaded there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from experiments.__main__ import main as experiments
from experiments.export.layouts import reloaded, write_layout
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from tests.support.models import (
    TEXTS,
    TinyPairs,
    tiny_classifier,
    tiny_pair,
    tiny_trainer,
    write_open_clip,
    write_whole_model,
)
from tests.support.runs import products_run
from vitrail.errors import UserError
from vitrail.runs import prepared_image

SCALE = 2.25


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (50, 41, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def trained(folder: Path, model: Path, **changes: Any) -> Any:
    """A dual encoder whose scale and weights differ from the pretrained ones."""
    task = tiny_pair(folder / "clip", towers={"model": str(model)}, **changes)
    task.load_pretrained()
    tiny_trainer(folder).fit(task, TinyPairs())
    with torch.no_grad():
        task.objective.logit_scale.log_scale.fill_(SCALE)
    task.input_options = {**task.towers.input_options}
    return task.eval()


def ours(task: Any, photo: Path) -> tuple[torch.Tensor, torch.Tensor]:
    image = prepared_image(photo, task.input_options)[None]
    with torch.no_grad():
        return task.encode_image(image), task.encode_text(list(TEXTS))


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_vit"])
@torch.no_grad()
def test_a_classifier_is_loaded_by_timm_with_its_labels(backbone: str, tmp_path: Path, photo: Path) -> None:
    size = 160 if backbone == "test_vit" else 32
    task = tiny_classifier(backbone=backbone, image_size=size).eval()
    task.input_options = {**task.input_options, "size": size, "crop_fraction": 1.0}
    folder = tmp_path / "timm"
    write_layout("timm", task, folder)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    with Image.open(photo) as image:
        expected = model(transform(image.convert("RGB"))[None])
    found = task(prepared_image(photo, task.input_options)[None])["class"]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # timm resizes by Pillow
    assert model.pretrained_cfg["label_names"] == task.tasks["class"]
    again: Any = reloaded("timm", task, folder)
    image_batch = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    torch.testing.assert_close(again(image_batch), task(image_batch))


@pytest.mark.parametrize("kind", ["clip", "siglip", "align", "siglip2"])
def test_a_whole_model_is_loaded_by_transformers_with_its_trained_scale(kind: str, tmp_path: Path, photo: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

    lora = {"rank": 2} if kind == "clip" else None
    task = trained(tmp_path, write_whole_model(tmp_path / "base", kind), lora=lora)
    folder = tmp_path / "export"
    folder.mkdir()
    write_layout("transformers", task, folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # the library's own
    fixed = kind.startswith("siglip")
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)(
        list(TEXTS), padding="max_length" if fixed else True, truncation=True, return_tensors="pt"
    )
    with Image.open(photo) as opened:
        square = opened.convert("RGB").crop((0, 0, 40, 40))  # SigLIP 2 NaFlex squashes others here
    square.save(photo)
    image, text = ours(task, photo)
    with torch.no_grad():
        inputs = processor(images=square, return_tensors="pt", **({"max_num_patches": 16} if kind == "siglip2" else {}))
        expected = F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)
        mask = None if fixed else tokens["attention_mask"]
        expected = F.normalize(model.get_text_features(tokens["input_ids"], attention_mask=mask).pooler_output, dim=-1)
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-4)
    scale = -model.temperature.log() if kind == "align" else model.logit_scale
    assert float(scale) == pytest.approx(SCALE)
    again: Any = reloaded("transformers", task, folder)
    assert torch.equal(ours(again, photo)[0], image) or lora
    assert float(again.objective.logit_scale.log_scale) == pytest.approx(SCALE)


def test_a_model_of_open_clip_is_loaded_there(tmp_path: Path, photo: Path) -> None:
    import open_clip

    task = trained(tmp_path, write_open_clip(tmp_path / "base", "vit"))
    folder = tmp_path / "export"
    folder.mkdir()
    write_layout("open_clip", task, folder)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    image, text = ours(task, photo)
    with Image.open(photo) as opened, torch.no_grad():
        expected = model.eval().encode_image(transform(opened)[None], normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(list(TEXTS)), normalize=True)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(text, texts, rtol=0, atol=1e-4)
    assert float(model.logit_scale) == pytest.approx(SCALE)


def test_adapters_alone_are_loaded_by_peft(tmp_path: Path, photo: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    base = write_whole_model(tmp_path / "base", "clip")
    task = trained(tmp_path, base, lora={"rank": 2})
    folder = tmp_path / "export"
    folder.mkdir()
    write_layout("peft", task, folder)
    model: Any = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(folder)).eval()
    image, text = ours(task, photo)
    pixels = task.towers.normalize(prepared_image(photo, task.input_options)[None])
    with torch.no_grad():
        expected = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)
    assert (folder / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size / 4
    torch.testing.assert_close(ours(reloaded("peft", task, folder), photo)[1], text)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("transformers", "transformers' layout is for a dual encoder"),
        ("open_clip", "open_clip's layout is for a dual encoder"),
        ("peft", r"peft's layout is for adapters \(lora\)"),
    ],
)
def test_a_layout_of_other_tasks_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_layout(kind, tiny_classifier(), tmp_path)


def test_the_command_compares_what_timm_loads_and_writes_a_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = products_run()
    task: VisionTask = load_task(run / "checkpoints" / "best.ckpt")
    assert experiments(["export", str(run), "--format", "timm", "--to", str(tmp_path)]) == (
        0 if type(task).__name__ == "ImageClassifier" else 2
    )
    if type(task).__name__ == "ImageClassifier":
        assert "timm" in capsys.readouterr().out
        card = (tmp_path / "timm" / "README.md").read_text()
        assert 'timm.create_model("hf-hub:OWNER/NAME"' in card
        assert "library_name: timm" in card
        assert "widget:" in card
    assert experiments(["export", str(run), "--format", "timm", "--quantize", "int8", "--to", str(tmp_path)]) == 2
    assert "--quantize: the layout of timm has float32 weights" in capsys.readouterr().err
