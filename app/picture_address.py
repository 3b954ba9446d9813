"""Where the browser finds a picture of a gallery."""

from __future__ import annotations

from urllib.parse import urlencode

ROUTE = "/pictures"
"""Path of the route; gallery and picture are in the query, since both of their names may hold slashes and dots."""

_prefix = ""


def serve_below(prefix: str) -> None:
    """Sets the path below which a reverse proxy serves this process, such as ``/vitrine``; empty for none."""
    global _prefix  # noqa: PLW0603 -- one server a process, and views know no request when they write an address
    _prefix = prefix


def route_url() -> str:
    """Address of the route, as the browser finds it."""
    return f"{_prefix}{ROUTE}"


def picture_url(gallery: str, sample_id: str, side: int) -> str:
    """Address of a picture, scaled, relative to the server's root.

    Args:
        gallery: name of the gallery, as the context knows it.
        sample_id: the picture's id in it.
        side: longest side in pixels.
    """
    return f"{route_url()}?{urlencode({'gallery': gallery, 'id': sample_id, 'side': side})}"
