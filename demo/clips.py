"""The page for videos, with clips of a few seconds instead of images. It exists only if a video model is given."""

import os
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image
from uploads import MAX_BYTES

from hf_vssm_prune.training.frame_sampling import clips_of
from hf_vssm_prune.training.video_decoding import decode_frames


MAX_FRAMES = 600  # 24 seconds at 25 frames per second
MAX_FRAME_PIXELS = 9_000_000  # 4K; a clip's frames are held in memory, and ten megabytes may hold far larger ones
LIMITS = (
    f"Any format that FFmpeg reads; at most {MAX_BYTES // 1024**2} MB, {MAX_FRAMES} frames, and "
    f"{MAX_FRAME_PIXELS // 10**6} million pixels in each."
)


def open_clip(path: str, num_frames: int) -> list[Image.Image]:
    """Frames spread over an uploaded video.

    Raises:
        ValueError: the file or its frames are too large, it is too long, or not a readable video. The message is for
            the person who uploaded it.
    """
    name = os.path.basename(path)
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES // 1024**2} MB: send a smaller one.")

    def choose(count: int) -> list[list[int]]:
        if count > MAX_FRAMES:
            raise ValueError(f"{name} has {count} frames; at most {MAX_FRAMES} are accepted: shorten it.")
        return list(clips_of("uniform", count, num_frames, 1))

    stored = {"bytes": None, "path": path}
    return decode_frames(stored, choose, lambda frame: frame.convert("RGB"), name, MAX_FRAME_PIXELS)[0]


def opener(model: Any) -> partial:
    """`open_clip` for the frames of a `PrunedModel`.

    Raises:
        ValueError: it is an image model.
    """
    config = model.model.config
    if config.modality != "video":
        raise ValueError("The model for the page for videos is an image model: name a video model.")
    return partial(open_clip, num_frames=config.input_size[0])


def add_page(page: Any, budget: gr.Slider, method_label: str) -> None:
    """Adds the controls, in a route of the page.

    Args:
        page: their actions, an `app.Page` that opens clips.
        budget: a slider like the one on the page for images.
        method_label: label of the method choice.
    """
    methods = list(page.model.methods)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = gr.UploadButton("Upload a video", file_types=["video"], elem_id="upload")
            gr.Markdown(LIMITS, elem_classes="remark")
            method = gr.Radio(methods, value=methods[0], label=method_label, elem_id="method")
        with gr.Column(scale=3, min_width=300):
            budget.render()
            output = gr.HTML(elem_id="result")
    page.connect([(upload.upload, page.upload, [upload])], [budget, method], output)
