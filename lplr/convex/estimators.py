"""Convex heads under scikit-learn's contract: samples in, a certified solution and an ordinary network out.

The programme's samples are (x - mean) / scale, with a feature of ones where there is an intercept, so that every neuron has a
bias (penalised with its weights) beside the free constant b.  Its gates are drawn from the samples without their labels; with
the linear block it contains the linear model.  lam is chosen on left-out samples along the solution path, then all samples
are fitted at it to the relative duality gap `tol`.  What is optimal is the programme with these gates, not "the network".
With activation "relu" the linear block is the gate that is open on all training samples, two ReLU neurons an output; lam comes
from the gated programme where the data are many (`_choose`).
Of the library this file alone imports scikit-learn.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn.functional import one_hot

from lplr.convex import network as networks
from lplr.convex import stored
from lplr.convex.frame import KINDS, Frame, draw
from lplr.convex.gates import Gates
from lplr.convex.path import Path, cross_validate, deal, grid, path, shrink
from lplr.convex.penalty import Penalty
from lplr.convex.problem import ACTIVATIONS, Problem
from lplr.convex.solve import solve
from lplr.errors import RecipeError, choose

DTYPES = {"float64": torch.float64, "float32": torch.float32}
TASKS: dict[str, None] = dict.fromkeys(("auto", "logistic", "softmax", "squared"))
CV_TOL = 1e-3  # relative gap of the fits that only compare penalties
CV_STEPS, CV_RATIO = 20, 1e-3  # of the grid of penalties
CONES = 1 << 21  # entries of X times gates up to which relu is cross-validated itself
ROWS = 1 << 14  # samples predicted at once


class _ConvexHead(BaseEstimator, ABC):
    """What both estimators share: parameters, the fit of targets Y (n, C), the network, files."""

    def __init__(
        self,
        *,
        activation: str = "gated",
        gates: str | Gates = "gaussian",
        n_gates: int = 64,
        lam: float | str = "cv",
        norm: str = "auto",
        intercept: bool = True,
        linear_block: bool = True,
        standardize: bool = True,
        tol: float = 1e-4,
        max_iter: int | None = None,
        method: str = "auto",
        dtype: str = "float64",
        cv: int = 5,
        random_state: Any = 0,
        callback: Callable[[float, float, str], object] | None = None,
    ) -> None:
        self.activation = activation
        self.gates = gates
        self.n_gates = n_gates
        self.lam = lam
        self.norm = norm
        self.intercept = intercept
        self.linear_block = linear_block
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter
        self.method = method
        self.dtype = dtype
        self.cv = cv
        self.random_state = random_state
        self.callback = callback

    @abstractmethod
    def _read(self, X: Any, y: Any) -> tuple[np.ndarray, Tensor, str, Tensor | None]:
        """Checked samples (n, d) float64, targets Y (n, C), the loss, and class numbers (n,); sets what is known of them."""

    def fit(self, X: Any, y: Any) -> Any:
        """Choose lam, minimise the convex programme of all samples, export the network.

        ConvergenceWarning, with what to do, where the duality gap stays above tol.  There are no sample weights.
        """
        problem, folds = self._programme(*self._read(X, y))
        vars(self).pop("cv_results_", None)  # of another fit
        self.lam_ = self._choose(problem, folds)
        penalty = Penalty(self.lam_, self._norm())
        self._tell(CV_STEPS if folds is not None else 0, folds, "fitting all samples")
        self.solution_ = solve(problem, penalty, method=self.method, tol=self.tol, max_iter=self.max_iter)
        self.n_iter_ = max(1, self.solution_.iterations)
        self.network_ = self._made(False)
        if not self.solution_.converged:
            warnings.warn(f"{type(self).__name__}: {self.solution_.message}", ConvergenceWarning, stacklevel=2)
        return self

    def path(self, X: Any, y: Any, *, steps: int = CV_STEPS, ratio: float = CV_RATIO) -> Path:
        """The solutions from lambda_max to ratio lambda_max of the programme that `fit` would solve; changes nothing here."""
        other: Any = clone(self)
        problem, _ = other._programme(*other._read(X, y), folds=False)
        settings = {"tol": self.tol, "method": self.method, "max_iter": self.max_iter}
        return path(problem, self._norm(), steps=steps, ratio=ratio, **settings)

    def to_torch(self) -> networks.Network:
        """A network of its own, float64, from raw samples (N, d): what is predicted, or for classes their logits (N, classes)."""
        check_is_fitted(self)
        return self._made()

    def save(self, path: str | FilePath) -> None:
        """Write the fitted estimator to one safetensors file, which `convex.network.load` reads too; nothing is pickled."""
        check_is_fitted(self)
        stored.save(self, path)

    @classmethod
    def load(cls, path: str | FilePath) -> Any:
        """A fitted estimator from a file of `save`.  Raises CheckpointError for another file."""
        return stored.load(cls, path)

    def _programme(
        self, X: np.ndarray, Y: Tensor, loss: str, classes: Tensor | None, folds: bool = True
    ) -> tuple[Problem, Tensor | None]:
        """The problem, and for lam "cv" the fold (n,) of each sample; sets the frame and the gates."""
        choose(dict.fromkeys(ACTIVATIONS), self.activation, "activation")
        dtype = choose(DTYPES, self.dtype, "dtype")
        rows = _tensor(X)
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        frame = self.frame_ = Frame.of(rows, standardize=self.standardize, ones=self.intercept)
        if isinstance(self.gates, Gates):
            vectors, offsets = tuple(self.gates.vectors.shape), tuple(self.gates.offsets.shape)
            if len(vectors) != 2 or vectors[0] != X.shape[1] or offsets != vectors[1:]:
                wanted = f"X has {X.shape[1]} features: give vectors ({X.shape[1]}, P) and offsets (P,)"
                raise RecipeError(f"gates have vectors {vectors} and offsets {offsets}, {wanted}")
            self.gates_, D = self.gates, self.gates.patterns(rows)
        else:
            if not isinstance(self.n_gates, Integral) or self.n_gates < 1:
                raise RecipeError(f"n_gates is {self.n_gates!r}: give a whole number from 1 on")
            choose(dict.fromkeys(KINDS), self.gates, "gates")
            free = self.activation == "gated" or self.intercept
            linear = self.linear_block and free
            self.gates_, D = draw(self.gates, rows, int(self.n_gates), frame, generator, linear=linear, offsets=free)
        problem = Problem(frame.apply(rows).to(dtype), Y.to(dtype), D, loss, self.activation, self.intercept)
        if self.lam != "cv" or not folds:
            return problem, None
        if not isinstance(self.cv, Integral):
            raise RecipeError(f"cv is {self.cv!r}: give a number of folds from 2 on")
        return problem, deal(len(X), int(self.cv), generator, classes)

    def _tell(self, done: int, folds: Tensor | None, what: str) -> None:
        if self.callback is not None:
            self.callback(float(done), float(CV_STEPS + 1 if folds is not None else 1), what)

    def _norm(self) -> str:
        if self.norm != "auto":
            return self.norm
        return "columns" if self.activation == "relu" else "group"

    def _choose(self, problem: Problem, folds: Tensor | None) -> float:
        """lam, or the one of least loss on left-out samples.

        relu on more than CONES entries of X times gates: the share of lambda_max that is best for the gated programme with the
        same gates, as a path of projections onto the cones would take hours.
        """
        if folds is None:
            if isinstance(self.lam, str) or not isinstance(self.lam, Real):
                raise RecipeError(f"lam is {self.lam!r}: give a positive number, or 'cv'")
            return float(self.lam)
        lams = grid(problem, self._norm(), CV_STEPS, CV_RATIO)
        if len(lams) == 1:  # constant targets
            return lams[0]
        small, method, unit = shrink(problem)[0], self.method, 1.0
        if self.activation == "relu" and problem.X.numel() * problem.D.shape[1] > CONES:
            small, method = replace(small, activation="gated"), "auto"
            gated = grid(small, self._norm(), CV_STEPS, CV_RATIO)
            lams, unit = gated, lams[0] / gated[0]
        small = replace(small, X=small.X.float(), Y=small.Y.float())  # half the work at CV_TOL
        self._tell(0, folds, f"penalty 1 of {CV_STEPS}")
        found = cross_validate(
            small, self._norm(), folds, lams=lams, tol=max(self.tol, CV_TOL), method=method, max_iter=self.max_iter,
            callback=lambda k: self._tell(k, folds, f"penalty {k + 1} of {CV_STEPS}"),
        )  # fmt: skip
        self.cv_results_ = {
            "lam": unit * np.array(found.lams),
            "mean_loss": found.mean.numpy(),
            "split_losses": found.losses.numpy(),
        }
        return unit * found.lams[found.best]

    def _made(self, logits: bool = True) -> networks.Network:
        """The network; logits: with an output for each class."""
        frame = self.frame_
        return networks.export(self.solution_, self.gates_, mean=frame.mean, scale=frame.scale, ones=frame.ones, raw=True)

    def _outputs(self, X: Any) -> np.ndarray:
        """(N, C)."""
        check_is_fitted(self)
        rows = _tensor(validate_data(self, X, reset=False, dtype=np.float64))
        with torch.no_grad():
            return torch.cat([self.network_(part) for part in rows.split(ROWS)]).numpy()


class ConvexHeadClassifier(ClassifierMixin, _ConvexHead):
    """A gated or ReLU network for classes, trained by convex optimisation.

    loss: "logistic" (two classes), "softmax", "squared" (targets -1 and 1, or one-hot: no probabilities), "auto": logistic or
    softmax by the classes.  activation: "gated" | "relu".  gates: "gaussian" | "data" (between two samples) | "mixed" | "wedge"
    (through neighbouring samples), n_gates of them, or the Gates of another fit.  lam: a number for the penalty, or "cv": the
    best of 20 by cross-validation with `cv` stratified folds.  norm: of `Penalty`; "auto": "group", for relu "columns".
    intercept, linear_block, standardize: see the
    top of this file.  tol, max_iter, method: of `solve`.  dtype: "float64" | "float32".  random_state: of gates and folds.
    callback(done, total, what): told of every step of the choice of lam, and of the last fit.

    Fitted: solution_ (over standardised samples, `frame_`), gates_ (over raw ones), classes_, lam_, n_features_in_, n_iter_,
    network_, cv_results_ with lam "cv".  Sample weights and sparse X are not supported.
    """

    def __init__(
        self,
        *,
        loss: str = "auto",
        activation: str = "gated",
        gates: str | Gates = "gaussian",
        n_gates: int = 64,
        lam: float | str = "cv",
        norm: str = "auto",
        intercept: bool = True,
        linear_block: bool = True,
        standardize: bool = True,
        tol: float = 1e-4,
        max_iter: int | None = None,
        method: str = "auto",
        dtype: str = "float64",
        cv: int = 5,
        random_state: Any = 0,
        callback: Callable[[float, float, str], object] | None = None,
    ) -> None:
        self.loss = loss
        super().__init__(
            activation=activation, gates=gates, n_gates=n_gates, lam=lam, norm=norm, intercept=intercept, tol=tol,
            linear_block=linear_block, standardize=standardize, max_iter=max_iter, method=method, dtype=dtype, cv=cv,
            random_state=random_state, callback=callback,
        )  # fmt: skip

    def _read(self, X: Any, y: Any) -> tuple[np.ndarray, Tensor, str, Tensor | None]:
        X, y = validate_data(self, X, y, dtype=np.float64, order="C")
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        count = len(self.classes_)
        choose(TASKS, self.loss, "loss")
        if count < 2:
            only = self.classes_.tolist()[0]
            raise RecipeError(f"y holds one class, {only!r}: a classifier needs samples of two classes or more")
        if self.loss == "logistic" and count > 2:
            raise RecipeError(f"loss 'logistic' is for two classes, y holds {count}: use 'softmax' or 'auto'")
        loss = self.loss if self.loss != "auto" else "logistic" if count == 2 else "softmax"
        of = torch.from_numpy(numbers)
        Y = one_hot(of, count) if loss == "softmax" or count > 2 else 2 * of[:, None] - 1
        return X, Y.double(), loss, of

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (N, classes), or for two classes the logit (N,) of the second; outputs of the squared loss likewise."""
        Z = self._outputs(X)
        if len(self.classes_) > 2:
            return Z
        return Z[:, 0] if Z.shape[1] == 1 else Z[:, 1] - Z[:, 0]

    def predict(self, X: Any) -> np.ndarray:
        """The class (N,) of the largest logit."""
        Z = self.decision_function(X)
        return self.classes_[(Z > 0).astype(int) if Z.ndim == 1 else Z.argmax(1)]

    @available_if(lambda self: self.loss != "squared")
    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, classes); not with the squared loss, whose outputs are no logits."""
        Z = torch.from_numpy(self.decision_function(X))
        return torch.softmax(Z if Z.ndim > 1 else torch.stack([torch.zeros_like(Z), Z], 1), 1).numpy()

    def _made(self, logits: bool = True) -> networks.Network:
        made = super()._made()
        return networks.two_logits(made) if logits and made.shape[2] == 1 else made


class ConvexHeadRegressor(RegressorMixin, _ConvexHead):
    """A gated or ReLU network for one or more real targets, squared loss 1/(2n) ||Z - Y||^2; lam is in the units of y.

    Parameters and fitted attributes are those of `ConvexHeadClassifier`, without loss and classes_.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _read(self, X: Any, y: Any) -> tuple[np.ndarray, Tensor, str, Tensor | None]:
        X, y = validate_data(self, X, y, dtype=np.float64, order="C", multi_output=True, y_numeric=True)
        self.n_outputs_ = 0 if y.ndim == 1 else y.shape[1]
        return X, torch.from_numpy(np.array(y, dtype=np.float64).reshape(len(X), -1)), "squared", None

    def predict(self, X: Any) -> np.ndarray:
        """(N,), or (N, C) where y was (n, C)."""
        Z = self._outputs(X)
        return Z if self.n_outputs_ else Z[:, 0]


def _tensor(X: Any) -> Tensor:
    """X, copied where torch cannot share it: read-only memory, or rows that are not side by side."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


def linear_probe(X: np.ndarray, y: np.ndarray, seed: int = 0) -> Any:
    """Logistic regression on standardised features, its C of seven by cross-validation: what a head must beat, fitted."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))
    smallest = int(np.unique(y, return_counts=True)[1].min())
    if smallest < 2:
        return probe.fit(X, y)
    search = GridSearchCV(probe, {"logisticregression__C": np.logspace(-4, 2, 7)}, scoring="neg_log_loss", cv=min(5, smallest))
    return search.fit(X, y).best_estimator_
