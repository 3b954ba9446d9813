from __future__ import annotations

import importlib

import lightning.pytorch.callbacks as of_lightning
import pytest

import callbacks


@pytest.mark.parametrize("package", ["vitrail", "datamodules", "lightning_modules", "callbacks"])
def test_names_are_imported_when_they_are_used(package: str) -> None:
    module = importlib.import_module(package)
    for name in set(module.__all__) - {"__version__"}:
        assert getattr(module, name).__name__ == name
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_no_callback_has_the_name_of_one_of_lightnings() -> None:
    assert not set(callbacks.__all__) & set(of_lightning.__all__)
