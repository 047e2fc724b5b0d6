"""The driver: a checkpoint goes in, a folder that transformers loads and a record of every layer come out.

First, bits are allocated (`stream.allocation`).  Then, block by block: read, collect the inputs' second moments behind everything
that is compressed already, in the block too, factorize each matrix, write the block's shard, append its records.  A block is
finished only when its line stands in run.jsonl.  A killed run goes on behind the last one, and since each matrix has a generator
of its own, seeded by its name, and each finished block is run from its shard, the result has the same bytes as that of an
unbroken run.  config.json is written last: a folder without it is no model to any loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lplr
from lplr import records
from lplr.errors import OutputError
from lplr.factor import Factorization, Format
from lplr.files import write_atomic
from lplr.hf.export import tokenizer_files
from lplr.hf.optimizers import optimizer_of
from lplr.hf.skeleton import materialise, release
from lplr.nn import swap
from lplr.recipe import Recipe
from lplr.records import LayerRecord
from lplr.stream import gradients
from lplr.stream.allocation import KIND, allocated, allocation, taking_part
from lplr.stream.calibrate import Activations, advance, calibration_windows, embed, loaded, stages
from lplr.stream.checkpoint import Checkpoint, LayerPlan, Stored, open_checkpoint, plan_layers, unmatched_rules
from lplr.stream.device import usable_device
from lplr.stream.distill import clear, distill
from lplr.stream.estimate import check_memory
from lplr.stream.finish import finish_folder
from lplr.stream.ledger import FORMAT_VERSION, Ledger, base_name, check_folder, identities, open_ledger
from lplr.stream.matrix import Made, Seen, seeded, tuned
from lplr.stream.meter import Meter, Progress, weights
from lplr.stream.moments import InputMoments, Original, collect
from lplr.stream.overlap import ReadAhead, WriteBehind
from lplr.stream.reconstruct import Block, Reconstructed, reconstruct
from lplr.stream.shards import Layout, shard_name
from lplr.stream.source import read_entries
from lplr.stream.workers import Begun, Pending, Workers, in_flight, make_workers, threads_of

ROUNDED = ".rounded"  # folder of the stages before distillation
DISTILLING = 1.0  # time of the distillation over that of all that comes before it, about
MEASURING = 0.4  # time of the allocation over that of the compression, about
Notify = Callable[[str], None]


def compress(
    recipe: Recipe,
    output_dir: Path | str,
    *,
    resume: bool = True,
    allow_pickle: bool = False,
    engine: str = "local",
    notify: Notify | None = None,
    progress: Progress | None = None,
) -> list[LayerRecord]:
    """Run a recipe into a folder and return the record of every layer; a finished folder is left as it is.

    allow_pickle: a folder of pickled weights is read too, by torch's restricted unpickler.  engine: `local`, or `ray`
    (`stream.cluster`): who works on the matrices, which changes no byte.

    Raises RecipeError, CheckpointError, HubError, DatasetError, BackendError or OutputError before anything is lost: what was
    finished stays, and the same call goes on with it.
    """
    say, folder = notify or (lambda _: None), Path(output_dir)
    if allow_pickle:
        say("pickled weights are allowed: a pickle can run code when read; only torch's restricted unpickler stands before it")
    tell = progress or (lambda *_: None)
    with threads_of(folder), closing(make_workers(engine, usable_device(recipe.device))) as workers:
        run = _Run.open(recipe, folder, workers, resume=resume, allow_pickle=allow_pickle, notify=say)
        with run.ledger as ledger:
            if ledger.done is None:
                if recipe.recovery.distill_epochs and run.tokens is not None:
                    run.distill(tell, allow_pickle=allow_pickle, engine=engine)
                else:
                    meter = Meter(tell, weights(run.plans))
                    with run.overlapped():
                        run.allocate(meter)
                        with torch.no_grad():
                            run.finish_blocks(meter)
                finish_folder(run.checkpoint, recipe, ledger)
            clear(ledger.folder, ledger.folder / ROUNDED)
            return list(records.layers(ledger.entries))


@dataclass
class _Run:
    """One run of the driver."""

    recipe: Recipe
    checkpoint: Checkpoint
    plans: list[LayerPlan]
    tokens: Tensor | None  # (rows, seqlen); None without calibration
    files: dict[str, bytes] = field(repr=False)  # tokenizer and generation settings, copied from the source
    ledger: Ledger
    workers: Workers
    read: Callable[[str], Tensor] = field(init=False)  # a matrix of the checkpoint, by name
    writer: WriteBehind = field(init=False)
    moments: dict[str, str] = field(default_factory=dict)  # block -> checksum of its file of `gradients`

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, workers: Workers, *, resume: bool, allow_pickle: bool, notify: Notify) -> _Run:
        """Everything that can fail early: output folder, source, plan, text, tokenizer."""
        check_folder(folder, resume=resume)
        checkpoint = open_checkpoint(recipe.model, recipe.revision, notify, allow_pickle=allow_pickle)
        plans = plan_layers(checkpoint, recipe)
        for pattern in unmatched_rules(recipe, plans):
            notify(f"the rule {pattern!r} fits no matrix: patterns are for whole names such as {plans[0].name}")
        for left in checkpoint.view.unused():
            notify(f"tensor {left} of the checkpoint has no place in the model and is left out")
        if not (folder / "config.json").is_file():  # else it is finished, and left as it is
            check_memory(checkpoint, plans, recipe)
            optimizer_of(recipe.recovery.optimizer)  # an error now, not after hours
        tokens, calibration = calibration_windows(recipe, checkpoint, seeded(recipe.seed, "calibration"), notify)
        if told := recipe.untuned(tokens is not None):
            notify(told)
        files = tokenizer_files(checkpoint.path)
        if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in files):
            notify(f"{checkpoint.path.name} holds no tokenizer: the compressed folder will hold none either")
        header = {
            "format_version": FORMAT_VERSION,
            "versions": {"lplr": lplr.__version__, "torch": torch.__version__, "transformers": version("transformers")},
            "recipe": recipe.model_dump(mode="json"),
            "model": base_name(checkpoint.path, recipe.model),
            "source": checkpoint.source.identity(),
            "files": identities(checkpoint.path, files),
            "calibration": calibration,
            "threads": torch.get_num_threads(),
        }
        ledger = open_ledger(folder, header, resume=resume)
        return cls(recipe, checkpoint, plans, tokens, files, ledger, workers)

    @property
    def device(self) -> torch.device:
        """Where the text is run and, in this process, matrices are worked on."""
        return self.workers.device

    @property
    def shards(self) -> int:
        """Blocks, and one more for what lies outside of them."""
        return len(self.checkpoint.stack) + 1

    def shard(self, index: int) -> Path:
        """File of one shard; the number of shards is known from the start."""
        return self.ledger.folder / shard_name(index, self.shards)

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """While one thing is computed, shards are written and, without calibration, matrices are read."""
        pending = [p for p in self.plans if p.block not in self.ledger.blocks] if self.tokens is None else []
        self.read = reader = ReadAhead(self.checkpoint.view.get, [f"{p.name}.weight" for p in pending])
        try:
            with WriteBehind() as self.writer:
                yield
        finally:
            reader.close()

    def allocate(self, meter: Meter) -> None:
        """Give every matrix its bits: as run.jsonl has it, or measured now and noted there.

        Files of gradients that are lost are measured again; OutputError when that gives other bits.
        """
        chosen = taking_part(self.plans, self.recipe)
        if not chosen:
            return
        known = next((entry for entry in self.ledger.entries if entry["kind"] == KIND), None)
        line = known
        if line is None or not self._has_moments(line):
            generator = seeded(self.recipe.seed, KIND, self.device)
            where = self.ledger.folder, self.device
            say = meter.ahead(MEASURING)
            line = allocation(self.checkpoint, chosen, self.recipe, self.tokens, *where, generator, self.workers, say)
            say(1.0, "bits are allocated")
            if known is None:
                self.ledger.append([line])
            elif line != known:
                raise OutputError(
                    f"{self.ledger.folder}: files of the run were lost, and this machine gives other numbers than the one that "
                    "began it: delete the folder and compress again"
                )
        self.plans = allocated(self.plans, line)
        self.moments = line.get("gradients", {})

    def _has_moments(self, line: dict[str, Any]) -> bool:
        told = line.get("gradients", {}).items()
        return all(gradients.intact(self.ledger.folder, int(i), sum_) for i, sum_ in told if int(i) not in self.ledger.blocks)

    def finish_blocks(self, meter: Meter) -> None:
        """Compress every block that is not finished yet, then store what lies outside of the blocks."""
        for name, content in self.files.items():
            write_atomic(self.ledger.folder / name, content)
        blocks = len(self.checkpoint.stack)
        pending = [i for i in range(blocks) if i not in self.ledger.blocks]
        inputs, originals, kwargs = None, None, [{}] * blocks
        without = self._begun(p for i in pending for p in self.plans if p.block == i) if self.tokens is None else None
        if self.tokens is not None and pending:
            meter.say("embedding the calibration text")
            inputs, kwargs = embed(self.checkpoint, self.tokens, self.ledger.folder, self.device)
            if self.recipe.propagation or self.recipe.recovery.epochs:
                originals = inputs.copy(self.ledger.folder)
        try:
            for i in range(blocks):
                plans = [p for p in self.plans if p.block == i]
                if i in pending:
                    self._compress_block(i, plans, inputs, originals, kwargs[i], without, meter)
                else:
                    gradients.drop(self.ledger.folder, i)  # a run that was killed behind the block's line may have left them
                if i not in pending and originals is not None and any(j > i for j in pending):
                    with loaded(self.checkpoint, i, self.device) as block:
                        advance(block, originals, kwargs[i], self.device, self.workers.spread)
                if inputs is not None and any(j > i for j in pending):
                    meter.say(f"block {i + 1}: running the calibration text through the compressed block")
                    self._advance(i, inputs, kwargs[i])
                meter.finish(plans, f"block {i + 1} of {blocks}")
        finally:
            for states in (inputs, originals):
                if states is not None:
                    states.close()
        self.writer.wait()
        if blocks not in self.ledger.blocks:
            outside = Stored(self.checkpoint, self.checkpoint.other_tensors())
            self._commit(blocks, outside, outside.layout, [])

    def _compress_block(
        self,
        index: int,
        plans: list[LayerPlan],
        inputs: Activations | None,
        originals: Activations | None,
        kwargs: Mapping[str, Any],
        without: Iterator[Begun] | None,
        meter: Meter,
    ) -> None:
        """Write one block; `originals`, its inputs in the original model, become its outputs there.  Without calibration its
        matrices come from `without`.
        """
        ck = self.checkpoint
        made: dict[str, Pending[Made]] = {}
        seen: dict[str, Tensor] = {}  # second moments of the inputs of what may be tuned
        done = 0.0
        told = self.moments.get(str(index))
        moments = gradients.kept(self.ledger.folder, index, told) if told else {}

        def followed(these: list[LayerPlan], begun: Iterator[Begun]) -> Iterator[Begun]:
            """What is begun of matrices, in order."""
            nonlocal done
            for p in these:
                meter.tell(meter.done + done, meter.total, p.name)
                found = next(begun)
                made[p.name] = found.made
                yield found
                done += weights([p])

        def several(these: list[LayerPlan], collected: InputMoments) -> Iterator[Factorization | None]:
            """The factorizations of matrices with what was collected of their inputs, some at a time."""
            jobs = []
            for p in these:
                H, step = collected.of(p.name)
                if H is not None and self.recipe.recovery.epochs:
                    seen[p.name] = H
                step = step if self.recipe.propagation else None  # the original block may run for what is tuned alone
                jobs.append(self._begin(p, Seen(H, moments.pop(p.name, None), step, collected.note(p.name))))
            return (found.f for found in followed(these, (job.result() for job in jobs)))

        chosen = {p.name: p for p in plans if p.format}
        changed = None
        if inputs is not None:
            meter.say(f"block {index + 1}: running the calibration text")
            changed = self._by_stages(index, chosen, inputs, originals, kwargs, several, meter)
        rest = [p for p in plans if p.name not in made]
        for found in followed(rest, without or self._begun(rest)):
            found.made.result()  # before the next one is asked for: in one process one matrix is in memory at a time
        results = {p.name: made[p.name].result() for p in plans}
        for name, f in ({} if changed is None else changed.matrices).items():
            where = {"transposed": chosen[name].transposed, "seed": self.recipe.seed, "device": self.device}
            results[name] = tuned(results[name].record, self.read(f"{name}.weight"), f, **where, H=seen.get(name))
        tensors = {name: tensor for p in plans for name, tensor in results[p.name].tensors().items()}
        replaced = {f"{name}.weight" for name in chosen}
        tensors.update({name: ck.stored(name) for name in ck.block_tensors(index) if name not in replaced})
        lines = [results[p.name].record.model_dump(mode="json") for p in plans]
        if changed is not None:
            tensors.update(changed.rest)
            lines.append(changed.line(index))
        layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self._commit(index, tensors, layout, lines)

    def _begin(self, p: LayerPlan, seen: Seen) -> Pending[Begun]:
        return self.workers.matrix(self.recipe, p, self.read(f"{p.name}.weight"), seen)

    def _begun(self, plans: Iterable[LayerPlan]) -> Iterator[Begun]:
        """Matrices without calibration, in order, as many in work as there is room for."""
        largest = max(self.checkpoint.view.nbytes(f"{p.name}.weight") for p in self.plans)
        return in_flight((self._begin(p, Seen()) for p in plans), self.workers.ahead(largest))

    def _by_stages(
        self,
        index: int,
        chosen: dict[str, LayerPlan],
        inputs: Activations,
        originals: Activations | None,
        kwargs: Mapping[str, Any],
        several: Callable[[list[LayerPlan], InputMoments], Iterator[Factorization | None]],
        meter: Meter,
    ) -> Reconstructed | None:
        """Hand the matrices of a block that have one input to `several`, with the second moments collected behind all matrices
        that come before them, and the step that makes up for what these did to that input; then tune them, if the recipe says so.
        """
        with loaded(self.checkpoint, index, self.device) as block:
            original = None if originals is None else Original.of(block, originals)
            layers = {name: self.checkpoint.model.get_submodule(name) for name in chosen}
            groups = stages(block, layers, inputs, kwargs, self.device) if layers else []
            made: dict[str, Factorization] = {}
            for names in groups:
                these = {name: layers[name] for name in names}
                last = names is groups[-1]
                moments = collect(block, these, inputs, kwargs, self.device, original, last=last, spread=self.workers.spread)
                for name, f in zip(names, several([chosen[name] for name in names], moments), strict=True):
                    assert f is not None  # a chosen matrix is compressed
                    made[name] = f
                    W = f.dequantize()
                    layers[name].weight = torch.nn.Parameter(W.T if chosen[name].transposed else W, requires_grad=False)
            if original is not None and not groups:
                advance(original.block, original.inputs, kwargs, self.device, self.workers.spread)
            if original is None or not made or not self.recipe.recovery.epochs:
                return None
            epochs = self.recipe.recovery.epochs

            def say(epoch: int, loss: float) -> None:
                meter.say(f"block {index + 1}: tuned {epoch} of {epochs} passes, held-out error {loss:.3g}")

            where = Block(self.checkpoint, index, block, self.device)
            generator = seeded(self.recipe.seed, f"recovery {index}")
            return reconstruct(where, made, inputs, original.inputs, kwargs, self.recipe.recovery, generator, say)

    def _advance(self, index: int, inputs: Activations, kwargs: Mapping[str, Any]) -> None:
        """Run a finished block from its shard, as a resumed run would, to get the next block's inputs."""
        self.writer.wait()
        ck = self.checkpoint
        made = records.formats(r for r in records.layers(self.ledger.entries) if r.block == index)
        formats = {name: Format.from_dict(entry) for name, entry in made.items()}
        swap(ck.model, formats)
        block, prefix = ck.stack[index], f"{ck.prefix}.{index}."
        packed = {f"{name}.{part}" for name, fmt in formats.items() for part in fmt.layout()}
        tensors = {}
        for name, entry in read_entries(self.shard(index)).items():
            tensor = entry.read()
            keep = name in packed or not tensor.is_floating_point()
            tensors[name.removeprefix(prefix)] = (tensor if keep else tensor.float()).to(self.device)
        materialise(block, tensors)
        advance(block, inputs, kwargs, self.device, self.workers.spread)
        release(block)

    def _commit(self, index: int, tensors: Mapping[str, Tensor], layout: Layout, rows: list[dict[str, Any]]) -> None:
        """Write a shard and its lines while the caller goes on; `tensors` must stay as they are."""

        def write() -> None:
            self.ledger.commit(index, self.shard(index).name, tensors, rows, layout)
            gradients.drop(self.ledger.folder, index)

        self.writer.do(write)

    def distill(self, progress: Progress, *, allow_pickle: bool, engine: str) -> None:
        """Make everything but the last stage of recovery in a hidden folder, as a run of its own; then that stage."""
        assert self.tokens is not None
        total = weights(self.plans)
        recovery = self.recipe.recovery.model_copy(update={"distill_epochs": 0})
        rounded = self.ledger.folder / ROUNDED
        ahead = (1 + DISTILLING) * total

        def first(done: float, of: float, what: str) -> None:
            progress(done / of * total, ahead, what)

        def then(share: float, what: str) -> None:
            progress((1 + share * DISTILLING) * total, ahead, what)

        recipe = self.recipe.model_copy(update={"recovery": recovery})
        compress(recipe, rounded, allow_pickle=allow_pickle, engine=engine, progress=first)
        for name, content in self.files.items():
            write_atomic(self.ledger.folder / name, content)
        distill(self.checkpoint, self.recipe, rounded, self.ledger, self.tokens, self.device, then)
