"""Model cards: valid, computed from the model, and with code that runs."""

import json
import re

import pytest
import torch
import yaml
from conftest import MAKE_CONFIG, NUM_CLS_TOKENS, TOKEN_PRUNING, load_script, make_video_config
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_vssm_prune import PlainMambaConfig, PlainMambaModel, VideoMambaConfig, VideoMambaModel, VimConfig, count_flops
from hf_vssm_prune.hub import (
    Evaluation,
    Measurement,
    ModelCardInfo,
    TrainingRecipe,
    create_model_card,
    save_for_hub,
)
from hf_vssm_prune.hub.model_card import METRIC_NAMES, format_flops
from hf_vssm_prune.hub.model_card_file import read_model_card_info
from hf_vssm_prune.hub.published_results import published_model


ALL_SECTIONS = [
    "Model details",
    "How to use",
    "Token pruning",
    "Training",
    "Evaluation",
    "Limits and biases",
    "Licence",
    "Citation",
]
EVALUATION = Evaluation(
    dataset_name="Fashion-MNIST",
    dataset_id="fashion_mnist",
    split="test",
    num_images=2000,
    this_model=Measurement("pruned, fine-tuned", top1=90.15, top5=99.6, images_per_second=321.04, pruned=True),
    others=[Measurement("dense", top1=90.4, images_per_second=200.0), Measurement("pruned", top1=80.0, pruned=True)],
    hardware="a CPU with 2 cores",
)
INFO = ModelCardInfo(
    name="A small model",
    summary="It tells bags from boots.",
    license="mit",
    license_notice="The data is under the MIT licence.",
    base_model="someone/dense",
    original_weights="trained by us",
    datasets=["zalando-datasets/fashion_mnist"],
    training=TrainingRecipe("python scripts/finetune.py --epochs 3", "Three epochs.", {"learning rate": 1e-5}),
    evaluation=EVALUATION,
    limits=["It knows three classes.", "It saw grey images only."],
    tags=["fashion"],
)


@pytest.fixture
def image_processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_classifier(config):
    return AutoModelForImageClassification.from_config(config).eval()


def sections(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.+)$", card.text, re.MULTILINE)


def python_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)


def test_full_card(tiny_pruned_config, image_processor) -> None:
    model = make_classifier(tiny_pruned_config)
    card = create_model_card(model, INFO, image_processor)
    assert sections(card) == ALL_SECTIONS
    flops = count_flops(model.config)
    assert f"| Parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |" in card.text
    assert f"| Multiply-adds, dense | {format_flops(flops.dense.published)} |" in card.text
    assert f"{format_flops(flops.pruned.published)} (−{100 * flops.reduction:.1f}%)" in card.text
    assert "| 1 | 0.7 | 16 | 12 |\n| 3 | 0.6 | 12 | 8 |" in card.text
    assert "```bash\npython scripts/finetune.py --epochs 3\n```" in card.text
    assert f"| dense | {format_flops(flops.dense.published)} | 90.40 | – | 200.0 |" in card.text
    pruned = format_flops(flops.pruned.published)
    assert f"| pruned, fine-tuned | {pruned} | 90.15 | 99.60 | 321.0 |" in card.text
    assert "2409.18962" in card.text


def test_a_variant_has_its_own_flops(tiny_pruned_config, tmp_path) -> None:
    result = {"metrics": {"top1": 0.5, "top5": 1.0}, "num_images": 9, "images_per_second": 2.0}
    (tmp_path / "results.json").write_text(
        json.dumps({"dense": result | {"gflops_published": 1.5}, "pruned": result | {"gflops_published": 0.75}})
    )
    about = {"dataset_name": "Data", "dataset_id": "data", "split": "test"}
    evaluation = Evaluation.from_results(tmp_path / "results.json", **about)
    card = create_model_card(make_classifier(tiny_pruned_config), ModelCardInfo("M", evaluation=evaluation))
    assert "| dense | 1.50 G | 50.00 |" in card.text
    assert "| pruned | 750.0 M | 50.00 |" in card.text


