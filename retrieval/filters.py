"""Filters that people write: ``colour = 'blue' AND confidence > .5``.

A filter becomes part of a query of the table, so only a short list of constructs passes: comparisons of columns with
literals or columns, ``AND``, ``OR``, ``NOT``, ``IN``, ``LIKE``, ``ILIKE``, ``BETWEEN``, ``IS NULL``, and of lists
``tags CONTAINS 'cat'``, ``CONTAINS ANY ('cat', 'dog')`` and ``CONTAINS ALL (…)``. What reaches the table is generated
from the parsed filter, never the user's own text. ``grade >= 'good'`` follows the order of an ordinal task's classes.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, NamedTuple

from retrieval.schema import CONFIDENCE, DEVIATION, LABEL, NOT_METADATA, PREDICTED, ModelIdentity
from vitrail.errors import UserError
from vitrail.types import CLASS_KINDS, LABEL_TASK

if TYPE_CHECKING:
    from sqlglot import exp
    from sqlglot.tokens import Token  # type: ignore[attr-defined]  # compiled, it does not name what it exports

LONGEST = 10_000
"""Characters of a filter."""

DEEPEST = 30
"""Nested brackets and ``NOT``; the parsers are recursive, and that of the table overflows the stack."""

ALLOWED = "comparisons, AND, OR, NOT, IN, LIKE, ILIKE, BETWEEN, CONTAINS and IS NULL"

IN_ONE_CONDITION = 500
"""Values that one ``IN`` condition names: the parser's memory and the stack stay small."""

_COMPARISONS = {"EQ": "=", "NEQ": "<>", "LT": "<", "LTE": "<=", "GT": ">", "GTE": ">="}
_MIRRORED = {"LT": "GT", "LTE": "GTE", "GT": "LT", "GTE": "LTE"}
_PATTERNS = {"Like": "LIKE", "ILike": "ILIKE"}
_NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?")
_LARGEST = 1e38


class Column(NamedTuple):
    """What a name in a filter means.

    Attributes:
        name: column of the table.
        kind: what its values are: one text or number, or a list of texts or numbers.
        instead: names that say which of several columns is meant, where this one leaves that open.
        scale: of an ordinal task its classes in their order.
    """

    name: str
    kind: Literal["text", "number", "list", "numbers"]
    instead: tuple[str, ...] = ()
    scale: tuple[str, ...] = ()


def checked_filter(text: str, columns: Mapping[str, Column]) -> str:
    """Parse a filter and generate SQL for the table from it.

    Args:
        text: what the user wrote.
        columns: the names that may stand in it; upper and lower case are the same.

    Raises:
        UserError: for an invalid filter, with the place.
    """
    from sqlglot.errors import ParseError, SqlglotError

    if not text.strip():
        raise UserError("filter: is empty; leave it out, or write one such as \"colour = 'blue'\"")
    if len(text) > LONGEST:
        raise UserError(f"filter: has {len(text):,} characters, at most {LONGEST:,} are read; shorten it")
    try:
        text = unicodedata.normalize("NFC", text)  # as labels, names and captions are
        return _Writer(text, columns).condition(parsed(text), 0)
    except ParseError as error:
        found = error.errors[0] if error.errors else {}
        place = f" at character {_offset(text, found['line'], found['col'])}" if found.get("line") else ""
        near = f" near {found['highlight']!r}" if found.get("highlight") else ""
        raise UserError(f"filter: not understood{place}{near}; write it like \"colour = 'blue'\"") from error
    except SqlglotError as error:
        raise UserError(
            "filter: not understood, a quote or bracket has no end; a quote within a word is written twice: 'it''s'"
        ) from error
    except RecursionError as error:
        raise _too_deep() from error


