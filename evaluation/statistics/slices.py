"""Slices: conditions over the columns of a split, and the score of the samples that meet them next to that of the rest.

The test permutes which samples are in a slice, whole groups together: a group takes the pattern of another one, so
that slices of whole groups (a store, a product) and slices within groups (dark images) are tested alike, and a slice of
few groups cannot reach small p-values (Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005). It needs
a score that is a mean over samples (``scores.TESTED``); of others there is the interval alone. All slices of a table
count as looks at one set of data: p-values are corrected together (Holm, 1979), those of a search as well, which may
leave nothing where it looks at hundreds.

Simulated size at p < .05 (40 and 200 groups of equal and very unequal size, accuracy .7 and .97, slices of whole groups
and within groups, of 5 to 50 % of the data): .00 to .05; of the smallest of 20 corrected p-values .00 to .05.

A condition has the grammar of a gallery's filters (``retrieval.filters``) and arithmetic. It is parsed, and only the
constructs of a short list become an Arrow expression; no text is ever executed.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import FEW_GROUPS, Estimate, Mean
from evaluation.statistics.paired import holm
from evaluation.statistics.scores import LOWER_IS_BETTER, MAIN, TESTED, scores_of
from vitrail.errors import UserError
from vitrail.predictions import Predictions, target_texts
from vitrail.runs import Run
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    import pandas as pd
    from sqlglot import exp


_PERMUTATIONS, _MORE = 1_000, 20_000
"""For every slice, and for those whose p-value is small after these."""

SMALLEST = 10
"""Samples that a slice of a search needs."""

_MOST_VALUES = 30
"""Different words of a column that a search makes slices of."""


@dataclass(frozen=True)
class SliceScore:
    """A score on the samples of a slice.

    Attributes:
        name: such as ``store = north``.
        n: samples with a known target.
        groups: different groups among them.
        score: with its 95 % interval by group.
        rest: the score on all other samples; NaN where there are none.
        p_value: of an equal score on the rest, corrected for all slices; NaN without a test.
    """

    name: str
    n: int
    groups: int
    score: Estimate
    rest: float
    p_value: float

    @property
    def difference(self) -> float:
        """From the rest."""
        return self.score.value - self.rest

    @property
    def note(self) -> str:
        """What a reader must know next to the numbers."""
        return f"fewer than {FEW_GROUPS} groups" if self.groups < FEW_GROUPS else ""


def slice_scores(
    predictions: Predictions, task: str, slices: Mapping[str, NDArray[np.bool_]], metric: str = "", *, seed: int = 0
) -> list[SliceScore]:
    """Score every slice that has samples with a known target, the worst first.

    Worst is the slice whose interval has the worst better end: one of a few images is not first by chance. Slices of
    fewer than ``FEW_GROUPS`` groups are last.

    Args:
        predictions: of one split.
        task: whose score.
        slices: bool ``(N,)`` of all samples, by name.
        metric: a name of ``scores``, by default the main score.
        seed: of permutations and resamples.
    """
    metric = metric or MAIN[predictions.kind(task)]
    rows = predictions.known(task)
    own, members = predictions.take(rows), {name: mask[rows] for name, mask in slices.items() if mask[rows].any()}
    if not members:
        return []
    whole = scores_of(own, task, (metric,))[metric].statistic
    p_values = [math.nan] * len(members)
    if metric in TESTED and isinstance(whole, Mean):
        p_values = holm(permutation_p(whole.scores, own.groups, np.stack([*members.values()]), seed=seed).tolist())
    found = []
    for (name, mask), p_value in zip(members.items(), p_values, strict=True):
        inside, outside = (np.flatnonzero(one) for one in (mask, ~mask))
        there = own.take(inside)
        score = scores_of(there, task, (metric,))[metric].estimate(there.groups, 1_000, seed=seed)
        found.append(
            SliceScore(
                name,
                len(inside),
                len(set(there.groups.tolist())),
                score,
                _value(own.take(outside), task, metric) if len(outside) else math.nan,
                p_value,
            )
        )
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def badness(one: SliceScore) -> tuple[bool, float]:
        low, high = one.score.interval
        end = low if sign < 0 else high
        return bool(one.note), sign * (one.score.value if math.isnan(end) else end)

    return sorted(found, key=badness)


def _value(predictions: Predictions, task: str, metric: str) -> float:
    return float(scores_of(predictions, task, (metric,))[metric].statistic(np.ones((1, len(predictions))))[0])


def permutation_p(
    scores: NDArray[np.float64], groups: NDArray[np.object_], members: NDArray[np.bool_], *, seed: int = 0
) -> NDArray[np.float64]:
    """Return two-sided p-values that slices have the same mean score as the rest, float64 ``(K,)``, not corrected.

    Args:
        scores: float64 ``(N,)``.
        groups: ``(N,)``, the group of each sample.
        members: bool ``(K, N)``, which samples are in each slice.
        seed: of the permutations.
    """
    index = np.unique(groups.astype(str), return_inverse=True)[1]
    order = np.argsort(index, kind="stable")
    residuals, inside = (scores - scores.mean())[order], members[:, order].astype(np.float64)
    sizes = np.bincount(index)
    p_values = _share_beyond(residuals, sizes, inside, _PERMUTATIONS, seed)
    if len(small := np.flatnonzero(p_values < 0.02)):
        p_values[small] = _share_beyond(residuals, sizes, inside[small], _MORE, seed + 1)
    return p_values


def _share_beyond(
    residuals: NDArray[np.float64], sizes: NDArray[np.int64], inside: NDArray[np.float64], times: int, seed: int
) -> NDArray[np.float64]:
    """P-values by ``times`` permutations of samples that are sorted by group."""
    rng, n, num_groups = np.random.default_rng(seed), len(residuals), len(sizes)
    begins, of_group = np.cumsum(sizes) - sizes, np.repeat(np.arange(num_groups), sizes)
    place = np.arange(n) - begins[of_group]

    def statistics(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.abs(sums) / np.sqrt(np.maximum(counts * (n - counts) / n, 1e-9))

    observed = statistics(inside @ residuals, inside.sum(axis=1)) * (1 - 1e-9)
    beyond = np.ones(len(inside))
    rows = max(1, 2_000_000 // n)
    for start in range(0, times, rows):
        taken = np.zeros((2, min(rows, times - start), n))
        for row in range(taken.shape[1]):
            # Each sample takes the membership of one in another group, from a random one there onwards.
            donor = rng.permutation(num_groups)[of_group]
            source = begins[donor] + (place + rng.integers(n, size=num_groups)[of_group]) % sizes[donor]
            taken[0, row] = np.bincount(source, weights=residuals, minlength=n)
            taken[1, row] = np.bincount(source, minlength=n)
        beyond += (statistics(*(taken @ inside.T)) >= observed).sum(axis=0)
    return beyond / (times + 1)


def column_slices(name: str, values: NDArray[np.object_] | NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """Return a slice for each value of a column, of many numbers one for each quarter; missing ones are in none.

    Args:
        name: of the column.
        values: ``(N,)``, texts (None where missing) or numbers (NaN where missing).
    """
    if values.dtype.kind == "f":
        numbers = np.unique(values[~np.isnan(values)])
        if len(numbers) <= 10:
            return {f"{name} = {number:g}": values == number for number in numbers}
        ends = np.unique(np.quantile(values[~np.isnan(values)], (0.25, 0.5, 0.75)))
        parts = {f"{name} <= {ends[0]:g}": values <= ends[0]}
        parts |= {
            f"{low:g} < {name} <= {high:g}": (values > low) & (values <= high) for low, high in itertools.pairwise(ends)
        }
        return {**parts, f"{name} > {ends[-1]:g}": values > ends[-1]}
    return {
        f"{name} = {value}": values == value for value in sorted({one for one in values.tolist() if one is not None})
    }


def searched_slices(columns: Mapping[str, NDArray[np.object_] | NDArray[np.float64]]) -> dict[str, NDArray[np.bool_]]:
    """Return the slices of all columns and of pairs of them that have ``SMALLEST`` samples, and as many outside.

    Columns of more than thirty different texts are left out.
    """
    single: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for name, values in columns.items():
        if values.dtype.kind == "f" or len({one for one in values.tolist() if one is not None}) <= _MOST_VALUES:
            own = column_slices(name, values) if len(values) and not _is_missing(values).all() else {}
            single[name] = {part: mask for part, mask in own.items() if _is_large(mask)}
    found = {name: mask for parts in single.values() for name, mask in parts.items()}
    for first, second in itertools.combinations(single.values(), 2):
        for (one, mask), (other, its) in itertools.product(first.items(), second.items()):
            # A pair that is one of the two alone is no further slice.
            if _is_large(mask & its) and (mask & its).sum() < min(mask.sum(), its.sum()):
                found[f"{one}, {other}"] = mask & its
    return found


def _is_missing(values: NDArray[np.object_] | NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isnan(values) if values.dtype.kind == "f" else np.array([one is None for one in values.tolist()])


def _is_large(mask: NDArray[np.bool_]) -> bool:
    return bool(SMALLEST <= mask.sum() <= len(mask) - SMALLEST)


Columns = dict[str, "NDArray[np.object_] | NDArray[np.float64]"]
"""Values of N samples by column: texts, None where missing, or numbers, NaN where missing."""

_SEPARATORS = (",", ";", "\t", "|")
_ABSENT = ("", "na", "n/a", "nan", "null", "none")
"""What a missing number is written as."""

OF_OUTPUTS = ("confidence", "predicted_", "confidence_")
"""Beginnings of columns that the model made."""


def sample_columns(
    run: Run, predictions: Predictions, task: str, table: Path | None = None
) -> tuple[Columns, list[str]]:
    """Return the columns of the predicted samples, and notes on what is left out.

    There are targets and predictions of all tasks (``colour``, ``predicted_colour``), the confidence of ``task`` and of
    all others (``confidence_colour``), and of the run's data, where they are at hand, ``width``, ``height`` and the
    columns of their table.

    Args:
        run: whose data.
        predictions: of one split; confidences are calibrated where these are.
        task: whose confidence is called ``confidence``.
        table: a further table (CSV, Parquet, JSON Lines), one of whose columns has the samples' names.

    Raises:
        UserError: the table cannot be read, or has no such column.
    """
    columns: Columns = {"name": predictions.names, "group": predictions.groups}
    for own, names in predictions.tasks.items():
        kind = predictions.kind(own)
        texts = target_texts(predictions.targets[own], names)
        columns[own] = predictions.targets[own].astype(np.float64) if kind == "regression" else np.array(texts, object)
        if kind in CLASS_KINDS:
            chosen = predictions.predicted(own)
            columns[f"predicted_{own}"] = np.array(target_texts(chosen, names), object)
            columns[f"confidence_{own}"] = predictions.probabilities(own).max(axis=1)
        elif kind == "regression":
            columns[f"predicted_{own}"] = predictions.values(own)
    if f"confidence_{task}" in columns:
        columns["confidence"] = columns[f"confidence_{task}"]
    further, notes = _of_data(run, predictions)
    if table is not None:
        further |= _joined(_read(table), predictions.names, str(table))
    return further | columns, notes


def _of_data(run: Run, predictions: Predictions) -> tuple[Columns, list[str]]:
    """Columns of the run's data; none, with a note, where they are not at hand."""
    try:
        data = run.load_datamodule()
        table = data.table
    except (UserError, OSError) as error:
        return {}, [f"Columns of the data are left out: {str(error).splitlines()[0]}"]
    row_of = {name: row for row, name in enumerate(table.names.to_pylist())}
    if missing := [name for name in predictions.names.tolist() if name not in row_of]:
        return {}, [f"Columns of the data are left out: they have no {missing[0]!r}, which was predicted."]
    rows = [row_of[name] for name in predictions.names.tolist()]
    found: Columns = {}
    if data.image_files and not data.generated:
        sizes = data.image_sizes(rows)
        found |= {"width": sizes[0], "height": sizes[1]}
    origin = Path(table.origin)
    if origin.is_file():
        try:
            found |= _joined(_read(origin), predictions.names, str(origin))
        except UserError as error:
            return found, [f"Columns of {origin} are left out: {error}"]
    return found, []


