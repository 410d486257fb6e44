"""Draws docs/quickstart.svg, the README's picture, from what a quickstart really answered.

python benchmarks/readme_picture.py work_dirs/quickstart/quickstart.json
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from course_lib.quickstart import QuickstartResult, comparison_table


def main() -> None:
    """Read the JSON named on the command line and write the SVG."""
    result = QuickstartResult(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(comparison_table(result))
    svg = console.export_svg(title="make quickstart")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # rich links fonts of a CDN; any monospace will do
    Path("docs/quickstart.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
