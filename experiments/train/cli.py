"""The command line: LightningCLI in subclass mode, with a directory and a record for every run.

Links carry what only the data know (class names, tasks, counts, image size) into the model; permanent callbacks have
keys of their own (``checkpoint``, ``predictions`` …), so that a later ``--config`` changes one setting of one of them
instead of replacing the list. What would make numbers that cannot be trusted is refused before anything is computed.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from argparse import HelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from callbacks.averaged_weights import AveragedWeights, EmaOptions
from callbacks.best_checkpoint import BestCheckpoint, keep_weights
from callbacks.confusion import ClassReport, ConfusionMatrixLogger
from callbacks.finetuning import FrozenFeatures
from callbacks.guards import MonitoredMetrics, NonFiniteLoss
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.outputs import PredictionWriter
from callbacks.retrieval_metrics import RetrievalMetrics
from callbacks.trackers import EpochLines, ProgressBar, log_configuration
from datamodules.base import ImageDataModule
from experiments.train.loggers import Tracker, WandbOptions, build_loggers, finish_wandb, sync_hint
from experiments.train.opened_run import KEY, OF_A_STAGE, from_parent, opened_arguments, parent_checkpoint, take_over
from experiments.train.options import EXPERIMENT, SECTIONS, add_run_options, own_data, own_data_help
from experiments.train.run_record import RunRecorder, closing_summary, write_report
from lightning_modules.base import VisionTask
from lightning_modules.distributed import FullySharded
from lightning_modules.options import current_arguments
from vitrail.config import FullNames, load_dumped, one_config, split_configs
from vitrail.errors import UserError, refuse_passwords, run_reporting_user_errors, was_interrupted
from vitrail.files import check_zip, write_text_atomically
from vitrail.programs import program_name
from vitrail.runs import (
    RESERVED,
    Run,
    discard_empty,
    new_run_directory,
    resolve_checkpoint,
    resumed_run_directory,
    run_of_checkpoint,
    same_data,
    same_experiment,
    same_validation,
)
from vitrail.trust import plain_name
from vitrail.types import DEFAULT_SEED

_NOT_COMPARED = {
    *("_instantiator", "class_counts", "target_stats", "class_prompts", "chunk_size", "architectures"),
    "gradient_checkpointing",
}
"""Counts of the training split only shape the loss, statistics of targets come with the weights, and a checkpoint may
well be tested on other data; prompts may be changed after training; chunks and recomputed activations do not change
results; configurations follow from names, which are compared."""

_NEEDED = {"state_dict", "hyper_parameters", "pytorch-lightning_version"}
"""What Lightning reads of a checkpoint before anything else."""


def refuse_conflicting_checkpoint(model: LightningModule, checkpoint: Path, *, trains: bool = False) -> None:
    """Refuse a checkpoint whose hyper-parameters or weights do not fit the configured model.

    LightningCLI would silently let the checkpoint win over YAML and flags. Class names and image size, which come from
    the data, are compared as well: other names in the same places would permute the predictions without a word.

    Raises:
        UserError: Some value differs, or weights do not fit; the line names each.
    """
    check_zip(checkpoint, "take the run's other checkpoint (best.ckpt, last.ckpt), or train again")
    try:
        saved: Any = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file of another format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--ckpt_path {checkpoint}: not a readable checkpoint ({reason[:120]})") from error
    whole = isinstance(saved, dict) and saved.keys() >= _NEEDED
    if not whole or not all(isinstance(saved[key], dict) for key in ("state_dict", "hyper_parameters")):
        raise UserError(
            f"--ckpt_path {checkpoint}: is not a checkpoint of a run; plain weights belong to the model's `pretrained:`"
        )
    if trains and "optimizer_states" not in saved:
        raise UserError(
            f"--ckpt_path {checkpoint}: has weights but no training state, so training cannot continue from it; give "
            "last.ckpt of the run, or start again with these weights as model.init_args.pretrained"
        )
    theirs, ours = (
        _plain(current_arguments(type(model), given)) for given in (saved["hyper_parameters"], model.hparams)
    )
    different = [
        f"{key}: the checkpoint has {_short(theirs[key])}, the configuration {_short(ours[key])}"
        for key in ours
        if key in theirs and theirs[key] != ours[key]
    ]
    if different:
        raise UserError(
            f"--ckpt_path {checkpoint} does not fit the configuration (model.init_args): {'; '.join(different)}. "
            "Use the run's own config.yaml, or leave --ckpt_path out to start again"
        )
    named = saved.get("by_reference", False)  # the origin of the weights is checked when they are read from there
    if isinstance(model, VisionTask) and not named and (wrong := model.misfits(saved["state_dict"])):
        raise UserError(
            f"--ckpt_path {checkpoint}: the weights do not fit {type(model).__name__}: {wrong}; give a whole checkpoint"
        )


def refuse_sections(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse sections of a configuration that are not mappings."""
    for key in keys:
        if key in config and not hasattr(config[key], "items"):
            raise UserError(f"{key}: must be a mapping of options, `key: value`; got {config[key]!r}")


