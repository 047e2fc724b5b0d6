"""The peers of eval/quality/peers.py: their settings, and how each library quantizes and what its own format takes.

Every function runs in a process of its library's interpreter, so nothing of lplr is imported here but for its own rows.  It hands
back the weights of the blocks' linear layers as the library's own format decodes them, and the bytes of every tensor of that
format.

llama.cpp   `ggml_quantize_chunk` of the library itself, taken from the wheel `xllamacpp`, decoded by the package `gguf`; every
            matrix at the named type, as `llama-quantize --pure` does it, but for rows that are no multiple of 256, which types
            with blocks of 256 cannot hold: they get the type that llama.cpp falls back to.  The importance matrix, where a row
            has one, is the mean square of each input over the calibration rows, as llama-imatrix has it
torchao     what its layers multiply with is read by sending the unit vectors through them, since its packed formats have no
            decoder of their own
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# name -> (library, settings); settings that are not named here are the library's defaults
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lplr-1": ("lplr", {"bits": 1.0}),
    "lplr-2": ("lplr", {"bits": 2.0}),
    "lplr-3": ("lplr", {"bits": 3.0}),
    "lplr-4": ("lplr", {"bits": 4.0}),
    "lplr-2-uniform": ("lplr", {"bits": 2.0, "allocation": "uniform"}),
    "nf4": ("bitsandbytes", {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}),
    "hqq-4": ("hqq", {"nbits": 4, "group_size": 64, "axis": 1}),
    "hqq-3": ("hqq", {"nbits": 3, "group_size": 64, "axis": 1}),
    "hqq-2": ("hqq", {"nbits": 2, "group_size": 64, "axis": 1}),
    "hqq-2-axis0": ("hqq", {"nbits": 2, "group_size": 64, "axis": 0}),
    "hqq-2-g16": ("hqq", {"nbits": 2, "group_size": 16, "axis": 1}),
    "gptq-4": ("gptqmodel", {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"}),
    "gptq-3": ("gptqmodel", {"bits": 3, "group_size": 64, "sym": False, "format": "gptq_v2"}),
    "gptq-2": ("gptqmodel", {"bits": 2, "group_size": 64, "sym": False, "format": "gptq_v2"}),
    "llmc-gptq-4": ("llmcompressor", {"num_bits": 4, "group_size": 64, "symmetric": False}),
    "llmc-gptq-3": ("llmcompressor", {"num_bits": 3, "group_size": 64, "symmetric": False}),
    "llmc-gptq-2": ("llmcompressor", {"num_bits": 2, "group_size": 64, "symmetric": False}),
    "auto-round-4": ("auto-round", {"bits": 4, "group_size": 64, "sym": False, "iters": 20, "rows": 32}),
    "auto-round-2": ("auto-round", {"bits": 2, "group_size": 64, "sym": False, "iters": 20, "rows": 32}),
    "torchao-int8": ("torchao", {"weights": "int8"}),
    "torchao-int4": ("torchao", {"weights": "int4", "group_size": 64}),
    "torchao-int4-hqq": ("torchao", {"weights": "int4", "group_size": 64, "int4_choose_qparams_algorithm": "hqq"}),
    "quanto-8": ("optimum-quanto", {"weights": "qint8"}),
    "quanto-4": ("optimum-quanto", {"weights": "qint4"}),
    "quanto-2": ("optimum-quanto", {"weights": "qint2"}),
    "llama.cpp-q4_0": ("xllamacpp", {"type": "Q4_0", "imatrix": False}),
    "llama.cpp-q4_k": ("xllamacpp", {"type": "Q4_K", "imatrix": False}),
    "llama.cpp-iq4_nl": ("xllamacpp", {"type": "IQ4_NL", "imatrix": False}),
    "llama.cpp-q3_k": ("xllamacpp", {"type": "Q3_K", "imatrix": False}),
    "llama.cpp-q2_k": ("xllamacpp", {"type": "Q2_K", "imatrix": False}),
    "llama.cpp-q2_k-imatrix": ("xllamacpp", {"type": "Q2_K", "imatrix": True}),
    "llama.cpp-iq2_xxs": ("xllamacpp", {"type": "IQ2_XXS", "imatrix": True}),
}
PACKAGES = {
    "lplr": ("transformers",),
    "bitsandbytes": ("bitsandbytes",),
    "hqq": ("hqq", "transformers"),
    "gptqmodel": ("gptqmodel", "transformers"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "transformers"),
    "auto-round": ("auto-round", "transformers"),
    "torchao": ("torchao", "transformers"),
    "optimum-quanto": ("optimum-quanto", "transformers"),
    "xllamacpp": ("xllamacpp", "gguf", "transformers"),
}
# llama.cpp's tensor_type_fallback (src/llama-quant.cpp), for rows that are no multiple of the type's block
FALLBACK = {"Q4_K": "Q5_0", "Q3_K": "IQ4_NL", "Q2_K": "IQ4_NL", "IQ2_XXS": "IQ4_NL"}

Weights = dict[str, Tensor]
Sizes = dict[str, int]  # tensor of the library's format -> bytes over all layers


def dense_model(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def block_linears(model: nn.Module, kind: type = nn.Linear) -> dict[str, Any]:
    """Name -> layer of the blocks (all layers of SmolLM2 but the embedding, which is tied to the head)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and ".layers." in name}


