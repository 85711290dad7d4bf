"""Loss terms compared with their definitions, computed by hand in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MAKE_CONFIG, TOKEN_PRUNING
from transformers import AutoModelForImageClassification

from hf_vssm_prune.training.losses import (
    LossWeights,
    alignment_loss,
    cross_entropy,
    distillation_loss,
    segment_ends,
    training_loss,
)
from hf_vssm_prune.training.tasks.classification import ImageClassification


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(5, 4, dtype=torch.float64)


def test_cross_entropy_of_hard_labels_with_smoothing(logits):
    labels = torch.tensor([0, 3, 1, 1, 2])
    target = 0.9 * np.eye(4)[labels] + 0.1 / 4
    expected = -(target * np.log(softmax(logits.numpy()))).sum(-1).mean()
    assert cross_entropy(logits, labels, label_smoothing=0.1).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_soft_labels(logits):
    labels = torch.rand(5, 4, dtype=torch.float64).softmax(-1)
    expected = -(labels.numpy() * np.log(softmax(logits.numpy()))).sum(-1).mean()
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_half_precision_logits_is_computed_in_float32(logits):
    labels = torch.tensor([0, 3, 1, 1, 2])
    halved = logits.bfloat16()
    assert cross_entropy(halved, labels).dtype == torch.float32
    torch.testing.assert_close(cross_entropy(halved, labels), cross_entropy(halved.float(), labels))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss(logits, temperature):
    teacher = 3 * torch.randn(5, 4, dtype=torch.float64)
    p, q = softmax(teacher.numpy() / temperature), softmax(logits.numpy() / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1).mean()
    assert distillation_loss(logits, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-12)


def normalised(states: np.ndarray) -> np.ndarray:
    centred = states - states.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


@pytest.fixture
def pruned_states():
    """Hidden states of 4 layers and 6 tokens. Layer 1 keeps 4 tokens, and layer 3 keeps 2 of them."""
    kept = (torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]]), torch.tensor([[2, 5], [1, 4]]))
    tokens_after_embedding_and_layers = (6, 6, 4, 4, 2)
    student = tuple(torch.randn(2, n, 8, dtype=torch.float64) for n in tokens_after_embedding_and_layers)
    teacher = tuple(torch.randn(2, 6, 8, dtype=torch.float64) for _ in student)
    return student, teacher, kept


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_alignment_loss(pruned_states, distance):
    student, teacher, kept = pruned_states
    stage_of_layer = {0: None, 1: 0, 2: 0, 3: 1}
    expected = []
    for layer in (0, 1, 2, 3):
        for sample in range(2):
            ids = range(6) if stage_of_layer[layer] is None else kept[stage_of_layer[layer]][sample].tolist()
            for row, token in enumerate(ids):
                s = student[layer + 1][sample, row].numpy()
                t = teacher[layer + 1][sample, token].numpy()
                if distance == "mse":
                    value = ((normalised(s) - normalised(t)) ** 2).mean()
                else:
                    value = 1 - s @ t / np.sqrt((s @ s) * (t @ t))
                expected.append((layer, value))
    layers = [1, 2, 3]
    by_layer = [np.mean([value for at, value in expected if at == layer]) for layer in layers]
    loss = alignment_loss(student, teacher, kept, [1, 3], layers, distance)
    assert loss.item() == pytest.approx(np.mean(by_layer), rel=1e-10)
    first = alignment_loss(student, teacher, kept, [1, 3], [0], distance)
    assert first.item() == pytest.approx(np.mean([value for at, value in expected if at == 0]), rel=1e-10)


def test_alignment_loss_sends_no_gradient_to_the_teacher(pruned_states):
    student, teacher, kept = pruned_states
    for states in (*student, *teacher):
        states.requires_grad_()
    alignment_loss(student, teacher, kept, [1, 3], [1, 3]).backward()
    assert student[2].grad.abs().sum() > 0
    assert all(states.grad is None for states in teacher)


def test_segment_ends_are_the_last_layers_of_the_stages():
    assert segment_ends([6, 12, 18], 36) == [11, 17, 35]
    assert segment_ends([1], 4) == [3]
    assert segment_ends([], 4) == [3]


@pytest.fixture(params=sorted(MAKE_CONFIG))
def student_and_teacher(request):
    """The same weights, pruned and dense."""
    teacher = AutoModelForImageClassification.from_config(MAKE_CONFIG[request.param]())
    student = AutoModelForImageClassification.from_config(MAKE_CONFIG[request.param]())
    teacher.classifier.weight.data *= 30  # or the logits differ by no more than what float32 rounds
    student.load_state_dict(teacher.state_dict())
    student.set_token_pruning(dict(TOKEN_PRUNING))
    return student.eval(), teacher.eval().requires_grad_(False)


WEIGHTS = LossWeights(kd_weight=0.5, kd_temperature=2.0, alignment_weight=0.25)


def test_the_terms_add_up_and_reach_the_student_only(student_and_teacher, pixel_values):
    student, teacher = student_and_teacher
    labels = torch.tensor([0, 2])
    outputs = student(pixel_values, output_hidden_states=True)
    targets = teacher(pixel_values, output_hidden_states=True)
    terms = training_loss(ImageClassification(), outputs, targets, {"labels": labels}, WEIGHTS, TOKEN_PRUNING["layers"])
    assert set(terms) == {"loss", "cross_entropy", "distillation", "alignment"}
    assert all(value > 0 for value in terms.values())
    expected = terms["cross_entropy"] + 0.5 * terms["distillation"] + 0.25 * terms["alignment"]
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["alignment"], hand_made_alignment(outputs, targets))
    by_cosine, layers = replace(WEIGHTS, alignment_distance="cosine"), TOKEN_PRUNING["layers"]
    others = training_loss(ImageClassification(), outputs, targets, {"labels": labels}, by_cosine, layers)
    cosine = alignment_loss(
        outputs.hidden_states, targets.hidden_states, outputs.kept_tokens, layers, segment_ends(layers, 4), "cosine"
    )
    torch.testing.assert_close(others["alignment"], cosine)
    assert not torch.isclose(cosine, terms["alignment"])
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in student.parameters()) > 0


def hand_made_alignment(outputs, targets) -> torch.Tensor:
    """Alignment loss of layers 2 and 3, before and after the second stage."""
    losses = []
    for layer, stage in ((2, 0), (3, 1)):
        student = outputs.hidden_states[layer + 1]
        rows = [t[ids] for t, ids in zip(targets.hidden_states[layer + 1], outputs.kept_tokens[stage], strict=True)]
        assert student.shape[1] == outputs.kept_tokens[stage].shape[1]
        teacher = torch.stack(rows)
        channels = student.shape[-1:]
        difference = torch.layer_norm(student, channels) - torch.layer_norm(teacher, channels)
        losses.append((difference**2).mean())
    return torch.stack(losses).mean()


def test_without_pruning_a_student_equal_to_its_teacher_has_nothing_to_align(student_and_teacher, pixel_values):
    student, teacher = student_and_teacher
    student.set_token_pruning(None)
    outputs = student(pixel_values, output_hidden_states=True)
    targets = teacher(pixel_values, output_hidden_states=True)
    terms = training_loss(ImageClassification(), outputs, targets, {"labels": torch.tensor([0, 2])}, WEIGHTS)
    assert terms["alignment"].item() == 0
    assert terms["distillation"].item() == pytest.approx(0, abs=1e-6)


def test_a_schedule_that_keeps_everything_has_nothing_to_align(student_and_teacher, pixel_values):
    student, teacher = student_and_teacher
    student.set_token_pruning({"layers": [1, 3], "keep_ratios": [1.0, 1.0]})
    outputs = student(pixel_values, output_hidden_states=True)
    targets = teacher(pixel_values, output_hidden_states=True)
    terms = training_loss(ImageClassification(), outputs, targets, {"labels": torch.tensor([0, 2])}, WEIGHTS, [1, 3])
    assert terms["alignment"].item() == pytest.approx(0, abs=1e-8)


def test_terms_with_weight_0_are_left_out(student_and_teacher, pixel_values):
    student, _ = student_and_teacher
    labels = torch.tensor([0, 2])
    outputs = student(pixel_values)
    terms = training_loss(
        ImageClassification(), outputs, None, {"labels": labels}, LossWeights(), TOKEN_PRUNING["layers"]
    )
    assert set(terms) == {"loss", "cross_entropy"}
    torch.testing.assert_close(terms["loss"], torch.nn.functional.cross_entropy(outputs.logits, labels))
