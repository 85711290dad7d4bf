"""A process of `busy.py`. For each line that it reads, it does a piece of work and prints `done`."""

import sys

import torch

from hf_vssm_prune import PlainMambaConfig, PlainMambaForImageClassification


def main(batch: int) -> None:
    torch.manual_seed(0)
    config = PlainMambaConfig(
        image_size=112,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=12,
        stem_channels=32,
        depthwise_layers=[],
        num_labels=10,
    )
    model = PlainMambaForImageClassification(config).eval()
    image, images = torch.randn(1, 3, 112, 112), torch.randn(batch, 3, 112, 112)
    labels = torch.randint(10, (batch,))
    for line in sys.stdin:
        if line == "forward\n":
            with torch.no_grad():
                model(image)
        else:
            model.zero_grad()
            model.train()(images, labels=labels).loss.backward()
            model.eval()
        print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
