"""How Sphinx builds the site: `make docs`, into build/docs.  Warnings are errors."""

import re
from importlib.metadata import version as version_of

from sphinx.application import Sphinx

project = "uffdaemon"
author = "The uffdaemon authors"
project_copyright = "the uffdaemon authors, Apache-2.0"
version = release = version_of("uffdaemon")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["**/.*"]
nitpicky = False  # names of trio, numpy and typing have no inventory here

html_theme = "furo"
html_title = "uffdaemon"
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "py:obj"  # `Name` in a docstring links where there is such a name
add_module_names = False
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Unions and callables by their names, instead of all that they stand for.
autodoc_type_aliases = {
    name: name for name in ("Action", "Event", "Fetch", "FailureAction", "Missing", "Policy")
}
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}


def plain_aliases(
    _app: Sphinx,
    _what: str,
    _name: str,
    _obj: object,
    _options: object,
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, ...]:
    """Show aliases by their names inside of unions too, where Sphinx 9.0 shows its own wrapper."""
    return tuple(
        part and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", part)
        for part in (arguments, returns)
    )


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-signature", plain_aliases)
