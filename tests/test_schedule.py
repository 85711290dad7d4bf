"""Pruning schedules: wrong ones are rejected when the configuration is created, and budgets are met."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import MAKE_CONFIG, TOKEN_PRUNING, make_model
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from hf_vssm_prune import PlainMambaConfig, VideoMambaConfig, VimConfig, count_flops
from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.pruning_methods import METHODS, RECOMMENDED_METHOD


# A narrow stem, which pruning cannot make cheaper.
NARROW = {"plainmamba": {"stem_channels": 4}}


def make_config(family: str, **changes) -> VisionMambaConfig:
    return MAKE_CONFIG[family](**NARROW.get(family, {}), **changes)


@pytest.fixture(params=sorted(MAKE_CONFIG))
def config(request) -> VisionMambaConfig:
    return make_config(request.param)


PRESETS = [(config, name) for config in (PlainMambaConfig, VimConfig, VideoMambaConfig) for name in config.presets]


def schedule(**changes) -> dict:
    """A schedule for the tiny models, which have four layers."""
    options = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]} | changes
    return {name: value for name, value in options.items() if value is not ...}


WRONG = [
    *((schedule(keep_ratios=[0.7, ratio]), rf"{ratio!r} is not in \(0, 1\]") for ratio in (0, -0.1, 1.1, True, "half")),
    *((schedule(keep_ratios=[ratio, 0.5]), r"is not in \(0, 1\]") for ratio in (math.nan, math.inf, None)),
    (schedule(keep_ratios=[0.7]), "1 ratios for 2 layers; give one ratio for each layer"),
    (schedule(keep_ratios=[0.7, 0.7, 0.7]), "3 ratios for 2 layers"),
    (schedule(keep_ratios=0.7), "0.7; it must be a list with one entry for each stage"),
    (schedule(layers=[3, 1]), r"\[3, 1\]; layers must be in ascending order, without duplicates"),
    (schedule(layers=[2, 2]), r"\[2, 2\]; layers must be in ascending order, without duplicates"),
    (schedule(layers=[0, 1]), r"\[0, 1\]; .*the allowed layers are 1 to 3 in a model with 4 layers"),
    (schedule(layers=[1, 4]), r"\[1, 4\]; .*the allowed layers are 1 to 3 in a model with 4 layers"),
    (schedule(layers=[-1, 2]), r"\[-1, 2\]; .*the allowed layers are 1 to 3"),
    (schedule(layers=[1.0, 2.0]), r"\[1\.0, 2\.0\]; layers must be whole numbers"),
    (schedule(layers=[True, 2]), r"\[True, 2\]; layers must be whole numbers"),
    (schedule(layers="12"), "'12'; it must be a list"),
    (schedule(layers=1, keep_ratios=0.5), "1; it must be a list"),
    (schedule(layers=[], keep_ratios=[]), "give at least one layer, or `token_pruning=None`"),
    (schedule(layers=...), r"needs \['layers'\], or `flops_reduction`"),
    (schedule(keep_ratios=None), r"needs \['keep_ratios'\]"),
    ({}, r"needs \['layers', 'keep_ratios'\]"),
    (
        schedule(alignment="Repeat"),
        r"'alignment'.*'Repeat'; allowed values are \['repeat', 'zero_input', 'none', 'learned'\]",
    ),
    (schedule(alignment=None), r"'alignment'.*None; allowed values are"),
    (
        schedule(importance="norm"),
        r"'importance'.*'norm'; allowed values are \['clip', 'mean', 'l1', 'l2', 'random', 'infl",
    ),
    (schedule(importance=["clip"]), r"'importance'.*\['clip'\]; allowed values are"),
    (
        schedule(method="ToMe"),
        r"'method'.*'ToMe'; allowed values are \['top', 'evit', 'tome', 'r_meeto', 'utr', 'mtr', ",
    ),
    (schedule(method=None), r"'method'.*None; allowed values are"),
    (
        schedule(method="tome", importance="l1"),
        r"'importance'.*'l1', but the method 'tome' does not use an importance; .* \['top', 'evit', 'utr'",
    ),
    ({"flops_reduction": 0.3, "method": "best"}, r"'method'.*'best'; allowed values are"),
    (schedule(ratio=0.5), r"unknown options \['ratio'\]; allowed options are \['layers', 'keep_ratios', 'alignment'"),
    (schedule(flops_reduction=0.4), "both `flops_reduction` and `keep_ratios`; give one of them"),
    ({"flops_reduction": 0.3, "layers": [9]}, r"'layers'.*\[9\]; .*the allowed layers are 1 to 3"),
    ({"flops_reduction": 0.3, "layers": 2}, r"'layers'.*2; it must be a list"),
    ({"flops_reduction": 0.9, "layers": [3]}, r"dropping all but one token at \[3\] removes 0\.\d+"),
    *(
        ({"flops_reduction": share}, rf"`flops_reduction` is {share!r}; it must be between 0 and 1")
        for share in (0, 1, -0.5, 1.5, True, "0.4", None, math.nan)
    ),
    ({"flops_reduction": 0.99}, r"`flops_reduction` is 0\.99; dropping all but one token at \[1\b.*\] removes 0\.\d+"),
    ({"flops_reduction": 0.3, "ratio": 0.5}, r"unknown options \['ratio'\]"),
    ({"flops_reduction": 0.3, "alignment": "no"}, r"'alignment'.*'no'; allowed values are"),
]


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize(("token_pruning", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_wrong_schedule(token_pruning, message, family) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(family, token_pruning=token_pruning)

    model = FAMILIES[family].classifier(make_config(family, token_pruning=dict(TOKEN_PRUNING)))
    with pytest.raises(ValueError, match=message):
        model.set_token_pruning(token_pruning)
    assert model.config.token_pruning == TOKEN_PRUNING


@pytest.mark.parametrize("token_pruning", ["repeat", 0.5, [1, 2]])
def test_not_a_dict(token_pruning, config) -> None:
    # The check of the fields' types speaks first when a configuration is made.
    with pytest.raises(StrictDataclassFieldValidationError, match=r"token_pruning.*\n.*expected"):
        type(config)(token_pruning=token_pruning)
    with pytest.raises(ValueError, match="it must be None or a dict"):
        FAMILIES[config.model_type].classifier(config).set_token_pruning(token_pruning)


def test_attribute_set_behind_the_checks_is_refused_in_use(config, pixel_values) -> None:
    model = FAMILIES[config.model_type].classifier(config)
    model.config.token_pruning = {"layers": [9], "keep_ratios": [0.5]}
    with pytest.raises(ValueError, match=r"\[9\]; .*the allowed layers are 1 to 3"):
        model(pixel_values)


def test_schedule_is_completed_and_copied(config) -> None:
    given = {"layers": (1, 3), "keep_ratios": (1, 0.5), "method": "top"}
    completed = config.complete_token_pruning(given)
    assert completed == TOKEN_PRUNING | {"keep_ratios": [1, 0.5]}
    assert given == {"layers": (1, 3), "keep_ratios": (1, 0.5), "method": "top"}


NUMBERS = {
    "numpy": lambda values: np.asarray(values, dtype=np.float64 if isinstance(values[0], float) else np.int32),
    "numpy scalars": lambda values: [np.array(value)[()] for value in values],
    "torch": lambda values: torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64),
    "torch scalars": lambda values: list(NUMBERS["torch"](values)),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_libraries(kind, config, tmp_path) -> None:
    make = NUMBERS[kind]
    config.token_pruning = TOKEN_PRUNING | {"layers": make([1, 3]), "keep_ratios": make([0.7, 0.6])}
    assert config.token_pruning == TOKEN_PRUNING
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).token_pruning == TOKEN_PRUNING
    config.token_pruning = {"flops_reduction": make([0.3])[0]}
    assert count_flops(config).reduction == pytest.approx(0.3, abs=0.005)


def test_schedule_cannot_be_changed_in_place(config) -> None:
    config.token_pruning = dict(TOKEN_PRUNING)
    for change in (
        lambda: config.token_pruning.update(method="evit"),
        lambda: config.token_pruning.__setitem__("method", "evit"),
        lambda: config.token_pruning.pop("method"),
    ):
        with pytest.raises(TypeError, match=r"can't be changed in place: set `config\.token_pruning`"):
            change()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.token_pruning == TOKEN_PRUNING
        assert copied.token_pruning.stages == {1: 0.7, 3: 0.6}


@pytest.mark.parametrize(("name", "value"), [("layers", 2), ("keep_ratios", 1.5)])
def test_lists_of_a_schedule_that_were_changed_are_noticed(name, value, pixel_values) -> None:
    model = make_model(make_config("plainmamba", token_pruning=schedule()))
    model.config.token_pruning[name][-1] = value
    with pytest.raises(TypeError, match=r"can't be changed in place: set `config\.token_pruning`"):
        model(pixel_values)
    model.set_token_pruning(schedule())
    assert len(model(pixel_values).kept_tokens) == 2


def test_options_of_from_pretrained_in_any_order(config, tmp_path) -> None:
    """A schedule and its depth override the saved ones; nothing is checked before both are set."""
    config.token_pruning = TOKEN_PRUNING | {"method": "local_top"}
    config.save_pretrained(tmp_path)
    budget = {"flops_reduction": 0.24}
    for options in (
        {"num_hidden_layers": 2, "token_pruning": budget},
        {"token_pruning": budget, "num_hidden_layers": 2},
    ):
        opened = AutoConfig.from_pretrained(tmp_path, **options)
        assert opened.token_pruning["layers"] == [1]
        assert opened.token_pruning["method"] == "local_top"
        assert count_flops(opened).reduction == pytest.approx(0.24, abs=0.005)
    with pytest.raises(ValueError, match=r"'layers'.*\[1, 3\]; .*the allowed layers are 1 to 1"):
        AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2)


def test_depth_changed_on_a_configuration(config) -> None:
    config.token_pruning = dict(TOKEN_PRUNING)
    config.num_hidden_layers = 6
    assert config.token_pruning == TOKEN_PRUNING
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"'layers'.*\[1, 3\]; .*the allowed layers are 1 to 2"):
        _ = config.token_pruning


def test_schedule_of_one_call(config, pixel_values) -> None:
    model = FAMILIES[config.model_type].classifier(config).eval()
    with torch.no_grad():
        dense = model(pixel_values).logits
        pruned = model(pixel_values, token_pruning=dict(TOKEN_PRUNING))
        assert config.token_pruning is None
        model.set_token_pruning(dict(TOKEN_PRUNING))
        assert torch.equal(model(pixel_values).logits, pruned.logits)
        assert torch.equal(model(pixel_values, token_pruning=None).logits, dense)
        assert model.config.token_pruning == TOKEN_PRUNING
        with pytest.raises(ValueError, match="the allowed layers are 1 to 3"):
            model(pixel_values, token_pruning={"layers": [9], "keep_ratios": [0.5]})
        deeper = make_config(config.model_type, num_hidden_layers=10)
        with pytest.raises(ValueError, match="the allowed layers are 1 to 3"):
            model(pixel_values, token_pruning=deeper.complete_token_pruning({"layers": [9], "keep_ratios": [0.5]}))


def test_options_of_a_call_that_are_not_known(config, pixel_values) -> None:
    for model in (
        FAMILIES[config.model_type].classifier(config),
        FAMILIES[config.model_type].classifier(config).base_model,
    ):
        with pytest.raises(TypeError, match=r"got unknown options \['interpolate_position'\]"):
            model(pixel_values, interpolate_position=True)


@pytest.mark.parametrize(
    "token_pruning", [None, dict(TOKEN_PRUNING), {"flops_reduction": 0.3, "alignment": "zero_input"}]
)
def test_config_file_keeps_the_schedule(token_pruning, config, tmp_path) -> None:
    config = type(config)(**{**config.to_diff_dict(), "token_pruning": token_pruning})
    config.save_pretrained(tmp_path)
    opened = type(config).from_pretrained(tmp_path)
    assert opened.token_pruning == config.token_pruning
    assert opened.to_dict() == config.to_dict()
    assert opened.token_pruning is None or opened.token_pruning["method"] in METHODS


def test_another_budget_keeps_the_method(config) -> None:
    model = FAMILIES[config.model_type].classifier(config)
    model.set_token_pruning({"flops_reduction": 0.2, "method": "local_top", "alignment": "none"})
    method = {"method": "local_top", "alignment": "none", "importance": "l1"}
    for given in ({"flops_reduction": 0.3}, {"layers": [2], "keep_ratios": [0.5]}):
        model.set_token_pruning(given)
        assert model.config.token_pruning.items() >= method.items()
    model.set_token_pruning({"flops_reduction": 0.3, "importance": "clip"})
    assert model.config.token_pruning.items() >= (method | {"importance": "clip"}).items()
    model.set_token_pruning({"flops_reduction": 0.3, "method": "local_top"})  # named, it comes with its own defaults
    assert model.config.token_pruning["alignment"] == "repeat"
    model.set_token_pruning(None)
    model.set_token_pruning({"flops_reduction": 0.3})
    assert model.config.token_pruning["method"] == RECOMMENDED_METHOD


@pytest.mark.parametrize(
    "wrong", [{"method": "tpo"}, {"method": ["top"]}, {"method": "top", "alignment": "hold"}, {"layers": [9]}], ids=str
)
def test_another_budget_inherits_nothing_from_a_schedule_that_is_not_valid(wrong, config) -> None:
    """It keeps the method of the last valid one."""
    budget, own = {"flops_reduction": 0.3}, {"method": "local_top", "alignment": "none", "importance": "l1"}
    config.token_pruning = TOKEN_PRUNING | own
    for _ in range(2):
        config.token_pruning = {"layers": [1], "keep_ratios": [0.5], **wrong}
        with pytest.raises(ValueError, match="`token_pruning"):
            _ = config.token_pruning
        assert config.complete_token_pruning(budget).items() >= own.items()
    config.token_pruning = budget
    assert config.token_pruning.items() >= own.items()
    copied = copy.deepcopy(config)
    copied.num_hidden_layers = 2  # which its schedule does not fit
    copied.token_pruning = {"layers": [1], "keep_ratios": [0.5]}
    assert copied.token_pruning.items() >= own.items()


@pytest.mark.parametrize(
    "options", [{"method": "dyvm"}, {"alignment": "learned"}, {"method": "top", "block_keep_ratio": 0.9}], ids=str
)
def test_another_budget_uses_the_parameters_that_were_trained(options) -> None:
    """They belong to layers, and the layers found for a budget may be others."""
    model = FAMILIES["vim"].classifier(make_config("vim"))
    model.set_token_pruning({"layers": [2, 3], "keep_ratios": [0.8, 0.8], **options})
    names = set(model.state_dict())
    model.set_token_pruning({"flops_reduction": 0.2})
    assert model.config.token_pruning["layers"] == [2, 3]
    assert set(model.state_dict()) == names
    config = type(model.config).from_dict(model.config.to_dict(), token_pruning={"flops_reduction": 0.25})
    assert config.token_pruning["layers"] == [2, 3]
    model.set_token_pruning({"flops_reduction": 0.2, "layers": [1, 3]})
    assert model.config.token_pruning["layers"] == [1, 3]


def test_schedule_of_a_loaded_model(config, pixel_values) -> None:
    model = FAMILIES[config.model_type].classifier(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        dense = model(pixel_values)
        model.set_token_pruning({"flops_reduction": 0.3})
        pruned = model(pixel_values)
        model.set_token_pruning(None)
        again = model(pixel_values)
    assert dense.kept_tokens is dense.token_scores is None
    assert len(pruned.kept_tokens) == len(pruned.token_scores) == 2
    assert torch.equal(dense.logits, again.logits)
    assert not torch.equal(dense.logits, pruned.logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- Budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flops_reduction", [0.1, 0.2, 0.3, 0.4, 0.416, 0.5, 0.6, 0.7])
@pytest.mark.parametrize(("config_class", "preset"), PRESETS)
def test_budget_is_met(config_class, preset, flops_reduction) -> None:
    config = config_class.from_preset(preset, token_pruning={"flops_reduction": flops_reduction})
    assert abs(count_flops(config).reduction - flops_reduction) <= 0.005
    assert config.token_pruning["method"] == RECOMMENDED_METHOD
    assert all(0 < ratio <= 1 for ratio in config.token_pruning["keep_ratios"])


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("layers", [[4], [6], (2, 9), [2, 3, 4, 5, 6, 7]])
def test_budget_at_given_layers(layers, family) -> None:
    config = make_config(
        family, image_size=128, num_hidden_layers=12, token_pruning={"flops_reduction": 0.3, "layers": layers}
    )
    assert config.token_pruning["layers"] == list(layers)
    assert count_flops(config).reduction == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("flops_reduction", [0.01, 0.2, 0.416, 0.6])
def test_budget_at_other_image_sizes(flops_reduction) -> None:
    for image_size in (112, [224, 384]):
        config = PlainMambaConfig.from_preset(
            "L1", image_size=image_size, token_pruning={"flops_reduction": flops_reduction}
        )
        assert count_flops(config).reduction == pytest.approx(flops_reduction, abs=0.005)


def test_budget_near_the_paper_needs_the_papers_layers() -> None:
    config = PlainMambaConfig.from_preset("L3", token_pruning={"flops_reduction": 0.416})
    assert config.token_pruning["layers"] == [6, 12, 18]
    assert config.token_pruning["keep_ratios"] == pytest.approx([0.7, 0.7, 0.7], abs=0.01)


def test_budget_of_a_clip_counts_what_matching_costs() -> None:
    """Matching is quadratic in the number of tokens, and clips have thousands. Its cost decides which layers are early
    enough."""
    budget = {"flops_reduction": 0.8, "method": "r_meeto"}
    config = VideoMambaConfig.from_preset("Ti", token_pruning=budget)
    assert config.token_pruning["layers"] == [2, 4, 6]
    assert count_flops(config).reduction == pytest.approx(0.8, abs=0.005)
    with pytest.raises(ValueError, match=r"dropping all but one token at \[1, 2, 3\] removes 0\.786"):
        VideoMambaConfig.from_preset("Ti", num_frames=64, token_pruning=budget)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_budget_that_few_tokens_cannot_meet(family) -> None:
    """With four tokens, the possible reductions are far apart."""
    with pytest.raises(
        ValueError, match=r"`flops_reduction` is 0\.05; with 4 tokens .* the nearest one removes 0\.\d+"
    ):
        make_config(family, image_size=16, token_pruning={"flops_reduction": 0.05})
    with pytest.raises(ValueError, match="a model of 1 layer has no layer before which"):
        make_config(family, num_hidden_layers=1, token_pruning={"flops_reduction": 0.3})
