"""Initialises a VideoMamba from a Vim that was trained on images.

    python study/videos/inflate.py study/photos/vim-imagenette <folder of videos by class> <model> \
        num_frames=16 image_size=48 tubelet_size=2

The two families have the same blocks. The patch projection is applied to the difference between the last and the first
frame of a tubelet: with a camera that stands still, motion changes pixels by a few levels of 255, and the still
background varies ten times as much.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vssm_prune import VideoMambaConfig, VideoMambaForVideoClassification, VimConfig, VimForImageClassification
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.modeling_common import resize_position_embeddings
from hf_vssm_prune.token_pruning import split_token
from hf_vssm_prune.training.data.loading import load_image_dataset
from hf_vssm_prune.training.data.media import VIDEOS


SCALE = 1.8  # factor of the difference: motion has less contrast than a photograph
MEAN, STD = 0.5, 0.1
ZOOM = 7 / 6  # the frame's short side, relative to the crop's


def inflate(image_model: VimForImageClassification, model: VideoMambaForVideoClassification) -> None:
    """Copies the weights; the classifier and the temporal embeddings remain as they were initialised."""
    own = {name: tensor for name, tensor in model.videomamba.state_dict().items() if "temporal" not in name}
    tensors = {
        name: _inflated(name, tensor, image_model.config, model.config)
        for name, tensor in image_model.vim.state_dict().items()
        if name in own
    }
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"the image model has no {', '.join(missing[:3])}.")
    model.videomamba.load_state_dict(tensors, strict=False)


def _inflated(name: str, tensor: Tensor, image: VimConfig, video: VideoMambaConfig) -> Tensor:
    if name == "embeddings.projection.weight":
        of_frames = torch.zeros(video.tubelet_size)
        of_frames[0], of_frames[-1] = -SCALE, SCALE
        return tensor.unsqueeze(2) * of_frames.view(1, 1, -1, 1, 1)
    if name == "embeddings.position_embeddings":
        place = tensor.shape[1] // 2  # the class token's, which comes first in the video model
        patches, cls_token = split_token(tensor, place)
        patches = resize_position_embeddings(patches, image.grid_size, video.grid_size[1:], interpolate=True)
        return torch.cat([cls_token, patches], dim=1)
    # Vim averages its directions, and VideoMamba sums them.
    return tensor / 2 if name.endswith("out_proj.weight") else tensor


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    source, folder, target, *options = arguments
    image_model = VimForImageClassification.from_pretrained(source)
    image = image_model.config
    config = VideoMambaConfig(
        id2label=load_image_dataset(folder, medium=VIDEOS).label_names,
        patch_size=image.patch_size,
        hidden_size=image.hidden_size,
        num_hidden_layers=image.num_hidden_layers,
        **{name: json.loads(value) for name, value in (option.split("=") for option in options)},
    )
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(config)
    inflate(image_model, model)
    processor: Any = new_image_processor(config, [MEAN] * 3, [STD] * 3)
    processor.size = {"shortest_edge": round(ZOOM * config.input_size[-1])}
    save_for_hub(model, Path(target), processor)


if __name__ == "__main__":
    main(sys.argv[1:])
