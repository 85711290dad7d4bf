"""Labels of a model and a data set, matched by name, and the forms of `id2label` that people write."""

import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_plainmamba_config, make_vim_config
from transformers import AutoConfig, AutoModelForImageClassification

from hf_vssm_prune import VimConfig
from hf_vssm_prune.label_maps import complete_label_maps
from hf_vssm_prune.training.labels import Match, match_labels, read_label_file, say_difference, say_labels
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.models import load_model, load_teacher


SAME, REORDERED, ADOPTED, DIFFERENT = Match.SAME, Match.REORDERED, Match.ADOPTED, Match.DIFFERENT
NUMBERED = [f"LABEL_{i}" for i in range(12)]
SORTED_AS_TEXT = sorted(str(i) for i in range(12))


# Reading


def test_blank_lines_of_a_label_file(tmp_path) -> None:
    (tmp_path / "names.txt").write_text("ant\nsea lion \n\n")
    assert read_label_file(tmp_path / "names.txt") == ["ant", "sea lion"]
    (tmp_path / "names.txt").write_text("ant\n\nbee\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*names\.txt is blank: each line must name a label"):
        read_label_file(tmp_path / "names.txt")


# Comparing


@pytest.mark.parametrize(
    ("model", "data", "kind", "ids"),
    [
        (["cat", "dog", "ox"], ["cat", "dog", "ox"], SAME, [0, 1, 2]),
        (["cat", "dog", "ox"], ["ox", "cat", "dog"], REORDERED, [2, 0, 1]),
        (["cat", "dog", "ox"], ["cat", "dog", "yak"], DIFFERENT, []),
        (["cat", "dog", "ox"], ["cat", "dog"], DIFFERENT, []),
        (["cat", "dog"], ["cat", "dog", "ox"], DIFFERENT, []),
        # Spelling.
        (["Sea Lion", "café"], ["sea_lion", unicodedata.normalize("NFD", "café")], SAME, [0, 1]),
        ([" cat", "dog "], ["DOG", "Cat"], REORDERED, [1, 0]),
        (["US", "us"], ["us", "US"], REORDERED, [1, 0]),
        (["US", "us"], ["us", "Us"], DIFFERENT, []),
        (["crane", "crane", "ox"], ["crane", "crane", "ox"], SAME, [0, 1, 2]),
        (["crane", "crane", "ox"], ["ox", "crane", "crane"], DIFFERENT, []),
        # Ids for names.
        (NUMBERED, [f"animal {i}" for i in "abcdefghijkl"], ADOPTED, list(range(12))),
        ([f"animal {i}" for i in "abcdefghijkl"], NUMBERED, ADOPTED, list(range(12))),
        ([f"animal {i}" for i in "abcdefghijkl"], SORTED_AS_TEXT, ADOPTED, [int(name) for name in SORTED_AS_TEXT]),
        (NUMBERED, SORTED_AS_TEXT, REORDERED, [int(name) for name in SORTED_AS_TEXT]),
        (SORTED_AS_TEXT, [f"animal {i}" for i in "abcdefghijkl"], DIFFERENT, []),
        (["0", "1"], ["class 0", "class_01"], SAME, [0, 1]),
        (["cat", "dog"], ["1", "2"], DIFFERENT, []),
        (["1", "2"], ["0", "1"], DIFFERENT, []),
        (["-1", "1"], ["0", "1"], DIFFERENT, []),
        (["-1", "1"], ["1", "-1"], REORDERED, [1, 0]),
        (["5", "70"], ["70", "5"], REORDERED, [1, 0]),
        (["0", "1"], ["0", "cat"], ADOPTED, [0, 1]),
        ([], ["cat", "dog"], DIFFERENT, []),
    ],
)
def test_labels_of_a_model_and_a_data_set(model, data, kind, ids) -> None:
    match = match_labels(model, data)
    assert (match.kind, match.ids) == (kind, ids)


@pytest.mark.parametrize(
    ("model", "data", "kind", "ids"),
    [
        (["cat", "dog", "ox"], ["ox", "cat"], REORDERED, [2, 0]),
        (["cat", "dog", "ox"], ["cat"], REORDERED, [0]),
        (["cat", "dog", "ox"], ["cat", "yak"], DIFFERENT, []),
        (["cat", "dog"], ["cat", "dog", "ox"], DIFFERENT, []),
        (["cat", "dog", "ox"], ["0", "2"], ADOPTED, [0, 2]),
        (["cat", "dog", "ox"], ["1", "2"], DIFFERENT, []),
        (["cat", "dog", "ox"], ["0", "3"], DIFFERENT, []),
        (NUMBERED, ["0", "11"], REORDERED, [0, 11]),
        (NUMBERED, ["cat", "dog"], DIFFERENT, []),
        (["1", "2", "3"], ["1", "3"], REORDERED, [0, 2]),
        (["1", "2", "3"], ["0", "1"], DIFFERENT, []),
    ],
)
def test_labels_of_a_split_for_evaluation(model, data, kind, ids) -> None:
    match = match_labels(model, data, some=True)
    assert (match.kind, match.ids) == (kind, ids)


