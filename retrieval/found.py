"""What a person wants to see of the pictures that a search found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from retrieval.schema import CONFIDENCE, LABEL, PREDICTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retrieval.gallery import Gallery


@dataclass(frozen=True)
class Found:
    """A picture that was found.

    Attributes:
        id: in the gallery.
        score: of the ranker.
        path: of its file, empty where it is none.
        caption: of the picture, or the one that was found.
        labels: true value of each task, None where unknown.
        predicted: value of each task that the model predicts, and how sure it is (0 to 1); None where it says nothing.
        thumbnail: JPEG, where the gallery keeps one.
    """

    id: str
    score: float
    path: str
    caption: str
    labels: dict[str, str | None]
    predicted: dict[str, tuple[str, float] | None]
    thumbnail: bytes | None

    def as_dict(self, rank: int) -> dict[str, Any]:
        """As JSON has it, with its rank from 1."""
        predicted = {
            task: None if answer is None else {"value": answer[0], "confidence": round(answer[1], 6)}
            for task, answer in self.predicted.items()
        }
        return {
            "rank": rank,
            "id": self.id,
            "score": round(self.score, 6),
            "path": self.path,
            "caption": self.caption,
            "labels": self.labels,
            "predicted": predicted,
        }


def look_up(
    gallery: Gallery, ids: Sequence[str], scores: Sequence[float], captions: Sequence[str] | None = None
) -> list[Found]:
    """Everything that is shown of pictures.

    Args:
        gallery: that they are in.
        ids: of the pictures, in the order of the result; one may come again.
        scores: of each.
        captions: to show instead of the pictures' own.
    """
    if not ids:
        return []
    identity = gallery.identity
    predicted = [f"{prefix}{task}" for task in identity.predicts for prefix in (PREDICTED, CONFIDENCE)]
    columns = ["id", "path", "caption", *(f"{LABEL}{task}" for task in identity.labels), *predicted, "thumbnail"]
    shown: Sequence[str | None] = captions or [None] * len(ids)
    distinct = list(dict.fromkeys(ids))
    rows = dict(zip(distinct, gallery.rows(distinct, columns).to_pylist(), strict=True))
    return [
        _found(rows[identifier], score, identity.labels, list(identity.predicts), own)
        for identifier, score, own in zip(ids, scores, shown, strict=True)
    ]


def _found(row: dict[str, Any], score: float, labels: list[str], predicts: list[str], caption: str | None) -> Found:
    answers = {task: (row[f"{PREDICTED}{task}"], row[f"{CONFIDENCE}{task}"]) for task in predicts}
    return Found(
        id=row["id"],
        score=float(score),
        path=row["path"] or "",
        caption=(row["caption"] or "") if caption is None else caption,
        labels={task: row[f"{LABEL}{task}"] for task in labels},
        predicted={
            task: None if value is None else (value, float(confidence or 0))
            for task, (value, confidence) in answers.items()
        },
        thumbnail=row["thumbnail"],
    )