def refuse_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse trainer settings that Lightning accepts and then trains nothing with, or fails on at once."""
    for name, least in _LEAST.items():
        value = options.get(name)
        if isinstance(value, (int, float)) and value < least:
            raise UserError(
                f"trainer.{name}: must be {'more than 0' if 0 < least < 1 else f'at least {least}'}; got {value}"
            )
    for name in _NOT_ZERO:
        if options.get(name) == 0:
            raise UserError(f"trainer.{name}: 0 trains nothing; leave it out or raise it")


def refuse_spawning(trainer: Trainer) -> None:
    """Refuse strategies that pickle everything to start their processes."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method != "fork":
        raise UserError("trainer.strategy: processes that are spawned cannot be given callbacks and data; use ddp")


_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1e-6,
    "gradient_clip_val": 0,
    "min_epochs": 0,
}
_NOT_ZERO = ("max_epochs", "max_steps", "limit_train_batches")


def refuse_test_metrics(callbacks: list[Callback]) -> None:
    """Refuse callbacks that select or stop by a metric of the test split."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("test"):
            raise UserError(
                f"{type(callback).__name__}.monitor: {monitor!r} would select on the test split, and the test result "
                "would no longer be one; monitor a val/… metric"
            )


def refuse_reversed_selection(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that would keep, or wait for, the worst epoch: ``mode`` is min unless it is set."""
    for callback in callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        metric = str(monitor).rpartition("/")[2]
        right = "max" if _HIGHER_IS_BETTER.fullmatch(metric) else "min" if metric in _LOWER_IS_BETTER else mode
        if mode in ("min", "max") and mode != right:
            key = "checkpoint" if isinstance(callback, BestCheckpoint) else type(callback).__name__
            worst = "lowest" if mode == "min" else "highest"
            raise UserError(f"{key}.mode: {mode} takes the {worst} {monitor} for the best; set {key}.mode: {right}")


_HIGHER_IS_BETTER = re.compile(
    r"accuracy|mean_per_class|top\d+|f1_\w+|R@\d+|mAP|mean_recall|auroc|exact_match|r2|spearman|quadratic_kappa"
)
_LOWER_IS_BETTER = ("loss", "median_rank", "mae", "rmse")


def refuse_other_checkpoints(callbacks: Sequence[Callback], best: BestCheckpoint, last: LastCheckpoint) -> None:
    """Refuse callbacks, other than ``best`` and ``last``, that would overwrite the run's own checkpoints."""
    folder = Path(str(best.dirpath))
    ours = {(folder / Path(name).name).resolve() for name in (Run.BEST, Run.LAST, Run.START)}
    for callback in callbacks:
        if callback is best or callback is last:
            continue
        kind = type(callback).__name__
        if isinstance(callback, (BestCheckpoint, LastCheckpoint)):
            section = "checkpoint" if isinstance(callback, BestCheckpoint) else "last"
            raise UserError(f"trainer.callbacks: {kind} is there already; set it in the section `{section}:`")
        if not isinstance(callback, (ModelCheckpoint, OnExceptionCheckpoint)):
            continue
        names = [callback.filename]
        if isinstance(callback, ModelCheckpoint) and callback.save_last:
            names.append(callback.CHECKPOINT_NAME_LAST)
        for name in names:
            path = Path(callback.dirpath or folder) / f"{name}{callback.FILE_EXTENSION}"
            if path.resolve() in ours:
                raise UserError(
                    f"trainer.callbacks: {kind} would overwrite the run's own {path.name}; give it another filename "
                    "(and no save_last), or another dirpath"
                )


def refuse_untrained(model: LightningModule, stage: str) -> None:
    """Refuse to evaluate a model that has untrained parts and no checkpoint."""
    if not getattr(model, "ready_without_training", False):
        raise UserError(
            f"{stage}: {type(model).__name__} has untrained parts, so its numbers would mean nothing; "
            "give --ckpt_path runs/…/checkpoints/best.ckpt (or `best` for the newest run)"
        )


