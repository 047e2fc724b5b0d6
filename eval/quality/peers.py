"""lplr beside GPTQ, HQQ and bitsandbytes NF4 from the real libraries, each at its true bits: one model, text, perplexity code.

    python eval/quality/peers.py --model FOLDER --wikitext wiki.test.raw --calibration c4_en_600.jsonl
        [--only nf4 hqq-2 ...] [--python hqq=PYTHON gptqmodel=PYTHON ...] [--windows 8] [--seqlen 2048]

FOLDER holds the dense model.  Every library runs in a process of its own, with its own interpreter if `--python` names one (they
pin versions that exclude each other; in each environment install the same torch first, then gptqmodel, llmcompressor or hqq).
That process quantizes the linear layers of the blocks with the library's own code and hands back the weights that the library's
own format decodes to, and the bytes of every tensor of that format: codes, scales, zero points, orders, code tables.
This process puts the weights into the dense model:

    bits per weight = 8 * bytes of these tensors / number of weights of these layers
    perplexity      = of the GPTQ protocol (lplr.evaluate.perplexity): windows of `seqlen` tokens, no BOS, float32 throughout

The rows of lplr are `lplr compress FOLDER --bits B --dataset CALIBRATION` with every other setting at its default, whatever the
model: no training, no list of layers.  It and GPTQ (arXiv:2210.17323) are calibrated with 128 rows of 512 tokens, packed from the
calibration text by `lplr.hf.text`.  Groups are of 64: 576, the width of SmolLM2-135M, is no multiple of 128.  Rows are merged
into eval/results/peers.json by name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROWS, ROW_LENGTH, SEED = 128, 512, 0
TARGET = Path(__file__).parents[1] / "results" / "peers.json"

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
}
PACKAGES = {
    "lplr": ("transformers",),
    "bitsandbytes": ("bitsandbytes",),
    "hqq": ("hqq", "transformers"),
    "gptqmodel": ("gptqmodel", "transformers"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "transformers"),
}

Weights = dict[str, Tensor]
Sizes = dict[str, int]  # tensor of the library's format -> bytes over all layers


# --- in the process of a library: no import of lplr here but for its own rows


def dense_model(folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def block_linears(model: nn.Module, kind: type = nn.Linear) -> dict[str, Any]:
    """Name -> layer of the blocks (all layers of SmolLM2 but the embedding, which is tied to the head)."""
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and ".layers." in name}


def count(sizes: Sizes, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        sizes[key] = sizes.get(key, 0) + tensor.numel() * tensor.element_size()


def with_lplr(folder: str, rows: Tensor, settings: dict[str, Any]) -> tuple[Weights, Sizes]:
    import lplr
    from lplr.recipe import make_recipe

    recipe = make_recipe({"model": folder, "dataset": settings.pop("dataset"), "nsamples": len(rows), **settings})
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


WORKERS: dict[str, Callable[[str, Tensor, dict[str, Any]], tuple[Weights, Sizes]]] = {
    "lplr": with_lplr,
    "bitsandbytes": with_bitsandbytes,
    "hqq": with_hqq,
    "gptqmodel": with_gptqmodel,
    "llmcompressor": with_llmcompressor,
}


def work(name: str, folder: str, scratch: Path, calibration: str) -> None:
    """Quantize; write weights.safetensors and facts.json into scratch, where rows.safetensors holds the calibration tokens."""
    library, settings = PEERS[name]
    settings = settings | {"dataset": calibration} if library == "lplr" else settings
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


# --- in the first process


def quantize(name: str, python: str, folder: str, rows: Tensor, calibration: str) -> tuple[Weights, dict[str, Any]]:
    """Weights and facts of a peer from a process of its own; raises RuntimeError with the end of what it said if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"rows": rows.contiguous()}, Path(scratch) / "rows.safetensors")
        here, model = str(Path(__file__).resolve()), str(Path(folder).resolve())
        command = [os.path.abspath(python), here, "--worker", name, "--model", model, "--scratch", scratch]
        command += ["--calibration", str(Path(calibration).resolve())]
        # in the scratch folder, because llmcompressor and gptqmodel leave logs where they run
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, cwd=scratch)
        if done.returncode:
            raise RuntimeError("\n".join((done.stderr or done.stdout).strip().splitlines()[-8:]))
        return load_file(Path(scratch) / "weights.safetensors"), json.loads((Path(scratch) / "facts.json").read_text())


