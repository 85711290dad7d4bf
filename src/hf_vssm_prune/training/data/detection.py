"""Images with objects (a box and a class each): converts any data set to one with the columns "image", not decoded;
"boxes", left, top, width and height in pixels; "labels"; "crowd"; and "row" (not in a stream)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from datasets import Sequence as Repeated

from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data.columns import ImageDatasets, ImageStream, take_columns
from hf_vssm_prune.training.data.dense_splits import DenseSplits, read_label_names, set_apart
from hf_vssm_prune.training.data.loading import count_streamed, draw_samples
from hf_vssm_prune.training.data.media import IMAGES
from hf_vssm_prune.training.data.object_files import holds_object_files, load_object_files
from hf_vssm_prune.training.data.objects import Fields, find_fields, read_objects


logger = logging.getLogger(__name__)

OBJECT_COLUMNS = ("objects", "annotations", "object", "annotation", "labels", "label")
COLUMNS: dict[str, Any] = {
    "boxes": Repeated(Repeated(Value("float32"), length=4)),
    "labels": Repeated(Value("int64")),
    "crowd": Repeated(Value("bool")),
}


@dataclass(frozen=True)
class ObjectOptions:
    """The format of objects.

    Attributes:
        label_file: file with the class names. None: the column's type, or a file next to the data.
        corners: boxes are left, top, right, bottom instead of left, top, width, height.
    """

    label_file: str | None = None
    corners: bool = False


def load_detection_datasets(data: DataArguments, options: ObjectOptions, seed: int) -> ImageDatasets:
    """Both data sets of a training run.

    Args:
        data: which data, splits, columns and samples.
        options: format of the objects.
        seed: random seed.

    Raises:
        FileNotFoundError, ValueError: the data set does not exist, a column or a split is missing, or an object is not
            valid.
    """
    splits = SPLITS.load(data, data.streaming)
    train = SPLITS.choose(splits, data.train_split, data)
    reader = _ObjectReader.of_rows(train, data, options)
    train_rows = reader.read(train)
    if (evaluation := SPLITS.choose_evaluation(splits, data)) is not None:
        evaluation_rows = _ObjectReader.of_rows(evaluation, data, options, reader.names).read(evaluation)
    else:
        train_rows, evaluation_rows = set_apart(train_rows, data.train_val_split, seed)
    evaluation_rows = draw_samples(evaluation_rows, data.max_eval_samples, "max_eval_samples", seed, IMAGES)
    _refuse_without_objects(evaluation_rows)
    if not data.streaming:
        train_rows = draw_samples(train_rows, data.max_train_samples, "max_train_samples", seed, IMAGES)
        _refuse_without_objects(train_rows)
        return ImageDatasets(train_rows, evaluation_rows, reader.names)
    count = count_streamed(train, data.dataset_name, data.train_split, data.max_train_samples, IMAGES)
    taken = train_rows if data.max_train_samples is None else train_rows.take(count)
    stream = ImageStream(taken, count, data.shuffle_buffer_size, data.train_split)
    return ImageDatasets(stream, evaluation_rows, reader.names)


def load_detection_evaluation(
    data: EvaluationDataArguments, options: ObjectOptions, seed: int
) -> tuple[Dataset, list[str]]:
    """The rows to evaluate, and the classes' names; see `load_detection_datasets`."""
    stored = SPLITS.load_evaluation(data)
    reader = _ObjectReader.of_rows(stored, data, options)
    rows = draw_samples(reader.read(stored), data.max_eval_samples, "max_eval_samples", seed, IMAGES)
    _refuse_without_objects(rows)
    return rows, reader.names


def _find_columns(
    features: Mapping[str, Any], image_column: str | None, object_column: str | None
) -> tuple[str | None, str | None]:
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    return (
        image_column or (images[0] if len(images) == 1 else None),
        object_column or next((name for name in OBJECT_COLUMNS if name in features), None),
    )


SPLITS = DenseSplits(holds_object_files, load_object_files, "objects", _find_columns)


def _refuse_without_objects(rows: Dataset) -> None:
    if all(all(crowd) for crowd in rows["crowd"]):
        raise ValueError(f"None of the {len(rows)} images of split '{rows.split}' has an object that is not a crowd.")


