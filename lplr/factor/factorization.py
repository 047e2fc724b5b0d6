"""The value that every method returns: W ~ Q + L R, in packed form, and the format that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.kernels.hadamard import rotate, rotation_signs
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
    "q_narrow_codes": ("q", "narrow_codes"),
    "q_row_scale": ("q", "row_scale"),
    "q_col_scale": ("q", "col_scale"),
}


@dataclass(frozen=True)
class Format:
    """All that is needed to lay out one compressed matrix without its data.

    shape is (n, d) = (out_features, in_features); rank 0 means no low-rank part.  The backbone has q_bits bits in each
    column, one less in the first q_narrow; 0 means none.  rotation is the seed of the rotation of the inputs in which
    the parts stand, 0 for none.  scales maps the name of each scale that is stored to its length.
    """

    shape: tuple[int, int]
    rank: int = 0
    l_bits: int = 0
    r_bits: int = 0
    q_bits: int = 0
    q_narrow: int = 0
    rotation: int = 0
    scales: tuple[tuple[str, int], ...] = ()

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every stored tensor, in order."""
        n, d = self.shape
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.rank:
            out["l_codes"] = ((n, packed_width(self.rank, self.l_bits)), torch.uint8)
            out["r_codes"] = ((self.rank, packed_width(d, self.r_bits)), torch.uint8)
        if self.q_bits:
            out["q_codes"] = ((n, packed_width(d - self.q_narrow, self.q_bits)), torch.uint8)
            if self.q_narrow and self.q_bits > 1:
                out["q_narrow_codes"] = ((n, packed_width(self.q_narrow, self.q_bits - 1)), torch.uint8)
        out.update({name: ((length,), SCALE_DTYPE) for name, length in self.scales})
        return out

    def stored_bits(self) -> int:
        """Every stored bit of the matrix: codes, row padding, scales."""
        n, d = self.shape
        codes = n * packed_width(self.rank, self.l_bits) + self.rank * packed_width(d, self.r_bits)
        if self.q_bits:
            codes += n * (packed_width(d - self.q_narrow, self.q_bits) + packed_width(self.q_narrow, self.q_bits - 1))
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
            "q_narrow": self.q_narrow,
            "rotation": self.rotation,
            "scales": dict(self.scales),
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Format:
        """Inverse of `to_dict`; raises CheckpointError on an entry that describes no matrix."""
        try:
            n, d = (int(size) for size in entry["shape"])
            rank, l_bits, r_bits, q_bits = (int(entry[k]) for k in ("rank", "l_bits", "r_bits", "q_bits"))
            q_narrow, rotation = int(entry["q_narrow"]), int(entry["rotation"])
            scales = tuple((str(name), int(length)) for name, length in entry["scales"].items())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a layer entry of config.json is damaged ({error!r}): compress the model again") from None
        fits = {"row_scale": n, "rank_scale": rank, "col_scale": d, "q_row_scale": n, "q_col_scale": d}
        sane = (
            min(n, d) > 0
            and 0 <= rank <= 1 << 24
            and all(0 <= b <= 8 for b in (l_bits, r_bits, q_bits))
            and (rank == 0 or (l_bits > 0 and r_bits > 0))
            and (0 <= q_narrow < d if q_bits else q_narrow == 0)
            and 0 <= rotation < 1 << 63
            and all(name in fits and length in (1, fits[name]) for name, length in scales)
        )
        if not sane:
            raise CheckpointError(f"a layer entry of config.json is out of range ({entry}): compress the model again")
        return cls((n, d), rank, l_bits, r_bits, q_bits, q_narrow, rotation, scales)


@dataclass(frozen=True)
class Factorization:
    """W (n x d) ~ (Q + L R) O^T with L: n x r, R: r x d, each packed; l and r stand together, q may be absent.

    O (d x d) is the orthogonal matrix of `kernels.hadamard.rotate` with the seed `rotation`, the identity for 0: Q + L R stands
    in the basis of the rotated inputs, W x = (Q + L R)(O^T x).  The scale along the rank is held once, as R's row scale.
    """

    l: QTensor | None = None
    r: QTensor | None = None
    q: QTensor | None = None
    rotation: int = 0

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
        bits = {k: int(part.bits) if part is not None else 0 for k, part in (("l", self.l), ("r", self.r), ("q", self.q))}
        narrow = self.q.narrow if self.q is not None else 0
        return Format(self.shape, self.rank, bits["l"], bits["r"], bits["q"], narrow, self.rotation, scales)

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
        fields: dict[str, dict[str, Any]] = {"l": {}, "r": {}, "q": {}}
        for name, (part, field) in _PARTS.items():
            if name in tensors:
                fields[part][field] = tensors[name]
        l = r = q = None
        if fmt.rank:
            l = QTensor(bits=fmt.l_bits, shape=(n, fmt.rank), **fields["l"])
            r = QTensor(bits=fmt.r_bits, shape=(fmt.rank, d), **fields["r"])
        if fmt.q_bits:
            q = QTensor(bits=fmt.q_bits, shape=fmt.shape, narrow=fmt.q_narrow, **fields["q"])
        return cls(l, r, q, fmt.rotation)

    def rotated(self, X: Tensor) -> Tensor:
        """X O (m x d), the rows of a matrix in the basis in which Q + L R stands."""
        return rotate(X, rotation_signs(self.rotation, X.shape[-1])) if self.rotation else X

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(Q + L R) O^T as a dense (n, d) matrix."""
        out = self.q.dequantize(dtype) if self.q is not None else None
        if self.l is not None and self.r is not None:
            product = self.l.dequantize(dtype) @ self.r.dequantize(dtype)
            out = product if out is None else out.add_(product)
        assert out is not None
        return rotate(out, rotation_signs(self.rotation, out.shape[-1]), inverse=True) if self.rotation else out

    def stored_bits(self) -> int:
        """Every stored bit."""
        return self.format.stored_bits()
