from __future__ import annotations

import hashlib
import os
import pickle
import re
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.encoders.weights import reachable, read_weights
from tests.support.models import BACKBONE, tiny_multitask
from vitrail.errors import UserError
from vitrail.types import TaskFacts

WEIGHTS = Path(os.environ.get("VITRAIL_WEIGHTS", "no-such-folder"))

State = dict[str, torch.Tensor]


def released(name: str = BACKBONE, **arguments: Any) -> State:
    """A state as timm's releases hold it, the classifier of a thousand classes included."""
    network = timm.create_model(name, **arguments)
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    state: State = network.state_dict()
    return state


def assert_loaded(encoder: ImageEncoder, state: State) -> None:
    for name, value in encoder.backbone.state_dict().items():
        torch.testing.assert_close(value, state[name].to(value.dtype), rtol=0, atol=0)


def encoder_from(path: Path | str, name: str = BACKBONE, size: int = 32) -> ImageEncoder:
    encoder = ImageEncoder(name, image_size=size, pretrained=str(path))
    encoder.load_pretrained()
    return encoder


def test_a_safetensors_file_in_half_precision_loads_as_float32(tmp_path: Path) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in released().items()}
    save_file(state, tmp_path / "w.safetensors")
    encoder = encoder_from(tmp_path / "w.safetensors")
    assert_loaded(encoder, state)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
@pytest.mark.parametrize("num_classes", [0, 1000])
def test_a_pth_file_loads_with_and_without_wrapping_and_classifier(
    tmp_path: Path, wrapping: str | None, num_classes: int
) -> None:
    state = released(num_classes=num_classes)
    torch.save({wrapping: state} if wrapping else state, tmp_path / "w.pth")
    assert_loaded(encoder_from(tmp_path / "w.pth"), state)


def test_the_backbone_of_an_own_checkpoint_loads(tmp_path: Path) -> None:
    # An ordinal task has weights behind its head, too.
    kinds: Any = {"class": "ordinal"}
    task = tiny_multitask(
        task_facts=TaskFacts(kinds), loss_options={"ordinal": "cumulative_link", "balance": "uncertainty"}
    )
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": {}}, tmp_path / "best.ckpt")
    assert_loaded(encoder_from(tmp_path / "best.ckpt"), task.encoder.backbone.state_dict())


def test_position_embeddings_are_resized_to_the_size_of_the_data(tmp_path: Path) -> None:
    state = released("test_vit")
    torch.save(state, tmp_path / "w.pth")
    encoder = encoder_from(tmp_path / "w.pth", "test_vit", size=64)
    assert encoder.backbone.state_dict()["pos_embed"].shape[1] < state["pos_embed"].shape[1]
    torch.testing.assert_close(encoder.backbone.state_dict()["norm.weight"], state["norm.weight"])
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 64)


def test_patches_of_another_size_are_refused_instead_of_resampled(tmp_path: Path) -> None:
    state = released("test_vit")
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][..., :8, :8].contiguous()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 of another shape \(patch_embed\.proj\.weight is \(64, 3, 8, 8\), not"):
        encoder_from(tmp_path / "w.pth", "test_vit")


def test_weights_are_loaded_once_in_place_without_random_numbers(tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "w.pth")
    encoder = ImageEncoder(BACKBONE, 32, str(tmp_path / "w.pth"))
    parameters, state = list(encoder.parameters()), torch.get_rng_state()
    encoder.load_pretrained()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(parameters, encoder.parameters(), strict=True))
    (tmp_path / "w.pth").unlink()
    encoder.load_pretrained()


def test_weights_of_another_architecture_are_a_user_error_that_names_keys(tmp_path: Path) -> None:
    torch.save(released("test_resnet"), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"does not fit test_efficientnet: \d+ missing .* unexpected .*conv1"):
        encoder_from(tmp_path / "w.pth")


def open_clip_model(kind: str, **vision: Any) -> torch.nn.Module:
    from open_clip.model import CLIP, CustomTextCLIP

    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    made = {"CLIP": CLIP, "CustomTextCLIP": CustomTextCLIP}[kind]
    torch.manual_seed(0)
    model: torch.nn.Module = made(embed_dim=16, vision_cfg={"image_size": 32, **vision}, text_cfg=text).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape) / 10)
    return model


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@torch.no_grad()
def test_the_image_tower_of_an_open_clip_file_gives_open_clips_features(tmp_path: Path, kind: str) -> None:
    peer: Any = open_clip_model(kind, layers=10, width=256, head_width=64, patch_size=16)
    save_file({key: value.contiguous() for key, value in peer.state_dict().items()}, tmp_path / "w.safetensors")
    encoder = encoder_from(tmp_path / "w.safetensors", "vit_xsmall_patch16_clip_224").eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    peer.visual.proj = None
    torch.testing.assert_close(encoder(image), peer.visual(encoder.normalize(image)), rtol=1e-4, atol=1e-5)
    assert encoder.origin is not None
    assert encoder.origin["left_out"]["projection"] == 1
    assert encoder.origin["left_out"]["text tower"] > 10


@pytest.mark.parametrize(
    ("name", "vision"),
    [
        ("vit_xsmall_patch16_clip_224", {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16}),
        ("vit_xsmall_patch16_clip_224", {"layers": (1, 1, 1, 1), "width": 16}),
        ("test_resnet", {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16}),
    ],
)
def test_another_open_clip_layout_is_refused_as_such(tmp_path: Path, name: str, vision: Any) -> None:
    state = open_clip_model("CLIP", **vision).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=rf"is an open_clip file whose image tower does not fit {name}: \d+ ") as found:
        encoder_from(tmp_path / "w.safetensors", name)
    assert "\n" not in str(found.value)
    assert "ln_final" not in str(found.value)  # the text tower is not what is wrong