def test_messages_show_both_sides() -> None:
    assert say_labels(["a", "b"]) == "2 labels ('a', 'b')"
    assert say_labels(list("abcdef")) == "6 labels ('a', 'b', 'c', 'd', …)"
    assert say_difference(["a", "b"], ["a", "c", "d"]) == "only the model has 'b'; only the data set has 'c' and 1 more"
    assert say_difference(["a", "a"], ["a", "b"]).startswith("the model has 'a' twice")


# Checkpoints

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model"), NAMES)


def config_of(names: list[str]) -> VimConfig:
    return make_vim_config(id2label=names, num_labels=len(names))


def save(folder: Path, names: list[str]) -> Path:
    torch.manual_seed(len(names))
    config = config_of(names)
    model = AutoModelForImageClassification.from_config(config)
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(folder)
    return folder


def logits_by_name(model) -> dict[str, float]:
    height, width = model.config.image_height_width(model.config.image_size)
    images = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)
    with torch.no_grad():
        logits = model.eval()(images).logits[0].tolist()
    return dict(zip(model.config.label_names, logits, strict=True))


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], ["cat", "ant", "dog", "bee"]])
@pytest.mark.parametrize("ignore", [False, True])
def test_the_classifier_takes_the_order_of_the_data_set(checkpoint, names, ignore, caplog) -> None:
    caplog.set_level(logging.INFO)
    model = load_model(str(checkpoint), names, ignore_mismatched_sizes=ignore)
    assert model.config.label_names == names
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    assert logits_by_name(model) == pytest.approx(logits_by_name(load_model(str(checkpoint), NAMES)))
    said = [record for record in caplog.records if "reordered by name to match" in record.getMessage()]
    assert len(said) == (names != NAMES)


def test_a_split_without_some_classes_is_evaluated(checkpoint) -> None:
    model = load_model(str(checkpoint), ["dog", "bee"], some_labels=True)
    assert model.config.label_names == ["dog", "bee", "ant", "cat"]
    assert logits_by_name(model) == pytest.approx(logits_by_name(load_model(str(checkpoint), NAMES)))
    with pytest.raises(ValueError, match=r"has 4 labels \('ant', .*, but the data set has 2 labels"):
        load_model(str(checkpoint), ["dog", "bee"])


@pytest.mark.parametrize("names", [["ant", "bee", "cat", "yak"], list("wxyz"), ["ant", "bee"], list("abcdefg")])
def test_other_labels_need_a_new_classifier(checkpoint, names, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has 4 labels .*'ant'.*the data set has \d labels .*ignore_mismatched"):
        load_model(str(checkpoint), names)
    model = load_model(str(checkpoint), names, ignore_mismatched_sizes=True)
    old = load_model(str(checkpoint), NAMES)
    assert model.config.label_names == names
    assert model.classifier.weight.shape == (len(names), old.classifier.in_features)
    assert not torch.isclose(model.classifier.weight[0], old.classifier.weight[0]).any()
    assert model.classifier.bias.tolist() == [0.0] * len(names)
    assert model.classifier.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.5)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier.")}
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in rest.items())
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).label_names == names
    assert model(torch.zeros(1, 3, 32, 32), labels=torch.tensor([len(names) - 1])).loss.isfinite()


def test_numbers_are_the_other_sides_ids(checkpoint, tmp_path, caplog) -> None:
    assert load_model(str(checkpoint), ["0", "1", "2", "3"]).config.label_names == NAMES
    assert load_model(str(checkpoint), ["1", "0"], some_labels=True).config.label_names == ["bee", "ant", "cat", "dog"]
    numbered = save(tmp_path, [f"LABEL_{i}" for i in range(4)])
    assert load_model(str(numbered), NAMES).config.label_names == NAMES
    assert all("numbers without names" in record.getMessage() for record in caplog.records)
    treated = [
        "'0' of the data set is treated as 'ant'",
        "'1' of the data set is treated as 'bee'",
        "'ant' of the data",
    ]
    assert all(words in record.getMessage() for words, record in zip(treated, caplog.records, strict=True))
    assert len(caplog.records) == 3
    # Somebody asks for a new classifier: digits are no animals.
    renewed = load_model(str(checkpoint), ["0", "1", "2", "3"], ignore_mismatched_sizes=True)
    assert renewed.config.label_names == ["0", "1", "2", "3"]
    assert renewed.classifier.bias.tolist() == [0.0] * 4


def losses_of(kd_weight: float, alignment_weight: float = 0.0) -> LossWeights:
    return LossWeights(kd_weight=kd_weight, alignment_weight=alignment_weight)


