"""The losses of pruned fine-tuning, as pure functions.

    loss = task + kd_weight * distillation + alignment_weight * alignment + block_ratio_weight * block_ratio

The task's own terms are for instance a cross-entropy, and its distillation T² KL(teacher ‖ student logits). The teacher
is the same network, dense and frozen. The alignment compares hidden states at the tokens that the student kept. The
last term exists only for models that select blocks. All terms are computed in float32 or higher precision, regardless
of the model's precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_vssm_prune.precision import at_least_float32
from hf_vssm_prune.token_pruning import gather_tokens


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the batch.

    Args:
        logits: (batch, labels).
        labels: class ids (batch,), or probabilities (batch, labels) as mixup and CutMix make them.
        label_smoothing: fraction of each label that is distributed evenly over all classes.
    """
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=label_smoothing)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher ‖ student) of the softened predictions, mean over the batch (Hinton et al., arXiv 1503.02531).

    T² keeps the gradient's size independent of the temperature. No gradient flows into the teacher.

    Args:
        student_logits, teacher_logits: (batch, labels).
        temperature: T > 0.
    """
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _mean_squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    channels = student.shape[-1:]
    return F.mse_loss(F.layer_norm(student, channels), F.layer_norm(teacher, channels))


def _cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


ALIGNMENT_DISTANCES = {"mse": _mean_squared_distance, "cosine": _cosine_distance}


def alignment_loss(
    student_hidden_states: Sequence[Tensor],
    teacher_hidden_states: Sequence[Tensor],
    kept_tokens: Sequence[Tensor],
    pruning_layers: Sequence[int],
    layers: Sequence[int],
    distance: str = "mse",
) -> Tensor:
    """The distance between the student's and the teacher's hidden states at the tokens that the student kept, averaged
    over layers. No gradient flows into the teacher.

    Args:
        student_hidden_states: the student's `hidden_states`: the output of the embeddings, then that of each layer,
            each (batch, n, hidden) with the n tokens remaining there.
        teacher_hidden_states: the same for the dense model, with all tokens.
        kept_tokens: for each pruning stage, the original ids (batch, n) of the tokens that remain after it.
        pruning_layers: the layers before which these stages drop tokens, ascending.
        layers: the layers whose outputs are compared.
        distance: `mse`, the mean squared difference after a layer norm without parameters; or `cosine`, one minus the
            cosine of the angle between the two states of a token.
    """
    measure = ALIGNMENT_DISTANCES[distance]
    distances = []
    for layer in layers:
        student, teacher = student_hidden_states[layer + 1], teacher_hidden_states[layer + 1].detach()
        stages_before = sum(pruning_layer <= layer for pruning_layer in pruning_layers)
        if stages_before:
            teacher = gather_tokens(teacher, kept_tokens[stages_before - 1])
        distances.append(measure(at_least_float32(student), at_least_float32(teacher)))
    return torch.stack(distances).mean()


def segment_ends(pruning_layers: Sequence[int], num_hidden_layers: int) -> list[int]:
    """The last layer that processes the tokens of each stage, where the stage's effect on the hidden states is
    complete."""
    return [layer - 1 for layer in pruning_layers[1:]] + [num_hidden_layers - 1]


def block_ratio_loss(block_gates: Sequence[Tensor], block_keep_ratio: float) -> Tensor:
    """The square of the distance between the fraction of the scan directions that ran in this batch, over all images
    and all layers that select, and the requested fraction (DyVM, arXiv 2504.04787).

    Args:
        block_gates: for each of these layers the gates, 0 or 1, shape (batch, directions).
        block_keep_ratio: the requested fraction.
    """
    return (at_least_float32(torch.stack(list(block_gates))).mean() - block_keep_ratio) ** 2


BLOCK_RATIO_WEIGHT = 10.0  # in the authors' scripts for classification; for segmentation, it is 20


@dataclass(frozen=True)
class LossWeights:
    """The weights of the loss terms.

    Attributes:
        kd_weight: weight of the distillation loss; 0 turns it off.
        kd_temperature: T.
        alignment_weight: weight of the alignment loss; 0 turns it off.
        alignment_layers: layers whose outputs are compared; None for `segment_ends`.
        alignment_distance: one of `ALIGNMENT_DISTANCES`.
        block_ratio_weight: weight of the block ratio loss of a model that selects blocks; None for 10; 0 turns it off,
            so that nothing limits the number of blocks that run.
    """

    kd_weight: float = 0.0
    kd_temperature: float = 1.0
    alignment_weight: float = 0.0
    alignment_layers: tuple[int, ...] | None = None
    alignment_distance: str = "mse"
    block_ratio_weight: float | None = None

    def model_options(self, block_keep_ratio: float | None) -> dict[str, bool]:
        """The options of a model's call that return what the losses need, see `training_loss`."""
        options = {"output_hidden_states": self.alignment_weight > 0}
        return options if block_keep_ratio is None else options | {"output_block_gates": True}

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0 or self.alignment_weight > 0

    def check_layers(self, num_hidden_layers: int) -> None:
        """Raises an error for layers that the model does not have.

        Raises:
            ValueError: there are some.
        """
        if outside := [layer for layer in self.alignment_layers or () if not 0 <= layer < num_hidden_layers]:
            raise ValueError(f"--alignment_layers has {outside}: the model has layers 0 to {num_hidden_layers - 1}.")


