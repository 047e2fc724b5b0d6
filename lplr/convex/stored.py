"""A fitted estimator in one safetensors file: its network, and beside it what the network does not say.

Weights of the solution, gates and frame are tensors; parameters, classes, lam and the figures of the certificate are JSON in the
header.  Nothing is pickled, so a file from anywhere is safe to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lplr.convex import network
from lplr.convex.frame import Frame
from lplr.convex.gates import Gates
from lplr.convex.solution import Solution
from lplr.errors import CheckpointError, RecipeError

FIGURES = ("primal", "dual", "gap", "kkt", "iterations", "seconds", "status", "message")
PLAIN = (str, int, float, bool)


def save(estimator: Any, path: str | Path) -> None:
    """Write a fitted estimator; RecipeError for classes that are neither text nor numbers."""
    solution, gates, frame = estimator.solution_, estimator.gates_, estimator.frame_
    tensors = {
        "U": solution.U, "b": solution.b, "theta": solution.theta, "gates.vectors": gates.vectors,
        "gates.offsets": gates.offsets, "frame.mean": frame.mean, "frame.scale": frame.scale, "frame.varies": frame.varies,
    }  # fmt: skip
    params = estimator.get_params(deep=False)
    if isinstance(params["gates"], Gates):
        tensors |= {"param.vectors": params["gates"].vectors, "param.offsets": params["gates"].offsets}
    facts: dict[str, Any] = {
        "estimator": type(estimator).__name__,
        "params": {name: _plain(value) for name, value in params.items()},
        "solution": {name: getattr(solution, name) for name in FIGURES},
        "lam": estimator.lam_,
        "ones": frame.ones,
        "features": estimator.n_features_in_,
        "n_iter": estimator.n_iter_,
    }
    if hasattr(estimator, "feature_names_in_"):
        facts["feature_names"] = [str(name) for name in estimator.feature_names_in_]
    if hasattr(estimator, "cv_results_"):
        facts["cv_results"] = {name: np.asarray(value).tolist() for name, value in estimator.cv_results_.items()}
    if hasattr(estimator, "classes_"):
        classes = estimator.classes_.tolist()
        if not all(isinstance(c, PLAIN) for c in classes):
            raise RecipeError(f"classes of type {type(classes[0]).__name__} cannot be stored: use text or numbers as labels")
        facts |= {"classes": classes, "classes_dtype": estimator.classes_.dtype.str}
    if hasattr(estimator, "n_outputs_"):
        facts["n_outputs"] = estimator.n_outputs_
    network.save(estimator.to_torch(), path, metadata=facts, tensors=tensors)


def _plain(value: Any) -> Any:
    """What JSON holds of a parameter; None for what it does not, as gates and random generators."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, PLAIN) else None


def load(cls: type, path: str | Path) -> Any:
    """An estimator of class cls with all that `save` wrote; CheckpointError for another file."""
    facts, tensors = network.describe(path)["metadata"], network.extras(path)
    if facts.get("estimator") != cls.__name__:
        kind = facts.get("estimator") or "a network alone"
        raise CheckpointError(f"{path} holds {kind}, not {cls.__name__}: load it with its own class, or network.load")
    try:
        return _restored(cls, facts, tensors)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header and tensors do not agree ({error!r}): save the estimator again") from None


def _restored(cls: type, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    params = dict(facts["params"])
    if "param.vectors" in tensors:
        params["gates"] = Gates(tensors["param.vectors"], tensors["param.offsets"])
    made: Any = cls(**params)
    figures = {name: facts["solution"][name] for name in FIGURES}
    made.solution_ = Solution(tensors["U"], tensors["b"], tensors["theta"], **figures)
    made.gates_ = Gates(tensors["gates.vectors"], tensors["gates.offsets"])
    made.frame_ = Frame(tensors["frame.mean"], tensors["frame.scale"], tensors["frame.varies"], facts["ones"])
    made.lam_, made.n_features_in_, made.n_iter_ = facts["lam"], facts["features"], facts["n_iter"]
    if "feature_names" in facts:
        made.feature_names_in_ = np.array(facts["feature_names"], dtype=object)
    if "cv_results" in facts:
        made.cv_results_ = {name: np.array(value) for name, value in facts["cv_results"].items()}
    if "classes" in facts:
        made.classes_ = np.array(facts["classes"], dtype=np.dtype(facts["classes_dtype"]))
    if "n_outputs" in facts:
        made.n_outputs_ = facts["n_outputs"]
    made.network_ = made._made(False)
    return made
