from __future__ import annotations

import pytest
import torch

from benchmarks.training import layout


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_only_the_layout_differs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def watched(network: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen.append(inputs[0])
            outputs.append(output)

        network.eval().register_forward_hook(hook)

    import timm

    create = timm.create_model

    def build(*arguments: object, **options: object) -> torch.nn.Module:
        network: torch.nn.Module = create(*arguments, **options)
        watched(network)
        return network

    monkeypatch.setattr(timm, "create_model", build)
    steps = layout.contenders(name, size=160, batch_size=2)
    assert all(step() > 0 for step in steps.values())
    last, first = seen
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert torch.equal(last, first)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)


def test_every_architecture_of_the_table_can_be_built() -> None:
    import timm

    assert set(layout.ARCHITECTURES) <= set(timm.list_models())
