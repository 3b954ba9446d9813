from __future__ import annotations

import subprocess
import sys

import pytest

from evaluation.__main__ import _COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in (*_COMMANDS, "base_to_novel", "wise_ft", "soup", "retrieval", "linear_probe"):
        assert f"    {name} " in printed


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m evaluation {name}" in capsys.readouterr().out


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["summary", "run", "--nonsense"], ["summary", "run", "--data.init_args.seed", "1"], ["dance"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "unknown argument '--nonsense'" in printed
    assert "unknown argument '--data.init_args.seed'" in printed
    assert "invalid choice: 'dance'" in printed


def test_help_waits_for_no_heavy_library() -> None:
    heavy = "torch", "matplotlib", "sklearn", "lightning", "pandas"
    code = (
        "import sys; from evaluation.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('loaded:', *[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]
