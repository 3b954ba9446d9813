from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.ndimage import laplace
from scipy.stats import entropy

from datamodules.checks.verify import FACTS, KINDS, measured, outliers
from datamodules.loading.decode import read_image

RNG = np.random.default_rng(0)


def textured(width: int = 60, height: int = 50) -> Image.Image:
    """Coarse colors with grain, like a photo."""
    coarse = Image.fromarray(RNG.integers(30, 220, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = RNG.normal(0, 12, (height, width, 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def facts_of(path: Path) -> dict[str, float]:
    pixels = read_image(path, value_range="dtype").permute(1, 2, 0).contiguous().numpy()
    return dict(zip(FACTS, measured(pixels, str(path)).tolist(), strict=True))


def test_the_facts_are_those_of_scipy(tmp_path: Path) -> None:
    image = textured()
    image.save(tmp_path / "a.png")
    facts, gray = facts_of(tmp_path / "a.png"), np.asarray(image.convert("L"))
    shares = np.bincount(gray.ravel(), minlength=256) / gray.size
    inner = laplace(gray.astype(np.float64))[1:-1, 1:-1]
    pixels = np.asarray(image).astype(int)
    expected = [
        60,
        50,
        gray.mean(),
        gray.std(),
        entropy(shares, base=2),
        inner.var(),
        np.ptp(pixels, axis=2).mean(),
        0,
        1,
    ]
    assert list(facts.values()) == pytest.approx(expected, rel=1e-4)


def test_every_kind_of_file_is_what_it_is(tmp_path: Path) -> None:
    image, exif = textured(), Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "plain.jpg")
    image.convert("P").save(tmp_path / "animated.gif", save_all=True, append_images=[textured().convert("P")])
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "16-bit.png")
    image.save(tmp_path / "rotated.jpg", exif=exif)
    image.quantize(16).save(tmp_path / "transparent-palette.png", transparency=0)
    clear = image.convert("RGBA")
    clear.putalpha(99)
    clear.save(tmp_path / "transparent.png")
    image.convert("L").save(tmp_path / "gray-file.png")
    for path in tmp_path.iterdir():
        kind = int(facts_of(path)["kind"])
        assert [name for name, bit in KINDS.items() if kind & bit] == ([path.stem] if path.stem != "plain" else [])
    assert facts_of(tmp_path / "animated.gif")["frames"] == 2
    # As it is shown: upright.
    assert (facts_of(tmp_path / "rotated.jpg")["width"], facts_of(tmp_path / "plain.jpg")["width"]) == (50, 60)


@pytest.fixture(scope="module")
def usual() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Facts of 60 images without a fault."""
    return np.stack([measured(np.asarray(textured()), "") for _ in range(60)])


def found_with(usual: np.ndarray[tuple[int, int], np.dtype[np.float32]], odd: Image.Image) -> dict[str, list[int]]:
    facts = np.concatenate([usual, measured(np.asarray(odd), "")[None]])
    return {one.finding: one.rows.tolist() for one in outliers(facts, np.arange(len(facts)))}


def test_nothing_is_odd_where_all_are_alike(usual: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    assert found_with(usual, textured()) == {}


@pytest.mark.parametrize(
    "finding", ["blurry", "dark", "bright", "low-information", "odd-size", "odd-aspect", "gray-in-color"]
)
def test_each_fault_is_found_and_no_other_image(
    usual: np.ndarray[tuple[int, int], np.dtype[np.float32]], finding: str
) -> None:
    image = textured()
    odd = {
        "blurry": image.filter(ImageFilter.GaussianBlur(5)),
        "dark": image.point(lambda value: value // 12),
        "bright": image.point(lambda value: 235 + value // 13),
        "low-information": Image.new("RGB", image.size, (100, 120, 140)),
        "odd-size": image.resize((600, 500)),
        "odd-aspect": textured(160, 20),
        "gray-in-color": image.convert("L").convert("RGB"),
    }[finding]
    found = found_with(usual, odd)
    assert found[finding] == [60]
    assert all(rows == [60] for rows in found.values())


def test_what_is_usual_in_a_set_is_no_finding(usual: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    night = np.stack([measured(np.asarray(textured().point(lambda value: value // 4)), "") for _ in range(40)])
    assert not outliers(night, np.arange(40))
    gray = np.stack([measured(np.asarray(textured().convert("L").convert("RGB")), "") for _ in range(40)])
    found = outliers(np.concatenate([gray, usual[:1]]), np.arange(41))
    assert [(one.finding, one.rows.tolist()) for one in found] == [("color-in-gray", [40])]
    black = np.concatenate([np.stack([measured(np.zeros((9, 9, 3), np.uint8), "")] * 9), usual[:1]])
    kinds = {one.finding: set(one.severity) for one in outliers(black, np.arange(10))}
    assert kinds["dark"] == {"high"}, "what is beyond doubt is found in any set"
