"""transformers' own tests for models, backbones and configurations, run for all families, dense and pruned.

transformers' `PipelineTesterMixin` is left out: it downloads its tiny models from the Hub, and works only for classes
that are part of transformers. `test_remote_code.py` tests pipelines.
"""

import unittest

import pytest
import torch
import transformers_suite
from transformers.models.auto import modeling_auto

import hf_vssm_prune
from hf_vssm_prune.families import FAMILIES


try:
    modeling = transformers_suite.import_suite("test_modeling_common")
    configuration = transformers_suite.import_suite("test_configuration_common")
    backbone = transformers_suite.import_suite("test_backbone_common")
except transformers_suite.SuiteUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


TABLES = {
    "Model": "MODEL_MAPPING_NAMES",
    "ForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ForVideoClassification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "Backbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
}


@pytest.fixture(autouse=True)
def known_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite looks up names in the tables of transformers' own models, which `AutoModel.register` does not
    extend."""
    for model_type, family in FAMILIES.items():
        for end, found in family.classes.items():
            monkeypatch.setitem(getattr(modeling_auto, TABLES[end]), model_type, found.__name__)


class PlainMambaTester:
    """What the suite asks for: a tiny configuration, inputs, and the expected sizes of outputs."""

    config_class = hf_vssm_prune.PlainMambaConfig
    options = {"num_stem_convs": 1, "depthwise_layers": [0]}
    seq_length = 16

    is_training = True
    batch_size = 4
    image_size = 16
    hidden_size = 16
    num_hidden_layers = 2

    def __init__(self, token_pruning: dict | None) -> None:
        self.token_pruning = token_pruning

    def get_config(self):
        return self.config_class(
            image_size=self.image_size,
            patch_size=4,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            state_size=4,
            token_pruning=self.token_pruning,
            num_labels=3,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": pixel_values}


class VimTester(PlainMambaTester):
    config_class = hf_vssm_prune.VimConfig
    options = {"patch_stride": 4}
    seq_length = 17


class VideoMambaImageTester(PlainMambaTester):
    config_class = hf_vssm_prune.VideoMambaConfig
    options = {"patch_stride": 4, "num_frames": None}
    seq_length = 17


class VideoMambaTester(PlainMambaTester):
    """Inputs are clips instead of images."""

    config_class = hf_vssm_prune.VideoMambaConfig
    options = {"num_frames": 4, "tubelet_size": 2}
    seq_length = 33

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 4, 3, self.image_size, self.image_size)}


class ModelTest(modeling.ModelTesterMixin):
    """What differs from the language models for which the suite is written."""

    model_tester_class: type[PlainMambaTester]
    token_pruning: dict | None = None

    has_attentions = False
    test_resize_embeddings = False
    # The suite tells a model's age by a copyright header, which files here do not have.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self.token_pruning)

    def test_config(self):
        config_tester = configuration.ConfigTester(
            self,
            config_class=self.model_tester_class.config_class,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers", "image_size", "num_channels"],
            hidden_size=32,
            token_pruning=self.model_tester.get_config().token_pruning,
        )
        config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        """The suite expects `nn.Embedding`, but an image model embeds patches with a convolution."""
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            model = model_class(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            output = model.get_output_embeddings()
            assert output is None or isinstance(output, torch.nn.Linear)


TOKEN_PRUNING = {"layers": [1], "keep_ratios": [0.5]}


class PlainMambaModelTest(ModelTest, unittest.TestCase):
    model_tester_class = PlainMambaTester
    all_model_classes = (hf_vssm_prune.PlainMambaModel, hf_vssm_prune.PlainMambaForImageClassification)


class PrunedPlainMambaModelTest(PlainMambaModelTest):
    token_pruning = TOKEN_PRUNING


class VimModelTest(ModelTest, unittest.TestCase):
    model_tester_class = VimTester
    all_model_classes = (hf_vssm_prune.VimModel, hf_vssm_prune.VimForImageClassification)


class PrunedVimModelTest(VimModelTest):
    token_pruning = TOKEN_PRUNING


class VideoMambaModelTest(ModelTest, unittest.TestCase):
    model_tester_class = VideoMambaTester
    all_model_classes = (hf_vssm_prune.VideoMambaModel, hf_vssm_prune.VideoMambaForVideoClassification)


class PrunedVideoMambaModelTest(VideoMambaModelTest):
    token_pruning = TOKEN_PRUNING


class VideoMambaImageModelTest(ModelTest, unittest.TestCase):
    model_tester_class = VideoMambaImageTester
    all_model_classes = (hf_vssm_prune.VideoMambaModel, hf_vssm_prune.VideoMambaForImageClassification)


class PlainMambaBackboneTest(backbone.BackboneTesterMixin, unittest.TestCase):
    config_class = hf_vssm_prune.PlainMambaConfig
    all_model_classes = (hf_vssm_prune.PlainMambaBackbone,)
    model_tester_class = PlainMambaTester
    token_pruning: dict | None = None
    has_attentions = False

    def setUp(self):
        self.model_tester = self.model_tester_class(self.token_pruning)


class PrunedPlainMambaBackboneTest(PlainMambaBackboneTest):
    token_pruning = TOKEN_PRUNING


class VimBackboneTest(PlainMambaBackboneTest):
    config_class = hf_vssm_prune.VimConfig
    all_model_classes = (hf_vssm_prune.VimBackbone,)
    model_tester_class = VimTester


class PrunedVimBackboneTest(VimBackboneTest):
    token_pruning = TOKEN_PRUNING


class VideoMambaBackboneTest(PlainMambaBackboneTest):
    config_class = hf_vssm_prune.VideoMambaConfig
    all_model_classes = (hf_vssm_prune.VideoMambaBackbone,)
    model_tester_class = VideoMambaImageTester


class PrunedVideoMambaBackboneTest(VideoMambaBackboneTest):
    token_pruning = TOKEN_PRUNING
