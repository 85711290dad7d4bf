"""Every convolution kernel against plain PyTorch in float64: values, gradients, shapes, precisions. Without a GPU,
Triton kernels are interpreted."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from kernel_arguments import (
    CONVOLUTIONS,
    Arguments,
    Convolution,
    assert_close_to_reference,
    assert_rounded_once,
    convolution,
    run,
)
from torch import Tensor

from hf_vssm_prune import convolution_torch, triton_backend
from hf_vssm_prune.causal_convolution import causal_conv1d
from hf_vssm_prune.grid_convolution import depthwise_conv2d
from hf_vssm_prune.kernels import KERNELS


HAS_GPU = torch.cuda.is_available()
PLAIN = {
    "depthwise_conv2d": convolution_torch.depthwise_conv2d_torch,
    "causal_conv1d": convolution_torch.causal_conv1d_torch,
}
PUBLIC = {"depthwise_conv2d": depthwise_conv2d, "causal_conv1d": causal_conv1d}
Function = Callable[..., Tensor]


@pytest.fixture(params=["cpu", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    """Each kernel in turn."""
    if reason := KERNELS[request.param].unavailable(device_of(KERNELS[request.param])):
        pytest.skip(reason)
    return KERNELS[request.param]


def device_of(kernel: ModuleType) -> str:
    return "cuda" if HAS_GPU and kernel is triton_backend else "cpu"


def by(kernel: ModuleType, operation: str) -> Function:
    """A kernel's function, for tensors on the CPU."""

    def compute(hidden_states: Tensor, **others) -> Tensor:
        there = {
            name: value.to(device_of(kernel)) if isinstance(value, Tensor) else value for name, value in others.items()
        }
        return getattr(kernel, operation)(hidden_states.to(device_of(kernel)), **there).cpu()

    return compute