def _plain(value: Any) -> Any:
    """Make values comparable that a checkpoint and a parser keep in different containers, without ``_NOT_COMPARED``."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in _NOT_COMPARED}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


_LINKS = (*("class_names", "class_prompts", "tasks", "task_facts", "class_counts", "image_size", "chunk_size"),)


class RunConfig(SaveConfigCallback):
    """Keep the whole configuration in the run directory, from which the run can be repeated with one command.

    Args:
        own: the experiment that ``fit --data PATH`` made, kept next to it; empty for none.
        options: see Lightning's ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, own: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self._own = own

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``, also to the experiment trackers."""
        config = self.config.clone()
        for key in OF_A_STAGE:
            config.pop(key, None)
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        path = Path(trainer.default_root_dir) / Run.CONFIG
        if not path.exists():
            write_text_atomically(path, text)
        if self._own:
            write_text_atomically(path.with_name(EXPERIMENT), self._own)
        log_configuration(trainer.loggers, text, load_dumped(text))


class _Parser(FullNames, LightningArgumentParser):
    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Options of ``--data PATH`` come last, where a terminal shows them."""
        text: str = super().format_help(formatter)
        return f"{text}\n{own_data_help()}" if self.prog.split()[-1] == "fit" else text


class VitrailCLI(LightningCLI):
    """``python -m experiments {fit,validate,test,predict}``.

    Args:
        args: Command-line arguments without the program's name; several ``--config`` are merged key by key.

    Raises:
        UserError: An experiment file cannot be read.
    """

    def __init__(self, args: list[str]) -> None:
        args, self._own = own_data(args)
        named = split_configs(args)[0] if args else []
        args = from_parent(args)
        args, self.config_files = one_config(args)
        self.config_files = named or self.config_files
        self._command = args[0] if args else ""
        self.run_directory = Path()
        self.checkpoint: Path | None = None
        self.parent: Path | None = None
        self._continues = True
        try:
            self._run_stage(args)
        except BaseException as error:
            if self.run_directory != Path():
                discard_empty(self.run_directory)
            if was_interrupted(error):
                raise KeyboardInterrupt(self._resume_hint()) from error
            raise

    def _run_stage(self, args: list[str]) -> None:
        quiet = {"exit_on_error": False}
        super().__init__(
            VisionTask,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False, "own": self._own},
            # Our samplers split an epoch between processes themselves: Lightning's pads evaluation with duplicates.
            trainer_defaults={"use_distributed_sampler": False, "max_epochs": 10, "log_every_n_steps": 10},
            seed_everything_default=DEFAULT_SEED,
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={
                **quiet,
                "prog": program_name("experiments"),
                **{command: dict(quiet) for command in self.subcommands()},
            },
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the instance only
        """Return the command that was asked for alone, as each parser takes long to build, or else all of them."""
        every = super().subcommands()
        return {self._command: every[self._command]} if self._command in every else every

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, the run's name and place, and W&B's settings."""
        types = {
            **{"seed_everything": int, "name": str | None, "runs": str, "from": str | None},
            **{"test_best": bool, "report": bool},
            **{"ema": EmaOptions | None, "wandb": WandbOptions | None, "trackers": list[Tracker]},
        }
        add_run_options(parser, types)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the permanent callbacks and the links from data to model."""
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.mode": "min",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
            }
        )
        # The best checkpoint would not do to go on from: the epochs since then would be repeated.
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(NonFiniteLoss, "non_finite")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults({"predictions.splits": ["val", "test", "predict"]})
        parser.add_lightning_class_args(ConfusionMatrixLogger, "confusion_matrix")
        parser.add_lightning_class_args(ClassReport, "class_report")
        parser.add_lightning_class_args(RetrievalMetrics, "retrieval")
        parser.add_lightning_class_args(FrozenFeatures, "features")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        for name in _LINKS:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint, without letting its hyper-parameters override the configuration."""
        config = self.config[self.config.subcommand]
        name = _name_from(self.config_files) if config.name is None else config.name
        config.name = plain_name(name, "--name")
        if config.name in RESERVED:
            raise UserError(
                f"--name {config.name}: the folder of that name is for {RESERVED[config.name]}; choose another"
            )
        if config.get("ckpt_path"):
            self.checkpoint = resolve_checkpoint(config.ckpt_path, Path(config.runs), config.name)
            config.ckpt_path = str(self.checkpoint)
        if config.get(KEY) and self.config.subcommand == "fit" and self.checkpoint is None:
            self.parent = parent_checkpoint(config[KEY])

    def before_instantiate_classes(self) -> None:
        """Choose the run directory: a new one, or a run's own where it is resumed or its best checkpoint is tested.

        Results of a run's other checkpoints are not the run's: they would replace those of the best one.
        """
        config = self.config[self.subcommand]
        # Of these two the parser has checked the class; it lets the others be anything.
        refuse_sections(config, SECTIONS.keys() - {"data", "model"})
        if self.subcommand == "fit":
            refuse_trainer_options(config.trainer)
        run = run_of_checkpoint(self.checkpoint) if self.checkpoint else None
        values = load_dumped(self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True))
        refuse_passwords(values, "")
        # For the hyper-parameters of checkpoints; Lightning would validate everything again.
        self.config_dump = load_dumped(
            self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
        )[str(self.subcommand)]
        if self.subcommand == "fit":
            own = run is not None and same_experiment(run, values)
        else:
            own = run is not None and self.checkpoint is not None and self.checkpoint.stem == "best"
            own = own and run is not None and same_data(run, values.get("data"))
        fetched = self.checkpoint.parent if self.checkpoint else Path()  # from where `last.copy_to` has copied a run to
        origin = run or (fetched if (fetched / Run.CONFIG).is_file() else None)
        self._continues = self.checkpoint is not None and origin is not None and same_validation(origin, values)
        if run is not None and own:
            self.run_directory = resumed_run_directory(run)
        else:
            self.run_directory = new_run_directory(Path(config.runs), config.name)
        if config.trainer.default_root_dir is not None:
            raise UserError("trainer.default_root_dir: every run makes its own directory; choose where with --runs")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the run's loggers and recorder."""
        config = self.config[self.subcommand]
        # CSVLogger empties the directory of an earlier log: a later stage of a run keeps its own.
        log_directory = self.run_directory
        if self.subcommand != "fit" and (self.run_directory / Run.CONFIG).exists():
            log_directory = self.run_directory / str(self.subcommand)
        if self._get(self.config_init, "trainer").strategy == "fsdp":
            kwargs["strategy"] = FullySharded()  # torch's second kind; Lightning means the first one
        user_loggers = self._get(self.config_init, "trainer").logger
        loggers = build_loggers(log_directory, config.wandb, config.trackers, continues=self.subcommand == "fit")
        if isinstance(user_loggers, Iterable):
            loggers.extend(user_loggers)
        elif user_loggers not in (None, True, False):
            loggers.append(user_loggers)
        try:
            trainer: Trainer = super().instantiate_trainer(
                logger=loggers, default_root_dir=str(self.run_directory), **kwargs
            )
        # The last one where two callbacks would have the same place in checkpoints.
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        saver = self._get(self.config_init, "checkpoint")
        saver.continues = self._continues
        saver.dirpath = saver.dirpath or str(self.run_directory.resolve() / Run.CHECKPOINTS)
        recorder = RunRecorder(self.run_directory, config.name, config.seed_everything, self.checkpoint, self.parent)
        # Lightning keeps checkpoint callbacks last; the recorder must see what they did.
        self.callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
        self.callbacks.extend(
            [LearningRateMonitor(logging_interval="step"), MonitoredMetrics(), EpochLines(), recorder]
        )
        for place, callback in enumerate(self.callbacks):
            if type(callback) is RichProgressBar:
                self.callbacks[place] = ProgressBar()
        ema = self._get(self.config_init, "ema")
        if ema is not None and self.subcommand == "fit":
            self.callbacks.insert(0, ema.callback())
        self.callbacks.insert(0, AveragedWeights())
        # It writes before the others have begun with a batch.
        last = self._get(self.config_init, "last")
        self.callbacks.sort(key=lambda callback: callback is not last)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Refuse what could not be trusted, before anything is computed."""
        refuse_test_metrics(self.callbacks)
        if self.subcommand == "fit":
            refuse_reversed_selection(self.callbacks)
        refuse_other_checkpoints(
            self.callbacks, self._get(self.config_init, "checkpoint"), self._get(self.config_init, "last")
        )
        refuse_spawning(self.trainer)
        if self.checkpoint:
            refuse_conflicting_checkpoint(self.model, self.checkpoint, trains=self.subcommand == "fit")
        elif self.subcommand != "fit":
            refuse_untrained(self.model, str(self.subcommand))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Predictions are in files; kept by Lightning as well, they would fill the memory."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and arguments.get("return_predictions") is None:
            arguments["return_predictions"] = False
        return arguments

    def before_fit(self) -> None:
        """Fetch pretrained weights at once, so that a missing network shows before the data are read."""
        if self.parent is not None:
            notes = take_over(self.model, self.parent)
            if self.trainer.is_global_zero:
                sys.stdout.write(
                    "".join(f"--from {line}.\n" for line in (f"{self.parent}: weights taken over", *notes))
                )
        elif self.checkpoint is None:
            self.model.load_pretrained()

    # What images must be like may only be known from the weights' folder.
    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Test the best checkpoint if asked to, and print the run directory."""
        saver = self._get(self.config_init, "checkpoint")
        best = saver.best_model_path
        test_best = self._get(self.config, "test_best") and not self.trainer.interrupted
        if test_best and not best and self.trainer.is_global_zero:
            sys.stdout.write(f"Not tested: there is no best checkpoint. {saver.reason_for_none(self.trainer)}.\n")
        if test_best and best:
            # ClassReport prints a shorter table; all values are in metrics.csv.
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, weights_only=True, verbose=False)
            self._print_cost()
        self.after_test()
        if test_best and best and self.trainer.is_global_zero:
            run = Run(self.run_directory)
            if self._get(self.config, "report"):
                write_report(run, self.datamodule)
            sys.stdout.write(closing_summary(run))

    def after_test(self) -> None:
        """Print the run directory."""
        if self.subcommand != "fit":
            self.after_validate()
        if self.trainer.is_global_zero:
            sys.stdout.write(f"Run directory: {self.run_directory}\n{sync_hint(self.trainer.loggers)}")
            if self._own and self.subcommand == "fit":
                sys.stdout.write(f"Experiment: {self.run_directory / EXPERIMENT}, to be edited and run with --config\n")

    def after_validate(self) -> None:
        """Leave a checkpoint of a zero-shot model, so that other commands take its run like any other."""
        if self.checkpoint is None and self.model.referenced and not getattr(self.trainer, "fast_dev_run", False):
            keep_weights(self.trainer)

    after_predict = after_test

    def _resume_hint(self) -> str:
        # Empty where there is nothing to resume.
        last = self.run_directory / Run.LAST
        if self.config.get("subcommand") != "fit" or self.run_directory == Path() or not last.is_file():
            return ""
        config = shlex.quote(str(self.run_directory / Run.CONFIG))
        return f"go on with: python -m experiments fit --config {config} --ckpt_path last"

    def _print_cost(self) -> None:
        # After training on some of the classes: what it did to the others.
        base_classes = getattr(self.datamodule, "base_classes", 0)
        if base_classes and self.trainer.is_global_zero and (self.run_directory / Run.START).exists():
            from evaluation.commands.transfer.base_to_novel import finetuning_cost
            from evaluation.statistics.base_to_novel import accuracy_table

            self.datamodule.trainer = None  # this process alone goes through all of the test split
            cost = finetuning_cost(self.run_directory, self.datamodule, base_classes)
            accuracy_table(cost, "base to novel, before and after fine-tuning").show()


def _name_from(configs: list[str]) -> str:
    """Return the run's name: that of its first YAML; the ``config.yaml`` of a repeated run contains its own."""
    is_file = bool(configs) and os.path.isfile(configs[0])  # noqa: PTH113 -- Path raises where a text is too long a name
    return Path(configs[0]).stem if is_file else "run"


def main(args: list[str]) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, or 2 after a mistake of the user.
    """
    quieten()
    return run_reporting_user_errors(lambda: _run(args))


def _run(args: list[str]) -> None:
    try:
        with opened_arguments(args) as arguments:
            VitrailCLI(arguments)
    finally:
        finish_wandb()


def quieten() -> None:
    """Leave out messages that no user could act on."""
    # Lightning's tips advertise its platform.
    silent = ("💡", "Detected KeyboardInterrupt")  # one line of ours has the command that resumes
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(part in record.getMessage() for part in silent)
    )
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*Jsonargparse.*")
    # The average of a training that is over is not needed any more.
    warnings.filterwarnings("ignore", message=".*loading a checkpoint outside the 'fit' stage.*")
    # Lightning's own use of a name that torch has renamed.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # The run directory is new; what is in it is this run's own configuration.
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
