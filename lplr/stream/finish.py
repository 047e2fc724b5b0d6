"""What turns committed shards into a folder that transformers loads: index, recipe, card, and config.json last."""

from __future__ import annotations

from typing import Any

from lplr import records
from lplr.errors import OutputError
from lplr.files import sha256, write_text_atomic
from lplr.hf.card import CARD, SHIM, card_text, shim_text
from lplr.hf.export import architecture_of, config_text
from lplr.hf.quantizer import LplrConfig
from lplr.recipe import Recipe
from lplr.stream.checkpoint import Checkpoint
from lplr.stream.ledger import Ledger, digest
from lplr.stream.shards import INDEX, write_index
from lplr.stream.source import read_entries


def finish_folder(checkpoint: Checkpoint, recipe: Recipe, ledger: Ledger) -> None:
    """Write what stands beside the shards, then the `done` line with the checksum of every file of the run.

    Raises OutputError when a shard is no longer what its line says, or the disk is full.
    """
    ck, folder, lines = checkpoint, ledger.folder, ledger.blocks
    weight_map = {name: line["file"] for line in lines.values() for name in read_entries(folder / line["file"])}
    tensor_bytes = sum(line["tensor_bytes"] for line in lines.values())
    write_index(folder, weight_map, tensor_bytes)
    rows = list(records.layers(ledger.entries))
    summary = _summary(ck, rows, tensor_bytes)
    write_text_atomic(folder / "recipe.yaml", recipe.to_yaml())
    write_text_atomic(folder / CARD, card_text(ledger.entries[0], summary, rows))
    if architecture := architecture_of(ck.config):
        write_text_atomic(folder / SHIM, shim_text(architecture))
    dtype = max((ck.stored_dtype(n) for n in ck.other_tensors()), key=lambda t: (t.is_floating_point, t.itemsize))
    config = LplrConfig(records.formats(rows), recipe.modules_to_not_convert, ck.defused)
    write_text_atomic(folder / "config.json", config_text(ck.config, config, dtype))
    done = {"kind": "done", **summary, "files": _manifest(ledger)}
    done["seconds"] = sum(row.seconds for row in rows)
    done["ledger_sha256"] = digest([*ledger.entries, done])
    done["seal"] = records.UNSEALED
    done["seal"] = records.seal(ledger.path.read_bytes() + records.encoded([done]))
    ledger.append([done])


def _manifest(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """Name -> bytes and SHA-256 of every file that the run wrote but run.jsonl and the card, read back from the disk.

    The card is for people and is written again with what was measured later.
    """
    shards = {line["file"]: line for line in ledger.blocks.values()}
    copied = {name: entry["sha256"] for name, entry in ledger.entries[0]["files"].items() if entry["copied"]}
    shim = {SHIM} if (ledger.folder / SHIM).is_file() else set()
    out = {}
    for name in sorted({INDEX, "recipe.yaml", "config.json", *shim, *shards, *copied}):
        path = ledger.folder / name
        out[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        told = copied.get(name) or (shards[name]["sha256"] if name in shards else out[name]["sha256"])
        if out[name]["sha256"] != told:
            raise OutputError(f"{path} was altered during the run: delete the folder and compress again")
    return out


def _summary(checkpoint: Checkpoint, rows: list[records.LayerRecord], tensor_bytes: int) -> dict[str, Any]:
    compressed = [row for row in rows if row.stored == "compressed"]
    parameters = sum(map(checkpoint.count, checkpoint.view.names()))
    return {
        "weights": sum(row.shape[0] * row.shape[1] for row in compressed),
        "bits_per_weight": records.bits_per_weight(rows),
        "parameters": parameters,
        "bytes": tensor_bytes,
        "bits_per_parameter": 8 * tensor_bytes / parameters,
    }
