"""The API on a port of this machine, asked as its users do."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from app.api.guard import Settings
from app.api.server import build_app, server_config
from app.command import load_gallery, load_model
from app.logic.zero_shot import ask
from app.state.context import Limits
from app.state.runs import ServedModel, ServedRun
from retrieval.__main__ import main as retrieval
from tests.app.hostile_files import encoded, harmless_files, hostile_files
from tests.app.running import running
from tests.docs.blocks import blocks
from tests.support.runs import data_of, flowers_run, kinds_run
from vitrail.errors import UserError
from vitrail.runs import Run

SETTINGS = Settings(rate=0, limits=Limits(upload_bytes=2**20, request_bytes=2**21, images=4, text=100))


def served(model: ServedModel, gallery: Any = None) -> Iterator[httpx.Client]:
    with (
        running(server_config(build_app(model, gallery, SETTINGS), SETTINGS)) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_model(kinds_run(), device="cpu")


@pytest.fixture(scope="module")
def kinds(model: ServedModel) -> Iterator[httpx.Client]:
    """A classifier with tasks of every kind, without a gallery."""
    yield from served(model)


@pytest.fixture(scope="module")
def pair() -> ServedModel:
    return load_model(flowers_run(), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery of the dual encoder."""
    folder = tmp_path_factory.mktemp("flowers") / "gallery"
    assert retrieval(["index", "--run", str(flowers_run()), "--gallery", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def flowers(pair: ServedModel, folder: Path) -> Iterator[httpx.Client]:
    """A dual encoder with its gallery."""
    yield from served(pair, load_gallery(pair, flowers_run(), str(folder), []))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Test images of the classifier's data."""
    root = tmp_path_factory.mktemp("wares")
    data = data_of(kinds_run())
    for row in range(4):
        Image.fromarray(data.dataset("test")[row]["image"].permute(1, 2, 0).numpy()).save(root / f"{row}.png")
    return sorted(root.iterdir())


def files(paths: list[Path]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (path.name, path.read_bytes())) for path in paths]


def refusal(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    line: str = response.json()["error"]
    assert line
    assert "\n" not in line
    assert "/" not in line or "multipart/" in line or "/docs" in line
    return line


def same(result: dict[str, Any], expected: Any, top_k: int) -> None:
    """A response has what ``Run.predict`` returns; images of a batch are summed in another order."""
    assert list(result["tasks"]) == list(expected.tasks)
    assert result["unknown"] == expected.unknown
    for task, one in expected.tasks.items():
        found = result["tasks"][task]
        assert (found["kind"], found["calibrated"]) == (one.kind, one.calibrated)
        assert found["decision"] == one.decision
        if one.kind == "regression":
            assert found["value"] == pytest.approx(one.value, rel=1e-4)
            assert found["deviation"] == pytest.approx(one.deviation, rel=1e-4)
            continue
        ranked = [(choice["label"], pytest.approx(choice["confidence"], abs=1e-5)) for choice in found["top_k"]]
        assert one.top_k(top_k) == ranked
        if one.kind == "multi_label":
            assert [choice["label"] for choice in found["labels"]] == [label for label, _ in one.labels]
        else:
            assert found["label"] == (one.label or None)
            assert found["confidence"] == pytest.approx(one.confidence, abs=1e-5)


def test_every_kind_is_predicted_as_by_the_run(kinds: httpx.Client, photos: list[Path]) -> None:
    response = kinds.post("/v1/classify", files=files(photos), data={"top_k": 2})
    assert response.status_code == 200
    found = response.json()["predictions"]
    assert [one["image"] for one in found] == [path.name for path in photos]
    expected = Run(kinds_run()).predict([str(path) for path in photos])
    assert {task.kind for task in expected[0].tasks.values()} == {
        "single_label", "multi_label", "ordinal", "regression",
    }  # fmt: skip
    assert expected[0].tasks["tags"].calibrated
    for result, one in zip(found, expected, strict=True):
        same(result, one, 2)


def test_many_clients_at_once_get_their_own_predictions_in_batches(kinds: httpx.Client, photos: list[Path]) -> None:
    expected = Run(kinds_run()).predict([str(path) for path in photos])

    def ask_for(number: int) -> None:
        place = number % len(photos)
        response = kinds.post("/v1/classify", files=files([photos[place]]))
        assert response.status_code == 200
        same(response.json()["predictions"][0], expected[place], 5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask_for, range(48)))
    metrics = dict(line.rsplit(" ", 1) for line in kinds.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(metrics["vitrail_batch_images_sum"]) > float(metrics["vitrail_batch_images_count"])
    assert float(metrics['vitrail_requests_total{endpoint="/v1/classify",status="200"}']) >= 48
    assert float(metrics["vitrail_requests_running"]) == float(metrics["vitrail_images_waiting"]) == 0


def test_no_file_does_harm(kinds: httpx.Client) -> None:
    codes = {}
    for what, name, content in hostile_files():
        response = kinds.post("/v1/classify", files={"images": (name, content)})
        assert response.status_code in (413, 415, 422), what
        refusal(response, response.status_code)
        codes[what] = response.status_code
    assert {codes[what] for what in ("a text", "an SVG", "a page that is called JPEG", "a pickle", "a PDF")} == {415}
    assert {codes[what] for what in codes if "bomb" in what and "flat" not in what} == {413}
    assert {codes[what] for what in ("empty", "PNG, cut at 60%", "JPEG, cut at 60%", "pixels that end early")} == {422}
    for what, name, content in harmless_files():
        assert kinds.post("/v1/classify", files={"images": (name, content)}).status_code == 200, what


def test_limits_of_a_request(kinds: httpx.Client, photos: list[Path]) -> None:
    large = encoded("BMP", (700, 600))
    assert "at most 1 MiB" in refusal(kinds.post("/v1/classify", files={"images": large}), 413)
    assert "larger than 2 MiB" in refusal(kinds.post("/v1/classify", files={"images": b"a" * 2**21}), 413)

    def parts() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(5):
            yield b"a" * 2**19

    chunked = {"content-type": "multipart/form-data; boundary=b"}
    assert "larger than 2 MiB" in refusal(kinds.post("/v1/classify", content=parts(), headers=chunked), 413)
    assert "too many" in refusal(kinds.post("/v1/classify", files=files([photos[0]] * 5)), 422)
    for top_k in ("0", "101", "-1", "many", "1e9", "NaN"):
        assert refusal(kinds.post("/v1/classify", files=files(photos[:1]), data={"top_k": top_k}), 422)


def test_requests_that_are_none(kinds: httpx.Client) -> None:
    assert "images" in refusal(kinds.post("/v1/classify", data={"labels": "a"}), 422)
    assert refusal(kinds.post("/v1/classify", json={"images": []}), 415)
    broken = {"content-type": "multipart/form-data"}
    assert refusal(kinds.post("/v1/classify", content=b"--b--", headers=broken), 400)
    assert refusal(kinds.post("/v1/classify", data={"images": "a text in place of a file"}), 422)
    assert refusal(kinds.get("/v1/nothing"), 404)
    assert refusal(kinds.get("/v1/../../etc/passwd"), 404)
    assert refusal(kinds.delete("/v1/classify"), 405)
    assert refusal(kinds.post("/v1/embed", data={"x": "y"}), 422)


def test_what_a_model_lacks_is_refused(kinds: httpx.Client, photos: list[Path]) -> None:
    assert "no text encoder" in refusal(kinds.post("/v1/embed", data={"texts": "a"}), 422)
    assert "no text encoder" in refusal(kinds.post("/v1/zero-shot", files=files(photos), data={"labels": "a"}), 422)
    assert "--gallery" in refusal(kinds.post("/v1/search", data={"text": "a"}), 404)
    assert "--gallery" in refusal(kinds.get("/v1/image", params={"id": "a"}), 404)


class Captioning(ServedRun):
    """A dual encoder without classes that writes how bright an image is."""

    def __init__(self) -> None:
        def described(pixels: torch.Tensor) -> list[str]:
            return [f"{one.float().mean():.0f} of 255" for one in pixels]

        self.path, self.name, self.kind = Path("runs/captions/1"), "captions/1", "dual encoder"
        self.tasks, self.kinds, self.notes, self._detector, self._lock = {}, {}, [], None, threading.RLock()
        cpu, options = torch.device("cpu"), {"size": 8, "resize": "crop", "crop_fraction": 1.0}
        self._model = SimpleNamespace(captioner=1, captions_of=described, device=cpu, input_options=options)

    def outputs(self, images: Any) -> dict[str, Any]:
        return {"": np.ones((len(images), 4), np.float32)}


def test_captions_are_returned_with_and_without_classes(kinds: httpx.Client, photos: list[Path]) -> None:
    sent = []
    for value in range(0, 60, 20):
        Image.new("L", (9, 9), value).save(content := io.BytesIO(), "PNG")
        sent.append(("images", (f"{value}.png", content.getvalue())))
    for client in served(Captioning()):
        response = client.post("/v1/classify", files=sent)
        assert response.status_code == 200, response.text
        found = response.json()["predictions"]
    assert [(one["image"], one["tasks"], one["caption"]) for one in found] == [
        (f"{value}.png", {}, f"{value} of 255") for value in range(0, 60, 20)
    ]
    [one] = kinds.post("/v1/classify", files=files(photos[:1])).json()["predictions"]
    assert one["caption"] is None


def test_the_document_describes_every_endpoint_and_loads_nothing_from_elsewhere(kinds: httpx.Client) -> None:
    document = kinds.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/health", "/metrics", "/v1/model", "/v1/classify", "/v1/embed", "/v1/zero-shot", "/v1/search", "/v1/image",
    }  # fmt: skip
    for path in document["paths"].values():
        for operation in path.values():
            assert operation.get("description")
            assert {"413", "415", "429", "503"} <= set(operation["responses"])
    files = document["components"]["schemas"]["Body_classify_v1_classify_post"]["properties"]["images"]
    assert files["items"]["format"] == "binary"  # else the page has no button to choose a file
    page = kinds.get("/docs").text
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert len(kinds.get("/static-offline-docs/swagger-ui-bundle.js").content) > 100_000
    about = kinds.get("/v1/model").json()
    assert about["tasks"]["tags"]["kind"] == "multi_label"
    assert about["gallery_images"] is None
    assert kinds.get("/health").json()["status"] == "ready"


def test_the_client_of_the_guide_gets_a_label(
    kinds: httpx.Client, photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = [one for one in blocks("python") if one.page == "docs/guides/serve.md"]
    monkeypatch.chdir(photos[0].parent)
    Path("photo.jpg").write_bytes(photos[0].read_bytes())
    exec(block.code.replace("http://127.0.0.1:8000", str(kinds.base_url).rstrip("/")), {})
    assert capsys.readouterr().out.strip() == Run(kinds_run()).predict("photo.jpg")[0].tasks["class"].label


def test_vectors_are_those_of_the_model(flowers: httpx.Client, pair: ServedModel) -> None:
    content = encoded("PNG", (32, 32))
    response = flowers.post("/v1/embed", files={"images": ("a.png", content)}, data={"texts": ["a rose", "a lily"]})
    found = response.json()
    image = pair.read(content, "a.png", Limits())
    np.testing.assert_allclose(found["images"], pair.encode_images([image]), atol=1e-5)
    np.testing.assert_allclose(found["texts"], pair.encode_texts(["a rose", "a lily"]), atol=1e-5)


def test_labels_of_a_request_are_compared_as_by_the_application(flowers: httpx.Client, pair: ServedModel) -> None:
    content = encoded("PNG", (32, 32))
    asked = {"labels": ["rose", "lily, white", "Rose"], "templates": ["a photo of a {}.", "{}"]}
    response = flowers.post("/v1/zero-shot", files={"images": ("a.png", content)}, data=asked)
    [found] = response.json()["predictions"]
    image = pair.read(content, "a.png", Limits())
    [expected] = ask(pair, [image], ["rose", "lily, white"], asked["templates"])
    assert [one["label"] for one in found["labels"]] == [label for label, _, _ in expected.ranked()]
    for one, (_, share, cosine) in zip(found["labels"], expected.ranked(), strict=True):
        assert one["confidence"] == pytest.approx(share, abs=1e-4)
        assert one["similarity"] == pytest.approx(cosine, abs=1e-4)
    assert isinstance(found["none_of_these"], bool)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"labels": " "}, "none"),
        ({"labels": ["a" * 301]}, "too many"),
        ({"labels": [str(number) for number in range(201)]}, "too many"),
        ({"labels": "a", "templates": "no place for the label"}, "must have {} once"),
        ({"labels": "a", "templates": "{}{}"}, "must have {} once"),
    ],
)
def test_labels_are_bounded(flowers: httpx.Client, data: dict[str, Any], reason: str) -> None:
    response = flowers.post("/v1/zero-shot", files={"images": encoded()}, data=data)
    assert reason in refusal(response, 422)