def filter_columns(names: Sequence[str], identity: ModelIdentity) -> dict[str, Column]:
    """Return the columns that a filter of a gallery may name, by their names in the table and by short names.

    ``colour`` is the predicted colour, or the label where the model predicts none; ``confidence`` is that of the class,
    where that is one class. Lists of confidences cannot be compared.
    Where an attribute has the name of a column (``split``, ``caption`` …), the bare name is refused: ``label_split``
    and ``predicted_split`` are the attribute, ``gallery_split`` is the gallery's own.

    Args:
        names: columns of the table of images.
        identity: which tasks the model predicts and the data have labels of.
    """
    columns = {name: Column(name, "text") for name in names if name not in NOT_METADATA}
    columns |= {f"{LABEL}{task}": _values(f"{LABEL}{task}", task, identity) for task in identity.labels}
    for task in identity.predicts:
        kind = identity.kind(task)
        further = f"{DEVIATION if kind == 'regression' else CONFIDENCE}{task}"
        columns[f"{PREDICTED}{task}"] = _values(f"{PREDICTED}{task}", task, identity)
        columns[further] = Column(further, "numbers" if kind == "multi_label" else "number")
    short = {task: columns[f"{LABEL}{task}"] for task in identity.labels}
    short |= {task: columns[f"{PREDICTED}{task}"] for task in identity.predicts}
    own = {name: columns[name] for name in columns if name in short}
    if LABEL_TASK in identity.predicts and identity.kind(LABEL_TASK) in CLASS_KINDS:
        confidence = Column(f"{CONFIDENCE}{LABEL_TASK}", "number")
        (own if "confidence" in short else short)["confidence"] = confidence
    for name, column in own.items():
        tasks = [
            f"{LABEL}{name}" if name in identity.labels else "",
            f"{PREDICTED}{name}" if name in identity.predicts else "",
        ]
        meant = column.name if column.name.startswith(CONFIDENCE) else f"gallery_{name}"
        short[meant] = column
        columns[name] = Column("", column.kind, tuple(filter(None, [*tasks, meant])))
    return columns | {name: column for name, column in short.items() if name not in columns}


def _values(name: str, task: str, identity: ModelIdentity) -> Column:
    """The column of a task's labels or predictions."""
    kinds: dict[str, Literal["list", "number"]] = {"multi_label": "list", "regression": "number"}
    return Column(name, kinds.get(identity.kind(task), "text"), scale=tuple(identity.scales.get(task, ())))


def one_of(column: str, values: Sequence[str]) -> str:
    """Condition that a column of strings has one of the values."""
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"`{column}` IN ({quoted})"


def parsed(text: str) -> exp.Expr:
    """Return the syntax tree of one condition; ``UserError`` or an error of sqlglot for what is none."""
    import sqlglot
    from sqlglot.tokens import Tokenizer

    depth = 0
    tokens = Tokenizer().tokenize(text)
    for token in tokens:
        if token.token_type.name == "SEMICOLON":
            raise UserError(f"filter: ';' at character {token.start + 1} is not allowed; write one condition")
        if token.comments:
            raise UserError(f"filter: holds a comment ({token.comments[0].strip()[:40]!r}); leave it out")
        depth += {"L_PAREN": 1, "R_PAREN": -1}.get(token.token_type.name, 0)
        if depth > DEEPEST:
            raise _too_deep()
    _mark_contains(tokens)
    parsed = [found for found in sqlglot.Parser().parse(tokens, text) if found is not None]
    if len(parsed) != 1:
        raise UserError("filter: holds no condition; write one such as \"colour = 'blue'\"")
    return parsed[0]


def _mark_contains(tokens: Sequence[Token]) -> None:
    """Read ``contains`` before a word in quotes, ``any`` or ``all`` as an operator, ``@>`` of some dialects."""
    from sqlglot.tokens import TokenType  # type: ignore[attr-defined]

    for word, following in itertools.pairwise(tokens):
        is_operator = following.token_type in (TokenType.STRING, TokenType.NUMBER, TokenType.ALL, TokenType.ANY)
        if is_operator and word.token_type == TokenType.VAR and word.text.casefold() == "contains":
            word.token_type = TokenType.AT_GT


