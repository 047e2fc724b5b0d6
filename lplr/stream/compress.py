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

    def _embed(self, tokens: Tensor) -> tuple[Activations, list[dict[str, Any]]]:
        """The inputs of the first block for all calibration rows, and the other arguments of every block."""
        ck = self.checkpoint
        head = ck.model.get_output_embeddings()
        names = {id(module): name for name, module in ck.model.named_modules()}
        skip = [ck.prefix] + ([names[id(head)]] if head is not None else [])
        outside = [name for name in ck.other_tensors() if not any(name.startswith(f"{s}.") for s in skip)]
        materialise(ck.model, {name: self._float(name) for name in outside}, skip=skip)
        size = batch_rows(*tokens.shape)
        activations, kwargs = None, []
        for start in range(0, len(tokens), size):
            hidden, kwargs = capture_block_inputs(ck.model, tokens[start : start + size].to(self.device))
            if activations is None:
                activations = Activations(*tokens.shape, hidden.shape[-1], folder=self.ledger.folder)
            activations.set(slice(start, start + size), hidden)
        assert activations is not None
        for name in dict.fromkeys(name.rpartition(".")[0] for name in outside):
            release(ck.model.get_submodule(name))
        return activations, kwargs

    def _float(self, name: str) -> Tensor:
        """A tensor of the source in float32, checked."""
        tensor = self.checkpoint.view.get(name)
        check_finite(name, tensor)
        return tensor.float().to(self.device) if tensor.is_floating_point() else tensor.to(self.device)

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

    def finish_folder(self) -> None:
        """Index, card, recipe, config.json, and last the `done` line with the checksum of every file."""
        ck, folder = self.checkpoint, self.ledger.folder
        lines = self.ledger.blocks
        weight_map = {
            name: line["file"] for line in lines.values() for name in read_entries(folder / line["file"])
        }
        tensor_bytes = sum(line["tensor_bytes"] for line in lines.values())
        write_index(folder, weight_map, tensor_bytes)
        rows = list(records.layers(self.ledger.entries))
        summary = self._summary(rows, tensor_bytes)
        write_text_atomic(folder / "recipe.yaml", self.recipe.to_yaml())
        write_text_atomic(folder / "README.md", card_text(self.ledger.entries[0], summary))
        layers = {p.name: p.format for p in self.plans if p.format}
        dtype = max((ck.stored_dtype(n) for n in ck.other_tensors()), key=lambda t: (t.is_floating_point, t.itemsize))
        config = LplrConfig(layers, self.recipe.modules_to_not_convert, ck.defused)
        write_text_atomic(folder / "config.json", config_text(ck.config, config, dtype))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir()) if _counts(p)}
        done = {"kind": "done", **summary, "files": files, "seconds": sum(row.seconds for row in rows)}
        done["ledger_sha256"] = digest([*self.ledger.entries, done])
        self.ledger.append([done])

    def _summary(self, rows: list[LayerRecord], tensor_bytes: int) -> dict[str, Any]:
        compressed = [row for row in rows if row.stored == "compressed"]
        parameters = sum(_count(self.checkpoint, name) for name in self.checkpoint.view.names())
        return {
            "weights": sum(row.shape[0] * row.shape[1] for row in compressed),
            "bits_per_weight": records.bits_per_weight(rows),
            "parameters": parameters,
            "bytes": tensor_bytes,
            "bits_per_parameter": 8 * tensor_bytes / parameters,
        }


class _Stored(Mapping[str, Tensor]):
    """Dense tensors as they will be stored, read when asked for, so that one is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def __getitem__(self, name: str) -> Tensor:
        return _stored(self._checkpoint, name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _stored(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.view.get(name)
    check_finite(name, tensor)
    return tensor.to(checkpoint.stored_dtype(name))


def _nbytes(tensors: Mapping[str, Tensor], name: str) -> int:
    if isinstance(tensors, _Stored):
        return _count(tensors._checkpoint, name) * tensors._checkpoint.stored_dtype(name).itemsize
    return tensors[name].numel() * tensors[name].element_size()


def _count(checkpoint: Checkpoint, name: str) -> int:
    return int(torch.Size(checkpoint.view.shape(name)).numel())


def _counts(path: Path) -> bool:
    """Whether a file is part of the result: the ledger, the report and evaluations come or change later."""
    return path.is_file() and path.name != records.LEDGER and path.name != "report.html" and not path.name.startswith(("eval-", "."))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise LplrError(f"device {name!r} cannot be used ({reason}): choose --device cpu, or install torch for it") from None
    return device


def _base_name(path: Path, model: str) -> str:
    """The name of the base model: a Hub id as given, else the folder's or file's own name, never a path."""
    return path.name if Path(model).expanduser().exists() else model


def _calibration(recipe: Recipe, checkpoint: Checkpoint, notify: Notify) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Calibration windows (rows, seqlen) and what they are, or None twice with `dataset: none`."""
    if recipe.dataset == "none":
        return None, None
    text = read_text(recipe.dataset)
    tokenizer = gguf_tokenizer(checkpoint.path) if is_gguf(checkpoint.path) else load_tokenizer(checkpoint.path)
    context = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None) or recipe.seqlen
    seqlen = min(recipe.seqlen, context)
    tokens = calibration_tokens(tokenizer, text, recipe.nsamples, seqlen, seeded(recipe.seed, "calibration"))
    if len(tokens) < recipe.nsamples:
        notify(f"{text.name} holds {len(tokens)} windows of {seqlen} tokens, not {recipe.nsamples}: calibrating on these")
    facts = {"name": text.name, "sha256": text.sha256, "rows": len(tokens), "seqlen": seqlen}
    return tokens, facts
