"""Exports a classifier to files that run without this package: ONNX, torch.export and AOTInductor.

All formats start from one traced program, in which the scan is a single loop and everything else is plain PyTorch
(`is_exporting` in `function_transforms.py`). Its input is `pixel_values`, any number of images of the size in the
configuration. Its outputs are `logits` and, for each pruning stage, the ids of the tokens left after it, like the
model's `kept_tokens`.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.image_processing_base import ImageProcessingMixin

from hf_vssm_prune.families import ImageClassifier
from hf_vssm_prune.quantization import Int8Linear


# What an exported file computes, from pixel values to the logits and each stage's kept tokens.
Program = Callable[[Tensor], tuple[Tensor, ...]]


class Format(NamedTuple):
    """A file format.

    Attributes:
        file: its path in the folder; transformers.js looks for ONNX there.
        write: writes the file, given the traced program, the folder (which already has `config.json`) and the file.
        load: loads the file, given its path and the number of threads (None: the runtime's default).
    """

    file: str
    write: Callable[[ExportedProgram, Path, Path], None]
    load: Callable[[Path, int | None], Program]


def export_classifier(
    model: ImageClassifier,
    folder: str | Path,
    formats: Iterable[str] = ("onnx",),
    image_processor: ImageProcessingMixin | None = None,
) -> Path:
    """Exports a classifier, dense or pruned as its configuration says, to files for other runtimes.

    The folder also contains `config.json`, which has the labels, and `preprocessor_config.json`. A new folder appears
    in one step, complete. Files are kept only if all of them reproduce the model's outputs on random images.

    Args:
        model: in evaluation mode and float32.
        folder: the folder to create; it may exist if it is empty.
        formats: one or more of `FORMATS`.
        image_processor: the model's image processor. None: preprocessing is not described.

    Returns:
        The folder.

    Raises:
        ValueError: a format is unknown; the model is not a classifier, or is in training mode, half precision or int8;
            or the image processor is for images of another size, or clips of another length, than the configuration's,
            which the files cannot process.
        FileExistsError: the folder is not empty.
        ImportError: a library that a format needs is not installed; the message names it.
        RuntimeError: the outputs of a file differ from the model's.
    """
    folder, formats = Path(folder), list(formats)
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"unknown formats {unknown}; allowed values are {list(FORMATS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} already exists and will not be overwritten: remove it, or choose another folder."
        )
    if not hasattr(model, "classifier"):
        raise ValueError(f"{type(model).__name__} is not a classifier; only classifiers can be exported.")
    if image_processor is not None:
        check_size(model, image_processor)
    program = trace(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the folder, which may be a mount point.
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=folder if folder.exists() else folder.parent) as scratch:
        staged = Path(scratch) / "model"
        model.config.save_pretrained(staged)
        if image_processor is not None:
            image_processor.save_pretrained(staged)
        for name in formats:
            file = staged / FORMATS[name].file
            file.parent.mkdir(exist_ok=True)
            FORMATS[name].write(program, staged, file)
            check_answers(model, FORMATS[name].load(file, None), name)
        _publish(staged, folder)
    return folder


def _publish(staged: Path, folder: Path) -> None:
    if not folder.exists():
        staged.rename(folder)
        return
    for file in list(staged.iterdir()):
        file.rename(folder / file.name)


# ---- Tracing -----------------------------------------------------------------------------------------------------


class _Outputs(nn.Module):
    """A classifier that returns its outputs as a tuple: the logits, then each stage's kept tokens."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        return outputs.logits, *(outputs.kept_tokens or ())


def trace(model: ImageClassifier) -> ExportedProgram:
    """Traces the classifier to a program of torch's own operators, for any number of images of one size.

    Raises:
        ValueError: it is in training mode, half precision or int8, or its configuration names a kernel.
        ImportError: torch is too old.
    """
    # In older versions, neither the ONNX exporter nor inductor knows `torch._higher_order_ops.scan`, the scan's loop.
    if torch.__version__ < "2.8":
        raise ImportError(f"exporting needs torch 2.8 or newer; the installed version is {torch.__version__}.")
    if model.training:
        raise ValueError("the model is in training mode; call its `eval()` first.")
    if model.dtype != torch.float32:
        raise ValueError(f"the model's weights are {model.dtype}; call its `float()` first.")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("the model has int8 linear layers, which cannot be exported: export the float32 model.")
    if model.config.scan_backend not in ("auto", "torch"):
        raise ValueError(
            f"`scan_backend` is {model.config.scan_backend!r}; an exported program can only use 'auto' or 'torch'."
        )
    # Two images: a batch size of 1 would be taken for a constant.
    inputs = {"pixel_values": random_images(model, batch=2)}
    with torch.no_grad():
        program = torch.export.export(
            _Outputs(model), (), inputs, dynamic_shapes={"pixel_values": {0: Dim("batch", min=1)}}, strict=False
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # the source location of each node, with this machine's paths
    return program


def check_size(model: ImageClassifier, image_processor: Any) -> None:
    """Raises an error if the image processor does not make images of the size in the model's configuration, or is for
    clips of another length.

    Raises:
        ValueError: it does not.
    """
    image = Image.new("L" if model.config.num_channels == 1 else "RGB", (53, 37))
    made = tuple(image_processor(image, return_tensors="pt")["pixel_values"].shape[-2:])
    if made != (expected := model.config.input_size[-2:]):
        raise ValueError(
            f"the image processor makes images of (height, width) {made}, but exported files take only those of the "
            f"model's `image_size`, {expected}: make the two sizes equal."
        )
    clip_length = image_processor.to_dict().get("num_frames")
    if model.config.modality == "video" and clip_length not in (None, length := model.config.input_size[0]):
        raise ValueError(
            f"the image processor is for clips of {clip_length} frames, but exported files take only those of the "
            f"model's `num_frames`, {length}: make the two numbers equal."
        )


def random_images(model: ImageClassifier, batch: int) -> Tensor:
    """Normalised pixel values of the model's image size, on its device."""
    return torch.randn(model.config.pixel_values_shape(batch), device=model.device)


# For an image on which rounding decides which tokens are kept or merged, the outputs differ between runtimes. Such
# images are rare, whereas a wrong file is wrong on all images.
TRIES = 2


@torch.no_grad()
def check_answers(model: ImageClassifier, program: Program, name: str) -> None:
    """Compares logits and kept tokens with the model's on random images, in batches of one and three. One of `TRIES`
    attempts with each batch size must agree completely.

    Raises:
        RuntimeError: they differ from the model's.
    """
    for batch in (1, 3):
        for _ in range(TRIES):
            difference = _difference(model, program, random_images(model, batch))
            if difference is None:
                break
        else:
            raise RuntimeError(
                f"the {name} file does not reproduce the model's outputs on random images, {batch} at a time: "
                f"{difference}."
            )


def _difference(model: ImageClassifier, program: Program, images: Tensor) -> str | None:
    """How a program's outputs differ from the model's, in words. None: they do not."""
    outputs = model(images)
    logits, *kept_tokens = program(images)
    expected_tokens = outputs.kept_tokens or ()
    shapes, expected_shapes = [kept.shape for kept in kept_tokens], [kept.shape for kept in expected_tokens]
    if shapes != expected_shapes:
        return f"its kept tokens have shapes {shapes}, the model's {expected_shapes}"
    if not all(bool((kept == expected).all()) for kept, expected in zip(kept_tokens, expected_tokens, strict=True)):
        return "it keeps different tokens"
    away = (logits - outputs.logits).abs().max().item()
    allowed = 1e-4 * max(1.0, outputs.logits.abs().max().item())
    return None if away <= allowed else f"its logits are up to {away:.1e} away, {allowed:.1e} are allowed"


# ---- ONNX --------------------------------------------------------------------------------------------------------


def write_onnx(program: ExportedProgram, folder: Path, file: Path) -> None:
    """Writes a single ONNX file that includes the weights; its metadata has the folder's JSON files under their
    names."""
    try:
        import onnxruntime  # noqa: F401  (checks the file)
        import onnxscript  # noqa: F401  (torch's exporter)
    except ImportError as error:
        raise ImportError(f"ONNX needs the extra `export`: pip install -e '.[export]' ({error}).") from error
    num_stages = len(program.graph_signature.user_outputs) - 1
    onnx_program: Any = torch.onnx.export(
        program,
        output_names=["logits", *(f"kept_tokens_{stage}" for stage in range(num_stages))],
        dynamo=True,
        verbose=False,
    )
    for node in onnx_program.model.graph.all_nodes():
        node.metadata_props.clear()  # where each node comes from in the model, which nothing reads
    for sidecar in sorted(folder.glob("*.json")):
        onnx_program.model.metadata_props[sidecar.name] = sidecar.read_text(encoding="utf-8")
    onnx_program.save(file)


def load_onnx(file: Path, threads: int | None) -> Program:
    """The program of an ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {"pixel_values": pixel_values.cpu().numpy()})
        return tuple(torch.from_numpy(output).to(pixel_values.device) for output in outputs)

    return run


# ---- torch.export and AOTInductor --------------------------------------------------------------------------------


def write_torch_export(program: ExportedProgram, folder: Path, file: Path) -> None:
    """Writes the program as it is; torch can load it on any machine."""
    torch.export.save(program, file)


def load_torch_export(file: Path, threads: int | None) -> Program:
    """The program of a torch.export file, in eager mode and with torch's threads."""
    module = torch.export.load(file).module()
    return lambda pixel_values: module(pixel_values=pixel_values)


def write_aotinductor(program: ExportedProgram, folder: Path, file: Path) -> None:
    """Compiles the program to a library, for machines like this one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ImportError(
            f"AOTInductor compiles C++: install g++ or clang++, and set CXX if it is not g++ ({error})."
        ) from error
    for name, path in compilers_paths().items():
        if " " in path:
            raise ValueError(f"AOTInductor's compiler cannot handle paths with spaces, and {name} is '{path}'.")
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def compilers_paths() -> dict[str, str]:
    """Paths that PyTorch's inductor writes into its commands without quotes."""
    return {
        "PyTorch's folder": str(Path(torch.__file__).parent),
        "the temporary folder (TMPDIR)": tempfile.gettempdir(),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""),
    }


def load_aotinductor(file: Path, threads: int | None) -> Program:
    """The program of an AOTInductor package, with torch's threads."""
    compiled = torch._inductor.aoti_load_package(str(file))
    return lambda pixel_values: tuple(compiled(pixel_values=pixel_values))


FORMATS = {
    "onnx": Format("onnx/model.onnx", write_onnx, load_onnx),
    "torch": Format("model.pt2", write_torch_export, load_torch_export),
    "aotinductor": Format("model.aotinductor.pt2", write_aotinductor, load_aotinductor),
}