def test_metadata(tiny_pruned_config, image_processor) -> None:
    model = make_classifier(tiny_pruned_config)
    model.add_model_tags("grey")
    card = create_model_card(model, INFO, image_processor)
    metadata = yaml.safe_load(card.content.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["license"] == "mit"
    assert metadata["base_model"] == "someone/dense"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == ["zalando-datasets/fashion_mnist"]
    assert {tiny_pruned_config.model_type, "token-pruning", "fashion", "grey"} <= set(metadata["tags"])
    (result,) = ModelCard(card.content).data.eval_results[:1]
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9015)
    assert (result.dataset_name, result.dataset_split) == ("Fashion-MNIST", "test")


def test_nothing_is_invented(tiny_config) -> None:
    card = create_model_card(make_classifier(tiny_config), ModelCardInfo(name="Unknown"))
    assert sections(card) == ["Model details", "How to use", "Citation"]
    assert set(card.data.to_dict()) == {"library_name", "tags"}
    assert "None" not in card.content
    assert "pruned" not in card.text
    assert "2409.18962" not in card.text, "the paper on pruning has no part in a dense model"


def test_headless_model(plainmamba_config, image_processor) -> None:
    card = create_model_card(PlainMambaModel(plainmamba_config), ModelCardInfo(name="Features"), image_processor)
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "AutoModelForImageClassification" not in card.text
    assert "Classes" not in card.text


def test_selection_of_blocks_names_its_paper(vim_config) -> None:
    vim_config.token_pruning = {**TOKEN_PRUNING, "method": "top", "block_keep_ratio": 0.5}
    card = create_model_card(make_classifier(vim_config), ModelCardInfo(name="Some of the directions"))
    assert "| Paper | [Dynamic Vision Mamba](https://arxiv.org/abs/2504.04787) |" in card.text


def test_the_hub_has_no_task_for_features_of_videos(image_processor) -> None:
    card = create_model_card(VideoMambaModel(make_video_config()), ModelCardInfo(name="Features"), image_processor)
    assert card.data.pipeline_tag is None


def test_names_cannot_break_a_table(vim_config) -> None:
    measured = Measurement("pruned | 30%", others={"f1": 50.0, "map": 25.0})
    card = create_model_card(
        make_classifier(vim_config),
        ModelCardInfo(
            name="Größe | 大きさ",
            original_weights="a|b.pth",
            training=TrainingRecipe(hyperparameters={"labels": "a|b\nc"}),
            evaluation=Evaluation("Data", "data", "test", 10, measured, [Measurement("dense", others={"map": 30.0})]),
        ),
    )
    flops = format_flops(count_flops(vim_config).dense.published)
    assert "| f1 (%) | Mean average precision (COCO) (%) |" in card.text
    assert rf"| pruned \| 30% | {flops} | 50.00 | 25.00 | – |" in card.text
    assert f"| dense | {flops} | – | 30.00 | – |" in card.text
    assert r"| labels | a\|b c |" in card.text
    assert r"| Original weights | a\|b.pth |" in card.text
    assert [result.metric_name for result in ModelCard(card.content).data.eval_results] == ["f1", METRIC_NAMES["map"]]


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("token_pruning", [None, TOKEN_PRUNING], ids=["dense", "pruned"])
@pytest.mark.parametrize("head", [True, False], ids=["classifier", "headless"])
def test_code_in_the_card_runs(family, token_pruning, head, image_processor, tmp_path, monkeypatch, capsys) -> None:
    model = make_classifier(MAKE_CONFIG[family](token_pruning=token_pruning))
    folder = save_for_hub(
        model if head else model.base_model, tmp_path / "my model", image_processor, ModelCardInfo("M")
    )
    Image.new("L", (40, 50), 128).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ModelCard.load(folder / "README.md"))
    assert len(blocks) == (4 if head else 3)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert ("LABEL_" in printed) == head
    if token_pruning:
        assert str([12 + NUM_CLS_TOKENS[family], 8 + NUM_CLS_TOKENS[family]]) in printed


