"""Configuration of the book. The pages of the methods are written when it is built."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))
from cheating_picture import write_cheating  # noqa: E402
from comparing_cams import write_comparison  # noqa: E402
from lecture_pictures import write_lecture  # noqa: E402
from measured_figures import write_measured_figures  # noqa: E402
from method_pages import sources_digest, write_method_pages  # noqa: E402
from normalization import write_normalization  # noqa: E402
from one_transformer import write_transformer  # noqa: E402
from sphinx.util import logging  # noqa: E402
from where_units_look import write_placements  # noqa: E402

project = "Phosphene"
copyright = "the Phosphene authors"
extensions = ["myst_parser", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = "Phosphene"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Words in quotes are what one types.
smartquotes = False

write_method_pages(here / "methods", logging.getLogger(__name__).info)
write_comparison(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
write_cheating(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
write_lecture(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
write_measured_figures(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
write_normalization(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
write_placements(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
write_transformer(here / "_build" / "pictures", sources_digest(), logging.getLogger(__name__).info)
