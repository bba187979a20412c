"""Save figures of a report as pictures.

python docs/pictures.py REPORT.html FOLDER NAME [NAME ...]

A name is that of a figure in the page, ``planes`` for the element ``plots-planes``. Needs Chromium and the dev extra
(playwright). Pictures are 1250 pixels wide, in the light colours, with the figure's legend and caption.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, SCALE = 1056, 1.25


def main(report: Path, folder: Path, names: list[str]) -> None:
    """Open the report once and photograph each figure."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        sys.exit("no browser: neither chromium nor google-chrome is on PATH")
    if not report.is_file():
        sys.exit(f"there is no {report}; a reproduction writes one: flatminima reproduce convex --out {report.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(report.resolve().as_uri())
        page.wait_for_function(
            "document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length"
        )
        for name in names:
            figure = page.locator(f"#plots-{name}")
            if figure.count() != 1:
                sys.exit(f"{report} has no figure {name!r}")
            target = folder / f"{name}.png"
            figure.screenshot(path=target)
            print(target, f"{target.stat().st_size / 1024:.0f} KiB")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
