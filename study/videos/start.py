"""Saves a new VideoMamba whose position embeddings cancel the mean frame of some videos.

    python study/videos/start.py <folder of videos by class> <model> num_frames=16 image_size=32 patch_size=8 ...

With a camera that stands still, motion changes pixels by a few levels of 255, and the still background varies ten times
as much. A small model takes long to learn to ignore the background; this one ignores its mean from the start.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_vssm_prune import VideoMambaConfig, VideoMambaForVideoClassification
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.training.data.clips import EvaluationClips, Views
from hf_vssm_prune.training.data.loading import load_image_dataset
from hf_vssm_prune.training.data.media import VIDEOS


STD = 0.1  # of all channels: roughly that of the pixels around their mean


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    folder, target, *options = arguments
    datasets = load_image_dataset(folder, medium=VIDEOS)
    config = VideoMambaConfig(
        id2label=datasets.label_names, **{name: json.loads(value) for name, value in (o.split("=") for o in options)}
    )
    torch.manual_seed(0)
    model = VideoMambaForVideoClassification(config)
    plain = EvaluationClips(datasets.train, new_image_processor(config, [0.0] * 3, [1.0] * 3), Views("segments"))
    frames: torch.Tensor = sum(plain[i]["pixel_values"][0].mean(0) for i in range(len(plain))) / len(plain)
    mean = frames.mean((1, 2))
    clip = ((frames - mean.view(3, 1, 1)) / STD).expand(config.num_frames or 1, -1, -1, -1)
    embeddings = model.videomamba.embeddings
    nothing = torch.zeros_like(clip)
    of_mean, of_nothing = (embeddings.projection(each[None].transpose(1, 2)) for each in (clip, nothing))
    embeddings.position_embeddings[:, 1:] -= (of_mean - of_nothing)[:, :, 0].flatten(2).transpose(1, 2)
    save_for_hub(model, Path(target), new_image_processor(config, mean.tolist(), [STD] * 3))


if __name__ == "__main__":
    main(sys.argv[1:])
