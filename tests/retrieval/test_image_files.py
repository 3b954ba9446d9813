"""What a gallery may show: files of its own folder, of its data, and of what the user has named or indexed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from retrieval import image_files
from retrieval.image_files import ImageFiles, OutsideError, note_folders
from vitrail.errors import UserError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a cache, a home, data of the user's own, and a secret file."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VITRAIL_DATA", str(tmp_path / "own data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("gallery/a.png", "photos/deep/b.png", "own data/c.png", "home/secret.png", "photos 2/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return tmp_path


def shown(machine: Path, files: ImageFiles) -> set[str]:
    """Those of the machine's files that may be shown."""
    found = set()
    for path in sorted(machine.rglob("*.png")):
        try:
            assert files.file(str(path)) == path.resolve()
        except OutsideError:
            assert files.outside([str(path)]) == [str(path)] or path.is_symlink()
            continue
        assert files.outside([str(path)]) == []
        found.add(path.name)
    return found


def test_only_the_gallery_and_the_users_data_by_default(machine: Path) -> None:
    assert shown(machine, ImageFiles(str(machine / "gallery"))) == {"a.png", "c.png"}


def test_folders_that_the_user_names(machine: Path) -> None:
    files = ImageFiles(str(machine / "gallery"), given=[machine / "photos"])
    # A folder whose name only begins alike is another one.
    assert shown(machine, files) == {"a.png", "b.png", "c.png"}


def test_what_was_indexed_here_is_shown_by_this_gallery_only(machine: Path) -> None:
    note_folders(str(machine / "gallery"), [str(machine / "photos" / "deep" / "b.png"), ""])
    assert shown(machine, ImageFiles(str(machine / "gallery"))) == {"a.png", "b.png", "c.png"}
    note_folders(str(machine / "gallery"), [str(machine / "photos 2" / "d.png")])
    assert shown(machine, ImageFiles(str(machine / "gallery"))) == {"a.png", "b.png", "c.png", "d.png"}
    assert shown(machine, ImageFiles(str(machine / "other"))) == {"c.png"}


def test_of_very_many_folders_what_they_have_in_common_is_noted(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_MOST", 3)
    note_folders(str(machine / "gallery"), [str(machine / "photos" / str(number) / "x.png") for number in range(9)])
    assert machine / "photos" in ImageFiles(str(machine / "gallery")).roots


@pytest.mark.parametrize("where", ["the run that is named", "the run around the gallery"])
def test_the_data_of_the_run(machine: Path, where: str) -> None:
    run = machine / "run"
    gallery = run / "gallery" if "around" in where else machine / "gallery"
    gallery.mkdir(parents=True, exist_ok=True)
    run.mkdir(exist_ok=True)

    def with_root(root: object) -> ImageFiles:
        config = {"data": {"init_args": {"root": root}}}
        (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return ImageFiles(str(gallery), "" if "around" in where else run)

    assert "b.png" in shown(machine, with_root(str(machine / "photos")))
    for wide in ("/", str(machine / "home"), str(machine), "/home", "", None, 3, ["/"]):
        assert not {"b.png", "secret.png"} & shown(machine, with_root(wide)), wide
    (run / "config.yaml").write_text("data: [", encoding="utf-8")
    assert "b.png" not in shown(machine, ImageFiles(str(gallery), run))


def test_links_and_dots_are_followed_before_a_file_is_checked(machine: Path) -> None:
    gallery = machine / "gallery"
    (gallery / "link.png").symlink_to(machine / "home" / "secret.png")
    (gallery / "folder").symlink_to(machine / "home")
    (machine / "photos" / "to own.png").symlink_to(gallery / "a.png")
    files = ImageFiles(str(gallery))
    for path in ("link.png", "folder/secret.png", "../home/secret.png", f"{gallery}/../home/secret.png"):
        with pytest.raises(OutsideError, match="--data-root"):
            files.file(path)
    assert files.outside(["folder/secret.png", "../home/secret.png", "a.png"]) == [
        "folder/secret.png",
        "../home/secret.png",
    ]
    assert files.file("a.png") == (gallery / "a.png").resolve()
    assert files.file(str(machine / "photos" / "to own.png")) == (gallery / "a.png").resolve()


@pytest.mark.parametrize(
    "path", ["file:///etc/passwd", "http://127.0.0.1/a.png", "s3://bucket/a.png", "file:a.png", "a\0b", "x" * 5000]
)
def test_addresses_and_what_is_no_path_are_refused_in_one_line(machine: Path, path: str) -> None:
    with pytest.raises(UserError) as caught:
        ImageFiles(str(machine / "gallery")).file(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_gallery_at_an_object_store_has_no_folder(machine: Path) -> None:
    files = ImageFiles("s3://bucket/gallery")
    assert shown(machine, files) == {"c.png"}
    with pytest.raises(OutsideError):
        files.file("a.png")


def test_a_file_that_is_gone_has_an_error_of_its_own(machine: Path) -> None:
    files = ImageFiles(str(machine / "gallery"))
    with pytest.raises(UserError, match="is gone"):
        files.file("b.png")
    with pytest.raises(UserError, match="no file of its own"):
        files.file("")
