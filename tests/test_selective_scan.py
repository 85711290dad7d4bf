"""The plain PyTorch scan compared with a loop in NumPy; its gradients, precisions and errors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_vssm_prune.kernels import cpu
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.selective_scan_torch import selective_scan_torch


BATCH, LENGTH, CHANNELS, STATES, PATHS = 2, 6, 3, 4, 3
OPTIONS = {
    "plain": [],
    "gate": ["gate"],
    "order": ["order"],
    "gaps, repeat": ["gaps"],
    "gaps, zero input": ["gaps", "hole_time_step"],
    "moves": ["order", "direction_B", "moves"],
    "all": ["gate", "order", "gaps", "hole_time_step", "direction_B", "moves"],
}
INTEGERS = ("order", "gaps", "moves")


def make_arguments(
    names: list[str], batch: int = BATCH, length: int = LENGTH, shared: bool = False
) -> dict[str, Tensor]:
    """Random float64 arguments: the required ones, and the optional ones with these names."""
    double = {"dtype": torch.float64}
    paths = (1 if shared else batch, PATHS if "order" in names else 1, length)
    arguments = {
        "hidden_states": torch.randn(batch, length, CHANNELS, **double),
        "time_step": torch.randn(batch, length, CHANNELS, **double) - 1,
        "A": -4 * torch.rand(CHANNELS, STATES, **double) - 0.1,
        "B": torch.randn(batch, length, STATES, **double),
        "C": torch.randn(batch, length, STATES, **double),
        "D": torch.randn(CHANNELS, **double),
        "time_step_bias": torch.randn(CHANNELS, **double),
        "gate": torch.randn(batch, length, CHANNELS, **double),
        "order": torch.rand(paths).argsort(-1),
        "gaps": torch.randint(1, 6, paths),
        "hole_time_step": torch.rand(CHANNELS, **double),
        "direction_B": torch.randn(5, STATES, **double),
        "moves": torch.randint(5, paths),
    }
    optional = {name for options in OPTIONS.values() for name in options}
    return {name: tensor for name, tensor in arguments.items() if name not in optional or name in names}


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def naive_scan(
    hidden_states, time_step, A, B, C, D, time_step_bias,
    gate=None, order=None, gaps=None, hole_time_step=None, direction_B=None, moves=None,
) -> np.ndarray:  # fmt: skip
    """The documented recurrence, one number at a time."""
    batch, length, channels = hidden_states.shape
    output = np.zeros((batch, length, channels))
    num_paths = 1 if order is None else order.shape[1]
    for b, k, c in np.ndindex(batch, num_paths, channels):
        state = np.zeros(A.shape[1])
        for i in range(length):
            shared = b if all(index is None or len(index) > 1 for index in (order, gaps, moves)) else 0
            token = i if order is None else order[shared, k, i]
            step = softplus(time_step[b, i, c] + time_step_bias[c])
            hole = 0.0
            if gaps is not None:
                hole = (gaps[shared, k, i] - 1) * (step if hole_time_step is None else hole_time_step[c])
            B_i = B[b, i] if moves is None else B[b, i] + direction_B[moves[shared, k, i]]
            u = hidden_states[b, token, c]
            state = np.exp((step + hole) * A[c]) * state + step * B_i * u
            output[b, token, c] += C[b, i] @ state + D[c] * u
    if gate is not None:
        output *= gate / (1 + np.exp(-gate))
    return output


def naive_scan_of(arguments: dict[str, Tensor]) -> np.ndarray:
    return naive_scan(**{name: tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
                         for name, tensor in arguments.items()})  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["paths of each sample", "shared paths"])
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_against_loop(names, shared) -> None:
    arguments = make_arguments(names, shared=shared)
    output = selective_scan_torch(**arguments)
    assert output.dtype == torch.float64
    np.testing.assert_allclose(output.numpy(), naive_scan_of(arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_gradients(names) -> None:
    arguments = make_arguments(names, length=4)
    inputs = [name for name in arguments if name not in INTEGERS]
    for name in inputs:
        arguments[name].requires_grad_()

    def scan(*tensors: Tensor) -> Tensor:
        return selective_scan_torch(**{**arguments, **dict(zip(inputs, tensors, strict=True))})

    assert torch.autograd.gradcheck(scan, [arguments[name] for name in inputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_a_float32_state(dtype) -> None:
    """Results equal those of the rounded inputs in float64, up to a single rounding.

    With a state in half precision, the error after so many steps would be ten times as large.
    """
    arguments = make_arguments(OPTIONS["all"], length=200)
    arguments["time_step"] -= 3  # a long memory
    halved = {name: t if name in INTEGERS else t.to(dtype) for name, t in arguments.items()}
    output = selective_scan_torch(**halved)
    assert output.dtype == dtype
    expected = torch.from_numpy(naive_scan_of(halved))
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=precision, atol=precision * expected.abs().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("names", [["gaps"], ["gaps", "hole_time_step"]], ids=["repeat", "zero input"])
def test_long_steps_and_wide_holes_are_finite(dtype, names) -> None:
    arguments = make_arguments(names)
    arguments["time_step"] *= 50
    arguments["gaps"] *= 1000
    arguments = {name: t if name in INTEGERS else t.to(dtype).requires_grad_() for name, t in arguments.items()}
    output = selective_scan_torch(**arguments)
    assert output.isfinite().all()
    output.sum().backward()
    for name in arguments.keys() - set(INTEGERS):
        assert arguments[name].grad.isfinite().all(), name


@pytest.mark.parametrize(("batch", "length"), [(0, LENGTH), (BATCH, 1), (1, 1)])
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_no_samples_or_one_token(names, batch, length) -> None:
    arguments = make_arguments(names, batch, length)
    output = selective_scan(**arguments)
    assert output.shape == (batch, length, CHANNELS)
    np.testing.assert_allclose(output.numpy(), naive_scan_of(arguments), rtol=1e-12, atol=1e-12)


def test_values_can_enter_a_graph() -> None:
    """Outputs computed without gradients can be saved for the backward pass of a later layer."""
    output = selective_scan_torch(**make_arguments(OPTIONS["all"]))
    weight = torch.ones(output.shape[-1], dtype=output.dtype, requires_grad=True)
    (output * weight).sum().backward()
    torch.testing.assert_close(weight.grad, output.sum((0, 1)))


def test_inputs_are_left_alone() -> None:
    arguments = make_arguments(OPTIONS["all"])
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    selective_scan(**arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in arguments.items())


# ---- Backends ----------------------------------------------------------------------------------------------------


def test_backend_torch_is_the_plain_one() -> None:
    arguments = make_arguments(OPTIONS["all"])
    assert torch.equal(selective_scan(**arguments, backend="torch"), selective_scan_torch(**arguments))


def test_auto_agrees_with_it() -> None:
    arguments = {name: t if name in INTEGERS else t.float() for name, t in make_arguments(OPTIONS["all"]).items()}
    torch.testing.assert_close(selective_scan(**arguments), selective_scan_torch(**arguments), rtol=1e-4, atol=1e-4)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'cuda11'; known backends are 'auto', 'torch', 'cpu'"):
        selective_scan(**make_arguments([]), backend="cuda11")


def test_unavailable_backend(monkeypatch) -> None:
    monkeypatch.setenv(cpu.DISABLE, "1")
    with pytest.raises(ImportError, match=f"backend 'cpu' cannot be used on cpu: .*{cpu.DISABLE}"):
        selective_scan(**make_arguments([]), backend="cpu")
    on_meta = {name: tensor.to("meta") for name, tensor in make_arguments([]).items()}
    with pytest.raises(ImportError, match="backend 'cpu' cannot be used on meta: it computes on the CPU only"):
        selective_scan(**on_meta, backend="cpu")


@pytest.mark.parametrize("missing", ["direction_B", "moves"])
def test_moves_and_their_additions_go_together(missing) -> None:
    arguments = make_arguments(OPTIONS["moves"])
    del arguments[missing]
    with pytest.raises(ValueError, match="`direction_B` and `moves` must be given together"):
        selective_scan(**arguments)