@dataclass(frozen=True)
class _ObjectReader:
    """Reads the rows of one split.

    Attributes:
        image_column, object_column: columns of the split.
        fields: fields of the objects.
        own_names: the classes that the split's ids refer to.
        names: class names in the order of their ids.
    """

    image_column: str
    object_column: str
    fields: Fields
    own_names: list[str]
    names: list[str]

    @classmethod
    def of_rows(
        cls, rows: Any, data: EvaluationDataArguments, options: ObjectOptions, names: list[str] | None = None
    ) -> "_ObjectReader":
        """
        Args:
            rows: rows of `SPLITS`, stored or streamed.
            names: for other splits, the classes of the training split.
        """
        image_column, object_column = rows.column_names
        kinds = _fields_of(rows.features[object_column], object_column)
        fields = find_fields(list(kinds), options.corners, object_column)
        own = kinds[fields.label]
        own_names = list(own.names) if isinstance(own, ClassLabel) else None
        if options.label_file is not None or own_names is None:
            own_names = read_label_names(data.dataset_name, options.label_file) or own_names
        if own_names is None and not isinstance(rows, IterableDataset):
            own_names = _names_in(rows, object_column, fields)
        if own_names is None:
            raise ValueError(
                f"Column '{object_column}' does not name its classes, and the data set is streamed: name them with "
                "--label_file."
            )
        return cls(image_column, object_column, fields, own_names or names or [], names or own_names)

    def read(self, rows: Any) -> Any:
        """The rows as this module converts them; streamed ones have no "row".

        Raises:
            ValueError: an object is not valid, see `read_objects`, or has an unknown class.
        """
        if isinstance(rows, IterableDataset):
            return self._read_stream(rows)
        objects = [
            self._read(stored, f"The objects in row {row} of split '{rows.split}'")
            for row, stored in enumerate(rows.select_columns([self.object_column])[self.object_column])
        ]
        _refuse_fractions([each["boxes"] for each in objects], str(rows.split))
        if left_out := sum(each.pop("without_area") for each in objects):
            logger.warning("%d boxes of split '%s' have zero area and are left out.", left_out, rows.split)
        columns = Dataset.from_dict(
            {name: [each[name] for each in objects] for name in COLUMNS} | {"row": np.arange(len(objects))},
            features=Features(COLUMNS | {"row": Value("int64")}),
            split=rows.split,
        )
        images = take_columns(rows, {self.image_column: "image"}).cast_column("image", Image(decode=False))
        return concatenate_datasets([images, columns], split=rows.split, axis=1)

    def _read_stream(self, rows: IterableDataset) -> IterableDataset:
        features = rows.features
        rows = rows.cast_column(self.image_column, Image(decode=False))
        image_column, object_column = self.image_column, self.object_column

        def read(row: dict[str, Any]) -> dict[str, Any]:
            objects = self._read(row[object_column], f"The objects of an image of split '{rows.split}'")
            return {"image": row[image_column]} | {name: objects[name] for name in COLUMNS}

        return rows.map(
            read,
            remove_columns=[name for name in features if name != "image"],
            features=Features({"image": Image(decode=False)} | COLUMNS),
        )

    def _read(self, stored: Any, name: str) -> dict[str, Any]:
        objects = read_objects(stored, self.fields, name)
        return {
            "boxes": objects.boxes,
            "labels": np.array([self._label(each, name) for each in objects.classes], np.int64),
            "crowd": objects.crowd,
            "without_area": objects.without_area,
        }

    def _label(self, stored: Any, name: str) -> int:
        own = self.own_names
        if isinstance(stored, str):
            text = stored
        elif stored is not None and 0 <= stored < len(own):
            text = own[stored]
        else:
            raise ValueError(f"{name}: the class id {stored} is not allowed; allowed values are 0 to {len(own) - 1}.")
        if text not in self.names:
            raise ValueError(f"{name}: the class {text!r} is unknown; the classes are {', '.join(self.names)}.")
        return self.names.index(text)


def _fields_of(kind: Any, column: str) -> dict[str, Any]:
    """The fields of an objects column with the type of a single object's value, from a dict of lists or a list of
    dicts."""
    if isinstance(kind, Mapping):
        return {name: getattr(each, "feature", each) for name, each in kind.items()}
    inner = getattr(kind, "feature", None)
    if isinstance(inner, Mapping):
        return dict(inner)
    raise ValueError(f"Column '{column}' contains no objects with boxes and classes; its type is {kind}.")


def _names_in(rows: Dataset, column: str, fields: Fields) -> list[str]:
    """The classes of a split's objects: sorted names, or "class 0" up to the highest id."""
    found: set[Any] = set()
    for row, stored in enumerate(rows.select_columns([column])[column]):
        found |= set(read_objects(stored, fields, f"The objects in row {row} of split '{rows.split}'").classes)
    found.discard(None)  # refused, with its row, when the objects are read
    if all(isinstance(each, str) for each in found):
        return sorted(found)
    return [f"class {label}" for label in range(max(found) + 1)]


def _refuse_fractions(boxes: Sequence[np.ndarray], split: str) -> None:
    given = [each for each in boxes if len(each)]
    if given and max(float(each.max()) for each in given) <= 1:
        raise ValueError(f"All boxes of split '{split}' lie between 0 and 1: they must be in pixels, not fractions.")
