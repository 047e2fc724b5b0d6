"""The value that every method returns: W ~ Q + L R, in packed form, and the format that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.kernels.pack import packed_width
from lplr.quant.qtensor import SCALE_BITS, SCALE_DTYPE, QTensor

# name of the stored tensor -> (factor, field of the QTensor)
_PARTS = {
    "l_codes": ("l", "codes"),
    "r_codes": ("r", "codes"),
    "row_scale": ("l", "row_scale"),
    "rank_scale": ("r", "row_scale"),
    "col_scale": ("r", "col_scale"),
    "q_codes": ("q", "codes"),
    "q_row_scale": ("q", "row_scale"),
    "q_col_scale": ("q", "col_scale"),
}


@dataclass(frozen=True)
class Format:
    """All that is needed to lay out one compressed matrix without its data.

    shape is (n, d) = (out_features, in_features); rank 0 means no low-rank part, q_bits 0 no backbone.
    scales maps the name of each scale that is stored to its length.
    """

    shape: tuple[int, int]
    rank: int = 0
    l_bits: int = 0
    r_bits: int = 0
    q_bits: int = 0
    scales: tuple[tuple[str, int], ...] = ()

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every stored tensor, in order."""
        n, d = self.shape
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.rank:
            out["l_codes"] = ((n, packed_width(self.rank, self.l_bits)), torch.uint8)
            out["r_codes"] = ((self.rank, packed_width(d, self.r_bits)), torch.uint8)
        if self.q_bits:
            out["q_codes"] = ((n, packed_width(d, self.q_bits)), torch.uint8)
        out.update({name: ((length,), SCALE_DTYPE) for name, length in self.scales})
        return out

    def stored_bits(self) -> int:
        """Every stored bit of the matrix: codes, row padding, scales."""
        n, d = self.shape
        codes = n * packed_width(self.rank, self.l_bits) + self.rank * packed_width(d, self.r_bits)
        codes += n * packed_width(d, self.q_bits)
        return 8 * codes + SCALE_BITS * sum(length for _, length in self.scales)

    @property
    def bits_per_weight(self) -> float:
        """stored_bits / (n d)."""
        return self.stored_bits() / (self.shape[0] * self.shape[1])

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as it stands in config.json."""
        return {
            "shape": list(self.shape),
            "rank": self.rank,
            "l_bits": self.l_bits,
            "r_bits": self.r_bits,
            "q_bits": self.q_bits,
            "scales": dict(self.scales),
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Format:
        """Inverse of `to_dict`; raises CheckpointError on an entry that describes no matrix."""
        try:
            n, d = (int(size) for size in entry["shape"])
            rank, l_bits, r_bits, q_bits = (int(entry[k]) for k in ("rank", "l_bits", "r_bits", "q_bits"))
            scales = tuple((str(name), int(length)) for name, length in entry["scales"].items())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a layer entry of config.json is damaged ({error!r}): compress the model again") from None
        fits = {"row_scale": n, "rank_scale": rank, "col_scale": d, "q_row_scale": n, "q_col_scale": d}
        sane = (
            min(n, d) > 0
            and 0 <= rank <= 1 << 24
            and all(0 <= b <= 8 for b in (l_bits, r_bits, q_bits))
            and (rank == 0 or (l_bits > 0 and r_bits > 0))
            and all(name in fits and length in (1, fits[name]) for name, length in scales)
        )
        if not sane:
            raise CheckpointError(f"a layer entry of config.json is out of range ({entry}): compress the model again")
        return cls((n, d), rank, l_bits, r_bits, q_bits, scales)


@dataclass(frozen=True)
class Factorization:
    """W (n x d) ~ Q + L R with L: n x r, R: r x d, each packed; l and r stand together, q may be absent.

    The scale along the rank is held once, as R's row scale: L has no column scale.
    """

    l: QTensor | None = None  # noqa: E741  (the papers' letter)
    r: QTensor | None = None
    q: QTensor | None = None

    def __post_init__(self) -> None:
        if (self.l is None) != (self.r is None) or (self.l is None and self.q is None):
            raise ValueError("a factorization holds L and R, or Q, or all three")
        if self.l is not None and self.l.col_scale is not None:
            raise ValueError("the scale along the rank belongs to R: L has a column scale")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        if self.q is not None:
            return self.q.shape
        assert self.l is not None and self.r is not None
        return self.l.shape[0], self.r.shape[1]

    @property
    def rank(self) -> int:
        """Columns of L; 0 without a low-rank part."""
        return self.r.shape[0] if self.r is not None else 0

    @property
    def format(self) -> Format:
        """The layout of this factorization."""
        scales = tuple((name, t.numel()) for name, t in self.tensors().items() if name.endswith("scale"))
        bits = {k: part.bits if part is not None else 0 for k, part in (("l", self.l), ("r", self.r), ("q", self.q))}
        return Format(self.shape, self.rank, bits["l"], bits["r"], bits["q"], scales)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> stored tensor, the names of `Format.layout` in its order."""
        out: dict[str, Tensor] = {}
        for suffix in ("codes", "scale"):
            for name, (part, field) in _PARTS.items():
                owner = getattr(self, part)
                value = getattr(owner, field) if owner is not None else None
                if value is not None and name.endswith(suffix):
                    out[name] = value
        return out

    @classmethod
    def from_tensors(cls, fmt: Format, tensors: dict[str, Tensor]) -> Factorization:
        """Put stored tensors back together; raises CheckpointError when one does not fit the format."""
        for name, (shape, dtype) in fmt.layout().items():
            found = tensors.get(name)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                state = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise CheckpointError(f"stored tensor {name} is {state}, {dtype} {shape} expected: compress the model again")
        n, d = fmt.shape
        size = {"l": (fmt.l_bits, (n, fmt.rank)), "r": (fmt.r_bits, (fmt.rank, d)), "q": (fmt.q_bits, (n, d))}
        parts: dict[str, QTensor] = {}
        for part, (bits, shape) in size.items():
            if f"{part}_codes" in fmt.layout():
                fields = {field: tensors.get(name) for name, (owner, field) in _PARTS.items() if owner == part}
                parts[part] = QTensor(bits=bits, shape=shape, **fields)  # type: ignore[arg-type]
        return cls(parts.get("l"), parts.get("r"), parts.get("q"))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q + L R as a dense (n, d) matrix."""
        out = self.q.dequantize(dtype) if self.q is not None else None
        if self.l is not None and self.r is not None:
            product = self.l.dequantize(dtype) @ self.r.dequantize(dtype)
            out = product if out is None else out.add_(product)
        assert out is not None
        return out

    def stored_bits(self) -> int:
        """Every stored bit."""
        return self.format.stored_bits()
