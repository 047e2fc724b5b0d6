"""The value that every method returns: W ~ P (Q + L R) O^T, in packed form, and the format that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lplr.errors import CheckpointError
from lplr.kernels.hadamard import rotate, rotation_signs
from lplr.kernels.levels import WIDTHS, narrower, packed_shape
from lplr.quant.qtensor import SCALE_DTYPE, QTensor
from lplr.recipe import QuantSpec

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
    column, the next lower width of its grid in the first q_narrow; 0 means none.  rotation and output_rotation are the seeds of
    the rotations of the inputs and of the outputs in which the parts stand, 0 for none.  scales maps the name of each scale that
    is stored to its length.
    """

    shape: tuple[int, int]
    rank: int = 0
    l_bits: float = 0
    r_bits: float = 0
    q_bits: float = 0
    q_narrow: int = 0
    rotation: int = 0
    scales: tuple[tuple[str, int], ...] = ()
    l_grid: str = "uniform"
    r_grid: str = "uniform"
    q_grid: str = "uniform"
    output_rotation: int = 0

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        rank: int,
        parts: tuple[QTensor | QuantSpec | None, QTensor | QuantSpec | None, QTensor | QuantSpec | None],
        q_narrow: int,
        rotations: tuple[int, int],
        scales: tuple[tuple[str, int], ...],
    ) -> Format:
        """The format with the widths and grids of L, R and Q, specified or made; rotations are of the inputs and the outputs."""
        l, r, q = (0.0 if part is None else float(part.bits) for part in parts)
        l_grid, r_grid, q_grid = ("uniform" if part is None else part.grid for part in parts)
        return cls(shape, rank, l, r, q, q_narrow, rotations[0], scales, l_grid, r_grid, q_grid, rotations[1])

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every stored tensor, in order."""
        n, d = self.shape
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.rank:
            out["l_codes"] = (packed_shape((n, self.rank), self.l_grid, self.l_bits), torch.uint8)
            out["r_codes"] = (packed_shape((self.rank, d), self.r_grid, self.r_bits), torch.uint8)
        if self.q_bits:
            out["q_codes"] = (packed_shape((n, d - self.q_narrow), self.q_grid, self.q_bits), torch.uint8)
            lower, _ = narrower(self.q_grid, self.q_bits)
            if self.q_narrow and lower:
                out["q_narrow_codes"] = (packed_shape((n, self.q_narrow), self.q_grid, lower), torch.uint8)
        out.update({name: ((length,), SCALE_DTYPE) for name, length in self.scales})
        return out

    def stored_bits(self) -> int:
        """Every stored bit of the matrix: codes, their padding, scales."""
        return 8 * sum(prod(shape) * dtype.itemsize for shape, dtype in self.layout().values())

    @property
    def bits_per_weight(self) -> float:
        """stored_bits / (n d)."""
        return self.stored_bits() / (self.shape[0] * self.shape[1])

    @property
    def backbone_width(self) -> float:
        """Bits of a code of Q, the mean over its columns; 0 without Q."""
        if not self.q_bits:
            return 0.0
        return self.q_bits - (self.q_bits - narrower(self.q_grid, self.q_bits)[0]) * self.q_narrow / self.shape[1]

    def grids(self) -> tuple[str, ...]:
        """The grids of what is there, of L, R and Q, each once."""
        parts = ((self.l_bits, self.l_grid), (self.r_bits, self.r_grid), (self.q_bits, self.q_grid))
        return tuple(dict.fromkeys(grid for bits, grid in parts if bits))

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
            "l_grid": self.l_grid,
            "r_grid": self.r_grid,
            "q_grid": self.q_grid,
            "output_rotation": self.output_rotation,
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Format:
        """Inverse of `to_dict`; raises CheckpointError on an entry that describes no matrix.

        The grids and output_rotation may be missing, as in folders that are older than they are: uniform, and none.
        """
        try:
            n, d = (int(size) for size in entry["shape"])
            rank, q_narrow, rotation = (int(entry[k]) for k in ("rank", "q_narrow", "rotation"))
            output_rotation = int(entry.get("output_rotation", 0))
            bits = {part: float(entry[f"{part}_bits"]) for part in "lrq"}
            grids = {part: str(entry.get(f"{part}_grid", "uniform")) for part in "lrq"}
            scales = tuple((str(name), int(length)) for name, length in entry["scales"].items())
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"a layer entry of config.json is damaged ({error!r}): compress the model again") from None
        fits = {"row_scale": n, "rank_scale": rank, "col_scale": d, "q_row_scale": n, "q_col_scale": d}
        sane = (
            min(n, d) > 0
            and 0 <= rank <= 1 << 24
            and all(grids[part] in WIDTHS and (not bits[part] or bits[part] in WIDTHS[grids[part]]) for part in "lrq")
            and (rank == 0 or (bits["l"] > 0 and bits["r"] > 0))
            and (0 <= q_narrow < d if bits["q"] else q_narrow == 0)
            and all(0 <= seed < 1 << 63 for seed in (rotation, output_rotation))
            and all(name in fits and length in (1, fits[name]) for name, length in scales)
        )
        if not sane:
            raise CheckpointError(f"a layer entry of config.json is out of range ({entry}): compress the model again")
        widths = bits["l"], bits["r"], bits["q"]
        names = grids["l"], grids["r"], grids["q"]
        return cls((n, d), rank, *widths, q_narrow, rotation, scales, *names, output_rotation)


@dataclass(frozen=True)
class Factorization:
    """W (n x d) ~ P (Q + L R) O^T with L: n x r, R: r x d, each packed; l and r stand together, q may be absent.

    O (d x d) and P (n x n) are the orthogonal matrices of `kernels.hadamard.rotate` with the seeds `rotation` and
    `output_rotation`, the identity for 0: Q + L R stands in the bases of the rotated inputs and outputs, P^T W x =
    (Q + L R)(O^T x).  The scale along the rank is held once, as R's row scale.
    """

    l: QTensor | None = None
    r: QTensor | None = None
    q: QTensor | None = None
    rotation: int = 0
    output_rotation: int = 0

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
    def is_zero(self) -> bool:
        """Whether scales alone make every entry zero."""
        scales = ([s for s in (part.row_scale, part.col_scale) if s is not None] for part in (self.r, self.q) if part is not None)
        return all(any(not bool(scale.any()) for scale in of_part) for of_part in scales)

    @property
    def format(self) -> Format:
        """The layout of this factorization."""
        scales = tuple((name, t.numel()) for name, t in self.tensors().items() if name.endswith("scale"))
        narrow = self.q.narrow if self.q is not None else 0
        rotations = self.rotation, self.output_rotation
        return Format.of(self.shape, self.rank, (self.l, self.r, self.q), narrow, rotations, scales)

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
            l = QTensor(bits=fmt.l_bits, shape=(n, fmt.rank), grid=fmt.l_grid, **fields["l"])
            r = QTensor(bits=fmt.r_bits, shape=(fmt.rank, d), grid=fmt.r_grid, **fields["r"])
        if fmt.q_bits:
            q = QTensor(bits=fmt.q_bits, shape=fmt.shape, narrow=fmt.q_narrow, grid=fmt.q_grid, **fields["q"])
        return cls(l, r, q, fmt.rotation, fmt.output_rotation)

    def rotated(self, W: Tensor) -> Tensor:
        """P^T W O (n x d): a matrix of this one's shape in the bases in which Q + L R stands."""
        return rotated(W, self.rotation, self.output_rotation)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """P (Q + L R) O^T as a dense (n, d) matrix."""
        out = self.q.dequantize(dtype) if self.q is not None else None
        if self.l is not None and self.r is not None:
            product = self.l.dequantize(dtype) @ self.r.dequantize(dtype)
            out = product if out is None else out.add_(product)
        assert out is not None
        return rotated(out, self.rotation, self.output_rotation, inverse=True)

    def plain_parts(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(P Q O^T, P L, R O^T), dense, whose first plus the product of the others is W; None for what is not there.

        What an engine without rotations can hold: (n, d), (n, r) and (r, d).
        """
        q, l, r = (None if part is None else part.dequantize(dtype) for part in (self.q, self.l, self.r))
        return (
            None if q is None else rotated(q, self.rotation, self.output_rotation, inverse=True),
            None if l is None else rotated(l, 0, self.output_rotation, inverse=True),
            None if r is None else rotated(r, self.rotation, 0, inverse=True),
        )

    def stored_bits(self) -> int:
        """Every stored bit."""
        return self.format.stored_bits()


def rotated(W: Tensor, rotation: int, output_rotation: int, *, inverse: bool = False) -> Tensor:
    """P^T W O (n x d), or with `inverse` P W O^T, for the seeds of O and P, 0 being the identity."""
    if rotation:
        W = rotate(W, rotation_signs(rotation, W.shape[1]), inverse=inverse)
    if output_rotation:
        # P^T W = (W^T P)^T
        W = rotate(W.T, rotation_signs(output_rotation, W.shape[0]), inverse=inverse).T.contiguous()
    return W
