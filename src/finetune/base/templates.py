"""Texts made of templates that lie beside the code that fills them."""

from pathlib import Path

import jinja2


def templates_in(folder: Path, *, are_pages: bool = False) -> jinja2.Environment:
    """The templates of a folder; what one names and is not given is an error.

    Args:
        are_pages: they are HTML: whatever is put in is escaped.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=are_pages,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
