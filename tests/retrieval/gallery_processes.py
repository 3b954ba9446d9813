"""What other processes do to a gallery in the tests: ``python -m tests.retrieval.gallery_processes NAME GALLERY``."""

from __future__ import annotations

import os
import resource
import signal
import sys

from retrieval.gallery import Gallery
from retrieval.store import Store
from tests.support.galleries import caption_rows, identity, image_rows, vectors
from vitrail.errors import UserError

BATCH = ["new0", "p1", "new1"]
"""Images that are added: two new ones, and one in the place of another."""


def add_batch(gallery: Gallery) -> None:
    """Adds the batch, with a caption each."""
    captions = caption_rows(identity(), [(name, f"caption of {name}") for name in BATCH], vectors(len(BATCH), seed=5))
    with gallery.writing() as writer:
        writer.add(image_rows(identity(), BATCH, vectors(len(BATCH), seed=4)), captions)


def killed_before_commit(gallery: Gallery, number: int) -> None:
    """Adds the batch and is killed before one of its commits."""
    commit = Store._commit
    done = 0

    def counted(store: Store, change: object) -> None:
        nonlocal done
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        commit(store, change)  # type: ignore[arg-type]

    Store._commit = counted  # type: ignore[method-assign,assignment]
    add_batch(gallery)


def holding(gallery: Gallery) -> None:
    """Writes until it is killed."""
    with gallery.writing():
        sys.stdout.write("writing\n")
        sys.stdout.flush()
        sys.stdin.read()


def on_a_full_disk(gallery: Gallery) -> None:
    """Adds more than fits into a file, and prints the error."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    names = [f"many{row}" for row in range(5000)]
    try:
        with gallery.writing() as writer:
            writer.add(image_rows(identity(), names, vectors(len(names))))
    except UserError as error:
        sys.stdout.write(f"{error}\n")


def _main() -> None:
    gallery = Gallery.open(sys.argv[2])
    if sys.argv[1] == "holding":
        holding(gallery)
    elif sys.argv[1] == "full":
        on_a_full_disk(gallery)
    else:
        killed_before_commit(gallery, int(sys.argv[1]))


if __name__ == "__main__":
    _main()
