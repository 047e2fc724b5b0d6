"""A transformers tokenizer as the metadata of a GGUF file: what llama.cpp needs to make the same tokens.

Two kinds can be told: byte-level BPE whose first split is one that llama.cpp has by name (`tokenizer.ggml.pre`), and BPE with
byte fallback, which llama.cpp runs as SentencePiece does: of all pairs of neighbours that make a token, the one of the highest
score is joined first.  With minus the rank of the merge as the score of what it makes, that is the same order.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lplr.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# the pattern of the split in front of the bytes -> tokenizer.ggml.pre
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


def write_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Add a tokenizer, padded to `size` tokens, to a gguf.GGUFWriter; UnsupportedModel for a kind unknown to llama.cpp."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    model = backend["model"]
    if model["type"] != "BPE":
        raise UnsupportedModel(f"a tokenizer of type {model['type']} cannot be written to GGUF: BPE is needed; export --to dense")
    tokens, types = _tokens(backend, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model["merges"], tokens))
        writer.add_add_space_prefix(_prepends(backend.get("normalizer"), backend.get("pre_tokenizer")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(backend.get("pre_tokenizer")))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for kind in ("bos", "eos", "unk", "pad"):
        found = getattr(tokenizer, f"{kind}_token_id", None)
        if isinstance(found, int):
            getattr(writer, f"add_{kind}_token_id")(found)
    framed = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and framed[0] == tokenizer.bos_token_id)  # type: ignore[index]
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and framed[-1] == tokenizer.eos_token_id)  # type: ignore[index]
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(backend: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token in the order of its number, and its type; numbers without one are unused."""
    vocabulary = {number: token for token, number in backend["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    vocabulary |= {number: entry["content"] for number, entry in added.items()}
    if max(vocabulary) >= size:
        raise UnsupportedModel(
            f"the tokenizer has token {max(vocabulary)}, the model {size} embeddings: they do not belong together"
        )
    tokens, types = [], []
    for number in range(size):
        token = vocabulary.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            types.append(_UNUSED)
        elif token == backend["model"].get("unk_token"):
            types.append(_UNKNOWN)
        elif number in added:
            types.append(_CONTROL if added[number]["special"] else _USER)
        else:
            byte = backend["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            types.append(_BYTE if byte else _NORMAL)
    return tokens, types


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; of those that none makes, one below all."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(_pair(merge)), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether a space is put in front of the text."""
    steps = _steps(normalizer, "normalizers")
    metaspace = next((s for s in _steps(pre_tokenizer, "pretokenizers") if s["type"] == "Metaspace"), None)
    return any(s["type"] == "Prepend" for s in steps) or (metaspace or {}).get("prepend_scheme", "never") != "never"


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    if not part:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if part["type"] == "Sequence" else [part]


def _split_name(pre_tokenizer: Any) -> str:
    """tokenizer.ggml.pre of a byte-level tokenizer; UnsupportedModel for one whose split llama.cpp is not known to have."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    kinds = [step["type"] for step in steps]
    own_split = bool(steps) and steps[-1].get("use_regex", False)  # that of GPT-2
    if kinds == ["ByteLevel"] and own_split:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own_split and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_split:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    known = ", ".join(("gpt-2", "smollm", *_SPLITS.values()))
    raise UnsupportedModel(
        f"the tokenizer splits text by {kinds}, which is none of {known} of llama.cpp: export --to dense instead"
    )
