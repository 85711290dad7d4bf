"""Videos as clips: reading, augmentation, views and their mean; and the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKEN_PRUNING, load_script, make_video_config, make_vim_config
from datasets import ClassLabel, Dataset, Features, Value, Video
from PIL import Image
from test_training import fresh_accelerator  # noqa: F401
from transformers import (
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    TrainingArguments,
    pipeline,
)
from videos import number_in, numbered_frames, write_class_folders, write_video

from hf_vssm_prune import count_flops
from hf_vssm_prune.export import check_size
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_image_processor, new_image_processor
from hf_vssm_prune.training import TokenPruningTrainer, image_steps
from hf_vssm_prune.training.arguments import DataArguments
from hf_vssm_prune.training.data.clips import EvaluationClips, TrainingClips, Views
from hf_vssm_prune.training.data.loading import load_evaluation_dataset, load_image_dataset
from hf_vssm_prune.training.data.media import VIDEOS
from hf_vssm_prune.training.data.tables import read_tables
from hf_vssm_prune.training.evaluation import compare_models
from hf_vssm_prune.training.frame_sampling import clips_of
from hf_vssm_prune.training.image_size import resize_image_processor, resize_model
from hf_vssm_prune.training.jobs import _at_size
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.video_classification import VideoClassification, VideoTrainingArguments, ViewArguments
from hf_vssm_prune.training.video_decoding import VideoError, read_clip


def make_processor(**changes):
    """An image processor whose pixel values are from 0 to 1."""
    return new_image_processor(make_video_config(**changes), [0.0] * 3, [1.0] * 3)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_class_folders(folder, "train", 4, np.random.default_rng(0))
    write_class_folders(folder, "val", 2, np.random.default_rng(1))
    return folder


@pytest.fixture
def wide_videos(tmp_path: Path) -> Dataset:
    """A single video of 20 numbered frames, 88 x 48 pixels."""
    write_video(tmp_path / "video.mp4", numbered_frames(20))
    return in_rows([tmp_path / "video.mp4"])


def in_rows(files: list[Path]) -> Dataset:
    """Rows as returned by `load_image_dataset`."""
    return Dataset.from_dict(
        {
            "image": [{"bytes": None, "path": str(file)} for file in files],
            "label": [0] * len(files),
            "row": list(range(len(files))),
        },
        features=Features({"image": Video(decode=False), "label": ClassLabel(names=["a", "b"]), "row": Value("int64")}),
        split="test",
    )


# Where videos come from


def test_folders_by_class(class_folders):
    datasets = load_image_dataset(class_folders, medium=VIDEOS)
    assert datasets.label_names == ["blue", "green", "red"]
    assert (len(datasets.train), len(datasets.evaluation)) == (12, 6)
    with pytest.raises(ValueError, match=r"The class folder '.*blue' contains no images"):
        load_image_dataset(class_folders)


TABLES = {
    "headings": ("label,path\n", "{label},{path}\n", "csv"),
    "more columns": ("path,frames,label\n", "{path},75,{label}\n", "csv"),
    "as for Kinetics": ("", "{path} {label}\n", "csv"),
    "commas": ("", "{path},{label}\n", "csv"),
    "semicolons": ("Video;Class\n", "{path};{label}\n", "csv"),
    "tabs": ("", "{path}\t{label}\n", "tsv"),
    "capitals": ("", "{path},{label}\n", "CSV"),
    "a byte order mark": ("\ufeffpath,label\r\n", "{path},{label}\r\n", "csv"),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("numbered", [False, True], ids=["names", "numbers"])
@pytest.mark.parametrize("absolute", [False, True], ids=["beside", "absolute"])
def test_tables_of_paths_and_labels(kind, numbered, absolute, class_folders, tmp_path):
    first, line, suffix = TABLES[kind]
    names = ["blue", "green", "red"]
    (tmp_path / "videos").symlink_to(class_folders)
    for split in ("train", "val"):
        files = sorted((class_folders / split).rglob("*.mp4"))
        paths = files if absolute else [Path("videos") / file.relative_to(class_folders) for file in files]
        labels = [names.index(file.parent.name) + 9 if numbered else file.parent.name for file in files]
        lines = [line.format(path=path, label=label) for path, label in zip(paths, labels, strict=True)]
        (tmp_path / f"{split}.{suffix}").write_text(first + "".join(lines))
    datasets = load_image_dataset(tmp_path, medium=VIDEOS)
    assert datasets.label_names == (["9", "10", "11"] if numbered else names)
    assert datasets.train["label"][:] == [0] * 4 + [1] * 4 + [2] * 4
    assert datasets.evaluation["label"][:] == [0, 0, 1, 1, 2, 2]
    assert Path(datasets.evaluation[5]["image"]["path"]).resolve() == class_folders / "val" / "red" / "1.mp4"
    alone, _ = load_evaluation_dataset(tmp_path / f"val.{suffix}", medium=VIDEOS)
    assert len(alone) == 6


@pytest.mark.parametrize("separator", ["\t", ";", " "])
def test_labels_with_commas_in_tables_with_another_separator(separator, tmp_path):
    labels = {"a.mp4": "lifting,dropping", "b,c.mp4": "other", "d.mp4": "pushing"}
    text = "".join(f"{path}{separator}{label}\n" for path, label in labels.items())
    (tmp_path / "train.csv").write_text(text)
    rows = read_tables({"train": [tmp_path / "train.csv"]}, VIDEOS)["train"]
    names = rows.features["label"].names
    assert {Path(row["image"]["path"]).name: names[row["label"]] for row in rows} == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"val\.csv' is empty: each line must have a path and a label"),
        ("path,label\na.mp4\n", r"Line 2 of '.*val\.csv' is \['a\.mp4'\]: it must have a path and a label"),
        ("path,label\na.mp4,\n", r"Line 2 of .*: it must have a path and a label"),
        ("a.mp4 1\nb.mp4 2 3\n", r"Line 2 of .*\['b\.mp4', '2', '3'\]: it must have a path and a label"),
        ("~a.mp4,1\n", r"row 0: its file '.*/~a\.mp4' cannot be opened"),  # not the folder of a user named a.mp4
        (f"{'a' * 200_000},1\n", r"val\.csv' cannot be read: field larger than field limit"),
        (
            "path,label\na.mp4,x\nb.mp4,y\n",
            r"2 of 2 rows of split 'validation' have no video .* the first is row 0: its",
        ),
    ],
)
def test_tables_that_are_wrong(text, message, tmp_path):
    (tmp_path / "val.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_evaluation_dataset(tmp_path / "val.csv", medium=VIDEOS)


def test_parquet_with_videos_and_none_in_a_row(class_folders, tmp_path):
    files = sorted((class_folders / "train").rglob("*.mp4"))
    features = Features({"clip": Video(), "label": ClassLabel(names=["blue", "green", "red"])})
    stored = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    Dataset.from_dict({"clip": stored, "label": [0, 1, 2] * 4}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    datasets = load_image_dataset(tmp_path / "train.parquet", medium=VIDEOS, validation_share=0.5)
    item = EvaluationClips(datasets.evaluation, make_processor(), Views())[0]
    assert item["pixel_values"].shape == (1, 3, 3, 32, 32)
    stored[7]["bytes"] = b""
    Dataset.from_dict({"clip": stored, "label": [0, 1, 2] * 4}, features=features).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(
        ValueError, match=r"1 of 12 rows .* have no video in column 'clip'; the first is row 7: it is empty"
    ):
        load_image_dataset(tmp_path / "train.parquet", medium=VIDEOS)


# What the model sees


def test_views_are_clips_by_crops(wide_videos):
    """Three crops along the longer side of the resized frame. The middle one is the image processor's."""
    processor = make_processor()
    items = EvaluationClips(wide_videos, processor, Views("segments", num_clips=2, num_crops=3))
    views = items[0]["pixel_values"]
    assert views.shape == (6, 3, 3, 32, 32)
    file = wide_videos[0]["image"]["path"]
    frames = read_clip(file, 20, "segments")
    width = 58  # 32 * 88 / 48
    for clip, numbers in enumerate(clips_of("segments", 20, 3, 2)):
        assert [number_in(frames[number]) for number in numbers] == numbers
        resized = [np.asarray(frames[i].resize((width, 32), Image.Resampling.BILINEAR)) / 255 for i in numbers]
        for crop, left in enumerate((0, 13, 26)):
            expected = np.stack([pixels[:, left : left + 32] for pixels in resized]).transpose(0, 3, 1, 2)
            np.testing.assert_allclose(views[3 * clip + crop], expected, atol=1e-6)
    middle = processor([frames[i] for i in clips_of("segments", 20, 3, 2)[0]], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(views[1], middle.float(), rtol=0, atol=1.1 / 255)
    single = EvaluationClips(wide_videos, processor, Views("segments", 2))[0]["pixel_values"]
    torch.testing.assert_close(single, views[[1, 4]])


def test_crops_of_upright_videos_go_from_top_to_bottom(tmp_path):
    generator = np.random.default_rng(0)
    write_video(tmp_path / "tall.mp4", list(generator.integers(0, 256, (4, 88, 48, 3), dtype=np.uint8)))
    views = EvaluationClips(in_rows([tmp_path / "tall.mp4"]), make_processor(), Views(num_crops=3))[0]["pixel_values"]
    assert views.shape[0] == 3
    torch.testing.assert_close(views[0, :, :, 13:], views[1, :, :, :-13])
    torch.testing.assert_close(views[0, :, :, 26:], views[2, :, :, :-26])


def test_all_frames_of_a_clip_are_augmented_alike(tmp_path):
    """Augmentation leaves a still video still, except for the noise of random erasing, whose place is the same in all
    frames."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "still.mkv", [pixels] * 6, codec="ffv1", pix_fmt="bgr0")
    rows = in_rows([tmp_path / "still.mkv"] * 30)
    augmentation = AugmentationArguments(randaugment_num_ops=3, reprob=0.0).image_augmentation()
    clips = TrainingClips(rows, make_processor(num_frames=4), augmentation)
    seen = [clips[i]["pixel_values"] for i in range(30)]
    assert all(torch.equal(frame, clip[0]) for clip in seen for frame in clip)
    assert len({clip.numpy().tobytes() for clip in seen}) == 30
    assert torch.equal(clips[3]["pixel_values"], seen[3])
    clips.set_epoch(1)
    assert not torch.equal(clips[3]["pixel_values"], seen[3])

    plain = {"no_random_crop": True, "hflip": 0.0, "randaugment_num_ops": 0, "reprob": 1.0}
    erased = TrainingClips(rows, make_processor(num_frames=4), AugmentationArguments(**plain).image_augmentation())
    clip, whole = erased[0]["pixel_values"], EvaluationClips(rows, make_processor(num_frames=4), Views())[0]
    changed = (clip != whole["pixel_values"][0]).any(1)
    assert changed.any()
    assert (changed == changed[0]).all()
    assert not torch.equal(clip[0], clip[1])


def test_frames_are_drawn_anew_in_each_epoch(wide_videos):
    plain = {"no_random_crop": True, "hflip": 0.0, "randaugment_num_ops": 0, "reprob": 0.0}
    processor = make_processor(num_frames=4, image_size=48)
    clips = TrainingClips(wide_videos, processor, AugmentationArguments(**plain).image_augmentation())
    drawn = set()
    for epoch in range(8):
        clips.set_epoch(epoch)
        drawn.add(clips[0]["pixel_values"].numpy().tobytes())
    assert len(drawn) > 4


def test_sizes_that_change_within_a_video(tmp_path):
    parts = []
    for height in (32, 48):
        write_video(tmp_path / "part.ts", numbered_frames(4, height))
        parts.append((tmp_path / "part.ts").read_bytes())
    (tmp_path / "video.ts").write_bytes(b"".join(parts))
    rows, processor = in_rows([tmp_path / "video.ts"]), make_processor(num_frames=8)
    assert TrainingClips(rows, processor, AugmentationArguments().image_augmentation())[0]["pixel_values"].shape[0] == 8
    assert EvaluationClips(rows, processor, Views(num_crops=3))[0]["pixel_values"].shape == (3, 8, 3, 32, 32)


def test_what_cannot_be_read_is_named_by_its_row(tmp_path):
    write_video(tmp_path / "good.mp4", numbered_frames(4))
    (tmp_path / "bad.mp4").write_bytes(b"x" * 1000)
    clips = EvaluationClips(in_rows([tmp_path / "good.mp4", tmp_path / "bad.mp4"]), make_processor(), Views())
    with pytest.raises(
        VideoError, match=r"^The video in row 1 of split 'test' \('.*bad\.mp4'\) cannot be read: Invalid"
    ):
        clips[1]


def test_what_cannot_be_cropped_is_named_by_its_row(wide_videos, monkeypatch):
    monkeypatch.setattr(image_steps, "MOST_RESIZED_PIXELS", 1000)
    clips = EvaluationClips(wide_videos, make_processor(), Views(num_crops=3))
    with pytest.raises(VideoError, match=r"^The video in row 0 .* cannot be used: 88 x 48 pixels are too elongated"):
        clips[0]


def test_a_processor_for_images_is_refused(wide_videos):
    processor = new_image_processor(make_vim_config(), [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match=r"has num_frames=None: the image processor of a video model must say"):
        EvaluationClips(wide_videos, processor, Views())


def test_probabilities_of_views_are_averaged():
    task, config = VideoClassification(ViewArguments()), make_video_config(num_labels=7)
    model = AutoModelForVideoClassification.from_config(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=3)
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(len(inputs["pixel_values"])), with_kwargs=True)
    clips, labels = torch.randn(4, 3, config.num_frames, 3, 32, 32), torch.tensor([0, 3, 6, 2])
    with torch.no_grad():
        scores = task.scores(task.predict(model, {"pixel_values": clips}), {"labels": labels})
        assert seen == [4, 4, 4]  # one view after the other
        probabilities = model(pixel_values=clips.flatten(0, 1)).logits.view(4, 3, 7).softmax(-1).mean(1)
    metrics = task.metrics([scores[:3], scores[3:]])
    assert metrics["top1"] == (probabilities.argmax(-1) == labels).float().mean()
    assert metrics["loss"] == pytest.approx(-probabilities[range(4), labels].log().mean().item(), abs=1e-5)


@pytest.mark.parametrize("num_frames", [2, 6])
def test_flops_are_those_of_the_evaluated_clips(num_frames):
    task, config = VideoClassification(ViewArguments()), make_video_config(token_pruning=dict(TOKEN_PRUNING))
    model = AutoModelForVideoClassification.from_config(config)
    batch = {"pixel_values": torch.zeros(2, 3, num_frames, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}
    found = compare_models(task, {"pruned": model}, [batch], torch.device("cpu"))["pruned"]
    flops = count_flops(make_video_config(num_frames=num_frames, token_pruning=dict(TOKEN_PRUNING)))
    assert found.gflops_total == flops.pruned.total / 1e9
    assert found.num_images == 2


def test_clips_are_mixed_alike_in_all_frames():
    task = VideoClassification(VideoTrainingArguments(mixup=0.0, cutmix=1.0))
    batch = {"pixel_values": torch.stack([torch.zeros(3, 3, 32, 32), torch.ones(3, 3, 32, 32)]), "labels": [0, 1]}
    mixed = task.mix(
        {**batch, "labels": torch.tensor([0, 1])}, make_video_config(num_labels=3), np.random.default_rng(0)
    )["pixel_values"]
    assert 0 < mixed[0].mean() < 1
    assert (mixed == mixed[:, :1]).all()


# Models and scripts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = make_video_config(id2label=["blue", "green", "red"])
    model = AutoModelForVideoClassification.from_config(config)
    return save_for_hub(
        model, tmp_path_factory.mktemp("dense") / "model", new_image_processor(config, [0.5] * 3, [0.25] * 3)
    )


def test_train_prune_and_evaluate(class_folders, tmp_path, capsys):
    shared = ["--task", "video-classification", "--dataset_name", str(class_folders), "--workers", "0"]
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4", "num_frames=3"]
    model = ["--family", "videomamba", "--image_size", "32", "--patch_size", "8", "--config_overrides", *sizes]
    short = ["--batch_size", "4", "--max_train_steps", "2", "--num_warmup_steps", "1", "--use_cpu"]
    run = load_script("train").main([*shared, *model, *short, "--output_dir", str(tmp_path / "dense")])
    assert run == 0
    fresh = ["--model_name_or_path", str(tmp_path / "dense" / "best")]
    options = ["--flops_reduction", "0.3", "--num_clips", "2", "--output_dir", str(tmp_path / "pruned")]
    assert load_script("finetune").main([*shared, *fresh, *short, *options]) == 0
    assert load_image_processor(str(tmp_path / "pruned" / "best")).num_frames == 3
    card = (tmp_path / "pruned" / "best" / "README.md").read_text()
    assert "pipeline_tag: video-classification" in card
    assert (tmp_path / "pruned" / "best" / "kept_tokens.png").is_file()
    views = ["--num_clips", "2", "--num_crops", "3", "--frame_sampling", "segments", "--device", "cpu"]
    pruned = ["--model_name_or_path", str(tmp_path / "pruned" / "best"), "--json", str(tmp_path / "out.json")]
    capsys.readouterr()
    assert load_script("evaluate").main([*shared, *pruned, *views]) == 0
    assert "| model | top-1 | top-5 | GFLOPs |" in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert {result["num_images"] for result in results.values()} == {6}


@pytest.mark.parametrize("num_crops", [1, 3])
def test_trainer_trains_and_evaluates_on_clips(num_crops, class_folders, tmp_path):
    datasets, processor = load_image_dataset(class_folders, medium=VIDEOS), make_processor()
    plain = AugmentationArguments(no_random_crop=True, randaugment_num_ops=0).image_augmentation()
    model = AutoModelForVideoClassification.from_config(make_video_config(token_pruning=dict(TOKEN_PRUNING)))
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    trainer = TokenPruningTrainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", **options),
        train_dataset=TrainingClips(datasets.train, processor, plain),
        eval_dataset=EvaluationClips(datasets.evaluation, processor, Views(num_crops=num_crops)),
    )
    trainer.train()
    predictions = trainer.predict(trainer.eval_dataset)
    assert predictions.predictions.shape == (6, 3)
    logits, labels = map(torch.from_numpy, (predictions.predictions, predictions.label_ids))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert predictions.metrics["test_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_models_of_images_are_named(class_folders, checkpoint, tmp_path, capsys):
    processor = new_image_processor(make_vim_config(), [0.5] * 3, [0.25] * 3)
    images = save_for_hub(AutoModelForImageClassification.from_config(make_vim_config()), tmp_path / "vim", processor)
    data = ["--dataset_name", str(class_folders), "--device", "cpu", "--workers", "0"]
    arguments = ["--task", "video-classification", "--model_name_or_path", str(images), *data]
    assert load_script("evaluate").main(arguments) == 1
    error = capsys.readouterr().err
    assert "is a model for images; --task video-classification needs a classifier of videos." in error
    with pytest.raises(ValueError, match="is a model for videos; --task image-classification needs a classifier of im"):
        ImageClassification().load_model(str(checkpoint), ["a"])


@pytest.mark.parametrize("options", [{"num_clips": 0}, {"num_crops": 101}])
def test_views_out_of_range(options):
    with pytest.raises(ValueError, match="it must be from 1 to 100"):
        ViewArguments(**options)


def test_the_pipeline_takes_a_file(checkpoint, tmp_path):
    write_video(tmp_path / "video.mp4", numbered_frames(9))
    classify = pipeline("video-classification", model=str(checkpoint))
    found = classify(str(tmp_path / "video.mp4"), frame_sampling_rate=3)
    assert {each["label"] for each in found} == {"blue", "green", "red"}
    model, processor = (
        AutoModelForVideoClassification.from_pretrained(checkpoint).eval(),
        load_image_processor(str(checkpoint)),
    )
    frames = read_clip(tmp_path / "video.mp4", 9)
    with torch.no_grad():
        logits = model(**processor([frames[i] for i in (0, 4, 8)], return_tensors="pt")).logits
    scores = {each["label"]: each["score"] for each in found}
    expected = dict(zip(("blue", "green", "red"), logits.softmax(-1)[0].tolist(), strict=True))
    assert scores == pytest.approx(expected, abs=1e-5)


def test_another_image_size(checkpoint):
    """Position embeddings are resized as in a forward pass at that size."""
    model = AutoModelForVideoClassification.from_pretrained(checkpoint).eval()
    clip = torch.randn(1, 3, 3, 48, 48)
    with torch.no_grad():
        expected = model(clip, interpolate_pos_encoding=True).logits
        resize_model(model, 48)
        torch.testing.assert_close(model(clip).logits, expected, rtol=0, atol=1e-5)
    processor = resize_image_processor(load_image_processor(str(checkpoint)), 48)
    assert processor.num_frames == 3
    assert processor([Image.new("RGB", (60, 50))] * 3, return_tensors="pt")["pixel_values"].shape == (1, 3, 3, 48, 48)


def test_clips_of_another_length_than_the_models(checkpoint, caplog):
    model, processor = AutoModelForVideoClassification.from_pretrained(checkpoint), make_processor(num_frames=6)
    _at_size(VideoClassification(), model, processor, None)
    assert "says that clips have 6 frames, but the model's configuration has num_frames 3" in caplog.text
    with pytest.raises(ValueError, match=r"for clips of 6 frames, but exported files take only .* `num_frames`, 3"):
        check_size(model, processor)
    caplog.clear()
    _at_size(VideoClassification(), model, make_processor(), None)
    check_size(model, make_processor())
    assert not caplog.records


def test_data_arguments_find_tables(class_folders, tmp_path):
    files = sorted((class_folders / "train").rglob("*.mp4"))
    (tmp_path / "train.csv").write_text("".join(f"{file},{file.parent.name}\n" for file in files))
    task = VideoClassification(VideoTrainingArguments())
    datasets = task.load_datasets(DataArguments(str(tmp_path), train_val_split=0.25), seed=0)
    assert (len(datasets.train), len(datasets.evaluation)) == (9, 3)
    model = AutoModelForVideoClassification.from_config(make_video_config(token_pruning=dict(TOKEN_PRUNING)))
    items = task.evaluation_items(datasets.evaluation, make_processor())
    assert task.draw(model, make_processor(), task.collate([items[0], items[1]])).width > 300
