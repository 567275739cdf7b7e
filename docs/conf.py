"""How the documentation is built: `make docs`. Every example on a page runs while it is."""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import unvanish  # noqa: E402 (after the path)

project = "unvanish"
author = "The unvanish maintainers"
copyright = "The unvanish maintainers, Apache-2.0"  # noqa: A001 (its name in Sphinx)
version = release = unvanish.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
extensions += ["balanced", "docstrings", "functions_first", "offline_search"]
exclude_patterns = ["_build", "_ext", "jupyter_execute", "**.ipynb_checkpoints"]
default_role = "py:obj"

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_number_source_lines = False
# What a page's kernel inherits: the commands of this environment, shell lines that may not fail, and one look for
# all figures.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["PYTHONSTARTUP"] = str(HERE / "_ext" / "kernel_startup.py")
os.environ["MATPLOTLIBRC"] = str(HERE / "matplotlibrc")
os.environ["COLUMNS"] = "80"
# Models of this size gain nothing from threads, and lose much where pages are built side by side.
os.environ["OMP_NUM_THREADS"] = "1"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": False}
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "unvanish"
# MathJax lies with the pages, so that equations can be read offline. The package that ships it is no extension for
# us: it does not say that it can be read in parallel.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert _mathjax is not None
assert _mathjax.origin is not None
mathjax_path = "mathjax/tex-chtml.js"
html_static_path = ["_static", str(Path(_mathjax.origin).parent / "static")]
html_css_files = ["unvanish.css"]
html_copy_source = False
html_show_search_summary = True
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "
