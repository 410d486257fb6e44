"""What all widgets here share: one style sheet, a few lines of JavaScript, and a static twin beside the live view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget

_HERE = Path(__file__).parent


def script(name: str) -> str:
    """A widget's JavaScript with `dom.js` before it: a widget's module comes inline, so it can import no other file."""
    return "\n".join((_HERE / part).read_text(encoding="utf-8") for part in ("dom.js", name))


class CourseWidget(anywidget.AnyWidget):
    """A widget that a page without a kernel shows as plain HTML, as it was when the cell ran."""

    _css = _HERE / "course.css"

    def twin(self) -> str:
        """The widget as it is now, as HTML without script."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = repr(self)
        data["text/html"] = self.twin()
        return bundle
