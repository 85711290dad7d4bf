"""The method's pure functions compared with formulas in NumPy and with brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLS_TOKEN_IDS, MAKE_CONFIG, NUM_CLS_TOKENS, TOKEN_PRUNING
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.mixer_output import MixerOutput
from hf_vssm_prune.pruning_importances import IMPORTANCES
from hf_vssm_prune.pruning_stage import Stage
from hf_vssm_prune.selective_scan_torch import selective_scan_torch
from hf_vssm_prune.token_pruning import (
    count_kept,
    fill_dropped_tokens,
    gather_tokens,
    nearest_tokens,
    path_gaps,
    prune_paths,
    select_tokens,
    snake_paths,
)


# ---- How many, how important ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "keep_ratio", "expected"),
    [
        (196, 0.7, 138),
        (138, 0.7, 97),
        (97, 0.7, 68),
        (100, 0.55, 55),
        (10, 0.7, 7),
        (5, 0.01, 1),
        (1, 0.5, 1),
        (9, 1, 9),
    ],
)
def test_count_kept(num_tokens, keep_ratio, expected) -> None:
    assert count_kept(num_tokens, keep_ratio) == expected


@given(num_tokens=st.integers(1, 5000), percent=st.integers(1, 100))
def test_count_kept_is_the_exact_ceiling(num_tokens, percent) -> None:
    assert count_kept(num_tokens, percent / 100) == max(1, -(-num_tokens * percent // 100))


FORMULAS = {
    "clip": lambda y: np.maximum(y, 0).mean(-1),
    "mean": lambda y: y.mean(-1),
    "l1": lambda y: np.abs(y).mean(-1),
    "l2": lambda y: np.sqrt((y**2).mean(-1)),
}


def importance_of(y: torch.Tensor, importance: str) -> torch.Tensor:
    """Importance of tokens on a one-row grid, from a mixer's gated output."""
    cells = torch.arange(y.shape[1]).expand(len(y), -1)
    return IMPORTANCES[importance](Stage(y, 1, cells, (1, y.shape[1]), MixerOutput(y, y, ())))


@pytest.mark.parametrize("importance", FORMULAS)
def test_importance(importance) -> None:
    y = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    scores = importance_of(y, importance)
    np.testing.assert_allclose(scores.numpy(), FORMULAS[importance](y.detach().numpy()), rtol=1e-12)


@pytest.mark.parametrize("importance", [*FORMULAS, "random"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_float32_without_gradient(importance, dtype) -> None:
    y = torch.randn(2, 7, 5, dtype=dtype, requires_grad=True)
    scores = importance_of(y, importance)
    assert scores.shape == (2, 7)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_half_precision_does_not_overflow() -> None:
    y = torch.full((1, 2, 64), 6e4, dtype=torch.float16)
    for importance in ("clip", "mean", "l1", "l2"):
        torch.testing.assert_close(importance_of(y, importance), y[..., 0].float())


# ---- Which -------------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_earlier_token_stays() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert select_tokens(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2]]


def test_many_ties_on_long_sequences() -> None:
    scores = torch.randint(3, (2, 4096)).float()
    ranking = np.argsort(-scores.numpy(), axis=1, kind="stable")
    assert select_tokens(scores, 1000).tolist() == np.sort(ranking[:, :1000], axis=1).tolist()


# Few different values, so that ties are common.
score_lists = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=20)


@given(scores=score_lists, data=st.data())
def test_selected_tokens_are_the_best(scores, data) -> None:
    count = data.draw(st.integers(1, len(scores)))
    selected = select_tokens(torch.tensor([scores]), count)[0].tolist()
    assert selected == sorted(set(selected))
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert selected == sorted(best_first[:count])


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_selection_in_a_model(family, importance) -> None:
    if (family, importance) == ("plainmamba", "mirrored_backward"):
        pytest.skip("a PlainMamba has no backward scan")
    config = MAKE_CONFIG[family](token_pruning=TOKEN_PRUNING | {"importance": importance})
    class_tokens, cls_token_id = NUM_CLS_TOKENS[family], CLS_TOKEN_IDS[family]
    outputs = FAMILIES[family].classifier(config).eval()(torch.randn(3, 3, 32, 32))
    assert [kept.shape for kept in outputs.kept_tokens] == [(3, 12 + class_tokens), (3, 8 + class_tokens)]
    assert [scores.shape for scores in outputs.token_scores] == [(3, 16), (3, 12)]
    for sample in range(3):
        first, second = (kept[sample].tolist() for kept in outputs.kept_tokens)
        assert second == sorted(set(second))
        assert first == sorted(set(first))
        assert set(second) <= set(first) <= set(range(16 + class_tokens))
        assert cls_token_id is None or {cls_token_id} <= set(second)
        left = [place for place in range(16 + class_tokens) if place != cls_token_id]
        for kept, scores, count in ((first, outputs.token_scores[0], 12), (second, outputs.token_scores[1], 8)):
            ranking = np.argsort(-scores[sample].numpy(), kind="stable")
            left = [left[i] for i in sorted(ranking[:count])]
            assert [place for place in kept if place != cls_token_id] == left


# ---- Positions ---------------------------------------------------------------------------------------------------


def walk_snake(height: int, width: int, path: int) -> list[tuple[int, int]]:
    """Cells of one of the four paths, which turns around at the end of each row or column."""
    if path >= 2:
        return [(row, column) for column, row in walk_snake(width, height, path - 2)]
    cells = [(row, column if row % 2 == 0 else width - 1 - column) for row in range(height) for column in range(width)]
    return cells[::-1] if path == 1 else cells


MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}

grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(grid=grids)
def test_snake_paths(grid) -> None:
    paths = snake_paths(grid)
    assert paths.gaps is None
    for path in range(4):
        cells = walk_snake(*grid, path)
        assert paths.order[0, path].tolist() == [row * grid[1] + column for row, column in cells]
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(cells)]
        assert paths.moves[0, path].tolist() == [0, *(MOVES[step] for step in steps)]


@settings(max_examples=60)
@given(grid=grids, data=st.data())
def test_pruned_paths_are_the_full_ones_with_holes(grid, data) -> None:
    num_cells = math.prod(grid)
    count = data.draw(st.integers(1, num_cells))
    batch = [sorted(data.draw(st.permutations(range(num_cells)))[:count]) for _ in range(2)]
    full = snake_paths(grid)
    pruned = prune_paths(full, torch.tensor(batch), "repeat")
    for sample, kept in enumerate(batch):
        for path in range(4):
            cells = [row * grid[1] + column for row, column in walk_snake(*grid, path)]
            visited = [(position, cell) for position, cell in enumerate(cells) if cell in kept]
            positions = [position for position, _ in visited]
            assert pruned.order[sample, path].tolist() == [kept.index(cell) for _, cell in visited]
            assert pruned.gaps[sample, path].tolist() == [1, *np.diff(positions).tolist()]
            assert pruned.moves[sample, path].tolist() == full.moves[0, path, positions].tolist()
            assert sum(pruned.gaps[sample, path].tolist()) == positions[-1] - positions[0] + 1


def test_without_alignment_there_are_no_gaps() -> None:
    full, kept = snake_paths((3, 3)), torch.tensor([[0, 4, 8]])
    naive, aligned = prune_paths(full, kept, "none"), prune_paths(full, kept, "zero_input")
    assert naive.gaps is None
    assert torch.equal(naive.order, aligned.order)
    assert torch.equal(naive.moves, aligned.moves)


def test_gaps() -> None:
    kept = torch.tensor([[2, 3, 7], [0, 4, 5]])
    assert path_gaps(kept).tolist() == [[1, 1, 4], [1, 4, 1]]
    assert path_gaps(-kept.flip(1)).tolist() == [[1, 4, 1], [1, 1, 4]]


def test_gather_tokens() -> None:
    tokens, positions = torch.randn(2, 5, 3), torch.tensor([[0, 4], [2, 3]])
    assert torch.equal(gather_tokens(tokens, positions), torch.stack([tokens[0, [0, 4]], tokens[1, [2, 3]]]))


