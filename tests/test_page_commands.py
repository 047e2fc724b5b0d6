"""Every `lplr` command of README.md and docs/ is run as it stands there, and the Python of the pages too.

The names in them are set up beforehand: models are pico ones, compressed models and heads are made from these, the Hub is a
server of this process, and datasets of the Hub come from a table.  Other commands of the pages are run elsewhere: `pip install`
and `make test` by CI, pytest by itself, scripts of eval/ by their tests; of `make` test_docs checks that the target exists.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import datasets
import hub_server
import pytest
import runs
import test_docs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lplr import cli

pytest.importorskip("sklearn", reason="needs the extra `convex`")
pytest.importorskip("peft", reason="needs the extra `peft`")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")
# of libraries: what peft says of layers that are not its own, an argument that huggingface_hub's HTTP client renamed, what
# lm_eval deprecates in itself, files it leaves open, a property of transformers that peft reads by its old name
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning",
    "ignore::DeprecationWarning:lm_eval",
    "ignore::ResourceWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
)
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 340
# sizes that the 4-bit products of bitsandbytes take
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 512}
REVIEWS = [(f"{word} film, number {i}", label) for i in range(30) for word, label in (("good", "1"), ("bad", "0"))]
LAMBADA = {"text": "the cat sat on the mat"}
PIQA = {"goal": "To sit", "sol1": "take a mat", "sol2": "take a cat", "label": 0}
ARC = {"query": "Question: Who sat?", "choices": ["the cat", "the mat"], "gold": 0}


def tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which GGUF files can hold."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tables(text: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Dataset of the Hub -> split -> rows."""
    lines = [{"text": line} for line in text.splitlines(keepends=True)]
    reviews = [{"sentence": words, "label": int(label)} for words, label in REVIEWS]
    return {
        "Salesforce/wikitext": {"train": lines, "test": lines},
        "stanfordnlp/sst2": {"train": reviews, "validation": reviews[:10]},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name; nobody writes into it."""
    here = tmp_path_factory.mktemp("world")
    model = checkpoints.write(here / "my-model", "llama", tokenizer=False, vocab_size=VOCABULARY, **SIZES)
    text = "\n".join(checkpoints.text(400, seed) for seed in range(8))
    tokenizer(text + " ".join(words for words, _ in REVIEWS)).save_pretrained(model)
    (here / "text.jsonl").write_text(lines_of([{"text": line} for line in text.splitlines()]))
    (here / "test.tsv").write_text("sentence\tlabel\n" + "".join(f"{words}\t{label}\n" for words, label in REVIEWS[:20]))
    for name, row in (("lambada", LAMBADA), ("piqa", PIQA), ("arc_easy", ARC)):
        (here / "data/tasks").mkdir(parents=True, exist_ok=True)
        (here / f"data/tasks/{name}.jsonl").write_text(lines_of([row] * 2))
    calibrated = {**runs.FAST, "dataset": str(here / "text.jsonl"), "nsamples": 8, "seqlen": 64, "model": str(model)}
    runs.run({**calibrated, "bits": 5, "method": "caldera", "rank": 4}, here / "out")  # with L R, which makes an adapter
    for bits in (4, 3, 2):
        runs.run({**calibrated, "bits": bits}, here / f"out{bits}")
        shutil.copytree(here / f"out{bits}", here / f"out-{bits}bit")
    for given, name in ((here / "out4", "try"), (model, "new-model"), (model, "pruned"), (ROOT / "recipes", "recipes")):
        shutil.copytree(given, here / name)
    (here / "sst2.tsv").write_text("sentence\tlabel\n" + "".join(f"{words}\t{label}\n" for words, label in REVIEWS))
    for command in ("fit-head out --dataset sst2.tsv --gates 8 -o out/heads/sst2", "export out --to peft -o out-peft"):
        words = [str(here / word) if (here / word.split("/")[0]).exists() else word for word in command.split()]
        words[-1] = str(here / words[-1])
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, done.output
    return here


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the world to work in, with a Hub that holds the models which pages take from there."""
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("LPLR_CACHE", str(tmp_path / "cache"))
    found = tables((world / "text.jsonl").read_text())

    def load_dataset(name: str, config: str | None = None, *, streaming: bool) -> datasets.IterableDatasetDict:
        splits = {key: datasets.Dataset.from_list(rows).to_iterable_dataset() for key, rows in found[name].items()}
        assert streaming
        return datasets.IterableDatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with hub_server.standing_in(monkeypatch, tmp_path) as hub:
        held = {
            "meta-llama/Llama-2-7b": {"consolidated.00.pth": b"Meta's own form", "params.json": b"{}"},
            "meta-llama/Llama-2-7b-hf": files(world / "my-model"),
            "HuggingFaceTB/SmolLM2-135M-Instruct": files(world / "my-model"),
        }
        for name, content in held.items():
            hub.branches[name], hub.private[name] = {}, False
            hub.commit(name, "main", content)
        yield here


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("line", test_docs.commands())
def test_a_command_of_a_page_runs(line: str, place: Path):
    words = shlex.split(line, comments=True)[1:]
    if "ray" in words:
        pytest.importorskip("ray", reason="needs the extra `ray`")
    for option in ("-o", "--output"):
        if option in words:  # the folder that a page writes is not there yet
            shutil.rmtree(place / words[words.index(option) + 1], ignore_errors=True)
    before = set(place.iterdir())
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, f"{done.output}\n{done.stderr}"
    assert done.stdout.strip()
    if "--dry-run" in words:
        assert set(place.iterdir()) == before
    elif "-o" in words:
        assert any((place / words[words.index("-o") + 1]).iterdir())


def programs() -> list[Any]:
    found = [(page, i, body) for page in test_docs.PAGES for i, body in enumerate(test_docs.fences(page, "python"))]
    return [pytest.param(body, id=f"{page.stem} {i}") for page, i, body in found]


@pytest.mark.parametrize("body", programs())
def test_the_python_of_a_page_runs(body: str, place: Path):
    pushed = CliRunner().invoke(cli.app, ["push", "out", "user/name"]) if "user/name" in body else None
    assert pushed is None or pushed.exit_code == 0, pushed.output
    exec("from __future__ import annotations\n" + body, {})