def _read(path: Path) -> pd.DataFrame:
    """A table of texts and numbers; in CSV, numbers with a leading zero are texts."""
    import pandas as pd

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".jsonl", ".ndjson"):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        named = re.match(r"sep=(.)\s*$", header)  # Excel's own line
        separator = named[1] if named else max(_SEPARATORS, key=header.count)
        frame = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", skiprows=1 if named else 0
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{path}: cannot be read as CSV, Parquet or JSON Lines ({str(error).splitlines()[0]})"
        ) from error
    return frame.apply(_numbers)


def _numbers(column: pd.Series[Any]) -> pd.Series[Any]:
    """A column of texts as numbers, if nothing else is in it."""
    import pandas as pd

    texts = column.str.strip()
    given = texts[~texts.str.lower().isin(_ABSENT)]
    numbers = pd.to_numeric(given, errors="coerce")
    is_text = numbers.isna().any() or given.str.match(r"[-+]?0\d").any()
    return column if is_text or not len(given) else numbers.reindex(column.index)


def _joined(frame: pd.DataFrame, names: NDArray[np.object_], where: str) -> Columns:
    """The rows of the samples, by the column that has their names; of several rows of a sample the first."""
    import pandas as pd

    wanted = set(names.tolist())
    texts = [str(column) for column in frame.columns if not pd.api.types.is_numeric_dtype(frame[column])]
    by_column = {column: [_name(value, wanted) for value in frame[column].tolist()] for column in texts}
    shares = {column: len(wanted.intersection(values)) for column, values in by_column.items()}
    key = max(shares, key=lambda column: shares[column], default="")
    if not key or not shares[key]:
        raise UserError(f"{where}: no column has the names of the samples, such as {names[0]!r}")
    frame = frame.assign(**{key: by_column[key]}).drop_duplicates(key).set_index(key).reindex(names)
    found: Columns = {}
    for column in frame.columns:
        values = frame[column]
        if pd.api.types.is_numeric_dtype(values):
            found[str(column)] = values.to_numpy(np.float64, na_value=np.nan)
        else:
            found[str(column)] = np.array([None if _is_absent(one) else str(one) for one in values.tolist()], object)
    return found