class _Writer:
    """Generates SQL from a parsed filter; refuses everything that is not on its list."""

    def __init__(self, text: str, columns: Mapping[str, Column]) -> None:
        self._text = text
        self._columns = {name.casefold(): column for name, column in columns.items()}

    def condition(self, node: exp.Expr, depth: int) -> str:
        """SQL of something that is true or false."""
        from sqlglot import exp

        if depth > DEEPEST:
            raise _too_deep()
        kind = type(node).__name__
        if kind in {"And", "Or"}:
            self._only(node, "this", "expression")
            # A chain of thousands is one level deep here; written so, the table's parser agrees.
            parts = [self.condition(part, depth + 1) for part in node.flatten(unnest=False)]
            return "(" + f" {kind.upper()} ".join(parts) + ")"
        if isinstance(node, exp.Paren):
            self._only(node, "this")
            return self.condition(node.this, depth + 1)
        if isinstance(node, exp.Not):
            self._only(node, "this")
            return f"(NOT {self.condition(node.this, depth + 1)})"
        return self._predicate(node, kind)

    def _predicate(self, node: exp.Expr, kind: str) -> str:
        from sqlglot import exp

        if isinstance(node, exp.ArrayContainsAll) or kind in _COMPARISONS:
            self._only(node, "this", "expression")
            return self._comparison(node, kind) if kind in _COMPARISONS else self._contains(node)
        if kind in _PATTERNS:
            self._only(node, "this", "expression", "negate")
            word = ("NOT " if node.args.get("negate") else "") + _PATTERNS[kind]
            self._column(node.this, "text")
            return self._compared(node, [node.this, node.expression], f"{{}} {word} {{}}")
        if isinstance(node, exp.Between):
            self._only(node, "this", "low", "high")
            ends = [node.args["low"], node.args["high"]]
            if scale := self._scale(node.this, *ends):
                low, high = (self._class(end, scale) for end in ends)
                return self._classes(node.this, scale[low : high + 1])
            return self._compared(node, [node.this, *ends], "{} BETWEEN {} AND {}")
        if isinstance(node, exp.In) and node.expressions:
            self._only(node, "this", "expressions")
            marks = ", ".join("{}" for _ in node.expressions)
            return self._compared(node, [node.this, *node.expressions], f"{{}} IN ({marks})")
        if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
            self._only(node, "this", "expression")
            return f"({self._column(node.this)} IS NULL)"
        raise self._refused(node)

    def _comparison(self, node: exp.Expr, kind: str) -> str:
        if scale := self._scale(node.this, node.expression):
            return self._ordered(node, scale)
        return self._compared(node, [node.this, node.expression], f"{{}} {_COMPARISONS[kind]} {{}}")

    def _compared(self, node: exp.Expr, operands: list[exp.Expr], form: str) -> str:
        """SQL of a comparison of values of one kind, one of which is a column."""
        from sqlglot import exp

        written = [self._operand(operand) for operand in operands]
        if not any(isinstance(operand, exp.Column) for operand in operands):
            raise UserError(f"filter: {self._place(node)} compares no column; {self._known()}")
        kinds = {kind for _, kind in written}
        if lists := [operand.name for operand, (_, kind) in zip(operands, written, strict=True) if kind == "list"]:
            raise UserError(
                f"filter: {self._place(node)} compares a list of labels; write {lists[0]} CONTAINS 'label', "
                "or CONTAINS ANY or ALL ('one', 'other')"
            )
        if "numbers" in kinds:
            raise UserError(f"filter: {self._place(node)} compares a list of numbers; filter by the labels themselves")
        if len(kinds) > 1:
            raise UserError(
                f"filter: {self._place(node)} compares text with a number; put words in quotes, not numbers"
            )
        return "(" + form.format(*(sql for sql, _ in written)) + ")"

    def _contains(self, node: exp.Expr) -> str:
        """SQL of a list of labels that has one label, any or all of several."""
        from sqlglot import exp

        column, given = self._column(node.this, "list"), node.expression
        quantifier = "ANY" if isinstance(given, exp.Any) else "ALL" if given.name.upper() == "ALL" else ""
        labels = [given]
        if quantifier:
            given = given.this if isinstance(given, exp.Any) else given
            labels = given.expressions or [given.unnest()]
        if not all(isinstance(label, exp.Literal) and label.is_string for label in labels):
            raise UserError(f"filter: {self._place(node)}: labels are words in single quotes, such as 'cat'")
        listed = ", ".join(self._operand(label)[0] for label in labels)
        return f"array_has_{'any' if quantifier == 'ANY' else 'all'}({column}, make_array({listed}))"

    def _scale(self, *nodes: exp.Expr) -> tuple[str, ...]:
        """Classes of the one ordinal column among the operands, which is compared with a word; empty for others."""
        from sqlglot import exp

        columns = [node for node in nodes if isinstance(node, exp.Column)]
        scale = self._meaning(columns[0]).scale if len(columns) == 1 else ()
        literals = [node for node in nodes if isinstance(node, exp.Literal)]
        return scale if len(columns) + len(literals) == len(nodes) else ()

    def _ordered(self, node: exp.Expr, scale: tuple[str, ...]) -> str:
        """SQL of a comparison with a class of an ordered scale."""
        from sqlglot import exp

        kind, column, word = type(node).__name__, node.this, node.expression
        if isinstance(word, exp.Column):
            kind, column, word = _MIRRORED.get(kind, kind), word, column
        place = self._class(word, scale)
        chosen = {"LT": scale[:place], "LTE": scale[: place + 1], "GT": scale[place + 1 :], "GTE": scale[place:]}
        chosen |= {"EQ": scale[place : place + 1], "NEQ": scale[:place] + scale[place + 1 :]}
        return self._classes(column, chosen[kind])

    def _class(self, node: exp.Expr, scale: tuple[str, ...]) -> int:
        if node.name not in scale:
            raise UserError(f"filter: {self._place(node)} is no class of the scale {' < '.join(scale)}")
        return scale.index(node.name)

    def _classes(self, node: exp.Expr, names: Sequence[str]) -> str:
        column = self._meaning(node).name
        # Comparing a column with itself keeps null what is not known, as every comparison does.
        return f"({one_of(column, names)})" if names else f"(`{column}` <> `{column}`)"

    def _operand(self, node: exp.Expr) -> tuple[str, str]:
        """SQL of a value, and its kind."""
        from sqlglot import exp

        if isinstance(node, exp.Column):
            return self._column(node), self._meaning(node).kind
        if isinstance(node, exp.Null):
            raise UserError('filter: nothing equals NULL; write "colour IS NULL" or "colour IS NOT NULL"')
        sign = ""
        if isinstance(node, exp.Neg):
            sign, node = "-", node.this
        if isinstance(node, exp.Literal):
            self._only(node, "this", "is_string")
            if node.is_string and not sign:
                return "'" + str(node.this).replace("'", "''") + "'", "text"
            if not node.is_string and _NUMBER.fullmatch(str(node.this)) and float(node.this) <= _LARGEST:
                # Columns of numbers are float32. LanceDB rounds a bare 0.45 in "x >= 0.45", but not in "NOT x >= 0.45".
                return f"CAST({sign}{node.this} AS FLOAT)", "number"
        raise self._refused(node)

    def _column(self, node: exp.Expr, kind: str = "") -> str:
        meaning = self._meaning(node)
        if kind and meaning.kind != kind:
            if kind == "list":
                raise UserError(f"filter: {node.name!r} is no list of labels, which CONTAINS is for; use = or <")
            if meaning.kind == "list":
                raise UserError(f"filter: {node.name!r} is a list of labels; write {node.name} CONTAINS 'label'")
            raise UserError(f"filter: {node.name!r} is a number, patterns are for text; use < and >")
        return f"`{meaning.name}`"

    def _meaning(self, node: exp.Expr) -> Column:
        from sqlglot import exp

        if not isinstance(node, exp.Column) or not isinstance(node.this, exp.Identifier) or node.table:
            raise self._refused(node)
        meaning = self._columns.get(node.name.casefold())
        if meaning is not None and meaning.instead:
            raise UserError(
                f"filter: {self._place(node)} is a column of the gallery and an attribute of the data; write "
                f"{' or '.join(meaning.instead)}"
            )
        if meaning is None:
            raise UserError(
                f"filter: there is no column {self._place(node)}; {self._known(node.name)}; words are written in "
                f"single quotes: '{node.name}'"
            )
        return meaning

    def _known(self, name: str = "") -> str:
        close = get_close_matches(name.casefold(), self._columns, n=1) if name else []
        return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self._columns)}"

    def _only(self, node: exp.Expr, *names: str) -> None:
        """Refuses a node with parts that would be lost."""
        for name, value in node.args.items():
            if value and name not in names:
                raise self._refused(node)

    def _refused(self, node: exp.Expr) -> UserError:
        return UserError(f"filter: {self._place(node)} is not allowed; a filter has only {ALLOWED}")

    def _place(self, node: exp.Expr) -> str:
        """The piece of the filter, and where it begins."""
        starts = [found.meta["start"] for found in node.walk() if "start" in found.meta]
        piece = " ".join(node.sql().split())
        piece = piece if len(piece) <= 60 else piece[:57] + "…"
        return f"{piece!r}" + (f" at character {min(starts) + 1}" if starts else "")


def _too_deep() -> UserError:
    return UserError(f"filter: is nested more than {DEEPEST} deep; take some brackets away")


def _offset(text: str, line: int, column: int) -> int:
    """Number of a character, from 1, by its line and column."""
    return sum(len(before) + 1 for before in text.split("\n")[: line - 1]) + column
