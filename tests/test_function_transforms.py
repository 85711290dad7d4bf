"""Function transforms and higher derivatives of operators, kernels and models: either equal to plain PyTorch in
float64, or rejected with a helpful message, but never silently zero."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from conftest import MAKE_CONFIG, TOKEN_PRUNING
from kernel_arguments import convolution_arguments, scan_arguments
from test_scan_kernels import mamba_scan_loop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from hf_vssm_prune import kernels
from hf_vssm_prune import mamba_ssm_scan as mamba_ssm
from hf_vssm_prune.causal_convolution import causal_conv1d
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.grid_convolution import depthwise_conv2d
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.selective_scan_torch import selective_scan_torch
from hf_vssm_prune.token_pruning import nearest_tokens


# From a small vector to a tensor. What is tested depends on the vector through all of its arguments.
Function = Callable[[Tensor], Tensor]
SIZE = 3


def squares(function: Function) -> Function:
    return lambda x: function(x).square().sum()


def forward_mode(function: Function, x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


def gradient_penalty(function: Function, x: Tensor, _: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(squares(function)(x), x, create_graph=True)
    gradient.square().sum().backward()
    return x.grad


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, d: jvp(f, (x,), (d,))[1],
    "linearize": lambda f, x, d: linearize(f, x)[1](d),
    "forward mode": forward_mode,
    "vjp": lambda f, x, d: vjp(squares(f), x)[1](d.sum())[0],
    "grad": lambda f, x, d: grad(squares(f))(x),
    "vmap": lambda f, x, d: vmap(f)(torch.stack([x, x + d])),
    "per-sample gradients": lambda f, x, d: vmap(grad(squares(f)))(torch.stack([x, x + d])),
    "jacrev": lambda f, x, d: jacrev(f)(x),
    "jacfwd": lambda f, x, d: jacfwd(f)(x),
    "hessian": lambda f, x, d: hessian(squares(f))(x),
    "jvp of grad": lambda f, x, d: jvp(grad(squares(f)), (x,), (d,))[1],
    "jacobian by a batch of gradients": lambda f, x, d: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "hvp": lambda f, x, d: torch.autograd.functional.hvp(squares(f), x, d)[1],
    "gradient penalty": gradient_penalty,
}
# A backward pass whose result is differentiated again, or that has a batch of gradients.
WITHIN_AUTOGRAD = ("jacobian by a batch of gradients", "hvp", "gradient penalty")


def along_directions(function: Callable[..., Tensor], arguments: dict[str, Tensor], dtype: torch.dtype) -> Function:
    """`function` as a function of a small vector that moves each floating-point argument along its own random
    directions."""
    generator = torch.Generator().manual_seed(7)
    base = {name: tensor.to(dtype) for name, tensor in arguments.items() if tensor.is_floating_point()}
    directions = {
        name: 0.1 * torch.randn(SIZE, *tensor.shape, generator=generator).to(dtype) for name, tensor in base.items()
    }

    def moved(x: Tensor) -> Tensor:
        moving = {name: tensor + torch.tensordot(x, directions[name], 1) for name, tensor in base.items()}
        return function(**{**arguments, **moving})

    return moved


def assert_transform_is_right(transform: str, function: Function, expected: Function, limit: float) -> None:
    x, direction = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 0.2, -0.4])
    found = TRANSFORMS[transform](function, x, direction)
    reference = TRANSFORMS[transform](expected, x.double(), direction.double())
    assert reference.abs().max() > 0
    assert found.shape == reference.shape
    assert (found - reference).abs().max() <= limit * reference.abs().max()


GRID = (3, 4)
PRUNED_GRID = convolution_arguments(2, GRID, 5, 3, 0.5)
STAND_INS = nearest_tokens(PRUNED_GRID["kept"], GRID)
SEQUENCE = {"hidden_states": torch.randn(2, 6, 5), "weight": torch.randn(5, 1, 4), "bias": torch.randn(5)}
OPERATORS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "scan": (selective_scan, scan_arguments(2, 4, 3, 2)),
    "scan of paths with holes": (
        selective_scan,
        scan_arguments(2, 4, 3, 2, paths=2, largest_gap=3, hole_time_step=True, direction_B=True),
    ),
    "grid convolution": (partial(depthwise_conv2d, grid=GRID, silu=True), PRUNED_GRID),
    "grid convolution with stand-ins": (partial(depthwise_conv2d, grid=GRID, stand_ins=STAND_INS), PRUNED_GRID),
    "causal convolution": (partial(causal_conv1d, reverse=True), SEQUENCE),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_operators(backend, operator, transform) -> None:
    if backend != "torch" and (reason := kernels.KERNELS[backend].unavailable("cpu")):
        pytest.skip(reason)
    function, arguments = OPERATORS[operator]
    found = along_directions(partial(function, backend=backend), arguments, torch.float32)
    expected = along_directions(partial(function, backend="torch"), arguments, torch.float64)
    assert_transform_is_right(transform, found, expected, limit=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradient_penalty_in_half_precision_with_weights_in_float32(backend, operator) -> None:
    """The tensors of a model under autocast."""
    function, arguments = OPERATORS[operator]
    exact = along_directions(partial(function, backend="torch"), arguments, torch.float64)

    def in_half_precision(hidden_states: Tensor, **others: Tensor) -> Tensor:
        return function(hidden_states.bfloat16(), **others, backend=backend).float()

    found = along_directions(in_half_precision, arguments, torch.float32)
    assert_transform_is_right("gradient penalty", found, exact, limit=0.05)


class OpaqueScan(torch.autograd.Function):
    """A stand-in for mamba-ssm's scan: opaque to PyTorch, and differentiable once."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return mamba_scan_loop(*inputs)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return torch.autograd.grad(mamba_scan_loop(*inputs), inputs, grad_output.detach())


