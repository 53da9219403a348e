"""What the pages have in common: templates in which everything that others named is escaped, and their style."""

import base64
from pathlib import Path

from markupsafe import Markup

from finetune.base.formatting import number_text, printable
from finetune.base.templates import templates_in

FOLDER = Path(__file__).parent
STYLE = FOLDER / "page.css"


def render_page(template: str, **values: object) -> str:
    """A page as HTML, of a template in this folder; it is also given the style sheet, as `style`."""
    environment = templates_in(FOLDER, are_pages=True).overlay(finalize=_shown)
    environment.filters |= {"svg": Markup, "number": number_text, "picture": picture_address}
    style = Markup(STYLE.read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def _shown(value: object) -> object:
    """What an expression in the template puts into the page: of text all but its ends of lines as in a terminal."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(printable, value.replace("\t", " ").splitlines()))


def picture_address(picture: bytes) -> Markup:
    """A PNG or JPEG as the address that a page shows it by; "" of nothing."""
    if not picture:
        return Markup("")
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64," + base64.b64encode(picture).decode())
