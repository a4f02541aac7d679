"""How the site is built: Markdown pages, nothing loaded from elsewhere, and every warning an error."""

import importlib.metadata

project = "batchinfer"
copyright = "the batchinfer authors, Apache-2.0"
version = release = importlib.metadata.version("batchinfer-jobs")

extensions = ["myst_parser"]
exclude_patterns = ["build"]
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"
html_title = f"batchinfer {version}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