class TaskLoss(Protocol):
    """The part of a task that the loss uses; see `tasks.task.Task`."""

    def losses(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]: ...

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Tensor: ...


def training_loss(
    task: TaskLoss,
    student: Any,
    teacher: Any | None,
    batch: dict[str, Any],
    weights: LossWeights,
    pruning_layers: Sequence[int] = (),
    block_keep_ratio: float | None = None,
) -> dict[str, Tensor]:
    """The total loss of a batch, under "loss", and its unweighted terms by name, each a scalar: the task's own terms
    and, if they are on, "distillation", "alignment" and "block_ratio".

    Args:
        task: defines the terms that need no teacher, and the distance between two outputs.
        student: output of the trained model; the alignment needs its `hidden_states` and `kept_tokens`, the block ratio
            its `block_gates`.
        teacher: output of the dense model; None if neither distillation nor alignment is on.
        batch: the batch after mixing by the task.
        weights: weights of the terms.
        pruning_layers: the student's pruning layers.
        block_keep_ratio: that of the student's schedule; None: it does not select blocks.
    """
    terms = task.losses(student, batch)
    loss = torch.stack(list(terms.values())).sum()
    if teacher is not None and weights.kd_weight > 0:
        terms["distillation"] = task.distillation(student, teacher, weights.kd_temperature)
        loss = loss + weights.kd_weight * terms["distillation"]
    if teacher is not None and weights.alignment_weight > 0:
        states = _hidden_states(student)
        layers = weights.alignment_layers or segment_ends(pruning_layers, len(states) - 1)
        terms["alignment"] = alignment_loss(
            states,
            _hidden_states(teacher),
            student.kept_tokens or (),
            pruning_layers,
            layers,
            weights.alignment_distance,
        )
        loss = loss + weights.alignment_weight * terms["alignment"]
    if block_keep_ratio is not None and weights.block_ratio_weight != 0:
        weight = BLOCK_RATIO_WEIGHT if weights.block_ratio_weight is None else weights.block_ratio_weight
        terms["block_ratio"] = block_ratio_loss(student.block_gates, block_keep_ratio)
        loss = loss + weight * terms["block_ratio"]
    return {"loss": loss, **terms}


@torch.no_grad()
def run_teacher(teacher: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """A teacher's output for the student's inputs. It gets no labels: its own loss is not needed, and a detector cannot
    compute it in half precision."""
    return teacher(**{name: value for name, value in inputs.items() if name != "labels"})


def _hidden_states(outputs: Any) -> Sequence[Tensor]:
    """The hidden states of the backbone, if the model has one, because its head may have others; otherwise the model's
    own."""
    states = getattr(outputs, "backbone_hidden_states", None)
    return outputs.hidden_states if states is None else states
