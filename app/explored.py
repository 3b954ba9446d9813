"""What was computed of the galleries for the dataset browser, kept for all who look at them."""

from __future__ import annotations

from app.class_colours import ClassColours
from app.context import AppContext
from app.embedding_map import PictureMap, checked_method, lay_out, methods
from app.exploring import Explorer
from app.once import Once


class Explored:
    """Each part is computed when it is first asked for.

    Args:
        context: what is served.
    """

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._explorers: Once[Explorer] = Once(len(context.galleries))
        self._colours: Once[ClassColours] = Once(len(context.galleries))
        self._maps: Once[PictureMap] = Once(len(methods()) * len(context.galleries))

    def explorer(self, name: object) -> Explorer:
        """Of a gallery.

        Raises:
            UserError: for a name that is not served.
        """
        gallery = self._context.gallery(name)
        return self._explorers.get(gallery.name, lambda: Explorer(gallery))

    def colours(self, name: object) -> ClassColours:
        """Of a gallery."""
        gallery = self._context.gallery(name)
        return self._colours.get(gallery.name, lambda: ClassColours(gallery, self.explorer(name)))

    def picture_map(self, name: object, method: object) -> PictureMap:
        """Of a gallery.

        Raises:
            UserError: for a method that there is none of.
        """
        gallery, explorer = self._context.gallery(name), self.explorer(name)
        known = checked_method(method)
        return self._maps.get((gallery.name, known), lambda: lay_out(gallery.gallery, explorer.ids, known))
