"""How Sphinx builds the site: `make docs`, into build/docs.  Warnings are errors."""

from importlib.metadata import version as version_of

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
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