def floating(arguments: Arguments, convert: Callable[[Tensor], Tensor]) -> Arguments:
    return {name: convert(tensor) if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_values_and_gradients(case: str, kernel):
    operation, arguments, options = convolution(**CONVOLUTIONS[case])
    reference = run(PLAIN[operation], arguments, torch.float64, **options)
    result = run(by(kernel, operation), arguments, **options)
    assert_close_to_reference(result, reference, value=1e-6, gradient=2e-6)


@pytest.mark.parametrize(
    ("dtype", "weights_too"), [(torch.bfloat16, True), (torch.float16, False)], ids=["bfloat16", "float16 rows"]
)
@pytest.mark.parametrize("case", ["3 x 3, kept cells", "3 x 3, stand-ins", "causal, reversed"])
def test_half_precision_is_rounded_once(case: str, dtype: torch.dtype, weights_too: bool, kernel):
    """Values and gradients equal those of the rounded inputs in float64, rounded to the tensor's own dtype."""
    operation, arguments, options = convolution(**CONVOLUTIONS[case])
    rounded = floating(arguments, lambda tensor: tensor.to(dtype))
    if not weights_too:
        rounded |= {name: arguments[name] for name in ("weight", "bias")}
    is_cut_off = kernel is triton_backend and not HAS_GPU  # what is interpreted is not rounded
    half_units = {torch.bfloat16: 2} if is_cut_off else {}
    assert_rounded_once(by(kernel, operation), PLAIN[operation], rounded, options, half_units)


@pytest.mark.parametrize("case", ["3 x 3, kept cells", "causal, reversed"])
def test_plain_pytorch_takes_weights_of_another_precision(case: str):
    operation, arguments, options = convolution(**CONVOLUTIONS[case])
    arguments["hidden_states"] = arguments["hidden_states"].bfloat16()
    assert_rounded_once(PLAIN[operation], PLAIN[operation], arguments, options)


@pytest.mark.parametrize("case", ["3 x 3, without SiLU", "causal"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_autocast_does_not_change_the_precision_of_tokens(backend: str, case: str):
    operation, arguments, options = convolution(**CONVOLUTIONS[case])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PUBLIC[operation](**arguments, **options, backend=backend).dtype == torch.float32


@pytest.mark.parametrize("operation", PLAIN)
def test_float64_keeps_its_precision(operation: str, kernel):
    case = next(case for case in map(call, CONVOLUTIONS) if case.operation == operation)
    doubles = floating(case.arguments, Tensor.double)
    assert torch.equal(by(kernel, operation)(**doubles, **case.options), PLAIN[operation](**doubles, **case.options))


def call(name: str) -> Convolution:
    return convolution(**CONVOLUTIONS[name])


@pytest.mark.parametrize("case", ["3 x 3, stand-ins", "causal, stand-ins"])
def test_split_projections_and_int32_indices(case: str, kernel):
    """Strided inputs and gradients (parts of a larger projection) are read in place."""
    operation, arguments, options = call(case)
    expected = run(by(kernel, operation), arguments, **options)
    strided = {name: tensor if tensor.is_floating_point() else tensor.int() for name, tensor in arguments.items()}
    strided["hidden_states"] = second_half(arguments["hidden_states"])
    inputs = floating(strided, lambda tensor: tensor.detach().requires_grad_())
    assert not inputs["hidden_states"].is_contiguous()
    output = by(kernel, operation)(**inputs, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(second_half(weights))
    found = {"output": output, **{name: inputs[name].grad for name in expected if name != "output"}}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def second_half(tensor: Tensor) -> Tensor:
    return torch.cat([tensor + 1, tensor], -1).chunk(2, -1)[1]


def test_results_are_the_same_from_run_to_run(kernel):
    operation, arguments, options = call("causal, stand-ins")
    once, again = (run(by(kernel, operation), arguments, **options) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("case", ["3 x 3, without SiLU", "causal"])
def test_empty(case: str, kernel):
    operation, arguments, options = call(case)
    results = run(by(kernel, operation), {**arguments, "hidden_states": arguments["hidden_states"][:0]}, **options)
    assert results["output"].shape == arguments["hidden_states"][:0].shape
    assert not results["weight"].any()


def test_bad_shapes_are_named(kernel):
    operation, arguments, options = call("3 x 3, kept cells")
    compute = by(kernel, operation)
    with pytest.raises(ValueError, match=r"`stand_ins` must have the shape \(2, 12\), got \(2, 4\)"):
        compute(**arguments, **options, stand_ins=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="odd"):
        compute(**{**arguments, "weight": torch.zeros(40, 1, 2, 2)}, **options)
    with pytest.raises(ValueError, match=r"`weight` must have the shape \(40, 1, 3, 3\)"):
        compute(**{**arguments, "weight": torch.zeros(39, 1, 3, 3)}, **options)
    with pytest.raises(ValueError, match="pass `kept`"):
        compute(**{**arguments, "kept": None}, **options)


def test_compiles_to_one_graph(kernel):
    operation, arguments, options = call("causal, stand-ins")
    compute = by(kernel, operation)
    expected = run(compute, arguments, **options)
    compiled = run(torch.compile(compute, fullgraph=True, backend="aot_eager"), arguments, **options)
    for name, value in expected.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("operation", PLAIN)
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_backend_asked_for_is_the_one_that_computes(name: str, operation: str, monkeypatch: pytest.MonkeyPatch):
    if HAS_GPU or (reason := KERNELS[name].unavailable("cpu")):
        pytest.skip("tested on the CPU" if HAS_GPU else reason)
    calls = []
    original = getattr(KERNELS[name], operation)
    monkeypatch.setattr(KERNELS[name], operation, lambda *args: calls.append(name) or original(*args))
    case = next(case for case in map(call, CONVOLUTIONS) if case.operation == operation)
    result = PUBLIC[operation](**case.arguments, **case.options, backend=name)
    torch.testing.assert_close(result, PLAIN[operation](**case.arguments, **case.options), rtol=1e-5, atol=1e-5)
    assert calls == [name]
