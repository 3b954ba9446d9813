"""Whether a model may add pictures to a gallery that another run may have made."""

from __future__ import annotations

from retrieval.schema import ModelIdentity
from vitrail.types import with_image_defaults


def difference(there: ModelIdentity, new: ModelIdentity) -> str:
    """In what the model that wants to add pictures differs; empty where it may."""
    if there.weights != new.weights:
        return f"the weights of {new.run or 'the new model'} are others"
    if there.dim != new.dim or there.encodes_text != new.encodes_text or there.task != new.task:
        return "the task is another"
    # A gallery of an older version does not say what has become an option since.
    older, newer = with_image_defaults(there.input_options), with_image_defaults(new.input_options)
    if any(older[key] != newer[key] for key in older.keys() & newer.keys()):
        return f"pictures were made as {there.input_options}, now {new.input_options}"
    if there.predicts != new.predicts:
        return "the model predicts other classes"
    if new.labels and there.labels != new.labels:  # pictures without any labels may join
        return f"the data have labels of {', '.join(new.labels)}, not of {', '.join(there.labels) or 'nothing'}"
    return ""