def test_card_without_image_processor_shows_no_code_that_needs_one(tiny_pruned_config) -> None:
    card = create_model_card(make_classifier(tiny_pruned_config), INFO)
    assert "pipeline_tag" not in card.data.to_dict()
    assert "AutoImageProcessor" not in card.text
    assert 'pipeline("' not in card.text


def test_model_id_in_code(tiny_config, tmp_path) -> None:
    model = make_classifier(tiny_config)
    assert 'from_pretrained("org/name")' in create_model_card(model, ModelCardInfo("Title", model_id="org/name")).text
    folder = save_for_hub(model, tmp_path / "name", model_card=ModelCardInfo("Some title"))
    assert 'from_pretrained("name")' in (folder / "README.md").read_text()


# ---- From files --------------------------------------------------------------------------------------------------


RESULTS = {
    "dense": {"accuracy": {"top1": 0.904, "top5": 0.99, "loss": 1.0, "num_images": 2000}, "images_per_second": 200.0},
    "pruned": {"accuracy": {"top1": 0.9015, "top5": 0.98, "loss": 1.0, "num_images": 2000}, "images_per_second": 321.0},
}
ABOUT = {"dataset_name": "Fashion-MNIST", "dataset_id": "fashion_mnist", "split": "test"}


def write_sources(folder, results=RESULTS, **changes):
    (folder / "results.json").write_text(json.dumps(results))
    card = {
        "name": "A small model",
        "license": "mit",
        "training": {"command": "python train.py"},
        "evaluation": {"results": "results.json", **ABOUT},
        **changes,
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return folder / "card.yaml"


def test_figures_of_an_evaluation_become_the_cards(tiny_pruned_config, vim_config, image_processor, tmp_path) -> None:
    info = read_model_card_info(write_sources(tmp_path))
    card = create_model_card(make_classifier(tiny_pruned_config), info, image_processor)
    assert [result.metric_value for result in card.data.eval_results] == [0.9015, 0.98]
    assert re.search(r"\| dense \| .* \| 90\.40 \| 99\.00 \| 200\.0 \|\n\| pruned \| .* \| 90\.15 \| 98", card.text)
    assert "2,000 images of Fashion-MNIST" in card.text
    assert "python train.py" in card.text
    with pytest.raises(ValueError, match="'pruned', are those of a pruned model, but the model is dense"):
        create_model_card(make_classifier(vim_config), info)
    only_dense = {"dense": RESULTS["dense"]}
    info = read_model_card_info(write_sources(tmp_path, only_dense))
    assert info.evaluation.this_model.name == "dense"
    assert info.evaluation.others == []


def test_script_writes_the_page_of_a_folder(tiny_pruned_config, image_processor, tmp_path, capsys) -> None:
    folder = save_for_hub(make_classifier(tiny_pruned_config), tmp_path / "model", image_processor)
    weights = (folder / "model.safetensors").read_bytes()
    card = write_sources(tmp_path)
    assert load_script("write_card").main([str(folder), str(card)]) == 0
    assert "# A small model" in (folder / "README.md").read_text()
    assert "The weights: under mit." in (folder / "NOTICE").read_text()
    assert (folder / "model.safetensors").read_bytes() == weights
    card.write_text("nom: A small model")
    assert load_script("write_card").main([str(folder), str(card)]) == 1
    assert "card.yaml does not describe a model card" in capsys.readouterr().err
    assert "# A small model" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "it must map names to values"),
        ("name: [", "does not describe a model card"),
        ("license: mit", "missing 1 required positional argument: 'name'"),
        ("name: M\ntraining: {recipe: none}", "unexpected keyword argument 'recipe'"),
        ("name: M\nevaluation: {split: test}", r"model card: evaluation has \['split'\], but no results"),
    ],
)
def test_wrong_descriptions_are_refused(content, message, tmp_path) -> None:
    (tmp_path / "card.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_model_card_info(tmp_path / "card.yaml")


@pytest.mark.parametrize("results", [[], {}, {"dense": {}}, {"dense": {"accuracy": {"top1": "high"}}}])
def test_wrong_results_are_refused(results, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"results\.json was not written by `hf-vssm-prune evaluate --json`"):
        read_model_card_info(write_sources(tmp_path, results))


# ---- Published results -------------------------------------------------------------------------------------------


def test_published_results_are_marked_as_the_papers(image_processor) -> None:
    config = VimConfig.from_preset("T", token_pruning={"layers": [10, 20], "keep_ratios": [0.8, 0.8]})
    card = create_model_card(make_classifier(config), ModelCardInfo("Vim-T"), image_processor)
    assert "## What papers report" in card.text
    assert "| token pruning with alignment | 75.1 | 1.29 G | ToP, arXiv 2409.18962 |" in card.text
    assert "none of them was measured with this checkpoint" in card.text
    assert "model-index" not in card.data.to_dict()


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_every_published_model_is_recognised(family) -> None:
    config_class = type(MAKE_CONFIG[family]())
    for preset, model in config_class.published.items():
        assert published_model(config_class.from_preset(preset)) is model
        assert published_model(config_class.from_preset(preset, num_labels=10)) is None
        assert published_model(config_class.from_preset(preset, image_size=448)) is None
    assert set(config_class.published) <= set(config_class.presets)
    assert published_model(MAKE_CONFIG[family]()) is None


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_a_dense_figure_of_every_published_model(family) -> None:
    config_class = type(MAKE_CONFIG[family]())
    for model in [*config_class.published.values(), *config_class.published_images.values()]:
        assert any(result.method.startswith("dense") for result in model.results)


def test_published_vim_with_overlapping_patches_is_recognised() -> None:
    assert published_model(VimConfig.from_preset("S", patch_stride=8)) is VimConfig.published["S"]


def test_cards_of_published_segmentation_models_show_their_results() -> None:
    backbone = PlainMambaConfig.from_preset("L3", out_features=["stage9", "stage18", "stage27", "stage36"])
    with torch.device("meta"):
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=150))
    text = create_model_card(model, ModelCardInfo("l3-upernet")).text
    assert "For the same architecture on ADE20K." in text
    assert "| method | mIoU (%) |" in text
    assert "| dense | 49.1 | – | repository of PlainMamba's authors |" in text
    assert "| token pruning with alignment | 48.6 | – | ToP, arXiv 2409.18962 |" in text
    for options in ({"num_labels": 11}, {"num_labels": 150, "hidden_size": 64}):
        assert published_model(UperNetConfig(backbone_config=backbone, **options)) is None


