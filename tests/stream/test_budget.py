"""Budgets in bytes: what a size or a device's memory allows is kept to, and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest

from lplr.errors import RecipeError, UnsupportedModel
from lplr.recipe import make_recipe
from lplr.stream.budget import bits_for_memory, bits_for_size, cache_bytes, parse_size
from lplr.stream.checkpoint import open_checkpoint
from lplr.stream.compress import compress


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("700 MB", 700_000_000), ("1.5kib", 1536), ("123456", 123456), (" 8 gb ", 8 * 10**9)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "2 gallons", "0", "1e9", "0.0001KB", "nan"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(RecipeError, match="is no size"):
        parse_size(text)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """Large enough that the matrices outweigh the headers."""
    return checkpoints.write(tmp_path / "base", "llama", hidden_size=128, intermediate_size=256, head_dim=32)


def recipe_of(folder: Path, **settings: Any) -> Any:
    return make_recipe({"model": str(folder), "dataset": str(folder / "text.txt"), "nsamples": 4, "seqlen": 16, **settings})


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_folder_keeps_to_its_size_and_uses_it(big: Path, tmp_path: Path):
    recipe, checkpoint = recipe_of(big), open_checkpoint(str(big))
    eight = bits_for_size(checkpoint, recipe, 1 << 40)
    assert eight == 8.0
    least, most = (bits_and_bytes(big, tmp_path / str(b), b) for b in (1.0, 6.0))
    wanted = (least + most) // 2 + 64 * 1024
    bits = bits_for_size(checkpoint, recipe, wanted)
    assert 1 < bits < 8
    taken = bits_and_bytes(big, tmp_path / "out", bits)
    assert taken <= wanted
    # what is allowed for records and settings is an upper estimate: 6 KiB a matrix and 64 KiB
    assert taken >= wanted - 21 * (6 << 10) - (64 << 10) - 4096


def bits_and_bytes(big: Path, folder: Path, bits: float) -> int:
    compress(recipe_of(big, bits=bits), folder)
    return folder_bytes(folder)


def test_a_size_that_nothing_fits_says_what_the_least_is(big: Path):
    with pytest.raises(RecipeError, match=r"1,000 bytes are too few for a folder at any width, [\d,]+ at 0.1 bits"):
        bits_for_size(open_checkpoint(str(big)), recipe_of(big), 1000)


def test_a_longer_context_leaves_fewer_bits(big: Path):
    checkpoint, recipe = open_checkpoint(str(big)), recipe_of(big)
    weights = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    short = bits_for_memory(checkpoint, recipe, 500_000, 16)
    longer = bits_for_memory(checkpoint, recipe, 500_000, 32)
    cache = 2 * 3 * 2 * 32 * 16 * 2  # 16 tokens more: keys and values, 3 layers, 2 heads of 32, 2 bytes
    work = 16 * (256 + 128) * 2
    assert short - longer == pytest.approx(8 * (cache + work) / weights, abs=0.05)  # byte padding of the columns


def test_cache_is_keys_and_values_of_every_layer_in_16_bits():
    class Config:
        num_attention_heads, num_key_value_heads, num_hidden_layers, hidden_size = 32, 8, 32, 4096

    assert cache_bytes(Config(), 4096) == 2 * 32 * 8 * 128 * 4096 * 2  # Llama-3-8B: 512 MiB


def test_a_configuration_without_heads_is_refused():
    with pytest.raises(UnsupportedModel, match="--size"):
        cache_bytes(object(), 16)