def merge(header: dict[str, Any], row: dict[str, Any] | None = None) -> dict[str, Any]:
    """The results with one more row; rows of another model, text or calibration are dropped."""
    found = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    rows = found.get("rows", {}) if {k: found.get(k) for k in header} == header else {}
    if row is not None:
        rows[row["name"]] = row
    results = {**header, "rows": {name: rows[name] for name in ("full precision", *PEERS) if name in rows}}
    TARGET.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> None:
    rows = results["rows"]
    base = rows["full precision"]["perplexity"]
    print(f"\n{'peer':15} {'library':22} {'bits/weight':>11} {'perplexity':>12} {'ratio':>10} {'seconds':>8}  parts")
    for name, row in rows.items():
        library = f"{row['library']} {row['versions'].get(row['library'], '')}"
        if "error" in row:
            print(f"{name:15} {library:22} failed: {row['error'].splitlines()[-1]}")
            continue
        parts = ", ".join(f"{k} {v:.3f}" for k, v in row["parts"].items() if v >= 5e-4)
        figures = f"{row['bits_per_weight']:11.4f} {row['perplexity']:12.4g} {row['perplexity'] / base:10.4g}"
        print(f"{name:15} {library:22} {figures} {row['seconds']:8.0f}  {parts}")


def run(args: argparse.Namespace) -> None:
    from lplr import load, load_tokenizer
    from lplr.evaluate.perplexity import evaluate
    from lplr.hf.text import calibration_tokens, evaluation_tokens, read_text
    from lplr.nn import linears

    pythons = dict(p.split("=", 1) if "=" in p else ("", p) for p in args.python)
    tokenizer, model = load_tokenizer(args.model), load(args.model)
    text, calibration = read_text(args.wikitext), read_text(args.calibration)
    tokens = evaluation_tokens(tokenizer, text)
    rows = calibration_tokens(tokenizer, calibration, ROWS, ROW_LENGTH, torch.Generator().manual_seed(SEED))
    layers = linears(model, ("lm_head",))
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    count_of_weights = sum(w.numel() for w in dense.values())

    def measure(weights: Weights) -> float:
        if weights.keys() != dense.keys():
            raise RuntimeError(f"the library handed back {len(weights)} layers, {len(dense)} expected")
        for name, layer in layers.items():
            layer.weight.data.copy_(weights[name])
        return evaluate(model, tokens, seqlen=args.seqlen, max_windows=args.windows, text=text).perplexity

    header = {
        "text": {"name": text.name, "sha256": text.sha256, "seqlen": args.seqlen, "windows": args.windows},
        "calibration": {"name": calibration.name, "sha256": calibration.sha256, "rows": list(rows.shape), "seed": SEED},
        "weights": count_of_weights,
    }
    results = merge(header)
    if "full precision" not in results["rows"]:
        versions = {p: metadata.version(p) for p in ("torch", "transformers")}
        base = {"name": "full precision", "library": "torch", "settings": {}, "versions": versions, "seconds": 0.0}
        results = merge(header, base | {"perplexity": measure(dense), "bits_per_weight": 32.0, "parts": {}})
    full = results["rows"]["full precision"]["perplexity"]
    print(f"full precision: {full:.4f}", flush=True)
    for name in args.only or PEERS:
        library, settings = PEERS[name]
        row: dict[str, Any] = {"name": name, "library": library, "settings": settings, "versions": {}}
        try:
            python = pythons.get(library, pythons.get("", sys.executable))
            weights, facts = quantize(name, python, args.model, rows, args.calibration)
            parts = {k: 8 * v / count_of_weights for k, v in facts.pop("sizes").items()}
            off = sum((weights[k] - w).square().sum().item() for k, w in dense.items())
            row |= facts | {"bits_per_weight": sum(parts.values()), "parts": parts}
            row |= {"weight_error": off / sum(w.square().sum().item() for w in dense.values()), "perplexity": measure(weights)}
            row["ratio"] = row["perplexity"] / full
            print(f"{name}: {row['bits_per_weight']:.4f} bits, perplexity {row['perplexity']:.4f}", flush=True)
        except RuntimeError as failure:
            row["error"] = str(failure)
            print(f"{name} failed:\n{failure}", flush=True)
        results = merge(header, row)
    table(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--wikitext", help="wiki.test.raw")
    parser.add_argument("--calibration", help="text that GPTQ is calibrated on")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), help="some of the peers")
    parser.add_argument("--python", nargs="+", default=[], metavar="[LIBRARY=]PYTHON", help="interpreter of a library's process")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model, args.scratch, args.calibration)
    elif args.wikitext and args.calibration:
        run(args)
    else:
        parser.error("--wikitext and --calibration are needed")


if __name__ == "__main__":
    main()
