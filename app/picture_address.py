"""Where the browser finds a picture of a gallery."""

from __future__ import annotations

from urllib.parse import urlencode

ROUTE = "/pictures"
"""Path of the route; gallery and picture are in the query, since both of their names may hold slashes and dots."""


def picture_url(gallery: str, sample_id: str, side: int) -> str:
    """Address of a picture, scaled, relative to the server's root.

    Args:
        gallery: name of the gallery, as the context knows it.
        sample_id: the picture's id in it.
        side: longest side in pixels.
    """
    return f"{ROUTE}?{urlencode({'gallery': gallery, 'id': sample_id, 'side': side})}"
