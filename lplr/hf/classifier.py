"""A head on a language model as a sequence-classification model of transformers.

A head is a folder: config.json (`HeadConfig`), model.safetensors (`convex.network`, whatever module it is), the tokenizer.  The
language model stays where it is; config.json says where, relative to the head's folder.  `AutoModelForSequenceClassification`
and `pipeline("text-classification", ...)` read such a folder once lplr is imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from lplr.convex.network import load as load_network
from lplr.convex.network import save as save_network
from lplr.errors import CheckpointError, RecipeError
from lplr.hf.features import last_hidden, pool

WEIGHTS = "model.safetensors"


class HeadConfig(PretrainedConfig):
    """Where the language model is, and how texts become vectors and vectors labels."""

    model_type = "lplr_head"

    def __init__(self, backbone: str = "", pooling: str = "mean", seqlen: int = 256, **kwargs: Any) -> None:
        self.backbone = backbone
        self.pooling = pooling
        self.seqlen = seqlen
        super().__init__(**kwargs)


class HeadModel(PreTrainedModel):
    """Logits (b, C) of texts: the pooled last hidden states of a language model, and a two-layer network on top."""

    config_class = HeadConfig
    config: HeadConfig

    def __init__(self, config: HeadConfig, backbone: PreTrainedModel, head: nn.Module) -> None:
        super().__init__(config)
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *_: Any, config: Any = None, **kwargs: Any) -> HeadModel:  # type: ignore[override]
        """The head in a local folder and its language model, in eval mode; dtype is that of the language model."""
        from lplr.hf.load import load_model

        folder = Path(path).expanduser()
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {WEIGHTS}: give a folder that `lplr fit-head` wrote")
        config = config if isinstance(config, HeadConfig) else HeadConfig.from_pretrained(folder)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        backbone = load_model(backbone_of(folder, config), dtype if isinstance(dtype, torch.dtype) else torch.float32)
        return cls(config, backbone, load_network(folder / WEIGHTS)).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:  # type: ignore[override]
        """The head alone: the language model stays where it is."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_head(folder, self.config, self.head)

    @property
    def labels(self) -> list[str]:
        """The class of each logit."""
        return [str(label) for _, label in sorted((self.config.id2label or {}).items(), key=lambda pair: int(pair[0]))]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """logits (b, C); the mean cross-entropy where labels (b,) are given."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        vectors = pool(last_hidden(self.backbone, input_ids, mask), mask, self.config.pooling)
        logits = self.head(vectors.to(next(iter(self.head.state_dict().values())).dtype))
        loss = None if labels is None else cross_entropy(logits, labels)
        out = SequenceClassifierOutput(loss=loss, logits=logits)
        return tuple(v for v in (loss, logits) if v is not None) if return_dict is False else out


def write_head(folder: Path, config: HeadConfig, head: nn.Module) -> None:
    """config.json and model.safetensors of a head."""
    save_network(head, folder / WEIGHTS)
    config.save_pretrained(folder)


def backbone_of(folder: Path, config: HeadConfig) -> Path:
    """The folder of the language model that a head belongs to; CheckpointError when it is not there."""
    if not config.backbone:
        raise RecipeError(f"{folder / 'config.json'} names no backbone: fit the head again with `lplr fit-head`")
    found = Path(os.path.normpath(folder.absolute() / config.backbone))
    if not found.exists():
        raise CheckpointError(f"{found}, the language model of {folder}, is not there: move the head's folder back below it")
    return found


def is_head(folder: str | Path) -> bool:
    """Whether a folder holds a head."""
    path = Path(folder).expanduser() / "config.json"
    try:
        return path.is_file() and f'"{HeadConfig.model_type}"' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


AutoConfig.register(HeadConfig.model_type, HeadConfig, exist_ok=True)
AutoModelForSequenceClassification.register(HeadConfig, HeadModel, exist_ok=True)
