"""The build of a wheel keeps the source's revision, which ``run.json`` records where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRevision(build_py):
    """Write ``vitrail/build.json`` into the built package."""

    def run(self) -> None:
        """Copy the modules, then write the file."""
        super().run()
        if self.editable_mode:
            return
        if content := _revision():
            text = json.dumps(content) + "\n"
            (Path(self.build_lib) / "vitrail" / "build.json").write_text(text, encoding="utf-8")


def _revision() -> dict[str, str | int | None]:
    """Return the commit and how many files differ from it; of a copy without .git, what ``$VITRAIL_REVISION`` names."""
    if not (Path(__file__).parent / ".git").exists():
        given = os.environ.get("VITRAIL_REVISION", "")
        return {"revision": given, "changed_files": None} if given else {}
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"revision": revision.strip(), "changed_files": len(changed.splitlines())}


setup(cmdclass={"build_py": BuildWithRevision})
