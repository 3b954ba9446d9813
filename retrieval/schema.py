"""What a gallery holds: its tables' columns, and which model made it.

A gallery has a table of pictures and, where a dual encoder saw captions, a table of captions. Vectors are of unit
length, so that a dot product is a cosine.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitrail.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
"""Counts up when the meaning of a gallery's tables changes."""

PICTURES, CAPTIONS = "pictures", "captions"
"""Names of the two tables."""

IDENTITY_KEY = b"vitrine.gallery"
"""Key of the schema's metadata under which the identity stands as JSON."""

LABEL, PREDICTED, CONFIDENCE = "label_", "predicted_", "confidence_"
"""Prefixes of a task's columns: what is true, what the model says, and how sure it is (0 to 1)."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model made the vectors of a gallery, and what else it says of a picture.

    Attributes:
        task: name of the task's class, such as ``DualEncoder``.
        weights: SHA-256 of the weights, hexadecimal; vectors of other weights do not compare.
        run: directory of the run, for people to read.
        dim: length of the vectors.
        encodes_text: whether texts can be compared with the vectors.
        input_options: how pictures were made that the model saw (size, crop fraction, interpolation).
        predicts: class names of each task that the model predicts.
        labels: tasks that the data have labels of.
    """

    task: str
    weights: str
    run: str
    dim: int
    encodes_text: bool
    input_options: dict[str, Any]
    predicts: dict[str, list[str]]
    labels: list[str]

    def to_json(self) -> str:
        """As one line of JSON, with the format's number."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> ModelIdentity:
        """Reads what ``to_json`` wrote.

        Raises:
            UserError: for a text that is none, or of a newer format.
        """
        try:
            content = json.loads(text)
            if content.pop("format") > FORMAT:
                raise UserError(f"{origin}: was made by a newer version of Vitrine; update, or make the gallery again")
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{origin}: does not say which model made it; make the gallery again") from error


def picture_schema(identity: ModelIdentity) -> pa.Schema:
    """Columns of the table of pictures; ``identity`` stands in its metadata."""
    import pyarrow as pa

    words = ["id", "path", "content", "caption", "group", "split", *(f"{LABEL}{task}" for task in identity.labels)]
    fields = [pa.field(name, pa.string()) for name in words]
    for task in identity.predicts:
        fields += [pa.field(f"{PREDICTED}{task}", pa.string()), pa.field(f"{CONFIDENCE}{task}", pa.float32())]
    fields += [pa.field("text", pa.string()), pa.field("thumbnail", pa.binary())]
    fields += [pa.field("run", pa.string()), pa.field("weights", pa.string())]
    fields.append(pa.field("vector", pa.list_(pa.float32(), identity.dim)))
    return pa.schema(fields, metadata={IDENTITY_KEY: identity.to_json().encode()})


def caption_schema(identity: ModelIdentity) -> pa.Schema:
    """Columns of the table of captions; ``picture`` is the id of the picture that the caption belongs to."""
    import pyarrow as pa

    fields = [pa.field(name, pa.string()) for name in ("id", "picture", "caption")]
    fields.append(pa.field("vector", pa.list_(pa.float32(), identity.dim)))
    return pa.schema(fields, metadata={IDENTITY_KEY: identity.to_json().encode()})