def test_published_video_mambas_of_every_size_are_recognised() -> None:
    videos, images = VideoMambaConfig.published["Ti"], VideoMambaConfig.published_images["Ti"]
    for size in ({"num_frames": 16}, {"num_frames": 64}, {"num_frames": 64, "image_size": 384}):
        assert published_model(VideoMambaConfig.from_preset("Ti", **size)) is videos
    for size in (448, 576):
        assert published_model(VideoMambaConfig.from_preset("Ti", num_frames=None, image_size=size)) is images
    for size in ({"num_frames": 24}, {"num_frames": 16, "image_size": 384}, {"num_frames": None, "image_size": 384}):
        assert published_model(VideoMambaConfig.from_preset("Ti", **size)) is None


# ---- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top1", [-0.1, 100.1, float("nan")])
def test_accuracy_out_of_range(top1) -> None:
    with pytest.raises(ValueError, match=r"`top1` of 'dense' is .*from 0 to 100"):
        Measurement("dense", top1=top1)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_speed_out_of_range(speed) -> None:
    with pytest.raises(ValueError, match="`images_per_second` of 'dense'"):
        Measurement("dense", top1=50.0, images_per_second=speed)


def test_empty_name() -> None:
    with pytest.raises(ValueError, match="`name` of a model card is empty"):
        ModelCardInfo(name=" ")


def test_missing_picture(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.png"):
        ModelCardInfo(name="Model", picture=tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("count", "text"), [(14_410_000_000, "14.41 G"), (86_312_000, "86.3 M"), (1_446_000_000, "1.45 G")]
)
def test_format_flops(count, text) -> None:
    assert format_flops(count) == text
