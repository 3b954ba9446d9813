"""The build of a wheel keeps the source's revision, which ``run.json`` records where there is no checkout."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRevision(build_py):
    """Write ``vitrail/build.json`` into the built package."""

    def run(self) -> None:
        """Copy the modules, then write the file."""
        super().run()
        if self.editable_mode or not (Path(__file__).parent / ".git").exists():
            return
        git = ["git", "-C", str(Path(__file__).parent)]
        try:
            revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
            changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return
        content = {"revision": revision.strip(), "changed_files": len(changed.splitlines())}
        (Path(self.build_lib) / "vitrail" / "build.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildWithRevision})
