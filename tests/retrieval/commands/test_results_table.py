import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrieval.commands.output import Answer, Found, as_json, rich_table
from retrieval.search.searcher import Query
from tests.retrieval.small_gallery import identity

FOUND = [
    Found(
        id="p7",
        score=0.98765,
        path="/photos/p7.jpg",
        caption="blue plastic bottle [bold]",
        labels={"class": "tableware_water_bottle", "colour": "blue", "material": None},
        predicted={"class": ("tableware_water_bottle", 0.91), "colour": ("black", 0.5), "material": None},
        thumbnail=None,
    ),
    Found("p2", 0.5, "", "", dict.fromkeys(("class", "colour", "material")), {}, b"jpeg"),
]
FOUND[1] = dataclasses.replace(FOUND[1], predicted=dict.fromkeys(("class", "colour", "material")))


def answer(**changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "query": Query("[red] bottle"),
        "gallery": "g",
        "identity": identity(),
        "ranker": "clip",
        "find": "images",
        "where": "",
        "found": FOUND,
        "notes": ["a note"],
    }
    return Answer(**{**fields, **changes})


def _printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_has_scores_answers_and_labels_in_order() -> None:
    text = _printed(rich_table(answer()))
    first, second = (line for line in text.splitlines() if "p7" in line or "p2" in line)
    assert "0.9877" in first
    assert "tableware_water_bottle 0.91, black 0.50 " in first
    assert "tableware_water_bottle, blue " in first
    assert "0.5000" in second
    assert all(name in text for name in ("the model says", "labels", "caption"))
    # A column of which nothing is known is left out.
    assert "the model says" not in _printed(rich_table(answer(found=FOUND[1:])))


def test_what_people_wrote_is_not_read_as_markup() -> None:
    text = _printed(rich_table(answer()))
    assert "blue plastic bottle [bold]" in text
    assert "“[red] bottle”" in text
    evil = dataclasses.replace(FOUND[0], caption="\x1b[2Jgone\nline", id="\x1b]0;title\x07")
    text = _printed(rich_table(answer(found=[evil], query=Query("\x1b[31mred"))))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "gone line" in text


def test_a_file_name_that_is_no_utf_8_can_be_printed() -> None:
    asked = answer(query=Query(image=Path("photo\udcff.jpg")))
    assert json.loads(as_json(asked).encode())["query"]["image"] == "photo?.jpg"
    assert "photo?.jpg" in _printed(rich_table(asked))


def test_captions_have_a_table_of_their_own() -> None:
    text = _printed(rich_table(answer(find="captions", query=Query(like="p1"))))
    assert "of image" in text
    assert "like p1" in text
    assert "the model says" not in text


def test_json_holds_everything_and_any_script() -> None:
    content = json.loads(as_json(answer(query=Query("синяя"), where="colour = 'blue'")))
    assert content["query"] == {"text": "синяя", "like": None, "image": None}
    assert content["notes"] == ["a note"]
    assert content["where"] == "colour = 'blue'"
    first, second = content["found"]
    assert (first["rank"], first["id"], first["score"]) == (1, "p7", 0.98765)
    assert first["predicted"]["colour"] == {"value": "black", "confidence": 0.5}
    assert first["labels"]["material"] is None
    assert second["predicted"]["class"] is None
    assert "синяя" in as_json(answer(query=Query("синяя")))