def test_dropped_tokens_keep_their_last_state() -> None:
    kept = [torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[2], [4]])]
    states = [torch.full((2, count, 1), float(stage)) for stage, count in enumerate((5, 3, 1))]
    filled = fill_dropped_tokens(states, kept)
    assert filled[..., 0].tolist() == [[1, 0, 2, 1, 0], [0, 1, 1, 0, 2]]
    assert torch.equal(fill_dropped_tokens(states[:1], []), states[0])


# ---- What the alignment means ------------------------------------------------------------------------------------


def dense_scan(u, time_step, A, B, C) -> np.ndarray:
    """Output y of one sample along one path, token by token. u and time_step are (length, channels), B and C (length,
    states)."""
    state, outputs = np.zeros_like(A), []
    for i in range(len(u)):
        state = np.exp(time_step[i][:, None] * A) * state + (time_step[i] * u[i])[:, None] * B[i][None, :]
        outputs.append(state @ C[i])
    return np.stack(outputs)


@pytest.mark.parametrize("alignment", ["repeat", "zero_input", "none"])
def test_aligned_scan_is_a_dense_one_whose_dropped_tokens_put_nothing_in(alignment) -> None:
    """With `none` it is not, because tokens after a hole see a different state. This shows that the check can fail."""
    grid, channels, states = (4, 5), 3, 4
    kept = torch.tensor([sorted(np.random.permutation(20)[:9].tolist())])
    count = kept.shape[1]
    paths = prune_paths(snake_paths(grid), kept, alignment)
    normal = {"dtype": torch.float64}
    u, time_step = torch.randn(1, count, channels, **normal), torch.randn(1, count, channels, **normal)
    B, C = torch.randn(1, count, states, **normal), torch.randn(1, count, states, **normal)
    A, D = -torch.rand(channels, states, **normal) - 0.1, torch.zeros(channels, **normal)
    bias = torch.randn(channels, **normal)
    hole = F.softplus(2 * bias) if alignment == "zero_input" else None
    output = selective_scan_torch(
        u, time_step, A, B, C, D, bias, order=paths.order, gaps=paths.gaps, hole_time_step=hole
    )

    step = F.softplus(time_step + bias)[0].numpy()
    expected = np.zeros((count, channels))
    for path in range(4):
        cells = [row * grid[1] + column for row, column in walk_snake(*grid, path)]
        visited = [cell for cell in cells if cell in kept[0]]
        # Every token of the grid, in path order, from the first one that is left to the last.
        full = cells[cells.index(visited[0]) : cells.index(visited[-1]) + 1]
        inputs, steps = np.zeros((len(full), channels)), np.zeros((len(full), channels))
        B_full, C_full = np.ones((len(full), states)), np.ones((len(full), states))
        for position, cell in enumerate(full):
            rank = sum(other in visited for other in full[:position])  # the kept token here, or the next one
            if cell in visited:
                inputs[position] = u[0, kept[0].tolist().index(cell)]
                B_full[position], C_full[position] = B[0, rank], C[0, rank]
            dropped_step = step[rank] if hole is None else hole.numpy()
            steps[position] = step[rank] if cell in visited else dropped_step
        dense = dense_scan(inputs, steps, A.numpy(), B_full, C_full)
        for position, cell in enumerate(full):
            if cell in visited:
                expected[kept[0].tolist().index(cell)] += dense[position]
    difference = np.abs(output[0].numpy() - expected).max()
    assert difference > 1e-3 if alignment == "none" else difference < 1e-12


@given(data=st.data(), height=st.integers(1, 6), width=st.integers(1, 6))
def test_nearest_tokens(data, height, width) -> None:
    cells = [divmod(cell, width) for cell in range(height * width)]
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(cells))), min_size=1)))
    expected = [
        min(range(len(kept)), key=lambda i: (sum(abs(a - b) for a, b in zip(cells[kept[i]], cell, strict=True)), i))
        for cell in cells
    ]
    assert nearest_tokens(torch.tensor([kept]), (height, width)).tolist() == [expected]