def test_a_teachers_labels_are_the_students(checkpoint) -> None:
    student = config_of(NAMES[::-1])
    teacher = load_teacher(str(checkpoint), student, losses_of(1.0))
    assert teacher.config.label_names == NAMES[::-1]
    assert logits_by_name(teacher) == pytest.approx(logits_by_name(load_model(str(checkpoint), NAMES)))


@pytest.mark.parametrize("names", [["ant", "bee", "cat", "yak"], ["ant", "bee"], [*NAMES, "eel"]])
def test_a_teacher_of_other_labels_does_not_teach_them(checkpoint, names) -> None:
    student = config_of(names)
    with pytest.raises(
        ValueError, match=r"The teacher .* has 4 labels \('ant'.*, but the model has \d labels .*`kd_weight` of 0"
    ):
        load_teacher(str(checkpoint), student, losses_of(1.0))
    assert load_teacher(str(checkpoint), student, losses_of(0.0, 1.0)).config.label_names == NAMES


# What people write


LISTED = [f"kind {i}" for i in (3, 1, 2, 0, *range(4, 12))]
FORMS = {
    "numbers": {"id2label": dict(enumerate(LISTED))},
    "texts": {"id2label": {str(i): name for i, name in enumerate(LISTED)}},
    "texts, not in order": {"id2label": {str(i): LISTED[i] for i in sorted(range(12), key=str)}},
    "numbers, backwards": {"id2label": {i: LISTED[i] for i in reversed(range(12))}},
    "numbers and texts": {"id2label": {i if i % 2 else str(i): name for i, name in enumerate(LISTED)}},
    "NumPy's numbers": {"id2label": {np.int64(i): name for i, name in enumerate(LISTED)}},
    "a list": {"id2label": LISTED},
    "a tuple": {"id2label": tuple(LISTED)},
    "the wrong way round": {"id2label": {name: i for i, name in enumerate(LISTED)}},
    "label2id": {"label2id": {name: i for i, name in enumerate(LISTED)}},
    "label2id, texts": {"label2id": {name: str(i) for i, name in enumerate(LISTED)}},
    "label2id, a list": {"label2id": LISTED},
    "label2id, the wrong way round": {"label2id": dict(enumerate(LISTED))},
    "both, and the number": {"id2label": dict(enumerate(LISTED)), "num_labels": 12},
    "both, at odds": {"id2label": LISTED, "label2id": {name: 11 - i for i, name in enumerate(LISTED)}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_config", [make_vim_config, make_plainmamba_config])
def test_labels_in_any_form(form, make_config, tmp_path) -> None:
    config = make_config(**{"num_labels": 12, **FORMS[form]})
    for each in (config, type(config).from_dict(json.loads(config.to_json_string()))):
        assert each.label_names == LISTED
        assert each.id2label == dict(enumerate(LISTED))
        assert each.label2id == {name: i for i, name in enumerate(LISTED)}
        assert each.num_labels == 12
    make_config(id2label=list("abcdefghijkl"), num_labels=12).save_pretrained(tmp_path)
    given = AutoConfig.from_pretrained(tmp_path, **FORMS[form])
    assert (given.label_names, given.id2label) == (LISTED, dict(enumerate(LISTED)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"id2label": {}}, []),
        ({"id2label": ["Katze", " Hund ", "猫", "İ", "LABEL_0"]}, ["Katze", " Hund ", "猫", "İ", "LABEL_0"]),
        ({"id2label": {0: 7, 1: 9}}, ["7", "9"]),
        ({"label2id": {"7": 0, "9": 1}}, ["7", "9"]),
        ({"label2id": {"1": 0, "0": 1}}, ["1", "0"]),
    ],
)
def test_names_are_kept_as_they_are(given, expected) -> None:
    maps = complete_label_maps(given)
    assert maps == {} if expected == {} else list(maps["id2label"].values()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"id2label": {1: "a", 2: "b"}},
            r"`id2label` has the ids \[1, 2\] for 2 labels; each id from 0 to 1 must occur",
        ),
        ({"id2label": {0: "a", 2: "b"}}, r"`id2label` has the ids \[0, 2\]"),
        ({"id2label": {0: "a", "0": "b"}}, r"`id2label` has the ids \[0\] for 2 labels"),
        ({"label2id": {"a": 0, "b": 0}}, r"`label2id` has the ids \[0\] for 2 labels"),
        ({"id2label": {"a": "b"}}, "`id2label` has ids neither as keys nor as values: {'a': 'b'}"),
        ({"id2label": {True: "a", False: "b"}}, "ids neither as keys"),
    ],
)
def test_ids_that_leave_a_label_without_a_name(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        complete_label_maps(given)
    with pytest.raises(Exception, match=message):
        make_vim_config(num_labels=2, **given)


def test_a_preset_takes_names() -> None:
    assert VimConfig.from_preset("T", id2label=["a", "b", "c"]).label_names == ["a", "b", "c"]
    assert VimConfig.from_preset("T").num_labels == 1000
