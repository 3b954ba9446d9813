"""What is known of one variant of an ablation, kept in a file of its own so that nothing is done twice."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.efficiency_models import ModelSource
from experiments.ablation_file import Variant
from experiments.sweep_file import Metric
from experiments.sweep_trial import Job, Outcome, Runner, run_trial
from vitrail.config import dump_yaml
from vitrail.errors import UserError
from vitrail.runs import CHECKPOINTS, CONFIG_FILE, write_text_whole

if TYPE_CHECKING:
    from evaluation.efficiency import Costs, Counts
    from evaluation.summary import TaskSummary


@dataclass(frozen=True)
class _VariantJob(Job):
    """A fit that is named after its variant.

    Attributes:
        run_name: of the run.
    """

    run_name: str = ""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run_name


class _Unwatched:
    """Nobody stops a variant early: each is to be compared with the others at its end."""

    def started(self, process: int) -> None:
        """Nothing to do."""

    def epoch(self, number: int, value: float) -> bool:
        """Never to be stopped."""
        return False

    def beat(self) -> None:
        """Nothing to do."""


class Results:
    """Counts, costs and the run of a variant.

    Args:
        folder: of the ablation.
        variant: which one; what is on disk of another version of it is left aside.

    Attributes:
        counts: None until counted, and where the model cannot be built.
    """

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.folder, self.variant = folder, variant
        self.source = ModelSource(variant.experiment)
        self.counts: Counts | None = None
        self._cannot_be_built = ""
        self._path = folder / "variants" / f"{variant.slug}.json"
        self._kept = self._read()

    def count(self) -> None:
        """Count, without weights; a model that cannot be built says why in ``note``."""
        from evaluation.efficiency import count
        from evaluation.efficiency_models import build

        try:
            self.counts = count(*build(self.source, "meta"))
        except UserError as error:
            self._cannot_be_built = str(error)
        self._keep("counts", self.counts and asdict(self.counts))

    @property
    def costs(self) -> Costs | None:
        """As they were measured; None where they were not, or could not be."""
        from evaluation.efficiency import costs_from_values

        kept = self._kept.get("costs")
        return costs_from_values(kept["measured"]) if kept else None

    def has_costs(self, settings: Mapping[str, Any]) -> bool:
        """Whether costs were measured this way."""
        kept = self._kept.get("costs")
        return kept is not None and kept["settings"] == settings

    def keep_costs(self, costs: Costs, settings: Mapping[str, Any]) -> None:
        """Keep what was measured, and how."""
        # By way of JSON once, because its keys are texts.
        self._keep("costs", json.loads(json.dumps({"measured": asdict(costs), "settings": dict(settings)})))

    @property
    def has_outcome(self) -> bool:
        """Whether its run has ended, well or not."""
        return "outcome" in self._kept

    @property
    def run(self) -> Path | None:
        """The run whose test split has been predicted."""
        outcome = self._kept.get("outcome") or {}
        return Path(outcome["run"]) if outcome.get("run") and not outcome.get("error") else None

    @property
    def was_refused(self) -> bool:
        """Whether the user's input stopped its run."""
        return bool(Outcome("failed", error=(self._kept.get("outcome") or {}).get("error")).refusal)

    def forget_failure(self) -> None:
        """Let a run that failed be tried again."""
        if (self._kept.get("outcome") or {}).get("error"):
            self._keep("outcome", None)

    @property
    def note(self) -> str:
        """Why numbers are missing; empty where none are."""
        costs, outcome = self.costs, self._kept.get("outcome") or {}
        told = [self._cannot_be_built]
        told.append(f"not measured: {costs.error}" if costs and costs.error else "")
        # The way out that an error tells is in the run's log; a table has room for what is wrong.
        told.append(f"no accuracy: {outcome['error'].split(';')[0]}" if outcome.get("error") else "")
        return "; ".join(one for one in told if one)

    def accuracies(self) -> list[TaskSummary]:
        """Of each task on the test split; empty where there is no run."""
        from evaluation.summary import summarise_run

        return summarise_run(self.run) if self.run else []

    def train(self, runner: Runner | None, stop: threading.Event) -> str:
        """Fit the variant and test its best checkpoint, or go on with its interrupted run.

        Args:
            runner: by default a process of its own.
            stop: set from outside to end early; the run then goes on the next time.

        Returns:
            What the user has to mend where the run was refused; else empty.
        """
        config = self.folder / "variants" / f"{self.variant.slug}.yaml"
        write_text_whole(config, dump_yaml(self.variant.experiment))
        name = f"{self.variant.slug}-{self.variant.fingerprint[:8]}"
        arguments = ["fit", "--config", str(config), "--test_best=true"]
        job = _VariantJob(0, arguments, self._metric(), self.folder, resumes=self._last_checkpoint(name), run_name=name)
        outcome = (runner or run_trial)(job, _Unwatched(), stop)
        if outcome.state == "stopped":
            return ""
        error = outcome.error or ""
        if not error and (outcome.run is None or not (outcome.run / "predictions" / "test.parquet").is_file()):
            error = f"the run left no predictions of the test split; see {job.log}"
        self._keep("outcome", {"run": outcome.run and str(outcome.run), "error": error})
        return outcome.refusal

    def _metric(self) -> Metric:
        """What the best checkpoint is chosen by."""
        checkpoint = self.variant.experiment.get("checkpoint") or {}
        mode = checkpoint.get("mode", "min")
        return Metric(checkpoint.get("monitor", "val/loss"), "maximize" if mode == "max" else "minimize")

    def _last_checkpoint(self, name: str) -> Path | None:
        """Of the run that was interrupted. One that never came to a checkpoint has nothing to go on with: it goes."""
        folder = self.folder / "trials" / name
        found = next((path for path in folder.glob(f"*/{CHECKPOINTS}/last.ckpt") if _is_run(path)), None)
        if found is None and folder.exists():
            shutil.rmtree(folder)
        return found

    def _read(self) -> dict[str, Any]:
        fresh = {"name": self.variant.name, "fingerprint": self.variant.fingerprint}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); remove it to begin anew") from error
        return kept if isinstance(kept, dict) and kept.get("fingerprint") == fresh["fingerprint"] else fresh

    def _keep(self, key: str, value: Any) -> None:
        self._kept = {**self._kept, key: value}
        if value is None:
            del self._kept[key]
        write_text_whole(self._path, json.dumps(self._kept, indent=2) + "\n")


def _is_run(checkpoint: Path) -> bool:
    return (checkpoint.parent.parent / CONFIG_FILE).is_file()
