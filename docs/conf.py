"""Settings of the site. `make docs` builds it, with warnings as errors."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

os.environ["TNLAYERS_CACHE"] = str(HERE / "_build" / "cache")  # plans of the pages are those of the shipped tables

import layer_pages  # noqa: E402
import links  # noqa: E402

import tnlayers  # noqa: E402

project = "tnlayers"
author = "The tnlayers contributors"
copyright = "2026, the tnlayers contributors"
version = release = tnlayers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # copies MathJax into the site: formulas show without a network
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
mathjax_path = "mathjax/tex-chtml.js"
if os.environ.get("DOCS_INTERSPHINX"):  # needs a network; without it, names of torch are plain text
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

exclude_patterns = [
    "_build",
    "tutorial_scripts",
    "**/GALLERY_HEADER.rst",
    "sg_execution_times.rst",
    "**/sg_execution_times.rst",
]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Shape", "returns_style"), ("Reference", "notes_style")]

sphinx_gallery_conf = {
    "examples_dirs": "tutorial_scripts",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "plot_gallery": True,
    "parallel": 2,
    "min_reported_time": 10_000,
}

html_theme = "pydata_sphinx_theme"
html_title = "tnlayers"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("search.js", {"defer": "defer"})]
html_favicon = html_logo = "_static/logo.svg"
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "tnlayers"},
    "article_header_start": [],  # the navigation names the part; the search would quote it as every page's beginning
    "show_prev_next": True,
    "header_links_before_dropdown": 6,
    "icon_links": [{"name": "Repository", "url": links.URLS["Repository"], "icon": "fa-brands fa-github"}],
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
}


linkcode_resolve = links.source


def setup(app):
    """Write the pages that follow from the registry of formats, and let docstrings link to each other."""
    layer_pages.write(HERE / "reference" / "layers")
    app.connect("autodoc-process-docstring", links.link_names, priority=900)
