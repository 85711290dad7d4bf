"""Renders a model card in headless Chromium as it looks on the Hub, with the metadata as labels and the Markdown as a
page.

    python scripts/screenshot_card.py model_cards/plainmamba-trashnet-pruned.md docs/images/model-card.png

It needs Chromium and the extra `dev`. The style is similar to the Hub's.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image, ImageChops
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name


WIDTH, TALLEST = 860, 6000  # pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; color: #1f2937; background: #fff; margin: 0; padding: 24px 40px; }
.labels span { display: inline-block; font-size: 13px; border: 1px solid #e5e7eb; border-radius: 8px; padding: 1px 8px;
  margin: 0 6px 6px 0; color: #374151; background: #f9fafb; }
h1 { font-size: 28px; border-bottom: 1px solid #e5e7eb; padding-bottom: 8px; }
h2 { font-size: 21px; margin-top: 32px; border-bottom: 1px solid #f3f4f6; padding-bottom: 4px; }
a { color: #1d4ed8; }
img { max-width: 100%; }
code { font: 13px/1.5 ui-monospace, 'DejaVu Sans Mono', monospace; background: #f3f4f6; border-radius: 4px;
  padding: 2px 4px; }
pre { background: #f8fafc; border: 1px solid #e5e7eb; border-radius: 8px; padding: 12px 16px; overflow-x: auto; }
pre code { background: none; padding: 0; }
table { border-collapse: collapse; margin: 16px 0; }
th, td { border: 1px solid #e5e7eb; padding: 5px 12px; text-align: left; }
thead tr { background: #f9fafb; }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", type=Path, help="a model card, with its pictures next to it")
    parser.add_argument("output", type=Path, help="PNG file to write")
    options = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"error: none of {', '.join(BROWSERS)} is installed.", file=sys.stderr)
        return 1
    try:
        html = page(ModelCard.load(options.card), options.card.parent)
        take_screenshot(browser, html, options.output)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")
    return 0


def page(card: ModelCard, folder: Path) -> str:
    metadata = card.data.to_dict()
    names = ("pipeline_tag", "library_name", "license", "datasets", "tags")
    labels = [value for name in names for value in _as_list(metadata.get(name))]
    chips = "".join(f"<span>{escape(label)}</span>" for label in labels)
    # HTML in a card is shown as text, so that a card cannot run anything in this browser.
    markdown = MarkdownIt("gfm-like", {"html": False, "highlight": _highlight})
    style = STYLE + HtmlFormatter().get_style_defs("code")
    return (
        f'<!doctype html><meta charset="utf-8"><base href="{folder.resolve().as_uri()}/"><style>{style}</style>'
        f'<div class="labels">{chips}</div>{markdown.render(card.text)}'
    )


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _highlight(code: str, language: str, _: str) -> str:
    return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True)) if language else ""


def take_screenshot(browser: str, html: str, output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file, shot = Path(scratch) / "page.html", Path(scratch) / "shot.png"
        file.write_text(html, encoding="utf-8")
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        switches += [f"--user-data-dir={scratch}/profile", f"--window-size={WIDTH},{TALLEST}", "--hide-scrollbars"]
        subprocess.run(
            [browser, *switches, f"--screenshot={shot}", file.as_uri()], check=True, capture_output=True, timeout=120
        )
        image = Image.open(shot).convert("RGB")
    content = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, 0)))).getbbox()
    if content is None:
        raise ValueError("the page is empty.")
    image.crop((0, 0, image.width, min(image.height, content[3] + 24))).quantize(64).save(output, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
