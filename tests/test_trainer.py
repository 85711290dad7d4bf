"""transformers' Trainer with this package's losses: equal to our loop, resumed bit by bit, pushed and loaded."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKEN_PRUNING, make_plainmamba_config, make_vim_config
from datasets import ClassLabel, Dataset, Features, Image
from forking import run_forked
from hub_server import HubServer
from PIL import Image as PILImage
from safetensors.torch import load_file
from test_training import (  # noqa: F401
    datasets,
    fresh_accelerator,
    image_folder,
    make_recipe,
    make_trainer,
    plain_augmentation,
)
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_vssm_prune import prunable
from hf_vssm_prune.hub.loading import load_classifier, new_image_processor
from hf_vssm_prune.metrics import load_metric
from hf_vssm_prune.training import TokenPruningTrainer
from hf_vssm_prune.training.data import EvaluationImages, StreamedTrainingImages, TrainingImages, load_image_stream
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.semantic_segmentation import SemanticSegmentation


LOSSES = LossWeights(kd_weight=0.7, kd_temperature=2.0, alignment_weight=0.3)


def make_model(config):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config)


def arguments(folder: Path, **changes) -> TrainingArguments:
    defaults = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(str(folder), **{**defaults, **changes})


def images_of(rows, config, kind=EvaluationImages, *options):
    return kind(rows, new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0), *options)


@pytest.mark.parametrize("make_config", [make_plainmamba_config, make_vim_config])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_of_a_batch_is_the_loops(make_config, mixed, datasets, tmp_path):  # noqa: F811
    config = make_config(token_pruning=dict(TOKEN_PRUNING), drop_path_rate=0.0)
    augmentation = plain_augmentation(mixup=0.8, cutmix=1.0, smoothing=0.1) if mixed else plain_augmentation()
    teacher = make_model(make_config()).requires_grad_(False)
    loop = make_trainer(config, datasets, make_recipe(tmp_path / "loop", LOSSES, augmentation), teacher)
    task = ImageClassification(augmentation)
    options = {"teacher": teacher, "losses": LOSSES, "task": task}
    ours = TokenPruningTrainer(make_model(config), arguments(tmp_path / "trainer", seed=0), **options)
    ours.create_optimizer()
    batch = next(iter(loop.loaders.train))
    loop.model.train()
    terms = loop._losses(batch, epoch=0, index=0)
    ours.model.train()
    loss = ours.compute_loss(ours.model, dict(batch))
    assert torch.equal(loss, terms["loss"])
    terms["loss"].backward()
    loss.backward()
    others = dict(ours.model.named_parameters())
    for name, parameter in loop.plain_model.named_parameters():
        assert torch.equal(parameter.grad, others[name].grad), name


def test_gradients_of_accumulated_batches_are_those_of_one_batch(datasets, tmp_path):  # noqa: F811
    """Losses are means over a batch, which Trainer has to divide by the number of batches."""
    config = make_vim_config(token_pruning=dict(TOKEN_PRUNING))
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_steps": 1,
        "max_grad_norm": 1e9,
    }
    trainer = TokenPruningTrainer(
        make_model(config), arguments(tmp_path, **options), train_dataset=images_of(datasets.train, config)
    )
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    whole = TokenPruningTrainer(
        make_model(config),
        arguments(tmp_path, **{**options, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}),
        train_dataset=images_of(datasets.train, config),
    )
    whole.train()
    (expected,) = (entry for entry in whole.state.log_history if "loss" in entry)
    for name in ("loss", "grad_norm", "cross_entropy", "distillation", "alignment"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    total = logged["cross_entropy"] + logged["distillation"] + logged["alignment"]
    assert logged["loss"] == pytest.approx(total, rel=1e-5)


def test_streamed_images(tmp_path):
    colours = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])})
    pictures = [PILImage.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)) for i in range(9)]
    Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(9)]}, features=colours).to_parquet(
        tmp_path / "train.parquet"
    )
    stream = load_image_stream(tmp_path, eval_split="train", shuffle_buffer_size=4).train
    config = make_vim_config(token_pruning=dict(TOKEN_PRUNING))
    seen = []

    class Seen(StreamedTrainingImages):
        def __getitems__(self, numbered_rows):
            items = super().__getitems__(numbered_rows)
            seen.extend((int(self._epoch), row["image"]["bytes"]) for _, row in numbered_rows)
            return items

    def trainer() -> TokenPruningTrainer:
        images = images_of(stream, config, Seen, plain_augmentation(hflip=0.5).image_augmentation())
        options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
        return TokenPruningTrainer(make_model(config), arguments(tmp_path / "run", **options), train_dataset=images)

    whole = trainer()
    whole.train()
    first, second = ([image for of, image in seen if of == epoch] for epoch in (0, 1))
    assert len(set(first)) == 9
    assert set(first) == set(second)
    assert first != second
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_teacher_runs_in_mixed_precision_as_in_the_loop(datasets, tmp_path):  # noqa: F811
    config = make_vim_config(token_pruning=dict(TOKEN_PRUNING))
    options = arguments(tmp_path, max_steps=1, bf16=True)
    trainer = TokenPruningTrainer(make_model(config), options, train_dataset=images_of(datasets.train, config))
    outputs = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher)):
        model.classifier.register_forward_hook(lambda *call, name=name: outputs.update({name: call[-1].dtype}))
    trainer.train()
    assert outputs == {"student": torch.bfloat16, "teacher": torch.bfloat16}


def test_a_trainer_that_trains_again_mixes_the_same_images(datasets, tmp_path, monkeypatch):  # noqa: F811
    config = make_vim_config()
    task, drawn = ImageClassification(plain_augmentation(mixup=0.8)), []
    monkeypatch.setattr(task, "mix", lambda batch, config, generator: drawn.append(generator.random()) or batch)
    trainer = TokenPruningTrainer(
        make_model(config),
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2),
        train_dataset=images_of(datasets.train, config),
        losses=LossWeights(),
        task=task,
    )
    for _ in range(2):
        trainer.train()
    assert len(set(drawn)) == 2
    assert drawn[:2] == drawn[2:]


def accuracy(prediction) -> dict[str, float]:
    return load_metric("top_k_accuracy").compute(
        predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
    )


def test_it_learns_evaluates_and_resumes_to_the_bit(datasets, tmp_path):  # noqa: F811
    config = make_vim_config(token_pruning=dict(TOKEN_PRUNING), drop_path_rate=0.2)
    augmentation = plain_augmentation(reprob=1.0).image_augmentation()

    def trainer(folder: str, **changes) -> TokenPruningTrainer:
        schedule = {"save_strategy": "steps", "save_steps": 11, "max_steps": 13, "eval_strategy": "epoch", "seed": 3}
        return TokenPruningTrainer(
            make_model(config),
            arguments(tmp_path / folder, **{**schedule, **changes}),
            train_dataset=images_of(datasets.train, config, TrainingImages, augmentation),
            eval_dataset=images_of(datasets.evaluation, config),
            compute_metrics=accuracy,
            task=ImageClassification(plain_augmentation(mixup=0.8)),
            elastic_budgets=[0.0, 0.2, 0.3],
        )

    whole = trainer("whole")
    before = whole.evaluate()
    whole.train()
    after = whole.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert 0 <= after["eval_top1"] <= 1
    assert whole.predict(images_of(datasets.evaluation, config)).predictions.shape == (15, 3)

    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-11"))  # within the second epoch
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_parameters_decay_as_in_the_loop(tmp_path):
    model = make_model(make_vim_config())
    trainer = TokenPruningTrainer(model, arguments(tmp_path, weight_decay=0.05), losses=LossWeights())
    trainer.create_optimizer()
    undecayed = {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"] if not group["weight_decay"]
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in undecayed}
    assert {"vim.embeddings.class_token", "vim.layers.0.norm.weight", "classifier.bias"} <= names
    assert any(name.endswith("A_log") for name in names)
    assert "classifier.weight" not in names
    assert trainer.teacher is None

    layered = TokenPruningTrainer(model, arguments(tmp_path, learning_rate=1.0), losses=LossWeights(), layer_decay=0.5)
    layered.create_optimizer()
    rates = {id(p): group["lr"] for group in layered.optimizer.param_groups for p in group["params"]}
    assert rates[id(model.vim.embeddings.class_token)] == 0.5**5
    assert rates[id(model.classifier.weight)] == 1.0

    descent = {"layer_decay": 0.5, "losses": LossWeights()}
    given = TokenPruningTrainer(
        model, arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.2}), **descent
    )
    assert isinstance(given.create_optimizer(), torch.optim.SGD)
    assert max(group["lr"] for group in given.optimizer.param_groups) == 0.2
    with pytest.raises(ValueError, match="layer_decay cannot be combined with SGD, which groups parameters itself"):
        TokenPruningTrainer(
            model, arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": []}), **descent
        ).create_optimizer()
    with pytest.raises(ValueError, match="layer_decay and `optimizers` cannot be combined"):
        TokenPruningTrainer(model, arguments(tmp_path), optimizers=(given.optimizer, None), **descent)


def test_every_trial_of_a_search_has_its_own_model(datasets, tmp_path):  # noqa: F811
    config = make_vim_config(token_pruning=dict(TOKEN_PRUNING))
    trainer = TokenPruningTrainer(
        args=arguments(tmp_path, max_steps=1),
        model_init=lambda trial: make_model(config),
        train_dataset=images_of(datasets.train, config),
        elastic_budgets=[0.3],
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert trainer.teacher.config.token_pruning is None


def test_smoothing_by_the_arguments(tmp_path):
    config = make_vim_config()
    trainer = TokenPruningTrainer(
        make_model(config), arguments(tmp_path, label_smoothing_factor=0.2), losses=LossWeights()
    )
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = torch.nn.functional.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="label_smoothing_factor and a task that smooths labels cannot be combined"):
        TokenPruningTrainer(
            make_model(config),
            arguments(tmp_path, label_smoothing_factor=0.2),
            task=ImageClassification(AugmentationArguments()),
        )


def test_wrong_layers_and_budgets_are_refused(tmp_path):
    model = make_model(make_vim_config())
    with pytest.raises(ValueError, match="the model has layers 0 to 3"):
        TokenPruningTrainer(model, arguments(tmp_path), losses=LossWeights(alignment_weight=1, alignment_layers=(9,)))
    with pytest.raises(ValueError, match=r"--elastic_budgets has \[1.5\]"):
        TokenPruningTrainer(model, arguments(tmp_path), elastic_budgets=[1.5])
    with pytest.raises(ValueError, match="compute_loss_func is not supported"):
        TokenPruningTrainer(model, arguments(tmp_path), compute_loss_func=torch.nn.functional.cross_entropy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_pruning": dict(TOKEN_PRUNING)}, "must be another model, without pruning"),
        ({"num_labels": 4}, "has 4 labels .*, but the model has 3 labels"),
        ({"id2label": {0: "b", 1: "a", 2: "c"}}, r"labels in another order: \['b', 'a', 'c'\], not \['a', 'b', 'c'\]"),
        ({"hidden_size": 32}, "has hidden_size 32, but the model has 16"),
        ({"image_size": 64}, r"has grid_size \(8, 8\), but the model has \(4, 4\)"),
    ],
)
def test_wrong_teachers_are_refused(options, message, tmp_path):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}}
    model = make_model(make_vim_config(token_pruning=dict(TOKEN_PRUNING), **labels))
    labels = {} if "num_labels" in options else labels
    with pytest.raises(ValueError, match=message):
        TokenPruningTrainer(model, arguments(tmp_path), teacher=make_model(make_vim_config(**(labels | options))))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_other_problems_need_a_task(problem_type, tmp_path):
    model = make_model(make_vim_config(problem_type=problem_type))
    with pytest.raises(ValueError, match=f"`problem_type` of the model is '{problem_type}'.*give a `task`"):
        TokenPruningTrainer(model, arguments(tmp_path))


def test_a_card_gives_the_length_of_the_run_and_the_budgets(tmp_path):
    options = {"max_steps": 7, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    trainer = TokenPruningTrainer(
        make_model(make_vim_config()), arguments(tmp_path, **options), losses=LossWeights(), elastic_budgets=[0.0, 0.3]
    )
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| max_steps | 7 |" in card
    assert "| gradient_accumulation_steps | 2 |" in card
    assert "| lr_scheduler_type | cosine |" in card
    assert "| elastic_budgets | [0.0, 0.3] |" in card
    assert "num_train_epochs" not in card
    assert "kd_weight" not in card


def test_a_model_with_a_head(tmp_path):
    levels = ["stage1", "stage2", "stage3", "stage4"]
    backbone = make_vim_config(patch_stride=None, out_features=levels, token_pruning=dict(TOKEN_PRUNING))
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=5)
    model = prunable(UperNetForSemanticSegmentation(config))
    items = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(5, (32, 32))} for _ in range(8)]
    with pytest.raises(ValueError, match=r"UperNetForSemanticSegmentation is not a classifier: give a `task`"):
        TokenPruningTrainer(model, arguments(tmp_path))
    given = {"train_dataset": items, "eval_dataset": items}
    trainer = TokenPruningTrainer(model, arguments(tmp_path), task=SemanticSegmentation(), **given)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    total = logged["segmentation"] + logged["distillation"] + logged["alignment"]
    assert logged["loss"] == pytest.approx(total, rel=1e-3)
    assert logged["alignment"] > 0
    assert trainer.predict(items).predictions.shape == (8, 5, 32, 32)
    trainer.create_model_card("en", "mit", finetuned_from="someone/dense", dataset=["someone/data", str(tmp_path)])
    card = (tmp_path / "README.md").read_text()
    assert "TokenPruningTrainer" in card
    assert "base_model: someone/dense\n" in card
    assert "datasets:\n- someone/data\nlibrary_name" in card
    assert "The weights: under mit." in (tmp_path / "NOTICE").read_text()
    by_transformers = Trainer(model, arguments(tmp_path), **given)
    assert by_transformers.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    of_stages = model.config.backbone_config.keys_to_ignore_at_inference
    assert by_transformers.predict(items, ignore_keys=of_stages).predictions.shape == (8, 5, 32, 32)


PROGRAM = """
import sys
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification, TrainingArguments, pipeline
from hf_vssm_prune import PlainMambaConfig
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.training import TokenPruningTrainer

