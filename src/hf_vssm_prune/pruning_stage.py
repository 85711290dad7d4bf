"""The contract of a pruning method: what it gets at a stage, and what it gives back.

Three spaces have indices, and each has one name everywhere. A *token* is a place in the full sequence, class token
included. A *cell* is a place on the full grid of patches. A *row* is a place among the tokens that are still there, in
the tensor that it belongs to.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .mixer_output import MixerOutput
from .token_pruning import nearest_tokens


class TokenView(NamedTuple):
    """How the layers behind a stage see the tokens that are left, beside their hidden states.

    Attributes:
        scale: mixers see each token multiplied by it, behind the norm, which would hide a factor; shape (batch, n).
            None: by 1.
        stand_ins: the row of the token that convolutions see in each cell, int64 of shape (batch, cells). None: they
            see nothing where a token is gone.
    """

    scale: Tensor | None = None
    stand_ins: Tensor | None = None


class StageModule(nn.Module):
    """Parameters that a method has at each of its stages."""

    def init_weights(self) -> None:
        """Initialises them, by `transformers.initialization` only."""
        raise NotImplementedError


class Stage(NamedTuple):
    """The n patch tokens before a layer that is to see fewer of them. A class token may be looked at; it stays.

    Attributes:
        hidden_states: of the patch tokens that are there, in raster order, shape (batch, n, hidden).
        num_kept: how many are to be left.
        cells: of these tokens, ascending, shape (batch, n).
        grid: shape of the full grid, in patches: (height, width), of a video (time, height, width).
        mixer: what the mixer of the layer before tells of all tokens, see `of_patches` and `of_cls_token`.
        patch_rows: the patch tokens' rows among all tokens, shape (batch, n). None: there is no class token.
        cls_row: the class token's row among all tokens, shape (batch, 1). None: there is none.
        cls_token: hidden state of the class token, shape (batch, hidden). None: there is none.
        sizes: how many patches were merged into each token, float of shape (batch, n). None: one each, or not counted.
        view: how the layers before saw these tokens. Its stand-ins are rows among all tokens of the stage before.
        importance: the measure that the schedule asks for, see `pruning_importances`.
        module: the method's parameters at this stage, where it has some.
    """

    hidden_states: Tensor
    num_kept: int
    cells: Tensor
    grid: tuple[int, ...]
    mixer: MixerOutput
    patch_rows: Tensor | None = None
    cls_row: Tensor | None = None
    cls_token: Tensor | None = None
    sizes: Tensor | None = None
    view: TokenView = TokenView()
    importance: "Callable[[Stage], Tensor] | None" = None
    module: nn.Module | None = None

    def of_patches(self, values: Tensor) -> Tensor:
        """The patch tokens' rows of the mixer's values (batch, tokens) or (batch, tokens, channels)."""
        return values if self.patch_rows is None else _take(values, self.patch_rows)

    def of_cls_token(self, values: Tensor) -> Tensor:
        """The class token's row of the mixer's values (batch, tokens) or (batch, tokens, channels).

        Raises:
            ValueError: the model has no class token.
        """
        if self.cls_row is None:
            raise ValueError("this model has no class token.")
        return _take(values, self.cls_row).squeeze(1)

    def scores(self) -> Tensor:
        """The patch tokens' importance, shape (batch, n)."""
        if self.importance is None:
            raise ValueError("the schedule names no importance, but its method needs one.")
        return self.importance(self)

    def nearest(self, rows: Tensor) -> Tensor:
        """For each cell of the grid which of the tokens in `rows` is nearest: as `TokenView.stand_ins`."""
        return nearest_tokens(self.cells.gather(1, rows), self.grid)


def _take(values: Tensor, rows: Tensor) -> Tensor:
    return values.gather(1, rows if values.ndim == 2 else rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class Reduction(NamedTuple):
    """What a method makes of a stage.

    Attributes:
        rows: of the stage's tokens that are left, ascending, int64 (batch, num_kept). A token that others were merged
            into keeps its place.
        hidden_states: of these tokens, shape (batch, num_kept, hidden).
        scores: what the method compared tokens by, in all of the image or in a part of it, higher for one that rather
            stays, shape (batch, n).
        merged_into: for each of the stage's tokens the row of the one that it was merged into, its own if it stays or
            is dropped, int64 (batch, n). None: the tokens that are not left were dropped.
        sizes: as in `Stage`, shape (batch, num_kept), where the method counts them: heads that take a mean over tokens
            then take it over patches. None: not counted.
        view: how the layers behind the stage see the tokens that are left.
    """

    rows: Tensor
    hidden_states: Tensor
    scores: Tensor
    merged_into: Tensor | None = None
    sizes: Tensor | None = None
    view: TokenView = TokenView()