def count(sizes: Sizes, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        sizes[key] = sizes.get(key, 0) + tensor.numel() * tensor.element_size()


def parts_of(tensor: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """The plain tensors that a tensor subclass is made of, at any depth."""
    if type(tensor) in (Tensor, nn.Parameter):
        return {name: tensor}
    found = {}
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        found |= parts_of(getattr(tensor, part), part.strip("_"))
    return found


def with_lplr(folder: str, rows: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    import lplr
    from lplr.recipe import make_recipe

    text = {"dataset": settings.pop("dataset"), "nsamples": len(rows)}
    recipe = make_recipe({"model": folder, **text, "recovery": "fast", **settings})
    lplr.compress(recipe, "compressed", progress=lambda done, total, what: None)
    weights, sizes = {}, {}
    for name, layer in lplr.load("compressed").named_modules():
        if isinstance(layer, lplr.LowRankLinear):
            count(sizes, layer.stored())
            weights[name] = layer.weight
    return weights, sizes


def with_bitsandbytes(folder: str, _: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    from bitsandbytes import functional

    weights, sizes = {}, {}
    for name, layer in block_linears(dense_model(folder)).items():
        packed, state = functional.quantize_4bit(layer.weight.data, **settings)
        count(sizes, {"codes": packed, **{k.split(".")[-1]: v for k, v in state.as_dict(packed=True).items()}})
        weights[name] = functional.dequantize_4bit(packed, state)
    return weights, sizes


def with_hqq(folder: str, _: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    weights, sizes = {}, {}
    for name, layer in block_linears(dense_model(folder)).items():
        packed = HQQLinear(layer, BaseQuantizeConfig(**settings), compute_dtype=torch.float16, device="cpu", del_orig=False)
        count(sizes, {"codes": packed.W_q, "scale": packed.meta["scale"], "zero": packed.meta["zero"]})
        weights[name] = packed.dequantize()
    return weights, sizes


def with_gptqmodel(folder: str, rows: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    # its pool of threads refuses to start on a machine of two cores unless told of two workers
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    model = GPTQModel.load(folder, QuantizeConfig(**settings, device="cpu", offload_to_disk=False), dtype=torch.float32)
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=4)
    weights, sizes = {}, {}
    for name, layer in block_linears(model.model, BaseQuantLinear).items():
        count(sizes, layer.state_dict())
        weights[name] = layer.dequantize_weight().T
    return weights, sizes


def with_llmcompressor(folder: str, rows: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = dense_model(folder)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(strategy="group", **settings))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(ignore=["lm_head"], config_groups={"blocks": scheme}),
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        batch_size=4,
    )
    layers, sizes = block_linears(model), {}
    for layer in layers.values():  # scales have the model's type, which is half precision in use
        layer.weight_scale.data = layer.weight_scale.data.half()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for layer in layers.values():
        count(sizes, layer.state_dict())
    compressor.decompress_model(model)
    return {name: layer.weight.data for name, layer in layers.items()}, sizes


def with_auto_round(folder: str, rows: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    rows = rows[: settings.pop("rows")]
    made = AutoRound(
        dense_model(folder),
        AutoTokenizer.from_pretrained(folder),
        dataset=list(rows[:, None]),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
        **settings,
    )
    made.quantize_and_save("saved", format="auto_round")
    about = json.loads(next(Path("saved").rglob("config.json")).read_text())["quantization_config"]
    one_less = "auto_gptq" in about["packing_format"]  # there zero points are stored less 1
    weights, sizes = {}, {}
    for name, stored in stored_layers(Path("saved")).items():
        count(sizes, stored)
        weights[name] = unpacked(stored, settings["bits"], settings["group_size"], int(one_less))
    return weights, sizes


def stored_layers(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Layer of the blocks -> its tensors in the safetensors files of a folder, norms left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (no mapping)
                name, _, part = key.rpartition(".")
                if ".layers." in name and "norm" not in name:
                    found.setdefault(name, {})[part] = tensors.get_tensor(key)
    return found


def unpacked(stored: dict[str, Tensor], bits: int, group: int, less: int = 0) -> Tensor:
    """(n, d) of GPTQ's packing: codes of 32 / bits inputs in an int32 of qweight (d bits / 32, n), zero points of as many
    outputs, each less `less`, in one of qzeros, W = (code - zero) scale."""
    places = torch.arange(0, 32, bits)
    mask = 2**bits - 1
    codes = (stored["qweight"][:, None] >> places[:, None] & mask).flatten(0, 1)
    zeros = (stored["qzeros"][:, :, None] >> places & mask).flatten(1)
    of_group = torch.arange(len(codes)) // group
    return ((codes - zeros[of_group] - less) * stored["scales"].float()[of_group]).T


def with_torchao(folder: str, _: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # its only one with 4 bits for processors
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = {"int4": PrototypeInt4WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[settings.pop("weights")]
    model = dense_model(folder).bfloat16()  # its products with 4 bits are in bfloat16
    quantize_(model, config(**settings), filter_fn=lambda m, name: isinstance(m, nn.Linear) and ".layers." in name)
    weights, sizes = {}, {}
    for name, layer in block_linears(model).items():
        count(sizes, parts_of(layer.weight.data))
        weights[name] = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T
    return weights, sizes


def with_quanto(folder: str, _: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    from optimum import quanto

    model = dense_model(folder).half()  # scales have the model's type, which is half precision in use
    quanto.quantize(model, weights=getattr(quanto, settings["weights"]), exclude="lm_head")
    quanto.freeze(model)
    weights, sizes = {}, {}
    for name, layer in block_linears(model).items():
        count(sizes, parts_of(layer.weight.data))
        weights[name] = layer.weight.dequantize()
    return weights, sizes


def with_llama_cpp(folder: str, rows: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    import gguf
    import numpy as np
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    pointers, numbers = [ctypes.c_void_p, ctypes.c_void_p], [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *pointers, *numbers, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    model = dense_model(folder)
    layers = block_linears(model)
    importance = input_squares(model, layers, rows) if settings["imatrix"] else {}
    weights, sizes = {}, {}
    for name, layer in layers.items():
        W = np.ascontiguousarray(layer.weight.detach().numpy())
        kind = gguf.GGMLQuantizationType[settings["type"]]
        if W.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType[FALLBACK[settings["type"]]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        packed = np.zeros((W.shape[0], W.shape[1] // block * size), np.uint8)
        squares = importance[name].numpy().ctypes.data if importance else None
        written = library.ggml_quantize_chunk(kind.value, W.ctypes.data, packed.ctypes.data, 0, *W.shape, squares)
        if written != packed.nbytes:
            raise RuntimeError(f"{name}: {written} bytes written, {packed.nbytes} expected")
        count(sizes, {kind.name: torch.from_numpy(packed)})
        weights[name] = torch.from_numpy(gguf.dequantize(packed, kind))
    return weights, sizes


@torch.inference_mode()
def input_squares(model: nn.Module, layers: dict[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """Mean square of each input of each layer over the rows, float32 (d,)."""
    sums = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # what a hook hands back would take the place of the inputs
            sums[name].add_(inputs[0].flatten(0, -2).square().sum(0))

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for row in rows:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / rows.numel() for name, total in sums.items()}


WORKERS: dict[str, Callable[[str, Tensor, dict[str, Any]], tuple[Weights, Sizes]]] = {
    "lplr": with_lplr,
    "bitsandbytes": with_bitsandbytes,
    "hqq": with_hqq,
    "gptqmodel": with_gptqmodel,
    "llmcompressor": with_llmcompressor,
    "auto-round": with_auto_round,
    "torchao": with_torchao,
    "optimum-quanto": with_quanto,
    "xllamacpp": with_llama_cpp,
}


def work(name: str, folder: str, scratch: Path, calibration: str) -> None:
    """Quantize; write weights.safetensors and facts.json into scratch, where rows.safetensors holds the calibration tokens."""
    library, settings = PEERS[name]
    settings = settings | ({"dataset": calibration} if library == "lplr" else {})
    rows = load_file(scratch / "rows.safetensors")["rows"]
    started, cpu = time.perf_counter(), time.process_time()
    weights, sizes = WORKERS[library](folder, rows, settings)
    facts = {
        "sizes": sizes,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "versions": {p: metadata.version(p) for p in (*PACKAGES[library], "torch")} | {"python": platform.python_version()},
    }
    save_file({k: w.detach().float().contiguous() for k, w in weights.items()}, scratch / "weights.safetensors")
    (scratch / "facts.json").write_text(json.dumps(facts))
