"""The driver: a checkpoint goes in, a folder that transformers loads and a record of every layer come out.

Block by block: read, collect the inputs' second moments on the compressed prefix, factorize each matrix, write the
block's shard, then append its records.  A block is finished only when its line stands in run.jsonl; a killed run
goes on behind the last one, and since each matrix has a generator of its own, seeded by its name, and
each finished block is run from its shard, the result has the same bytes as that of an unbroken run.  config.json is
written last: a folder without it is no model to any loader.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lplr
from lplr import records
from lplr.errors import CheckpointError, LplrError
from lplr.factor import certify, factorize
from lplr.hf.export import card_text, config_text, tokenizer_files
from lplr.hf.gguf import gguf_tokenizer
from lplr.hf.load import is_gguf, load_tokenizer
from lplr.hf.quantizer import LplrConfig
from lplr.hf.skeleton import capture_block_inputs, materialise, release
from lplr.hf.text import calibration_tokens, read_text
from lplr.linalg.hessian import Hessian
from lplr.nn import swap
from lplr.recipe import Recipe
from lplr.records import LayerRecord
from lplr.stream.calibrate import Activations, advance, batch_rows, collect
from lplr.stream.checkpoint import Checkpoint, LayerPlan, open_checkpoint, plan_layers
from lplr.stream.ledger import FORMAT_VERSION, Ledger, digest, open_ledger
from lplr.stream.shards import sha256, write_atomic, write_index, write_shard, write_text_atomic
from lplr.stream.source import check_finite, read_entries

Progress = Callable[[float, float, str], None]  # (done, total, what): in weights of the compressed matrices
Notify = Callable[[str], None]


def compress(
    recipe: Recipe,
    output_dir: Path | str,
    *,
    resume: bool = True,
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> list[LayerRecord]:
    """Run a recipe into a folder and return the record of every layer; a finished folder is left as it is.

    Raises RecipeError, CheckpointError, HubError, DatasetError or OutputError before anything is lost: what was
    finished stays, and the same call goes on with it.
    """
    folder = Path(output_dir)
    run = _Run.open(recipe, folder, resume=resume, notify=notify or (lambda _: None))
    if run.ledger.done is None:
        with torch.inference_mode():
            run.finish_blocks(progress or (lambda *_: None))
        run.finish_folder()
    return list(records.layers(run.ledger.entries))


def seeded(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each name: what is drawn does not depend on what was drawn before."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key[:7], "little"))


@dataclass
class _Run:
    """One run of the driver."""

    recipe: Recipe
    checkpoint: Checkpoint
    plans: list[LayerPlan]
    tokens: Tensor | None  # (rows, seqlen); None without calibration
    ledger: Ledger
    device: torch.device
    model_name: str

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, *, resume: bool, notify: Notify) -> _Run:
        """Everything that can fail early: source, plan, text, output folder, tokenizer."""
        device = _device(recipe.device)
        checkpoint = open_checkpoint(recipe.model, recipe.revision, notify)
        plans = plan_layers(checkpoint, recipe)
        for left in checkpoint.view.unused():
            notify(f"tensor {left} of the checkpoint has no place in the model and is left out")
        tokens, calibration = _calibration(recipe, checkpoint, notify)
        header = {
            "format_version": FORMAT_VERSION,
            "versions": {"lplr": lplr.__version__, "torch": torch.__version__, "transformers": version("transformers")},
            "recipe": recipe.model_dump(mode="json"),
            "model": _base_name(checkpoint.path, recipe.model),
            "source": checkpoint.source.identity(),
            "calibration": calibration,
        }
        ledger = open_ledger(folder, header, resume=resume)
        if ledger.done is None:
            files = tokenizer_files(checkpoint.path)
            for name, content in files.items():
                write_atomic(folder / name, content)
            if not any(name.startswith(("tokenizer", "vocab")) for name in files):
                notify(f"{checkpoint.path.name} holds no tokenizer: the compressed folder will hold none either")
        return cls(recipe, checkpoint, plans, tokens, ledger, device, header["model"])

    @property
    def shards(self) -> int:
        """Blocks, and one more for what lies outside of them."""
        return len(self.checkpoint.stack) + 1

    def shard(self, index: int) -> Path:
        """File of one shard; the number of shards is known from the start."""
        return self.ledger.folder / f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def is_finished(self, index: int) -> bool:
        """Whether the ledger has the shard's line and the file its size."""
        line, path = self.ledger.blocks.get(index), self.shard(index)
        if line is not None and not (path.is_file() and path.stat().st_size == line["bytes"]):
            raise CheckpointError(f"{path} is missing or cut short though run.jsonl has it: delete the folder and start again")
        return line is not None

    def finish_blocks(self, progress: Progress) -> None:
        """Compress every block that is not finished yet, then store what lies outside of the blocks."""
        total = float(sum(p.shape[0] * p.shape[1] for p in self.plans if p.format))
        blocks = range(len(self.checkpoint.stack))
        pending = [i for i in blocks if not self.is_finished(i)]
        inputs, kwargs = (None, [{}] * len(blocks))
        if self.tokens is not None and pending:
            progress(0.0, total, "embedding the calibration text")
            inputs, kwargs = self._embed(self.tokens)
        done = 0.0
        try:
            for i in blocks:
                plans = [p for p in self.plans if p.block == i]
                if i in pending:
                    self._compress_block(i, plans, inputs, kwargs[i], lambda x, text: progress(done + x, total, text))
                if inputs is not None and any(j > i for j in pending):
                    self._advance(i, plans, inputs, kwargs[i])
                done += float(sum(p.shape[0] * p.shape[1] for p in plans if p.format))
                progress(done, total, f"block {i + 1} of {len(blocks)}")
        finally:
            if inputs is not None:
                inputs.close()
        last = self.shards - 1
        if not self.is_finished(last):
            self._commit(last, _Stored(self.checkpoint, self.checkpoint.other_tensors()), [])

    def _compress_block(
        self,
        index: int,
        plans: list[LayerPlan],
        inputs: Activations | None,
        kwargs: Mapping[str, Any],
        progress: Callable[[float, str], None],
    ) -> None:
        ck = self.checkpoint
        todo = [p for p in plans if p.format]
        hessians: dict[str, Hessian] = {}
        if inputs is not None and todo:
            progress(0.0, f"block {index + 1}: running the calibration text")
            block, prefix = ck.stack[index], f"{ck.prefix}.{index}."
            materialise(block, {name.removeprefix(prefix): self._float(name) for name in ck.block_tensors(index)})
            hessians = collect(block, {p.name: ck.model.get_submodule(p.name) for p in todo}, inputs, kwargs, self.device)
            release(block)
        tensors: dict[str, Tensor] = {}
        rows: list[LayerRecord] = []
        done = 0.0
        for p in plans:
            progress(done, p.name)
            hessian = hessians.pop(p.name, None)
            stored, record = self._compress_layer(p, hessian.mean() if hessian is not None else None)
            tensors.update(stored)
            rows.append(record)
            done += p.shape[0] * p.shape[1] if p.format else 0
        replaced = {f"{p.name}.weight" for p in todo}
        for name in ck.block_tensors(index):
            if name not in replaced:
                tensors[name] = _stored(ck, name)
        self._commit(index, tensors, rows)

    def _compress_layer(self, p: LayerPlan, H: Tensor | None) -> tuple[dict[str, Tensor], LayerRecord]:
        """The stored tensors of one matrix, by full name, and its record."""
        started = time.perf_counter()
        W = self._float(f"{p.name}.weight")
        W = W.T.contiguous() if p.transposed else W
        common = {"name": p.name, "block": p.block, "shape": p.shape, "method": p.spec.method}
        if p.format is None:
            norm = float(torch.linalg.vector_norm(W.double()))
            return {}, LayerRecord(**common, stored="dense", bits=p.dense_bits, norm=norm, note=p.reason)
        generator = seeded(self.recipe.seed, p.name, self.device)
        f = factorize(W, p.spec, H=H, generator=generator)
        assert f.format == p.format, f"{p.name}: planned {p.format}, made {f.format}"
        facts = certify(W, f, p.spec, H, generator)
        note = "" if H is not None or self.tokens is None else "no calibration token reached it: compressed without data"
        facts["note"] = "; ".join(filter(None, [note, facts.get("note", "")]))
        fmt = f.format
        record = LayerRecord(
            **common,
            rank=fmt.rank,
            l_bits=fmt.l_bits,
            r_bits=fmt.r_bits,
            q_bits=fmt.q_bits,
            bits=fmt.stored_bits(),
            seconds=time.perf_counter() - started,
            **facts,
        )
        return {f"{p.name}.{part}": tensor for part, tensor in f.tensors().items()}, record

    def _advance(self, index: int, plans: list[LayerPlan], inputs: Activations, kwargs: Mapping[str, Any]) -> None:
        """Run a finished block from its shard, as a resumed run would, to get the next block's inputs."""
        ck = self.checkpoint
        swap(ck.model, {p.name: p.format for p in plans if p.format})
        block, prefix = ck.stack[index], f"{ck.prefix}.{index}."
        packed = {f"{p.name}.{part}" for p in plans if p.format for part in p.format.layout()}
        stored = {name: entry.read() for name, entry in read_entries(self.shard(index)).items()}
        tensors = {
            name.removeprefix(prefix): (t if name in packed or not t.is_floating_point() else t.float()).to(self.device)
            for name, t in stored.items()
        }
        materialise(block, tensors)
        advance(block, inputs, kwargs, self.device)
        release(block)

    def _commit(self, index: int, tensors: Mapping[str, Tensor], rows: list[LayerRecord]) -> None:
        """Write a shard, then its lines: in this order, so that a line never speaks of bytes that are not there."""
        path = self.shard(index)
        digest_hex = write_shard(path, tensors)
        line = {
            "kind": "block",
            "index": index,
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": digest_hex,
            "tensor_bytes": sum(_nbytes(tensors, name) for name in tensors),
        }
        self.ledger.append([row.model_dump(mode="json") for row in rows] + [line])
