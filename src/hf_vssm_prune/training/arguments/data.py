"""Options: the images to train and evaluate on."""

import math
from dataclasses import dataclass, field

from hf_vssm_prune.training.arguments.parsing import check_range, describe


@dataclass
class EvaluationDataArguments:
    """The images for evaluation."""

    _argument_group_name = "data"

    dataset_name: str = field(
        metadata=describe(
            "a Hub data set, a folder of images by class, a table of paths and labels, or Parquet files", "--data_dir"
        )
    )
    dataset_config_name: str | None = field(default=None, metadata=describe("configuration of the Hub data set"))
    eval_split: str | None = field(
        default=None, metadata=describe("split to evaluate on; inferred from the name by default")
    )
    image_column_name: str | None = field(
        default=None, metadata=describe("column of the images, or of their paths in a table; inferred by default")
    )
    label_column_name: str | None = field(default=None, metadata=describe("column of the labels; inferred by default"))
    max_eval_samples: int | None = field(
        default=None, metadata=describe("number of evaluation images, drawn at random; by default all")
    )
    dataloader_num_workers: int = field(default=2, metadata=describe("data-loading workers", "--workers"))

    def __post_init__(self) -> None:
        check_range("max_eval_samples", self.max_eval_samples, 1, math.inf)
        check_range("dataloader_num_workers", self.dataloader_num_workers, 0, math.inf)


@dataclass
class DataArguments(EvaluationDataArguments):
    """The images for training and evaluation."""

    train_split: str = field(default="train", metadata=describe("split to train on"))
    train_val_split: float = field(
        default=0.1, metadata=describe("fraction held out for evaluation if there is no evaluation split")
    )
    max_train_samples: int | None = field(
        default=None,
        metadata=describe(
            "number of training images, drawn at random (with --streaming, the first ones); by default all"
        ),
    )
    streaming: bool = field(
        default=False, metadata=describe("stream the training images instead of downloading them first")
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata=describe("size of the shuffle buffer with --streaming, in images")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("shuffle_buffer_size", self.shuffle_buffer_size, 1, math.inf)
        if self.shuffle_buffer_size != DataArguments.shuffle_buffer_size and not self.streaming:
            raise ValueError(f"--shuffle_buffer_size is {self.shuffle_buffer_size}: it needs --streaming.")
        check_range("train_val_split", self.train_val_split, 0, 1, above=True, below=True)
        check_range("max_train_samples", self.max_train_samples, 1, math.inf)