def _name(value: Any, wanted: Collection[str]) -> str:
    """A cell as the samples are called, which have no ``./`` in front, and ``/`` for back-slashes."""
    text = str(value)
    return text if text in wanted else Path(normalize("NFC", text).strip().replace("\\", "/")).as_posix()


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value))


def rows_where(text: str, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Return which samples fulfil a condition, bool ``(N,)``; a comparison with a missing value is not fulfilled.

    Args:
        text: such as ``store = 'north' AND confidence < .5``; words are in single quotes.
        columns: see ``Columns``.

    Raises:
        UserError: the condition is not understood, or names a column that does not exist.

    Example:
        >>> import numpy as np
        >>> from evaluation.statistics.slices import rows_where
        >>> rows_where("width * height < 1e4", {"width": np.array([50.0, 200.0]), "height": np.array([80.0, 90.0])})
        array([ True, False])
    """
    import pyarrow as pa
    from sqlglot.errors import SqlglotError

    from retrieval.filters import parsed

    try:
        condition = _expression(parsed(text), columns)
        arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        n = len(next(iter(arrays.values())))
        kept = pa.table({**arrays, "\0row": np.arange(n)}).filter(condition)["\0row"].to_numpy()
    except SqlglotError as error:
        raise UserError(f"--where {text}: not understood; write it like \"store = 'north'\"") from error
    except (pa.ArrowException, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--where {text}: must compare texts with texts and numbers with numbers ({reason})") from error
    except RecursionError as error:
        raise UserError(f"--where {text[:40]} …: is nested too deep") from error
    mask = np.zeros(n, dtype=bool)
    mask[kept] = True
    return mask


def _expression(node: exp.Expr, columns: Mapping[str, NDArray[Any]]) -> Any:
    """The Arrow expression of a syntax tree; refuses what is not on the list."""
    import pyarrow.compute as pc
    from sqlglot import exp

    def part(name: str) -> Any:
        return _expression(node.args[name], columns)

    if isinstance(node, exp.Column) and isinstance(node.this, exp.Identifier) and not node.table:
        return pc.field(_known(node.name, columns))
    if isinstance(node, exp.Literal):
        return pc.scalar(str(node.this) if node.is_string else float(node.this))
    made: dict[type[exp.Expr], Callable[[], Any]] = {
        exp.Paren: lambda: part("this"),
        exp.Not: lambda: ~part("this"),
        exp.Neg: lambda: pc.scalar(0.0) - part("this"),
        exp.Between: lambda: (part("this") >= part("low")) & (part("this") <= part("high")),
        exp.Is: lambda: part("this").is_null(),
        exp.In: lambda: part("this").isin([_literal(one) for one in node.expressions]),
    }
    of_two: dict[type[exp.Expr], Callable[[Any, Any], Any]] = {
        exp.And: lambda a, b: a & b,
        exp.Or: lambda a, b: a | b,
        exp.EQ: lambda a, b: a == b,
        exp.NEQ: lambda a, b: a != b,
        exp.LT: lambda a, b: a < b,
        exp.LTE: lambda a, b: a <= b,
        exp.GT: lambda a, b: a > b,
        exp.GTE: lambda a, b: a >= b,
        exp.Add: lambda a, b: a + b,
        exp.Sub: lambda a, b: a - b,
        exp.Mul: lambda a, b: a * b,
        exp.Div: lambda a, b: a / b,
    }
    if type(node) in of_two:
        return of_two[type(node)](part("this"), part("expression"))
    if type(node) in made and not (isinstance(node, exp.Is) and not isinstance(node.expression, exp.Null)):
        return made[type(node)]()
    raise UserError(
        f"--where: {node.sql()[:60]!r} is not allowed; use comparisons, AND, OR, NOT, IN, BETWEEN, IS NULL, + - * /"
    )


def _known(name: str, columns: Mapping[str, NDArray[Any]]) -> str:
    by_case = {column.casefold(): column for column in columns}
    if name.casefold() not in by_case:
        close = get_close_matches(name.casefold(), by_case, n=1)
        hint = f"did you mean {by_case[close[0]]}?" if close else f"there are {', '.join(columns)}"
        raise UserError(f"there is no column {name!r}; {hint} (words are in single quotes: '{name}')")
    return name if name in columns else by_case[name.casefold()]


def _literal(node: exp.Expr) -> str | float:
    from sqlglot import exp

    if not isinstance(node, exp.Literal):
        raise UserError(f"--where: IN takes words in single quotes or numbers; got {node.sql()[:60]!r}")
    return str(node.this) if node.is_string else float(node.this)
