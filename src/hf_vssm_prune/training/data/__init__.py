"""Labelled images and videos for training and evaluation, from the Hub, a folder, a table, Parquet files, or a saved
data set."""

from hf_vssm_prune.training.data.columns import ImageDatasets, ImageStream
from hf_vssm_prune.training.data.items import EvaluationImages, StreamedTrainingImages, TrainingImages, collate
from hf_vssm_prune.training.data.loading import load_evaluation_dataset, load_image_dataset, load_image_stream


__all__ = [
    "EvaluationImages",
    "ImageDatasets",
    "ImageStream",
    "StreamedTrainingImages",
    "TrainingImages",
    "collate",
    "load_evaluation_dataset",
    "load_image_dataset",
    "load_image_stream",
]
