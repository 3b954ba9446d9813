from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from experiments.export.graphs import graph_of, towers_of
from lightning_modules.classification import ImageClassifier
from lightning_modules.encoders.weights import known_architecture
from lightning_modules.optim import parameter_groups
from tests.support.models import TASKS
from vitrail.errors import UserError

SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_1536_20",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035",
    "mobilenetv5": "mobilenetv5_300m",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""The smallest architecture of each of timm's files."""

TWO_BLOCKS = {"beit", "deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer_sam"}
"""Files without small architectures, which have an option for the number of blocks."""

SIX = ["efficientnet", "levit", "nfnet", "regnet", "resnet", "vision_transformer"]
SIZE = 64


def classifier(family: str, **changes: Any) -> ImageClassifier:
    """A classifier for images of 64 px; where they are refused, for those of the architecture's own size."""
    name = SMALLEST[family]
    own = int(known_architecture(name).input_size[-1])
    arguments: dict[str, Any] = {"backbone": name, "class_names": TASKS["class"], "pretrained": False, **changes}
    if family in TWO_BLOCKS:
        arguments["backbone_options"] = {"timm": {"depth": 2}}
    torch.manual_seed(0)
    if "image_size" in changes:
        return ImageClassifier(**arguments)
    try:
        return ImageClassifier(**arguments, image_size=SIZE)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"image size: {name} c"), message
        assert "\n" not in message
    return ImageClassifier(**arguments, image_size=own)


def images(task: ImageClassifier) -> torch.Tensor:
    size = task.encoder.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def backward(task: ImageClassifier) -> None:
    torch.manual_seed(1)
    task.zero_grad()
    (task(images(task))["class"] ** 2).mean().backward()


def check_phases(task: ImageClassifier) -> None:
    """A frozen backbone keeps its weights and statistics; an unfrozen one gets a gradient for every parameter."""
    trainable = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
    task.train()
    task.freeze_backbone()
    before = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    backward(task)
    assert {name for name, p in task.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert all(torch.equal(value, before[name]) for name, value in task.encoder.state_dict().items())
    task.unfreeze_backbone()
    backward(task)
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is not None] == trainable


def check_groups(task: ImageClassifier) -> None:
    """Every parameter is in one group, and the lowest layers train more slowly than the heads."""
    groups = parameter_groups(task, task.backbones, weight_decay=0.1, layer_decay=0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in task.parameters() if parameter.requires_grad)
    assert min(group["lr_scale"] for group in groups) < 0.5


def check_state(task: ImageClassifier, family: str) -> None:
    """A checkpoint's weights give the same outputs."""
    other = classifier(family, image_size=task.encoder.image_size)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(task.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(images(task))["class"], task.eval()(images(task))["class"])


def check_release(family: str, folder: Path) -> None:
    """The weights of timm's own network fit, without its classifier."""
    name, options = SMALLEST[family], {"depth": 2} if family in TWO_BLOCKS else {}
    whole = timm.create_model(name, **options)
    torch.save(whole.state_dict(), folder / "w.pth")
    own = int(known_architecture(name).input_size[-1])
    task = classifier(family, pretrained=str(folder / "w.pth"), image_size=own)
    task.load_pretrained()
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in task.backbone.state_dict().items())
    (folder / "w.pth").unlink()


def check_export(task: ImageClassifier) -> None:
    """The exported graph computes what the network does."""
    task.input_options["size"] = task.encoder.image_size  # as its data had
    [tower] = towers_of(task.eval())
    module = graph_of(tower).module()
    with torch.no_grad():
        torch.testing.assert_close(module(images(task))[0], task(images(task))["class"], rtol=1e-3, atol=1e-4)


def walk(family: str, folder: Path) -> ImageClassifier:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = classifier(family)
        check_phases(task)
        check_groups(task)
        check_state(task, family)
        check_release(family, folder)
    return task


@pytest.mark.parametrize("family", SIX)
def test_six_families_train_in_phases_and_load_their_weights(family: str, tmp_path: Path) -> None:
    walk(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SMALLEST))
def test_every_family_trains_in_phases_loads_its_weights_and_is_exported(family: str, tmp_path: Path) -> None:
    task = walk(family, tmp_path)
    if family not in NOT_EXPORTED:
        check_export(task)
        return
    with pytest.raises(UserError, match="export: no graph can be made of the model network"):
        check_export(task)


NOT_EXPORTED: set[str] = set()
"""Families whose code cannot be traced."""


def test_every_family_of_timm_is_walked() -> None:
    assert set(SMALLEST) == set(timm.list_modules())
