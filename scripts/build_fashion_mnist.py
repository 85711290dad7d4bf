"""Build Fashion-MNIST as Parquet files with Hugging Face features, from the IDX files that Debian's package
`dataset-fashion-mnist` installs.

    apt-get install dataset-fashion-mnist
    python scripts/build_fashion_mnist.py                                        # the subset that the package ships
    python scripts/build_fashion_mnist.py --all --output fashion_mnist_full      # all 70,000 images

The same arguments give the same bytes (with the same versions of Pillow, pyarrow and datasets).
"""

import argparse
import gzip
import io
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tqdm import tqdm


DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGED_FOLDER = Path(__file__).resolve().parents[1] / "src" / "hf_vssm_prune" / "data" / "fashion_mnist"
IDX_FILE_PREFIXES = {"train": "train", "test": "t10k"}
CLASS_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FEATURES = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
LICENSE_NOTICE = """\
Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist)
Copyright: 2017, Zalando SE, https://tech.zalando.com

The MIT License (MIT)

Permission is hereby granted, free of charge, to any person obtaining a
copy of this software and associated documentation files (the "Software"),
to deal in the Software without restriction, including without limitation
the rights to use, copy, modify, merge, publish, distribute, sublicense,
and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included
in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS
OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.
IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY
CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(path: Path) -> np.ndarray:
    """Reads an unsigned-byte array from a gzipped IDX file (two zero bytes, the type 0x08, the number of dimensions,
    the dimensions as big-endian 32-bit numbers, the values).

    Raises:
        ValueError: The file is not such a file, or holds fewer or more values than its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a gzipped IDX file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} does not start like an IDX file of unsigned bytes (00 00 08): {content[:4].hex(' ')}")
    rank = content[3]
    if len(content) < 4 + 4 * rank:
        raise ValueError(f"{path} ends inside its header.")
    shape = struct.unpack_from(f">{rank}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} says shape {shape} in its header and holds {values.size} values.")
    return values.reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images (count, 28, 28) and the labels (count,) of one split, both uint8."""
    prefix = IDX_FILE_PREFIXES[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    if images.shape != (len(labels), 28, 28):
        raise ValueError(f"{folder}: split '{split}' has images of shape {images.shape} and {len(labels)} labels.")
    return images, labels


def choose_balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Chooses `count` rows at random with the same number of each class (one more of the first classes where ten does
    not divide `count`), and returns their indices in ascending order."""
    generator = np.random.default_rng(seed)
    chosen = []
    for label in range(len(CLASS_NAMES)):
        rows = np.flatnonzero(labels == label)
        wanted = count // len(CLASS_NAMES) + (label < count % len(CLASS_NAMES))
        if wanted > len(rows):
            raise ValueError(
                f"{count} class-balanced images were asked for, which is {wanted} of '{CLASS_NAMES[label]}'; "
                f"there are {len(rows)}."
            )
        chosen.append(generator.choice(rows, wanted, replace=False))
    return np.sort(np.concatenate(chosen))


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def build_split(folder: Path, split: str, count: int | None, seed: int) -> bytes:
    """Returns the Parquet file of one split: all of it, or `count` class-balanced images."""
    images, labels = read_split(folder, split)
    rows = np.arange(len(labels)) if count is None else choose_balanced(labels, count, seed)
    encoded = [{"bytes": encode_png(images[row]), "path": None} for row in tqdm(rows, desc=f"{split} images")]
    dataset = Dataset.from_dict({"image": encoded, "label": labels[rows].astype(np.int64)}, features=FEATURES)
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    return buffer.getvalue()


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=DEBIAN_FOLDER, help="folder of the IDX files (%(default)s)")
    parser.add_argument("--output", type=Path, default=PACKAGED_FOLDER, help="folder to write to (the package's data)")
    parser.add_argument("--train", type=positive_int, default=10_000, help="training images, balanced (%(default)s)")
    parser.add_argument("--test", type=positive_int, default=2_000, help="test images, balanced (%(default)s)")
    parser.add_argument("--all", action="store_true", help="all images, whatever --train and --test say")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if not options.input.is_dir():
        sys.exit(f"{options.input} is not a folder: install Debian's package dataset-fashion-mnist, or give --input.")
    counts = {"train": None, "test": None} if options.all else {"train": options.train, "test": options.test}
    try:
        files = {split: build_split(options.input, split, count, options.seed) for split, count in counts.items()}
    except ValueError as error:
        sys.exit(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    for split, content in files.items():
        write_atomically(options.output / f"{split}.parquet", content)
    write_atomically(options.output / "LICENSE", LICENSE_NOTICE.encode())


if __name__ == "__main__":
    main()
