"""A page for trying out token pruning: choose an image and a FLOPs budget, and see which patches a model drops.

    python demo/app.py                                           # the small model that comes with the package
    python demo/app.py --model_name_or_path <folder or Hub model>    # or set HF_VSSM_PRUNE_DEMO_MODEL
    python demo/app.py --video_model_name_or_path <folder or Hub model>    # adds a page for videos

Run `pip install -e '.[demo]'` first; videos need '.[demo,video]'. demo/README.md explains how to create a Space on the
Hub.
"""

import argparse
import base64
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import threads  # noqa: F401  (first, because it sets variables that torch reads when it is loaded)


# isort: split
import clips
import gradio as gr
from PIL import Image
from pruned_model import Classification, Measurement, PrunedModel
from torch import Tensor
from uploads import FORMATS, MAX_BYTES, MAX_PIXELS, SUFFIXES, open_upload

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub.model_card import format_flops


HERE = Path(__file__).resolve().parent
WASTE = sorted((HERE / "examples" / "waste").iterdir())
KINDS_OF_WASTE = {file.stem.partition("_")[0] for file in WASTE}
PHOTOS = sorted((HERE / "examples" / "photos").iterdir())
THUMBNAIL_SIZE = 128  # pixels
MOST_PERCENT, FIRST_PERCENT = 60, 42
HOUR = 3600
# Gradio keeps what this many visitors have chosen, also of those who left: a megabyte each, or ten for a clip.
MOST_VISITORS = 100
MOST_WAITING = 60  # requests; others are told that the server is busy

