"""The only door to peft: adapters on compressed layers; and Q as bitsandbytes NF4 weights, L R as a LoRA adapter on them.

    W = Q + B A,   B = P L (n x r),  A = R O^T (r x d),  lora_alpha = r, so that the adapter's factor is one

NF4 (Dettmers et al., "QLoRA", 2023) is another grid than that of Q, and the adapter's type is bfloat16: both lose something.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lplr.errors import BackendError, UnsupportedModel
from lplr.hf.quiet import quiet
from lplr.nn import LowRankLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE, ADAPTER = "base", "adapter"
_NEEDED = "the export to peft needs the packages peft and bitsandbytes: pip install lplr[peft]"


def write_peft(
    dense: Path, output: Path, layers: Collection[str], low_rank: Iterable[tuple[str, Tensor, Tensor]], tokenizer: Any
) -> int:
    """Write `output`/base, NF4, from the dense folder of Q, and `output`/adapter; how many matrices have an adapter.

    layers: the linear layers that become NF4; the others stay dense.  low_rank: (layer, B, A); when it is empty there is no
    folder `adapter`.  Raises BackendError without the packages, UnsupportedModel where bitsandbytes does not take a layer.
    """
    peft, bitsandbytes = _packages()
    model = _load_nf4(dense, layers)
    packed = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    if set(layers) - packed:
        name = min(set(layers) - packed)
        raise UnsupportedModel(f"{name} is no linear layer that bitsandbytes can hold: export --to dense instead")
    model.save_pretrained(output / BASE)
    if tokenizer is not None:
        tokenizer.save_pretrained(output / BASE)
    factors = {layer: (left, right) for layer, left, right in low_rank}
    if not factors:
        return 0
    ranks = {layer: right.shape[0] for layer, (_, right) in factors.items()}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=sorted(ranks),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    for layer, (left, right) in factors.items():
        module = adapted.get_submodule(f"base_model.model.{layer}")
        module.lora_A["default"].weight.data = right.bfloat16()
        module.lora_B["default"].weight.data = left.bfloat16()
    adapted.peft_config["default"].base_model_name_or_path = BASE  # beside the adapter: no path of this machine
    adapted.save_pretrained(output / ADAPTER, save_embedding_layers=False)  # or it would look for "base" on the Hub
    return len(factors)


def load_peft(folder: Path) -> PreTrainedModel:
    """The model that `write_peft` wrote, by transformers and peft alone.

    Where the processor multiplies bfloat16, bitsandbytes 0.50 packs weights by 32 outputs and 64 inputs and fails where these are
    no whole number: such layers are multiplied as on other processors.
    """
    from transformers import AutoModelForCausalLM

    peft, bitsandbytes = _packages()
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(folder / BASE, local_files_only=True)
        packed: list[Any] = [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        for module in packed:
            if module.out_features % 32 or module.in_features % 64:
                module.support_avx512bf16_for_cpu = False
        model = peft.PeftModel.from_pretrained(base, folder / ADAPTER) if (folder / ADAPTER).is_dir() else base
    return model.eval()


def adaptable(config: Any) -> Any:
    """The same peft.LoraConfig, with which adapters may stand on compressed layers; for training a compressed model further.

        model = peft.get_peft_model(lplr.load(folder), lplr.adaptable(peft.LoraConfig(target_modules=["q_proj", "v_proj"])))
        again = peft.PeftModel.from_pretrained(
            lplr.load(folder), adapter, config=lplr.adaptable(peft.LoraConfig.from_pretrained(adapter))
        )

    Packed weights stay as they are, so adapters cannot be merged into them.  Raises BackendError without the package.
    """
    try:
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise BackendError(f"training adapters needs the package peft: pip install lplr[peft] ({error})") from None
    config._register_custom_module({LowRankLinear: Linear})  # documented by peft for layers that it does not know
    return config


def _packages() -> tuple[Any, Any]:
    try:
        import bitsandbytes
        import peft
    except ImportError as error:
        raise BackendError(f"{_NEEDED} ({error})") from None
    return peft, bitsandbytes


def _load_nf4(dense: Path, layers: Collection[str]) -> Any:
    """The dense folder with its layers as NF4, packed while it is read."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lplr.hf.skeleton import load_config, skeleton
    from lplr.nn.swap import is_linear

    net = skeleton(load_config(dense))
    others = [name for name, module in net.named_modules() if is_linear(module) and name not in layers]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=others or ["lm_head"],
    )
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
        )
