"""README.md of a compressed folder, the model card: how to load it, what it is, what was measured of it.

Names of tensors, models and texts come from files that others wrote: they are data, and every character of theirs that Markdown
or HTML gives a meaning is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lplr.errors import CheckpointError
from lplr.hf.gguf_header import read_header
from lplr.hf.hub import hub_errors
from lplr.records import LayerRecord

CARD = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$@:-])")
_LONG = 200  # characters of a name; a longer one is cut
_REPO = re.compile(r"[\w-][\w.-]*/[\w.-]+")

_BODY = """# {name}, {bits:.2f} bits per weight

Compressed with lplr {version}: every weight matrix of the blocks is held as packed low-precision factors. `run.jsonl` holds the
error, the certificate and the bound of each.

```python
import lplr  # teaches transformers the format (pip install lplr); without it the weights cannot be read
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({repo})
tokenizer = AutoTokenizer.from_pretrained({repo})
```

Without `import lplr`, pass `trust_remote_code=True`: the folder's `{shim}` then does it, or says what to install.

| | |
|---|---|
| bits per weight of the compressed matrices, all overheads counted | {bits:.4f} |
| bits per parameter of the whole model | {whole:.3f} |
| base model | {base} |
| calibration text | {calibration} |
| method | {method} |

## Measured

{measured}

## Every matrix

Frobenius norms of the error over those of the matrix. The certificate is an upper bound computed from the packed weights, the
bound one from the matrix alone, before it was compressed (`-`: no theorem covers the method, or the matrix was tuned afterwards).

{layers}

Check the folder with `lplr verify DIR --against BASE`; measure it with `lplr eval DIR --against BASE`.
"""
SHIM = "modeling_lplr.py"
_SHIM = '''"""Loads this folder where trust_remote_code=True is passed and lplr was not imported.

The weights are packed by lplr: without that package transformers would fill the model with random numbers, so this file
fails instead and says what to install.
"""

import lplr  # noqa: F401  (pip install lplr; registers the format)
from transformers import {name} as _Base


class {name}(_Base):
    """{name} as transformers has it."""
'''


def escape(text: object) -> str:
    """A text as one line of Markdown that shows exactly these characters; longer ones than 200 are cut."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    shown = shown if len(shown) <= _LONG else shown[:_LONG] + ".."
    return _MARKUP.sub(r"\\\1", shown)


def card_text(
    header: Mapping[str, Any],
    summary: Mapping[str, Any],
    rows: Sequence[LayerRecord],
    *,
    evaluations: Sequence[Mapping[str, Any]] = (),
    licence: Mapping[str, str] | None = None,
    repo: str = "PATH OR ID",
) -> str:
    """README.md from the first line of run.jsonl, the totals, the records and the evaluations (the JSON of `lplr eval`).

    licence: the fields of the base model's own card, see `base_licence`.  repo: what to pass to from_pretrained.
    """
    calibration = header["calibration"]
    told = "none (data-free)"
    if calibration:
        told = f"{escape(calibration['name'])}, {calibration['rows']} x {calibration['seqlen']} tokens"
    base = str(header["model"])
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lplr", "quantized"]}
    if _REPO.fullmatch(base.partition(":")[0]):
        front |= {"base_model": base.partition(":")[0], "base_model_relation": "quantized"}
    front |= {field: str(licence[field]) for field in LICENCE_FIELDS if licence and field in licence}
    body = _BODY.format(
        name=escape(base),
        base=escape(base),
        bits=summary["bits_per_weight"],
        whole=summary["bits_per_parameter"],
        version=header["versions"]["lplr"],
        calibration=told,
        method=escape(header["recipe"]["method"]),
        repo=json.dumps(repo),
        shim=SHIM,
        measured=_measured(evaluations),
        layers=_layers(rows),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n{body}"


def shim_text(architecture: str) -> str:
    """The file that `auto_map` names for people who pass trust_remote_code; architecture: a class of transformers."""
    return _SHIM.format(name=architecture)


def base_licence(model: str, revision: str | None = None) -> dict[str, str]:
    """The licence fields of a base model: of the card beside it, of a GGUF file's metadata, or of the Hub.

    model: what the recipe calls it.  {} where it names none.  Raises HubError when it is on the Hub, which cannot be asked.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        return _fields(_front_matter(local / CARD))
    if local.is_file():
        try:
            metadata = read_header(local).metadata
        except CheckpointError:
            return {}
        named = {field: metadata.get(f"general.{field.replace('_', '.')}") for field in LICENCE_FIELDS}
        return _fields(named)
    repo = model.partition(":")[0]
    if not _REPO.fullmatch(repo) or local.is_absolute():
        return {}
    import huggingface_hub

    with hub_errors(repo, revision):
        found = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=30).card_data
    return _fields(found.to_dict() if found else {})


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML on top of a card; {} where there is none that can be read."""
    try:
        found = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        fields = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _fields(found: Mapping[str, Any]) -> dict[str, str]:
    return {field: found[field] for field in LICENCE_FIELDS if isinstance(found.get(field), str) and found[field]}


def _measured(evaluations: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for e in evaluations:
        if not isinstance(e.get("perplexity"), int | float):
            continue
        calibration = e.get("calibration")
        name = escape(calibration.get("name", "-")) if isinstance(calibration, dict) else "none (data-free)"
        text = f"{escape(e.get('dataset', '-'))} ({e.get('windows', '-')} x {e.get('seqlen', '-')} tokens)"
        values = (_number(e.get(key)) for key in ("perplexity", "base_perplexity", "ratio", "kl", "top1"))
        rows.append(f"| {text} | {name} | {' | '.join(values)} |")
    if not rows:
        return "Nothing yet: `lplr eval DIR --against BASE` measures perplexity and keeps it beside the weights."
    head = (
        "| text | calibrated on | perplexity | of the base | ratio | KL divergence, nats | top-1 agreement |\n" + "|---" * 7 + "|"
    )
    return "\n".join([head, *rows])


def _layers(rows: Sequence[LayerRecord]) -> str:
    head = "| matrix | shape | bits per weight | rank | error | certificate | bound |\n" + "|---" * 7 + "|"
    lines = []
    for row in rows:
        name, shape = escape(row.name), f"{row.shape[0]} x {row.shape[1]}"
        unit = row.norm or 1.0
        errors = (_number(None if v is None else v / unit) for v in (row.error, row.certificate, row.bound))
        rank = str(row.rank) if row.stored == "compressed" else "dense"
        lines.append(f"| {name} | {shape} | {row.bits_per_weight:.4f} | {rank} | {' | '.join(errors)} |")
    return "\n".join([f"<details><summary>{len(rows)} matrices</summary>\n", head, *lines, "\n</details>"])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
