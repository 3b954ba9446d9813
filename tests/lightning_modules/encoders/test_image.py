from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch

from lightning_modules.classification import ImageClassifier
from lightning_modules.encoders.image import ImageEncoder, Normalize
from lightning_modules.encoders.weights import create_backbone
from tests.support.models import tiny_classifier
from vitrail.errors import UserError
from vitrail.types import InputOptions


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_normalize_takes_uint8_and_is_the_usual_formula() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = images(4)
    expected = (image.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Normalize(mean, std)(image), expected.float())
    with pytest.raises(TypeError, match="uint8"):
        Normalize(mean, std)(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "width"),
    [("deit_tiny_patch16_224", 192), ("mobilevit_xxs", 320), ("resnet18", 512), ("tf_mobilenetv3_small_100", 1024)],
)
def test_features_are_as_wide_as_they_say(name: str, width: int) -> None:
    encoder = ImageEncoder(name, image_size=64, pretrained=False).eval()
    with torch.no_grad():
        features = encoder(images(64))
        torch.testing.assert_close(features, encoder.backbone(encoder.normalize(images(64))))
    assert features.shape == (2, encoder.num_features) == (2, width)


def test_statistics_are_those_of_the_weights() -> None:
    mobilenet = ImageEncoder("tf_mobilenetv3_small_100", image_size=64, pretrained=False)
    assert mobilenet.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    tagged = ImageEncoder("vit_tiny_patch16_224.augreg_in21k", image_size=32, pretrained=False)
    assert tagged.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    deit = ImageEncoder("deit_tiny_patch16_224", image_size=64, pretrained=False)
    assert deit.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert deit.input_options == {
        "size": 224,
        "resize": "crop",
        "crop_fraction": 0.9,
        "interpolation": "bicubic",
        "crop_rounding": "even",
    }


def test_architectures_for_one_size_are_built_for_the_size_of_the_data() -> None:
    backbone = create_backbone("test_vit", 64)
    expected = timm.create_model("test_vit", num_classes=0, img_size=64)
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_vit", {"image_size": 100, "pretrained": False}, "patches of 16 px"),
        ("resnet_18", {}, r"resnet_18.*resnet18"),
        ("resnet18.a9_in1k", {}, r"resnet18\.a1_in1k"),
        ("???", {}, "list_models"),
        ("coatnet_0_224", {"pretrained": True}, "no weights for 'coatnet_0_224'"),
        ("efficientvit_m0", {"image_size": 100, "pretrained": False}, "patches of 16 px, 100 px do not fit"),
        ("inception_v3", {"image_size": 32, "pretrained": False}, r"cannot encode images of 32 px .*image\.size: 299"),
    ],
)
def test_unknown_backbones_and_sizes_are_user_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageEncoder(name, **options)


def test_options_are_those_of_timm_and_change_the_network_as_there() -> None:
    options = {"drop_path_rate": 0.2, "global_pool": "avg", "act_layer": "silu", "dynamic_img_size": True}
    encoder = ImageEncoder("test_vit", 64, False, options)
    peer = timm.create_model("test_vit", num_classes=0, img_size=64, **options)
    assert str(encoder.backbone) == str(peer)
    peer.load_state_dict(encoder.backbone.state_dict())
    with torch.no_grad():
        expected = peer.eval()(encoder.normalize(images(64)))
        torch.testing.assert_close(encoder.eval()(images(64)), expected)
    # Networks that take classes get them by name, too; pooling may change the number of features.
    assert isinstance(ImageEncoder("test_resnet", 64, False, {"act_layer": "silu"}).backbone.act1, torch.nn.SiLU)
    assert ImageEncoder("test_resnet", 64, False, {"global_pool": "catavgmax"}).num_features == 192


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_vit", {"drop_path": 0.1}, "test_vit has no option 'drop_path'; did you mean drop_path_rate, "),
        ("test_resnet", {"zzz": True}, "test_resnet has no option 'zzz'; it has aa_layer, "),
        ("test_vit", {"num_classes": 3}, "num_classes: cannot be set, the task has the classifier"),
        ("test_vit", {"img_size": 64}, "img_size: cannot be set, the data have the image size"),
        ("test_vit", {"in_chans": 1}, "in_chans: images have 3 channels; got 1"),
        ("test_vit", {"global_pool": ""}, r"outputs \(1, 17, 64\) for one image, not one vector"),
        ("test_vit", {"act_layer": "no"}, "test_vit does not work with act_layer: no "),
        ("test_resnet", {"norm_layer": "groupnorm"}, "test_resnet does not work with norm_layer: groupnorm "),
        ("efficientvit_b0", {"no_such": 1}, "efficientvit_b0 has no option 'no_such'"),
    ],
)
def test_options_that_the_network_does_not_have_are_user_errors(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^towers\.image_options.*{message}") as caught:
        ImageEncoder(name, 64, False, options, part="towers.image")
    assert "\n" not in str(caught.value)


def step(task: ImageClassifier, image: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    task.train()
    task.zero_grad()
    task(image)["class"].square().mean().backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "mobilevit_xxs", "test_efficientnet"])
def test_recomputed_activations_give_the_same_gradients_and_statistics(name: str) -> None:
    options = {"timm": {"drop_path_rate": 0.3}}
    plain, recomputing = (tiny_classifier(backbone=name, image_size=64, backbone_options=options) for _ in range(2))
    recomputing.load_state_dict(plain.state_dict())
    recomputing.encoder.checkpoint_activations()
    for seed in range(2):  # the second time with statistics of the first
        image = images(64, count=2 + seed)
        expected, found = step(plain, image), step(recomputing, image)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    state = recomputing.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


def test_networks_that_cannot_recompute_are_refused_when_they_are_built() -> None:
    with pytest.raises(UserError, match="gradient_checkpointing: timm does not support it for pit_ti_224"):
        tiny_classifier(backbone="pit_ti_224", image_size=64, backbone_options={"gradient_checkpointing": True})
    # Only training recomputes.
    task = tiny_classifier(backbone="test_vit", backbone_options={"gradient_checkpointing": True})
    assert not task.backbone.grad_checkpointing


def warned(task: ImageClassifier, options: InputOptions) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.warn_of_other_inputs(options)
    return [str(warning.message) for warning in caught]


def test_images_made_otherwise_than_for_the_weights_give_one_warning() -> None:
    task = tiny_classifier(backbone="test_resnet", image_size=64, pretrained="weights.pth")
    [line] = warned(task, {"size": 64, "crop_fraction": 1.0, "interpolation": "bilinear"})
    assert "size 64 instead of 160" in line
    assert "crop_fraction 1.0 instead of 0.95" in line
    assert "interpolation" not in line
    assert "\n" not in line
    assert not warned(task, task.input_options)
    random = tiny_classifier(backbone="test_resnet", image_size=64)
    assert not warned(random, {"size": 64, "crop_fraction": 1.0, "interpolation": "bilinear"})
