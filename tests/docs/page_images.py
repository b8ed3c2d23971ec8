"""Photographs the page for the documentation: python tests/docs/page_images.py RUNS [FOLDER]

RUNS: a folder with runs, such as `demo`. Needs Chromium. Writes docs/images/page-VIEW.png, or into FOLDER.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from castalia.serve.catalogue import Catalogue
from tests.serve.browser import browsing, chromium, opened
from tests.serve.server_process import serving

SIZE = {"width": 1120, "height": 760}
PROMPT = "And the LORD said unto"
TEXT = "And it came to pass in those days, that the children of Israel went up out of Egypt."
COLORS = 128  # of a picture, which keeps it small


def main(runs: str, folder: Path) -> None:
    """A picture of each view."""
    path = chromium()
    if path is None:
        sys.exit("needs Chromium: apt-get install chromium")
    catalogue = Catalogue([runs])
    names, last = list(catalogue.runs()), catalogue.models()[-1]
    steps = [entry for entry in catalogue.models() if entry.source == last.source]
    earlier = steps[len(steps) // 4]
    views = {
        "runs": f"#runs?run={','.join(names[:2])}",
        "try": f"#try?model={last.name}&prompt={PROMPT}&seed=3&max=70",
        "compare": f"#compare?models={earlier.name},{last.name}&text={TEXT}",
        "inside": f"#inside?model={last.name}&text={TEXT}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    log = Path(tempfile.mkdtemp()) / "log"
    with serving(log, runs) as server, browsing(path) as browser:
        for name, view in views.items():
            page, complaints = opened(browser, f"{server.url}/{view}", viewport=SIZE)
            page.wait_for_timeout(3000)  # until a text is written
            if name == "try":
                page.locator("#out .tok").nth(4).hover()
            if complaints:
                sys.exit(f"{name}: {complaints}")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLORS)
            picture.save(folder / f"page-{name}.png", optimize=True)
            page.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images"))
