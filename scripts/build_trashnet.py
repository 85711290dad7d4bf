"""Builds the photographs of waste that come with the package from TrashNet (https://github.com/garythung/trashnet), in
folders or Parquet files of splits. Photographs are reduced to the short side that the included model uses, and saved as
JPEG.

    python scripts/build_trashnet.py <TrashNet, with splits `train` and `test`>

The output is reproducible byte for byte with the same versions of Pillow, pyarrow and datasets.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tqdm import tqdm

from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.training.data.loading import load_image_dataset
from hf_vssm_prune.training.data.sources import PACKAGED_DATA
from hf_vssm_prune.training.image_steps import decode_image


SHORT_SIDE, QUALITY = 144, 75
SPLITS = ("train", "test")
NOTICE = """\
TrashNet (https://github.com/garythung/trashnet), by Gary Thung and Mindy Yang: a part of its pictures, made smaller.

MIT License

Copyright (c) 2017 Gary Thung

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def build_split(dataset: Dataset, label_names: Sequence[str], split: str) -> bytes:
    """The Parquet file of one split."""
    rows = tqdm(range(len(dataset)), desc=f"{split} images")
    images = [
        {"bytes": encode(decode_image(dataset[row]["image"], "RGB", f"{split} {row}")), "path": None} for row in rows
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=list(label_names))})
    buffer = io.BytesIO()
    Dataset.from_dict({"image": images, "label": dataset["label"]}, features=features).to_parquet(buffer)
    return buffer.getvalue()


def encode(image: PILImage.Image) -> bytes:
    """A JPEG with the wanted short side; smaller pictures are not resized."""
    scale = min(1, SHORT_SIDE / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    buffer = io.BytesIO()
    image.resize(size, PILImage.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


@one_line_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="TrashNet, in any form that the other scripts accept")
    parser.add_argument(
        "--output", type=Path, default=PACKAGED_DATA / "trashnet", help="folder (default: the package's)"
    )
    options = parser.parse_args(arguments)
    datasets = load_image_dataset(options.source, eval_split="test")
    splits = dict(zip(SPLITS, (datasets.train, datasets.evaluation), strict=True))
    files = {split: build_split(dataset, datasets.label_names, split) for split, dataset in splits.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    for split, content in files.items():
        (options.output / f"{split}.parquet").write_bytes(content)
    (options.output / "LICENSE").write_text(NOTICE, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
