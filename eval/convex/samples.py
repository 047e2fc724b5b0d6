"""The data of eval/convex/heads.py: features of texts, pixels, columns of a table; and training rows drawn by a seed."""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import numpy as np

MAX_LENGTH, TEST_TEXTS = 128, 2000


def texts_of(folder: Path, name: str) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    from lplr.hf.labelled import read_labelled

    files = {
        "agnews": ("train10k.jsonl", "test.jsonl"),
        "sst2": ("train.tsv", "dev.tsv"),
        "imdb": ("train.jsonl", "test.jsonl"),
    }[name]
    parts = [read_labelled(str(folder / name / file)) for file in files]
    return (parts[0].texts, parts[0].labels), (parts[1].texts, parts[1].labels)


def chosen_texts(folder: Path, name: str, most: int) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """`most` training texts and TEST_TEXTS of the test part, drawn once with a fixed seed; labels as numbers."""
    (texts, labels), (test, truth) = texts_of(folder, name)
    words = sorted(set(labels))
    rng = np.random.default_rng(0)
    train, apart = rng.permutation(len(texts))[:most], rng.permutation(len(test))[:TEST_TEXTS]
    y, yt = (np.array([words.index(label) for label in given]) for given in (labels, truth))
    return [texts[i] for i in train], y[train], [test[i] for i in apart], yt[apart]


def text_features(source: str, texts: list[str], cache: Path) -> np.ndarray:
    from lplr import load, load_tokenizer
    from lplr.hf.features import encode, features, fingerprint

    tokens = encode(load_tokenizer(source), texts, MAX_LENGTH)
    file = cache / f"features-{fingerprint(Path(source), tokens, 'mean')[:24]}.npy"
    if file.is_file() and not np.isnan(np.load(file, mmap_mode="r")).any():
        return np.load(file)
    return features(load(source), tokens, cache=file).numpy()  # type: ignore[arg-type]


def embedder_features(source: str, texts: list[str], cache: Path) -> np.ndarray:
    """Mean-pooled states of an encoder of transformers."""
    from transformers import AutoModel, AutoTokenizer

    from lplr.hf.features import encode, features, fingerprint

    tokens = encode(AutoTokenizer.from_pretrained(source), texts, MAX_LENGTH)
    file = cache / f"features-{fingerprint(Path(source), tokens, 'mean')[:24]}.npy"
    return features(AutoModel.from_pretrained(source).eval(), tokens, cache=file).numpy()


def mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.open(folder / "mnist_t10k" / name).read(), np.uint8, offset=offset)

    return read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 784) / 255.0, read("t10k-labels-idx1-ubyte.gz", 8).astype(int)


def table_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A CSV without header, the target last; columns of words are coded one by one, rows with a gap are left out."""
    rows = [row for row in csv.reader(file.open()) if row and not any(cell.strip() in ("", "?", "NA") for cell in row)]
    columns = []
    for column in list(zip(*rows, strict=True))[:-1]:
        try:
            columns.append(np.array(column, float)[:, None])
        except ValueError:
            words = sorted(set(column))
            columns.append(np.eye(len(words))[[words.index(w) for w in column]])
    targets = [row[-1] for row in rows]
    words = sorted(set(targets))
    return np.hstack(columns), np.array([words.index(t) for t in targets])


def load_set(name: str, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Training pool and test part; no test part where the seeds split the rows."""
    kind, _, which = name.partition("/")
    if kind == "mnist":
        X, y = mnist(args.data)
        return X[:8000], y[:8000], X[8000:], y[8000:]
    if kind == "uci":
        return (*table_of(args.data / "uci" / f"{which}.csv"), None, None)
    texts, y, test, yt = chosen_texts(args.data, kind, args.pool)
    if which == "minilm":
        return embedder_features(args.embedder, texts, args.cache), y, embedder_features(args.embedder, test, args.cache), yt
    source = dict(pair.split("=", 1) for pair in args.model)[which]
    return text_features(source, texts, args.cache), y, text_features(source, test, args.cache), yt


def draw(X: np.ndarray, y: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to fit, to choose on, and the rest; every class in all of them as far as it goes."""
    from sklearn.model_selection import train_test_split

    rows, rest = train_test_split(np.arange(len(y)), train_size=size, stratify=y, random_state=seed)
    fit, apart = train_test_split(rows, test_size=0.2, stratify=y[rows], random_state=seed)
    return fit, apart, rest
