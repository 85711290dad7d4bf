"""What a pruning method is given at a stage, and what it gives back."""

from typing import NamedTuple

from torch import Tensor, nn

from .mixer_output import MixerOutput
from .token_pruning import nearest_tokens, token_importance


class Stage(NamedTuple):
    """The patch tokens before a layer that is to see fewer of them. A class token is not among them: no method scores,
    drops or merges it.

    Attributes:
        hidden_states: of the n patch tokens that are there, in raster order, shape (batch, n, hidden).
        num_kept: how many shall be left.
        mixer: output of the layer before, of all tokens.
        rows: the patch tokens' rows in it, shape (batch, n). None: there is no class token, they are all of them.
        cells: the patch tokens' cells in the grid, ascending, shape (batch, n).
        grid: (height, width) of the full grid, in patches.
        sizes: how many patches were merged into each token, float of shape (batch, n). None: one each, or not counted.
        importance: the measure that the schedule asks for, one of `token_pruning.IMPORTANCES`.
        predictor: the module that scores the tokens, of a method that has one.
    """

    hidden_states: Tensor
    num_kept: int
    mixer: MixerOutput
    rows: Tensor | None
    cells: Tensor
    grid: tuple[int, int]
    sizes: Tensor | None = None
    importance: str = "clip"
    predictor: nn.Module | None = None

    def of_patches(self, values: Tensor) -> Tensor:
        """The patch tokens' rows of the mixer's values (batch, tokens) or (batch, tokens, channels)."""
        if self.rows is None:
            return values
        rows = self.rows if values.ndim == 2 else self.rows.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        return values.gather(1, rows)

    def scores(self) -> Tensor:
        """The patch tokens' importance, shape (batch, n)."""
        return self.of_patches(token_importance(self.mixer, self.importance))

    def nearest(self, positions: Tensor) -> Tensor:
        """For each cell of the grid which of the tokens at `positions` is nearest: as `Reduction.stand_ins`."""
        return nearest_tokens(self.cells.gather(1, positions), self.grid)


class Reduction(NamedTuple):
    """What a method makes of a stage.

    Attributes:
        positions: the places, among the stage's n, of the tokens that are left, ascending, int64 (batch, num_kept). A
            token that others were merged into keeps its place.
        hidden_states: of these tokens, shape (batch, num_kept, hidden).
        scores: what the method compared tokens by, in all of the image or in a part of it, higher for one that rather
            stays, shape (batch, n).
        sizes: as in `Stage`, shape (batch, num_kept). None: not counted.
        gates: of a method that learns whom to keep, in training: 1 for each token, with the gradient of the decision
            for it, shape (batch, num_kept). None: nothing to learn.
        stand_ins: the token, of those that are left, that convolutions see in each cell of the grid, int64 of shape
            (batch, height * width). None: they see none in the cell of a token that is gone.
    """

    positions: Tensor
    hidden_states: Tensor
    scores: Tensor
    sizes: Tensor | None = None
    gates: Tensor | None = None
    stand_ins: Tensor | None = None
