from __future__ import annotations

import warnings

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


def test_normalize_is_the_fields_formula() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = images(4)
    expected = (image.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(Normalize(mean, std)(image), expected.float())


def test_images_that_are_scaled_already_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        Normalize((0.5,) * 3, (0.5,) * 3)(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "width"),
    [("deit_tiny_patch16_224", 192), ("mobilevit_xxs", 320), ("resnet18", 512), ("tf_mobilenetv3_small_100", 1024)],
)
def test_features_are_as_wide_as_they_say(name: str, width: int) -> None:
    encoder = ImageEncoder(name, image_size=64, pretrained=False).eval()
    with torch.no_grad():
        assert encoder(images(64)).shape == (2, width)
    assert encoder.num_features == width


def test_statistics_are_those_of_the_weights() -> None:
    mobilenet = ImageEncoder("tf_mobilenetv3_small_100", image_size=64, pretrained=False)
    assert mobilenet.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    deit = ImageEncoder("deit_tiny_patch16_224", image_size=64, pretrained=False)
    assert deit.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert deit.input_options == {
        "size": 224,
        "resize": "crop",
        "crop_fraction": 0.9,
        "interpolation": "bicubic",
        "crop_rounding": "even",
    }


def test_statistics_are_those_of_the_tag_that_is_asked_for() -> None:
    plain = ImageEncoder("vit_tiny_patch16_224.augreg_in21k", image_size=32, pretrained=False)
    assert plain.normalize.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_an_encoder_is_the_network_behind_the_normalisation() -> None:
    encoder = ImageEncoder("test_resnet", image_size=64, pretrained=False).eval()
    image = images(64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), encoder.backbone(encoder.normalize(image)))


def test_architectures_for_one_size_are_built_for_the_size_of_the_data() -> None:
    backbone = create_backbone("test_vit", 64)
    expected = timm.create_model("test_vit", num_classes=0, img_size=64)
    assert {k: v.shape for k, v in backbone.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }


def test_a_size_that_the_patches_do_not_divide_is_a_user_error() -> None:
    with pytest.raises(UserError, match="patches of 16 px"):
        ImageEncoder("test_vit", image_size=100, pretrained=False)


def test_an_unknown_backbone_is_a_user_error_that_names_close_ones() -> None:
    with pytest.raises(UserError, match=r"resnet_18.*resnet18"):
        ImageEncoder("resnet_18")
    with pytest.raises(UserError, match=r"resnet18\.a1_in1k"):
        ImageEncoder("resnet18.a9_in1k")
    with pytest.raises(UserError, match="list_models"):
        ImageEncoder("???")


def test_true_needs_weights_that_exist() -> None:
    with pytest.raises(UserError, match="no weights for 'coatnet_0_224'"):
        ImageEncoder("coatnet_0_224", pretrained=True)


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


def test_random_weights_have_no_expectations() -> None:
    task = tiny_classifier(backbone="test_resnet", image_size=64)
    assert not warned(task, {"size": 64, "crop_fraction": 1.0, "interpolation": "bilinear"})
