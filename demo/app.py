"""A page on which anybody can try token pruning: choose an image and a budget of FLOPs, and see what a model drops.

    python demo/app.py                                           # the small model that comes with the package
    python demo/app.py --model_name_or_path <folder or Hub model>    # or set HF_VSSM_PRUNE_DEMO_MODEL

`pip install -e '.[demo]'` first. demo/README.md tells how to put it on the Hub as a Space.
"""

import argparse
import base64
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image
from pruned_model import Classification, Measurement, PrunedModel
from torch import Tensor
from uploads import FORMATS, MAX_BYTES, MAX_PIXELS, SUFFIXES, open_upload

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub.model_card import format_flops


HERE = Path(__file__).resolve().parent
GARMENTS = sorted((HERE / "examples" / "garments").iterdir())
PHOTOS = sorted((HERE / "examples" / "photos").iterdir())
THUMBNAIL_SIZE = 128  # pixels
MOST_PERCENT, FIRST_PERCENT = 60, 42
HOUR = 3600

TITLE = "Token pruning for vision Mambas"
INTRODUCTION = """# Token pruning for vision Mambas

A vision Mamba reads an image patch by patch, and many patches do not matter. Choose an image and how much of the
computation is to go: the model drops the patches that it finds least important, stage by stage, and classifies what
is left.
"""
ABOUT_EXAMPLE_MODEL = """The model is a small one that tells **ten kinds of garments** apart (Fashion-MNIST, 28 × 28
pixels). The garments are test images. Photos are here to show *what is dropped*: a label for one means nothing.
"""
UPLOAD_LIMITS = (
    f"{', '.join(FORMATS)}; at most {MAX_BYTES // 1024**2} MB and {MAX_PIXELS // 10**6} million pixels. "
    "Uploads are deleted within two hours."
)
BUDGET = "Computation to leave out (% of FLOPs)"
ABOUT_PHOTO = "This model knows garments only. For a photo look at what is dropped, not at the label."
SELECT_EXAMPLE = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) trigger("select", {name: button.dataset.name});
});"""


@dataclass(frozen=True)
class Chosen:
    """The image on the page: pixel values (1, channels, height, width), and whether the model's labels fit it."""

    pixel_values: Tensor
    is_photo: bool


class Page:
    """What the page's controls do.

    Args:
        model: classifies and measures.
        is_example_model: it knows garments and nothing else.
    """

    def __init__(self, model: PrunedModel, is_example_model: bool) -> None:
        self.model = model
        self.is_example_model = is_example_model
        self.examples = [*GARMENTS, *PHOTOS] if is_example_model else PHOTOS

    def choose_first(self, percent: int) -> Iterator[tuple[Chosen, str]]:
        yield from self._choose(self.examples[0], percent)

    def choose_example(self, percent: int, selected: gr.EventData) -> Iterator[tuple[Chosen, str]]:
        # The name comes from the browser.
        by_name = {file.stem: file for file in self.examples}
        if selected.name not in by_name:
            raise gr.Error(f"There is no example {selected.name!r}.", print_exception=False)
        yield from self._choose(by_name[selected.name], percent)

    def upload(self, file: str, percent: int) -> Iterator[tuple[Chosen, str]]:
        yield from self._choose(Path(file), percent)

    def show(self, chosen: Chosen | None, percent: int) -> Iterator[str]:
        """The result, first without and then with times: what is kept is there before it has been measured."""
        if chosen is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        try:
            classification = self.model.classify(chosen.pixel_values, int(percent))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        note = ABOUT_PHOTO if self.is_example_model and chosen.is_photo else ""
        yield result(classification, None, note)
        yield result(classification, self.model.measure(chosen.pixel_values, int(percent)), note)

    def _choose(self, file: Path, percent: int) -> Iterator[tuple[Chosen, str]]:
        try:
            image = open_upload(str(file))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        chosen = Chosen(self.model.prepare(image), is_photo=file not in GARMENTS)
        for html in self.show(chosen, percent):
            yield chosen, html


# ---- HTML --------------------------------------------------------------------------------------------------------


def example_buttons(files: Sequence[Path]) -> str:
    """A button with a picture for each example."""
    return "".join(
        f'<button type="button" data-name="{file.stem}" aria-label="{_title(file)}" title="{_title(file)}">'
        f'<img src="{_data_uri(_thumbnail(file))}" alt=""></button>'
        for file in files
    )


def _title(file: Path) -> str:
    return file.stem.replace("_", " ")


def _thumbnail(file: Path) -> Image.Image:
    """The middle of an image; the page enlarges a tiny one without blurring."""
    with Image.open(file) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
    square.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return square


