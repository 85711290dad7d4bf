"""Draws which tokens a pruned model keeps of some images, stage by stage.

python scripts/visualize.py <folder or Hub model> image.jpg ... --output kept_tokens.png
"""

import argparse
import sys
from collections.abc import Sequence

from transformers import AutoImageProcessor

from hf_vssm_prune.hub.loading import load_classifier
from hf_vssm_prune.training.image_steps import decode_image
from hf_vssm_prune.visualization import draw_classification


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a classifier of this package, in a folder or on the Hub")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--flops_reduction", type=float, help="prune by this share, in place of the model's schedule")
    parser.add_argument("--output", default="kept_tokens.png", help="where to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        model = load_classifier(options.model)
        if options.flops_reduction is not None:
            model.set_token_pruning({"flops_reduction": options.flops_reduction})
        image_processor = AutoImageProcessor.from_pretrained(options.model)
        images = [decode_image({"bytes": None, "path": file}, "RGB", file) for file in options.images]
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
        mean, std = image_processor.image_mean, image_processor.image_std
        draw_classification(model, pixel_values, mean, std).save(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