config = PlainMambaConfig(
    image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4, num_stem_convs=1, num_labels=3,
    token_pruning={"layers": [1, 3], "keep_ratios": [0.7, 0.6]},
)
items = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(8)]
arguments = TrainingArguments(
    sys.argv[1], max_steps=2, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="user/trained",
)
processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
model = AutoModelForImageClassification.from_config(config)
trainer = TokenPruningTrainer(model, arguments, train_dataset=items, processing_class=processor)
trainer.train()
files = HfApi().list_repo_files("user/trained")
print({"modeling_plainmamba.py", "LICENSE-CODE", "NOTICE"} <= set(files), "README.md" in files)
trainer.push_to_hub(dataset="user/photos")
classify = pipeline("image-classification", "user/trained")
from PIL import Image
print(len(classify(Image.new("RGB", (40, 50), "red"))))
opened = AutoModelForImageClassification.from_pretrained("user/trained", trust_remote_code=True)
print(opened.config.token_pruning["layers"])
"""


def test_push_and_load_by_name(tmp_path):
    with HubServer() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {**hub.environment(tmp_path / "home", "hf_test"), "OMP_NUM_THREADS": "1"}
        done = run_forked(
            "-c",
            PROGRAM,
            tmp_path / "run",
            environment=environment,
            prepare=lambda: hub.use_in_this_process(pytest.MonkeyPatch(), tmp_path / "home"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-3:] == ["True False", "3", "[1, 3]"]
        files = hub.files("user/trained")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_plainmamba.py"} <= files.keys()
    card = files["README.md"].decode()
    assert "# trained" in card
    assert "TokenPruningTrainer" in card
    assert "user/photos" in card
    assert "| kd_weight | 1.0 |" in card
    assert str(tmp_path) not in card
    pushed = load_file(tmp_path / "run" / "model.safetensors")
    loaded = load_classifier(tmp_path / "run").state_dict()
    assert all(np.array_equal(pushed[name], loaded[name]) for name in pushed)