@pytest.fixture
def mamba_package(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = OpaqueScan.apply
    packages = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops")}
    for name, module in {**packages, interface.__name__: interface}.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_mamba_ssm(transform, mamba_package) -> None:
    _, arguments = OPERATORS["scan of paths with holes"]
    found = along_directions(mamba_ssm.selective_scan, arguments, torch.float32)
    expected = along_directions(selective_scan_torch, arguments, torch.float64)
    if transform in WITHIN_AUTOGRAD:
        with pytest.raises(RuntimeError, match=r"'mamba_ssm' can only be computed once.*: use backend 'torch'"):
            TRANSFORMS[transform](found, torch.zeros(SIZE), torch.ones(SIZE))
    else:
        assert_transform_is_right(transform, found, expected, limit=1e-5)


def logits_along_directions(family: str, token_pruning: dict | None, backend: str, dtype: torch.dtype) -> Function:
    torch.manual_seed(0)
    config = MAKE_CONFIG[family](
        token_pruning=token_pruning, num_hidden_layers=2, scan_backend=backend, initializer_range=0.2
    )
    model = FAMILIES[family].classifier(config).eval().to(dtype)
    names = [name for name, _ in model.named_parameters()]
    arguments = {f"parameter {i}": model.get_parameter(name).detach() for i, name in enumerate(names)}

    def logits(pixel_values: Tensor, **parameters: Tensor) -> Tensor:
        values = {name: parameters[f"parameter {i}"] for i, name in enumerate(names)}
        return functional_call(model, values, (pixel_values,)).logits

    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return along_directions(logits, {"pixel_values": images, **arguments}, dtype)


# Each transform in each family, dense and pruned in turns. "linearize" is traced, for a minute.
@pytest.mark.parametrize(
    ("family", "pruned", "transform"),
    [
        (family, (i + j) % 2 == 0, transform)
        for i, family in enumerate(sorted(MAKE_CONFIG))
        for j, transform in enumerate(name for name in TRANSFORMS if name != "linearize")
    ],
)
def test_models(family, pruned, transform) -> None:
    token_pruning = {**TOKEN_PRUNING, "layers": [1], "keep_ratios": [0.6]} if pruned else None
    found = logits_along_directions(family, token_pruning, "auto", torch.float32)
    expected = logits_along_directions(family, token_pruning, "torch", torch.float64)
    assert_transform_is_right(transform, found, expected, limit=1e-3)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.skipif(kernels.cpu.unavailable("cpu") is not None, reason="no C++ kernels")
def test_kernels_compute_what_is_not_transformed(operator) -> None:
    """Checks compiled forward and backward passes."""
    function, arguments = OPERATORS[operator]
    graphs = []

    def collect(graph, _):
        graphs.append({node.target for node in graph.graph.nodes if str(node.target).startswith("hf_vssm_prune")})
        return graph

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    moved = torch.compile(along_directions(function, arguments, torch.float32), backend=backend, fullgraph=True)
    moved(torch.zeros(SIZE, requires_grad=True)).sum().backward()
    assert [len(kernels_called) for kernels_called in graphs] == [1, 1]
