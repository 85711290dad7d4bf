"""The script that makes the packaged subset of Fashion-MNIST, on small IDX files."""

import gzip
import importlib.util
import struct
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from datasets import load_dataset

import hf_vssm_prune


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "scripts" / "build_fashion_mnist.py"
    spec = importlib.util.spec_from_file_location("build_fashion_mnist", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """60 training and 30 test images; the pixel in the corner is the image's number, the label its last digit."""
    folder = tmp_path / "idx"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 30)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return folder


def build(script: ModuleType, idx_folder: Path, output: Path, *options: str) -> dict[str, bytes]:
    script.main(["--input", str(idx_folder), "--output", str(output), *options])
    return {file.name: file.read_bytes() for file in output.iterdir()}


def test_subset_is_balanced_and_unchanged(script: ModuleType, idx_folder: Path, tmp_path: Path):
    files = build(script, idx_folder, tmp_path / "out", "--train", "20", "--test", "13")
    assert set(files) == {"train.parquet", "test.parquet", "LICENSE"}
    assert b"MIT License" in files["LICENSE"]
    assert b"Zalando" in files["LICENSE"]
    splits = load_dataset(
        "parquet", data_files={split: str(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test")}
    )
    assert Counter(splits["train"]["label"]) == dict.fromkeys(range(10), 2)
    assert Counter(splits["test"]["label"]) == {label: 1 + (label < 3) for label in range(10)}
    assert splits["train"].features["label"].names[9] == "Ankle boot"
    original, _ = script.read_split(idx_folder, "train")
    numbers = []
    for row in splits["train"]:
        pixels = np.asarray(row["image"])
        numbers.append(int(pixels[0, 0]))
        assert row["label"] == numbers[-1] % 10
        assert np.array_equal(pixels, original[numbers[-1]])
    assert numbers == sorted(set(numbers))


def test_same_arguments_same_bytes(script: ModuleType, idx_folder: Path, tmp_path: Path):
    options = ("--train", "20", "--test", "10")
    first = build(script, idx_folder, tmp_path / "first", *options)
    assert build(script, idx_folder, tmp_path / "second", *options) == first
    assert build(script, idx_folder, tmp_path / "third", *options, "--seed", "1") != first


def test_all(script: ModuleType, idx_folder: Path, tmp_path: Path):
    build(script, idx_folder, tmp_path / "out", "--all")
    dataset = load_dataset("parquet", data_files=str(tmp_path / "out" / "train.parquet"), split="train")
    assert [int(np.asarray(image)[0, 0]) for image in dataset["image"]] == list(range(60))


def damage(idx_folder: Path, change) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, ("--train", "70"), "70 class-balanced images were asked for, which is 7 of 'T-shirt/top'; there are 6"),
        (lambda content: content[:300], (), "train-images-idx3-ubyte.gz cannot be read as a gzipped IDX file"),
        (lambda content: content[:20] + bytes(40) + content[60:], (), "cannot be read as a gzipped IDX file"),
        (lambda content: b"plain", (), "cannot be read as a gzipped IDX file"),
        (lambda content: gzip.compress(b"\x00\x00\x0d\x03"), (), "does not start like an IDX file.*00 00 0d 03"),
        (lambda content: gzip.compress(b"\x00\x00\x08\x03\x00"), (), "ends inside its header"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), (), r"\(60, 28, 28\).*holds 47039 values"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    script: ModuleType, idx_folder: Path, tmp_path: Path, change, options: tuple[str, ...], message: str
):
    if change is not None:
        damage(idx_folder, change)
    with pytest.raises(SystemExit, match=message):
        build(script, idx_folder, tmp_path / "out", *(options or ("--train", "10", "--test", "10")))
    assert not (tmp_path / "out").exists()


def test_splits_must_fit(script: ModuleType, idx_folder: Path, tmp_path: Path):
    write_idx(idx_folder / "train-labels-idx1-ubyte.gz", np.zeros(59, np.uint8))
    with pytest.raises(SystemExit, match=r"split 'train' has images of shape \(60, 28, 28\) and 59 labels"):
        build(script, idx_folder, tmp_path / "out", "--all")


def test_missing_folder_and_bad_count(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="is not a folder: install Debian's package dataset-fashion-mnist"):
        script.main(["--input", str(tmp_path / "gone")])
    with pytest.raises(SystemExit):
        script.main(["--train", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err


def test_the_packaged_files():
    """The numbers of images that the documentation promises, and the licence that must travel with them."""
    folder = Path(hf_vssm_prune.__file__).parent / "data" / "fashion_mnist"
    assert "The MIT License (MIT)" in (folder / "LICENSE").read_text()
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    splits = load_dataset("parquet", data_files=files)
    assert Counter(splits["train"]["label"]) == dict.fromkeys(range(10), 1000)
    assert Counter(splits["test"]["label"]) == dict.fromkeys(range(10), 200)
    assert splits["test"][0]["image"].size == (28, 28)