def test_a_classifier_that_timm_renames_is_left_out(tmp_path: Path) -> None:
    # The names of iFormer's authors, whose classifier has a BatchNorm.
    own = released("iformer_t")
    theirs = {key.replace("head.head_dist.", "classifier.classifier_dist."): value for key, value in own.items()}
    theirs = {key.replace("head.head.", "classifier.classifier."): value for key, value in theirs.items()}
    theirs = {re.sub(r"^(stages\.\d)\.blocks\.", r"\1.", key): value for key, value in theirs.items()}
    assert "classifier.classifier.bn.weight" in theirs
    torch.save(theirs, tmp_path / "w.pth")
    encoder = encoder_from(tmp_path / "w.pth", "iformer_t", size=64)
    assert_loaded(encoder, own)
    assert encoder.origin is not None
    assert encoder.origin["left_out"] == {"classifier": len(own) - len(encoder.backbone.state_dict())}


@pytest.mark.parametrize("name", ["levit_128s", "iformer_t"])
def test_a_release_in_the_layout_of_the_hub_loads_with_a_normalised_classifier(
    hub: type[FakeHub], tmp_path: Path, name: str
) -> None:
    state = released(name)
    save_file(state, tmp_path / "model.safetensors")
    hub.files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    encoder = ImageEncoder(name, 224, pretrained=True)
    encoder.load_pretrained()
    assert_loaded(encoder, state)


def test_wrappers_of_training_are_taken_off_the_names(tmp_path: Path) -> None:
    state = released()
    for wrapper in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({wrapper + name: value for name, value in state.items()}, tmp_path / "w.pth")
        assert_loaded(encoder_from(tmp_path / "w.pth"), state)


def test_where_weights_came_from_is_known(tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "w.pth")
    assert encoder_from(tmp_path / "w.pth").origin == {
        "part": "backbone",
        "name": BACKBONE,
        "source": str(tmp_path / "w.pth"),
        "revision": None,
        "sha256": {"w.pth": hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()},
        "left_out": {"classifier": 2},
    }
    assert ImageEncoder(BACKBONE, 32, pretrained=False).origin is None


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo this must never run",)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"weight": Harmful()}, protocol=2))
    torch.save({"weight": Harmful()}, tmp_path / "v.pth")
    for name in ("w.pth", "v.pth"):
        with pytest.raises(UserError, match="cannot be read as plain weights"):
            read_weights(str(tmp_path / name))
    assert "never" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "there is no file"),
        ("w.h5", b"x", r"must be one of \.safetensors"),
        ("w.safetensors", b"x", "cannot be read as plain weights"),
        (".", None, "is a folder; give the weights file in it"),
        ("empty.pth", None, "contains no weights"),
    ],
)
def test_files_that_are_not_weights_are_user_errors(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(str(tmp_path / name))


@pytest.mark.skipif(not (WEIGHTS / "regnetx_002.safetensors").is_file(), reason="$VITRAIL_WEIGHTS has no regnetx_002")
def test_the_real_regnet_loads() -> None:
    path = WEIGHTS / "regnetx_002.safetensors"
    encoder = encoder_from(path, "regnetx_002", size=64)
    assert_loaded(encoder, read_weights(str(path)))
    assert encoder.num_features == 368


class FakeHub(BaseHTTPRequestHandler):
    """Responds like the hub: a HEAD with an etag and a commit, then the file."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        content = self.files.get(Path(self.path).name)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        body = content or b""
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeHub]]:
    class Hub(FakeHub):
        files: dict[str, bytes] = {}  # noqa: RUF012
        asked: list[str] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "hub")
    yield Hub
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def from_hub() -> ImageEncoder:
    encoder = ImageEncoder(BACKBONE, 32, pretrained=True)
    encoder.load_pretrained()
    return encoder


def test_weights_come_from_the_hub_once_and_then_from_its_cache(hub: type[FakeHub], tmp_path: Path) -> None:
    state = released()
    save_file(state, tmp_path / "model.safetensors")
    hub.files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    assert_loaded(from_hub(), state)
    assert any(line.startswith("GET") and BACKBONE in line for line in hub.asked)
    hub.asked.clear()
    encoder = from_hub()
    assert_loaded(encoder, state)
    assert not hub.asked
    assert encoder.origin is not None
    assert encoder.origin["source"] == f"timm/{encoder.name}.r160_in1k"
    assert encoder.origin["revision"] == "0" * 40
    content = hub.files["model.safetensors"]
    assert encoder.origin["sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}


def test_weights_in_the_hubs_older_format_are_found(hub: type[FakeHub], tmp_path: Path) -> None:
    state = released()
    torch.save(state, tmp_path / "w.bin")
    hub.files["pytorch_model.bin"] = (tmp_path / "w.bin").read_bytes()
    assert_loaded(from_hub(), state)


def test_a_hub_without_the_file_is_a_user_error_and_an_encoder_is_built_without_the_hub(hub: type[FakeHub]) -> None:
    ImageEncoder(BACKBONE, 32, pretrained=True)
    assert not hub.asked
    with pytest.raises(UserError, match="cannot be fetched"):
        from_hub()


def test_without_a_network_one_line_names_three_fixes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:1", tmp_path)  # a closed port
    with pytest.raises(UserError) as caught:
        from_hub()
    message = str(caught.value)
    assert "\n" not in message
    for way in ("connect", "HF_HOME", "path of a weights file", "pretrained: false"):
        assert way in message


def test_offline_by_choice_does_not_even_knock(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        from_hub()
    assert not hub.asked


def test_a_server_is_reachable_if_it_responds_even_with_an_error(hub: type[FakeHub]) -> None:
    assert reachable(f"{constants.ENDPOINT}/nothing", seconds=5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)