TITLE = "Token pruning for vision Mambas"
INTRODUCTION = """# Token pruning for vision Mambas

A vision Mamba reads an image patch by patch, and many patches contribute little. Choose an image and the fraction of
the computation to remove. The model then drops or merges patches in several stages, and classifies the rest.
"""
ABOUT_WASTE = """This small model sorts **waste** into cardboard, glass, metal, paper, plastic and trash. It was
trained on single objects on a plain, bright background; the examples are test images. Try a photo of a bottle.
"""
UPLOAD_LIMITS = (
    f"{', '.join(FORMATS)}; at most {MAX_BYTES // 1024**2} MB and {MAX_PIXELS // 10**6} million pixels. "
    "Uploads are deleted within two hours."
)
NO_VIDEOS = (
    "To add a page for videos, start this page with `--video_model_name_or_path`, or set "
    "`HF_VSSM_PRUNE_DEMO_VIDEO_MODEL`. No video model comes with the package."
)
BUDGET = "Computation to remove (% of FLOPs)"
METHOD = "Pruning method"
CAMERA = "Take a picture"
CAMERA_REMARK = (
    "If nothing happens, the browser does not let this page use the camera (it must be on `https://` or `localhost`, "
    "and have your permission): upload an image instead."
)
REAR_CAMERA = gr.WebcamOptions(mirror=False, constraints={"video": {"facingMode": "environment"}})  # if there are two
# Gradio turns a camera off when it is removed from the page, but not when it is hidden. These run in the browser.
REMOVE, INSERT = (f"() => ({{__type__: 'update', visible: {visible}}})" for visible in ("false", "true"))
# While a number is being typed, the slider's value may be null or too large.
IN_RANGE = f"Math.min(Math.max(percent, 0), {MOST_PERCENT})"
# The browser counts its requests, because two that it sends at once may arrive in the other order.
COUNTED = (
    "(session, number, percent, ...others) => "
    f"[session, window.requests = (window.requests ?? 0) + 1, {IN_RANGE}, ...others]"
)
UNCOUNTED = f"(session, percent, ...others) => [session, {IN_RANGE}, ...others]"
SELECT_EXAMPLE = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) {
        props.value = button.dataset.name;
        trigger("select");
    }
});"""


@dataclass(frozen=True)
class Result:
    """A result on the page, with what it was computed from.

    Attributes:
        chosen: the model's input.
        how: the budget in percent, and the method.
        classification: the result.
    """

    chosen: Tensor
    how: tuple[int, str]
    classification: Classification


@dataclass
class Session:
    """What one visitor has chosen, and the result that is shown; None while there is none. Several requests of a
    visitor may be processed at once, and arrive and end in any order.

    Attributes:
        chosen_by: the browser's number of the request that chose.
        chosen: the model's input.
        moved_by: the browser's number of the request after which the controls of budget and method were last moved.
        moved_to: what they were moved to.
        shown: the result.
    """

    chosen_by: int = 0
    chosen: Tensor | None = None
    moved_by: int = 0
    moved_to: tuple[int, str] | None = None
    shown: Result | None = None


class Page:
    """The actions of the page's controls.

    Args:
        model: classifies images and measures times.
        open_input: converts a file to the model's input.

    Attributes:
        sorts_waste: whether the model has the labels of the example model, as after fine-tuning it.
        examples: pictures to choose.
    """

    def __init__(self, model: PrunedModel, open_input: Callable[[str], Any] = open_upload) -> None:
        self.model = model
        self.open_input = open_input
        self.sorts_waste = set(model.labels) == KINDS_OF_WASTE
        self.examples = WASTE if self.sorts_waste else PHOTOS

    def choose_first(self, session: Session, number: int, percent: int, method: str) -> Any:
        return self._choose(session, number, self.examples[0], percent, method)

    def choose_example(self, session: Session, number: int, percent: int, method: str, name: str) -> Any:
        # The name comes from the browser.
        by_name = {file.stem: file for file in self.examples}
        if name not in by_name:
            raise gr.Error(f"There is no example {name!r}.", print_exception=False)
        return self._choose(session, number, by_name[name], percent, method)

    def upload(self, session: Session, number: int, percent: int, method: str, file: str | None) -> Any:
        # None: a camera picture was discarded
        return gr.skip() if file is None else self._choose(session, number, Path(file), percent, method)

    def show(self, session: Session, number: int, percent: int, method: str) -> Any:
        """The result for controls that were moved, without times, which are added later."""
        if number < session.moved_by:
            return gr.skip()  # they were moved again since
        session.moved_by, session.moved_to = number, (int(percent), method)
        return self._show(session, session.moved_to)

    def add_times(self, session: Session, percent: int, method: str) -> Any:
        """The result with times. Measuring takes a second or more, and stops if there is another result to show, so
        that the slider does not wait for it."""
        how = (int(percent), method)
        if session.shown is not None and session.shown.how != how == session.moved_to:
            self._show(session, how)  # the controls were moved while a file was opened, before it was chosen
        shown = session.shown
        if shown is None:
            return gr.skip()
        latest = None
        for measurement in self.model.measure(shown.chosen, *shown.how):
            if session.shown is not shown:
                return gr.skip()
            latest = measurement
        return result(shown.classification, latest)

    def connect(self, sources: Sequence[tuple[Callable, Callable, list[Any]]], how: list[Any], output: gr.HTML) -> None:
        """Lets controls act.

        Args:
            sources: events that choose an input, their actions (see above), and what these take besides `how`.
            how: the controls of budget and method.
            output: displays the result.
        """
        session, number = gr.State(Session()), gr.Number(visible=False, precision=0)
        # An event that had to wait takes the values that its inputs have then.
        options: dict[str, Any] = {"trigger_mode": "always_last", "api_visibility": "private"}
        quick = options | {"show_progress": "hidden"}
        slow = options | {"show_progress": "minimal"}  # it opens a file
        counted = [session, number, *how]
        shown = [event(action, [*counted, *inputs], output, js=COUNTED, **slow) for event, action, inputs in sources]
        shown.append(gr.on([control.change for control in how], self.show, counted, output, js=COUNTED, **quick))
        for each in shown:
            each.success(self.add_times, [session, *how], output, js=UNCOUNTED, **quick)

    def _choose(self, session: Session, number: int, file: Path, percent: int, method: str) -> Any:
        try:
            image = self.open_input(str(file))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        chosen = self.model.prepare(image)
        if number < session.chosen_by:
            return gr.skip()  # another was chosen since
        session.chosen_by, session.chosen = number, chosen
        return self._show(session, (int(percent), method))

    def _show(self, session: Session, how: tuple[int, str]) -> Any:
        session.shown = None  # first, so that a measurement ends
        chosen = session.chosen
        if chosen is None:
            raise gr.Error(
                f"No {self.model.medium} is chosen, or the server no longer has it: choose one.", print_exception=False
            )
        try:
            classification = self.model.classify(chosen, *how)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if session.chosen is not chosen:
            return gr.skip()  # the request that chose something else shows that
        session.shown = Result(chosen, how, classification)
        return result(classification, None)


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
    """The centre of an image. The page enlarges small ones without blurring."""
    with Image.open(file) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
    square.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return square


def result(classification: Classification, measurement: Measurement | None) -> str:
    """The pictures of the stages above a table that compares dense and pruned, and a sentence for screen readers, which
    read it out when it changes."""
    (dense, _), (pruned, _) = classification.dense[0], classification.pruned[0]
    sentence = f"Dense: {dense}. Pruned by {classification.flops.reduction:.1%}: {pruned}."
    return (
        f'<p class="spoken" role="status">{escape(sentence)}</p>'
        f'<div class="stages">{"".join(_figures(classification))}</div>{_table(classification, measurement)}'
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
        single = f"one {classification.medium} at a time"
        batches = f"batches of {measurement.batch_size} copies" if measurement.batch_size > 1 else single
        remark = f"Times: minimum of {measurement.turns} alternating runs on this page's server, {batches}."
    rows = [
        ("Label", _guesses(classification.dense), _guesses(classification.pruned), ""),
        (
            "FLOPs",
            format_flops(flops.dense.published),
            format_flops(flops.pruned.published),
            f"{flops.reduction:.1%} fewer",
        ),
        (f"ms per {classification.medium}", *times),
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


def build(page: Page, video_page: Page | None = None) -> gr.Blocks:
    """The page with its controls, and optionally one for videos."""
    # Every hour, files older than an hour are deleted.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.Markdown(INTRODUCTION + ("\n" + ABOUT_WASTE if page.sorts_waste else ""))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                # Its value is the name of the example that was chosen last.
                buttons = example_buttons(page.examples)
                examples = gr.HTML(html_template=buttons, js_on_load=SELECT_EXAMPLE, elem_id="examples")
                # With "image", phones offer their camera.
                upload = gr.UploadButton("Upload an image", file_types=["image", *SUFFIXES], elem_id="upload")
                with gr.Accordion(CAMERA, open=False, elem_id="camera") as tile:
                    camera = gr.Image(
                        sources="webcam",
                        type="filepath",
                        image_mode=None,  # with a mode, Gradio would write the picture to another file first
                        show_label=False,
                        buttons=[],
                        webcam_options=REAR_CAMERA,
                    )
                    gr.Markdown(CAMERA_REMARK, elem_classes="remark")
                tile.collapse(None, None, camera, js=REMOVE, api_visibility="private")
                tile.expand(None, None, camera, js=INSERT, api_visibility="private")
                gr.Markdown(UPLOAD_LIMITS, elem_classes="remark")
                methods = list(page.model.methods)
                method = gr.Radio(methods, value=methods[0], label=METHOD, elem_id="method")
            with gr.Column(scale=3, min_width=300):
                budget = make_slider()
                output = gr.HTML(elem_id="result")
        sources = [
            (blocks.load, page.choose_first, []),
            (examples.select, page.choose_example, [examples]),
            (upload.upload, page.upload, [upload]),
            (camera.input, page.upload, [camera]),
        ]
        page.connect(sources, [budget, method], output)
        if video_page is None:
            gr.Markdown(NO_VIDEOS, elem_classes="remark")
    if video_page is not None:
        with blocks.route("Videos"):
            clips.add_page(video_page, make_slider(render=False), METHOD)
    return blocks


def make_slider(render: bool = True) -> gr.Slider:
    return gr.Slider(0, MOST_PERCENT, FIRST_PERCENT, step=1, label=BUDGET, buttons=[], elem_id="budget", render=render)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path",
        default=os.environ.get("HF_VSSM_PRUNE_DEMO_MODEL") or str(EXAMPLE_MODEL),  # it may be set to nothing
        help="a classifier of this package, in a folder or on the Hub (default: HF_VSSM_PRUNE_DEMO_MODEL, or the small "
        "model in the package)",
    )
    parser.add_argument(
        "--video_model_name_or_path",
        default=os.environ.get("HF_VSSM_PRUNE_DEMO_VIDEO_MODEL"),
        help="a video model, for a page for videos (default: HF_VSSM_PRUNE_DEMO_VIDEO_MODEL, or no such page)",
    )
    parser.add_argument("--port", type=int, help="port to serve on (default: the first free one from 7860 on)")
    options = parser.parse_args(arguments)
    try:
        model = PrunedModel(options.model_name_or_path)
        if model.medium != "image":
            raise ValueError("The model for the page for images is a video model: name an image model.")
        video_page = None
        if options.video_model_name_or_path:
            video_model = PrunedModel(options.video_model_name_or_path)
            video_page = Page(video_model, clips.opener(video_model))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    build(Page(model), video_page).queue(max_size=MOST_WAITING).launch(
        server_port=options.port,
        max_file_size=MAX_BYTES,
        state_session_capacity=MOST_VISITORS,
        theme=gr.themes.Base(primary_hue="blue", font=("system-ui", "sans-serif")),
        css_paths=HERE / "page.css",
        footer_links=[],
        ssr_mode=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
