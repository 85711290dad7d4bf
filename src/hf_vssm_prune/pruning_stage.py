"""The interface of a pruning method: what it receives at a stage, and what it returns.

There are three kinds of indices, which have the same names everywhere. A *token* is a position in the full sequence,
including the class token. A *cell* is a position on the full grid of patches. A *row* is a position among the remaining
tokens, in the tensor in question.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .mixer_output import MixerOutput
from .token_pruning import nearest_tokens


class TokenView(NamedTuple):
    """How the layers after a stage see the remaining tokens, in addition to their hidden states.

    Attributes:
        scale: factor by which each token is multiplied for the mixers, after the norm (which would cancel it); shape
            (batch, n). None: 1.
        stand_ins: the row of the token that convolutions see in each cell, int64 of shape (batch, cells). None: they
            see nothing in the cell of a dropped token.
    """

    scale: Tensor | None = None
    stand_ins: Tensor | None = None


class StageModule(nn.Module):
    """The parameters of a method at one of its stages."""

    def init_weights(self) -> None:
        """Initialises the parameters, with `transformers.initialization` only."""
        raise NotImplementedError


class Stage(NamedTuple):
    """The n patch tokens before a layer that will see fewer of them. The class token can be read, but is never dropped.

    Attributes:
        hidden_states: hidden states of the current patch tokens, in raster order, shape (batch, n, hidden).
        num_kept: how many tokens to keep.
        cells: cells of these tokens, ascending, shape (batch, n).
        grid: shape of the full grid, in patches: (height, width), of a video (time, height, width).
        mixer: results of the previous layer's mixer for all tokens, see `of_patches`; None for a method whose
            `reads_mixer` is False.
        patch_rows: the patch tokens' rows among all tokens, shape (batch, n). None: there is no class token.
        cls_row: the class token's row among all tokens, shape (batch, 1). None: there is none.
        cls_token: hidden state of the class token, shape (batch, hidden). None: there is none.
        sizes: how many patches were merged into each token, float of shape (batch, n). None: one each, or not counted.
        view: how the previous layers saw these tokens. Its stand-ins are rows among all tokens of the previous stage.
        importance: the measure of importance in the schedule, see `pruning_importances`.
        module: the method's parameters at this stage, if it has any.
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
        rows = self.patch_rows
        if rows is None:
            return values
        return values.gather(1, rows if values.ndim == 2 else rows.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def scores(self) -> Tensor:
        """The patch tokens' importance, shape (batch, n)."""
        if self.importance is None:
            raise ValueError("the schedule names no importance, but its method needs one.")
        return self.importance(self)

    def nearest(self, rows: Tensor) -> Tensor:
        """For each cell of the grid, the nearest of the tokens in `rows`, in the form of `TokenView.stand_ins`."""
        return nearest_tokens(self.cells.gather(1, rows), self.grid)


class Reduction(NamedTuple):
    """The result of a method for a stage.

    Attributes:
        rows: rows of the remaining tokens, ascending, int64 (batch, num_kept). A token that others were merged into
            keeps its position.
        hidden_states: hidden states of these tokens, shape (batch, num_kept, hidden).
        scores: the scores by which the method compared tokens, in the whole image or in parts of it; higher scores are
            preferred; shape (batch, n).
        merged_into: for each of the stage's tokens, the row of the token that it was merged into, or its own row if it
            is kept or dropped, int64 (batch, n). None: the other tokens were dropped.
        sizes: as in `Stage`, shape (batch, num_kept), if the method counts them: heads that average over tokens then
            average over patches. None: not counted.
        view: how the layers after the stage see the remaining tokens.
    """

    rows: Tensor
    hidden_states: Tensor
    scores: Tensor
    merged_into: Tensor | None = None
    sizes: Tensor | None = None
    view: TokenView = TokenView()