def result(classification: Classification, measurement: Measurement | None, note: str) -> str:
    """The pictures of the stages above a table of dense against pruned."""
    return (
        f'<div class="stages">{"".join(_figures(classification))}</div>'
        f"{f'<p class=note>{escape(note)}</p>' if note else ''}{_table(classification, measurement)}"
    )


def _figures(classification: Classification) -> list[str]:
    total = classification.num_patches
    titles = ["What the model sees", *(f"From layer {layer} on" for layer in classification.layers)]
    counts = [f"{total} patches", *(f"{kept} of {total} kept" for kept in classification.num_kept)]
    return [
        f'<figure><img src="{_data_uri(panel)}" alt="{title}: {count}">'
        f"<figcaption>{title}<br>{count}</figcaption></figure>"
        for panel, title, count in zip(classification.panels, titles, counts, strict=True)
    ]


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(classification: Classification, measurement: Measurement | None) -> str:
    flops = classification.flops
    times, remark = ("measuring…", "measuring…", ""), "&nbsp;"
    if measurement is not None:
        times = (
            f"{measurement.dense:.2f}",
            f"{measurement.pruned:.2f}",
            f"{measurement.dense / measurement.pruned:.2f} times as fast",
        )
        batches = f"batches of {measurement.batch_size} copies" if measurement.batch_size > 1 else "one image at a time"
        remark = f"Times: the fastest of {measurement.turns} runs each, in turns, on this page's server, {batches}."
    rows = [
        ("Label", _guesses(classification.dense), _guesses(classification.pruned), ""),
        (
            "FLOPs",
            format_flops(flops.dense.published),
            format_flops(flops.pruned.published),
            f"{flops.reduction:.1%} fewer",
        ),
        ("ms per image", *times),
    ]
    body = "".join(
        f"<tr><th scope=row>{name}</th><td>{dense}</td><td>{pruned}{_small(gain)}</td></tr>"
        for name, dense, pruned, gain in rows
    )
    return (
        "<table class=comparison><thead><tr><td></td><th scope=col>dense</th><th scope=col>pruned</th></tr></thead>"
        f"<tbody>{body}</tbody></table><p class=remark>{remark}</p>"
    )


def _guesses(guesses: list[tuple[str, float]]) -> str:
    (first, share), *others = guesses
    rest = "".join(_small(f"{escape(label)} {other:.1%}") for label, other in others)
    return f"<strong>{escape(first)}</strong> {share:.1%}{rest}"


def _small(line: str) -> str:
    return f"<br><small>{line}</small>" if line else ""


# ---- The page ----------------------------------------------------------------------------------------------------


def build(page: Page) -> gr.Blocks:
    """The page with its controls."""
    # Once an hour what is older than an hour is deleted.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.Markdown(INTRODUCTION + ("\n" + ABOUT_EXAMPLE_MODEL if page.is_example_model else ""))
        chosen = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                examples = gr.HTML(example_buttons(page.examples), js_on_load=SELECT_EXAMPLE, elem_id="examples")
                upload = gr.UploadButton("Upload an image", file_types=list(SUFFIXES), elem_id="upload")
                gr.Markdown(UPLOAD_LIMITS, elem_classes="remark")
            with gr.Column(scale=3, min_width=300):
                budget = gr.Slider(0, MOST_PERCENT, FIRST_PERCENT, step=1, label=BUDGET, buttons=[], elem_id="budget")
                output = gr.HTML(elem_id="result")
        options = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        blocks.load(page.choose_first, budget, [chosen, output], **options)
        examples.select(page.choose_example, budget, [chosen, output], **options)
        upload.upload(page.upload, [upload, budget], [chosen, output], **options)
        budget.change(page.show, [chosen, budget], output, **options)
    return blocks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path",
        default=os.environ.get("HF_VSSM_PRUNE_DEMO_MODEL", str(EXAMPLE_MODEL)),
        help="a classifier of this package, in a folder or on the Hub (default: HF_VSSM_PRUNE_DEMO_MODEL, or the small "
        "model in the package)",
    )
    parser.add_argument("--port", type=int, help="to serve on (default: the first that is free from 7860 on)")
    options = parser.parse_args(arguments)
    try:
        model = PrunedModel(options.model_name_or_path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = Page(model, is_example_model=Path(options.model_name_or_path).resolve() == EXAMPLE_MODEL.resolve())
    build(page).launch(
        server_port=options.port,
        max_file_size=MAX_BYTES,
        theme=gr.themes.Base(primary_hue="blue", font=("system-ui", "sans-serif")),
        css_paths=HERE / "page.css",
        footer_links=[],
        ssr_mode=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
