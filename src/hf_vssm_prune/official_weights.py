"""What the classes of a family's models tell of the files in which its authors published weights: see `conversion`."""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor


# Our names of tensors -> published names; the first pattern that matches the whole name counts.
OfficialNames = list[tuple[str, str | Callable[[re.Match[str]], str]]]


class OfficialWeights:
    """The defaults of a family.

    Attributes:
        official_names: of an image classifier's tensors.
        official_marks: names of tensors by which a file is known as the family's.
        official_weight_key: under which the family's own training code saves weights.
        official_ignored: beginnings of names that are no part of the model.
        official_last_weights: beginnings of the names of a second set of weights, the last ones, which lies beside the
            model's own where training saves averaged weights under the model's names.
    """

    official_names: ClassVar[OfficialNames] = []
    official_marks: ClassVar[tuple[str, ...]] = ()
    official_weight_key: ClassVar[str] = "model"
    official_ignored: ClassVar[tuple[str, ...]] = ()
    official_last_weights: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def options_of_official(cls, official: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the configuration that published tensors, `conversion.OfficialTensors`, imply beside overrides."""
        raise NotImplementedError

    @classmethod
    def complete_official(cls, official: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors with what a file may lack or have in another layout, to those that the model expects."""
        return official
