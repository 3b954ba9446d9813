from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from vitrail.errors import UserError
from vitrail.runtime import check_device, memory_bytes

PROGRAM = """
import resource, sys
from vitrail.runtime import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(3)
for _ in range(20):
    block = bytearray(64 * 1024 * 1024)  # zeroed, so every page is touched
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(case: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, case], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this C library has no such thresholds")
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    pages = 64 * 1024 * 1024 // resource.getpagesize()
    assert faults("kept") < 5 * pages < faults("own")


def test_the_processor_can_always_be_used() -> None:
    assert check_device("cpu") == "cpu"
    assert check_device("meta") == "meta"


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:99"])
def test_an_absent_device_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}: cannot be used here") as caught:
        check_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_can_be_used_where_there_is_one() -> None:
    assert check_device("cuda") == "cuda"


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_first_gpu_is_chosen(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, chosen: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert check_device("auto") == chosen


def test_memory_is_unknown_where_the_system_does_not_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (memory_bytes() or 0) > 1 << 28
    monkeypatch.delattr("os.sysconf")  # Windows
    assert memory_bytes() is None


def _loaded(code: str) -> str:
    program = f"import sys; from vitrail.runtime import lighten_torchmetrics; lighten_torchmetrics(); {code}"
    return subprocess.check_output([sys.executable, "-c", program], text=True).strip()


def test_packages_for_other_metrics_are_left_out_and_no_others() -> None:
    checks = (
        "bool(R('transformers>=4.4')), bool(R('matplotlib')), available('scipy'), bool(R('numpy>=1')), available('PIL')"
    )
    names = "from lightning_utilities.core.imports import RequirementCache as R, package_available as available"
    assert _loaded(f"{names}; print({checks})") == "(False, False, False, True, True)".strip("()").replace(",", "")


@pytest.mark.slow  # imports torch in a new process
def test_torchmetrics_does_not_import_them() -> None:
    code = (
        "import torchmetrics; print([name for name in ('transformers', 'matplotlib', 'scipy') if name in sys.modules])"
    )
    assert _loaded(code) == "[]"
