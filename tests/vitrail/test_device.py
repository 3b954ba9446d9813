import pytest
import torch

from vitrail.errors import UserError
from vitrail.runtime import checked_device


def test_the_processor_can_always_be_used() -> None:
    assert checked_device("cpu") == "cpu"
    assert checked_device("meta") == "meta"


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:99"])
def test_a_device_that_is_not_there_is_told_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: cannot be used here") as caught:
        checked_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_can_be_used_where_there_is_one() -> None:
    assert checked_device("cuda") == "cuda"