def test_search_finds_an_image_by_itself_and_by_text_and_shows_no_path(flowers: httpx.Client, folder: Path) -> None:
    every = flowers.post("/v1/search", data={"text": "a flower", "top_k": 100}).json()["results"]
    assert len(every) == flowers.get("/v1/model").json()["gallery_images"]
    assert sorted((one["score"] for one in every), reverse=True) == [one["score"] for one in every]
    assert str(flowers_run()) not in str(every)
    assert set(every[0]["metadata"]) >= {"split", "predicted_class", "confidence_class"}
    assert not {"path", "run", "vector"} & set(every[0]["metadata"])
    image = flowers.get(every[3]["image_url"])
    assert image.headers["content-type"] == "image/jpeg"
    by_image = flowers.post("/v1/search", files={"image": ("a.jpg", image.content)}, data={"top_k": 2}).json()
    assert len(by_image["results"]) == 2
    some = flowers.post("/v1/search", data={"text": "a flower", "where": "split = 'test'", "top_k": 100}).json()
    assert {one["metadata"]["split"] for one in some["results"]} == {"test"}
    assert 0 < len(some["results"]) < len(every)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "give one of them"),
        ({"text": "  "}, "give one of them"),
        ({"text": "a" * 101}, "too many"),
        ({"text": "a", "where": "a" * 101}, "too many"),
        ({"text": "a", "where": "1 = 1; DROP TABLE images"}, ""),
        ({"text": "a", "where": "path LIKE '%' OR version() = ''"}, ""),
        ({"text": "a", "top_k": "101"}, "less than or equal to 100"),
    ],
)
def test_searches_are_bounded(flowers: httpx.Client, data: dict[str, str], reason: str) -> None:
    assert reason in refusal(flowers.post("/v1/search", data=data or {"x": "y"}), 422)


@pytest.mark.parametrize(
    "sample_id",
    [
        "/etc/passwd",
        "../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "file:///etc/passwd",
        "\0",
        "a\nb",
        "",
        "run.json",
    ],
)
def test_no_address_leads_out_of_the_gallery(flowers: httpx.Client, sample_id: str) -> None:
    assert refusal(flowers.get("/v1/image", params={"id": sample_id}), 404) == "there is no such image"


def test_a_gallery_of_another_model_is_refused(model: ServedModel, folder: Path) -> None:
    with pytest.raises(UserError, match="do not compare"):
        load_gallery(model, kinds_run(), str(folder), [])
    assert load_gallery(model, kinds_run(), "", []) is None
