"""LplrConfig and LplrQuantizer: how transformers loads and saves a compressed folder.

config.json carries the whole table of layers, so every LowRankLinear is built on meta before a byte of weights is
read.  transformers initialises what a file lacks at random and only warns; here the headers of the files are
compared with the model first, and a missing, unexpected or misshapen tensor is a VerificationError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lplr.errors import CheckpointError, RecipeError, VerificationError
from lplr.factor.factorization import Format
from lplr.nn import LowRankLinear, defuse, swap
from lplr.quant.qtensor import SCALE_DTYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANT_METHOD = "lplr"
FORMAT_VERSION = 2  # 2: grids, half-integer widths, rotation of the outputs (1 is read)
_AGAIN = "copy the folder again or compress the model again"

Shapes = dict[str, tuple[tuple[int, ...], str]]  # name -> (shape, dtype as safetensors writes it)


class LplrConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed folder's config.json.

    layers maps the module name of each compressed layer to `Format.to_dict()`; defused says that fused experts were
    split into linear layers.  Fields of later versions are kept and written back.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        modules_to_not_convert: Iterable[str] = (),
        defused: bool = False,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an open set: transformers compares strings
        self.format_version = format_version
        if not isinstance(layers, Mapping | None) or not all(isinstance(e, Format | Mapping) for e in (layers or {}).values()):
            raise CheckpointError(f"the table of layers in config.json is damaged: {_AGAIN}")
        self.layers = {name: e.to_dict() if isinstance(e, Format) else dict(e) for name, e in (layers or {}).items()}
        self.modules_to_not_convert = list(modules_to_not_convert)
        self.defused = defused
        for key, value in kwargs.items():
            if key != "quant_method":
                setattr(self, key, value)

    def formats(self) -> dict[str, Format]:
        """Module name -> Format; CheckpointError on a damaged entry or a format from a later version."""
        if type(self.format_version) is not int or self.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the folder has format version {self.format_version}, up to {FORMAT_VERSION} can be read: upgrade lplr"
            )
        return {name: Format.from_dict(entry) for name, entry in self.layers.items()}


def file_shapes(files: Iterable[str | Path]) -> Shapes:
    """Every tensor of safetensors files, from their headers; CheckpointError names a file that is damaged."""
    found: Shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (not a mapping)
                    part = handle.get_slice(key)
                    found[key] = (tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): {_AGAIN}") from None
    return found


def compressed_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Name -> module of every LowRankLinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def check_shapes(model: PreTrainedModel, found: Shapes, *, everything: bool) -> None:
    """Compare the tensors of files with those that a swapped model stores; raises VerificationError.

    Compressed layers must match exactly.  With `everything`, so must every other tensor; without, only
    those below the model's base are required, and a head that the files lack is left to be trained anew.
    """
    state = model.state_dict()
    names = {
        found_as: name for name in found for found_as in _aliases(name, model.base_model_prefix) if found_as in state
    }
    stored = {f"{layer}.{key}" for layer, m in compressed_layers(model).items() for key in m.state_dict()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
    base = model.base_model_prefix + "." if hasattr(model, model.base_model_prefix) else ""
    for name, tensor in state.items():
        if name not in names:
            optional = name in tied or any(re.search(p, name) for p in ignored)
            wanted = everything or not base or name.startswith(base)
            if name in stored or (wanted and not optional):
                raise VerificationError(f"tensor {name} is missing from the files: {_AGAIN}")
        elif name in stored or everything:
            shape, dtype = found[names[name]]
            packed = name in stored and not name.endswith(".bias")
            if shape != tuple(tensor.shape) or (packed and dtype != _WRITTEN[tensor.dtype]):
                want = f"{_WRITTEN.get(tensor.dtype, tensor.dtype)} {tuple(tensor.shape)}"
                raise VerificationError(f"tensor {name} is {dtype} {shape}, {want} expected: {_AGAIN}")
    _refuse_unexpected(model, set(found) - set(names.values()), everything=everything)


_WRITTEN = {torch.uint8: "U8", torch.bfloat16: "BF16"}


def _aliases(name: str, prefix: str) -> tuple[str, ...]:
    """The names that a stored tensor may have in a model with or without its head."""
    return (name, f"{prefix}.{name}", name.removeprefix(prefix + "."))


def _refuse_unexpected(model: PreTrainedModel, unexpected: set[str], *, everything: bool) -> None:
    layers = compressed_layers(model)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name in sorted(unexpected):
        owners = {alias.rpartition(".")[0] for alias in _aliases(name, model.base_model_prefix)}
        excused = name in tied or any(re.search(p, name) for p in ignored)
        if not owners.isdisjoint(layers) or (everything and not excused):
            raise VerificationError(f"tensor {name} of the files has no place in the model: {_AGAIN}")


class LplrQuantizer(HfQuantizer):
    """Builds the packed layers before the weights are read; see the module's docstring."""

    requires_calibration = False  # what cannot be done is told by __init__, with the remedy

    def __init__(self, quantization_config: LplrConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        if not self.pre_quantized:
            raise RecipeError(
                "from_pretrained cannot compress a dense model on the fly: run `lplr compress` and load its folder"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Split experts, swap the table's layers in on meta, and check the headers of the files."""
        formats = self.config.formats()
        if self.config.defused:
            defuse(model)
        swap(model, _renamed(formats, model))
        files = kwargs.get("checkpoint_files")
        if files:
            whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
            check_shapes(model, file_shapes(files), everything=whole)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Raise when a packed tensor was not loaded; undo a cast of scales that a model's fp32 list asked for."""
        for layer, module in compressed_layers(model).items():
            for name, tensor in module.stored().items():
                loaded = getattr(tensor, "_is_hf_initialized", False)
                if not loaded and not hasattr(module, "_hf_hook"):  # a hook loads from the files checked above
                    raise VerificationError(f"tensor {layer}.{name} was not loaded: {_AGAIN}")
                if tensor.is_floating_point() and tensor.dtype != SCALE_DTYPE:
                    setattr(module, name, tensor.to(SCALE_DTYPE))
            module.follow()
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """None: a compressed folder names its tensors as the model does, so loading and saving change nothing."""
        return []

    def is_serializable(self) -> bool:  # type: ignore[override]  # the base declares nothing
        """The state dict is the file."""
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Packed codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The reference kernel is plain torch with static shapes."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace every packed layer by a dense nn.Linear of its dequantized weight."""
        for name, module in compressed_layers(model).items():
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            dense.weight = nn.Parameter(
                module.factorization.dequantize().to(dtype or module.dtype), requires_grad=False
            )
            dense.bias = module.bias  # type: ignore[assignment]
            model.set_submodule(name, dense)
        return model


def _renamed(formats: dict[str, Format], model: PreTrainedModel) -> dict[str, Format]:
    """The table by the names of this model, which may be the base without the head that was compressed with it."""
    prefix = model.base_model_prefix + "."
    modules = {name for name, _ in model.named_modules()}
    out: dict[str, Format] = {}
    for name, fmt in formats.items():
        fits = [alias for alias in (name, name.removeprefix(prefix), prefix + name) if alias in modules]
        outside = not hasattr(model, model.base_model_prefix) and not name.startswith(prefix)
        if fits or not outside:
            out[fits[0] if fits else name] = fmt
    return out


# By assignment, which may be repeated: the decorators of transformers refuse a module that is imported anew.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LplrConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LplrQuantizer
