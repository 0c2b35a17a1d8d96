"""`fit`: published values, its arguments, and what it says of bad ones."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openreml_nn import FitResult, fit
from openreml_nn.covariance import (
    AR1Matrix,
    CellMatrix,
    CovariancePropagation,
    DummyMatrix,
    IdentityMatrix,
    KnownMatrix,
    KroneckerProduct,
    Matrix,
    ScalarMatrix,
    Sum,
    UnstructuredMatrix,
)
from openreml_nn.covariance.transform import TransformExpPow2
from openreml_nn.data import MixedModel, Term, read_table
from openreml_nn.optim import ConfoundedParameters, Observed
from openreml_nn.solvers import DenseSolver

MODELS: dict[str, Callable[[], MixedModel]] = {
    "dyestuff": lambda: MixedModel("dyestuff", "Yield ~ 1", random=["Batch"]),
    "dyestuff2": lambda: MixedModel("dyestuff2", "Yield ~ 1", random=["Batch"]),
    "penicillin": lambda: MixedModel("penicillin", "diameter ~ 1", random=["plate", "sample"]),
    "pastes": lambda: MixedModel("pastes", "strength ~ 1", random=["batch", "batch:cask"]),
    "john_alpha": lambda: MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"]),
    "sleepstudy": lambda: MixedModel("sleepstudy", "Reaction ~ Days", random={"Subject": Term("Subject", "1 + Days")}),
}
# ℓ, variances and fixed effects that lme4 gives (Bates, Mächler, Bolker & Walker 2015, J. Stat. Softw. 67, 1-48;
# Bates 2010, lme4: Mixed-effects modeling with R); ℓ is −½ of its REML criterion.
PUBLISHED: dict[str, tuple[str, list[str], list[str]]] = {
    "dyestuff": ("-159.8271", ["1764.05", "2451.25"], ["1527.50"]),
    "dyestuff2": ("-80.9141", ["0.0000", "13.8063"], ["5.6656"]),
    "penicillin": ("-165.4303", ["0.7169", "3.7309", "0.3024"], ["22.9722"]),
    "pastes": ("-123.4954", ["1.6573", "8.4337", "0.6780"], ["60.0533"]),
    "john_alpha": ("-46.5969", ["0.1429", "0.0702", "0.0816"], ["4.518", "0.298", "-0.414"]),
    "sleepstudy": ("-871.8141", ["612.1", "9.6", "35.1", "654.9"], ["251.405", "10.467"]),
}


def fitted(name: str, **options: Any) -> FitResult:
    model = MODELS[name]()
    return fit(model.V, model.y, model.X, x_names=model.x_names, **options)


def as_printed(value: float, like: str) -> str:
    """A number with as many decimals as another one was printed with."""
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("solver", ["auto", "dense"])
def test_published_fits_to_their_printed_digits(name: str, solver: str) -> None:
    loglik, variances, effects = PUBLISHED[name]
    result = fitted(name, solver=solver)
    assert result.converged
    assert f"{result.loglik:.4f}" == loglik
    assert [as_printed(*pair) for pair in zip(result.variance["estimate"], variances, strict=True)] == variances
    assert [as_printed(*pair) for pair in zip(result.beta.tolist(), effects, strict=True)] == effects


def test_maximum_likelihood() -> None:
    """lme4's ML fits: sleepstudy −875.9697, with 565.516, 11.055, 32.682 and 654.941; Dyestuff −163.6635, 1388.33."""
    result = fitted("sleepstudy", method="ML")
    assert f"{result.loglik:.4f}" == "-875.9697"
    np.testing.assert_allclose(result.variance["estimate"], [565.516, 11.055, 32.682, 654.941], rtol=1e-4)
    batch = fitted("dyestuff", method="ml")
    assert f"{batch.loglik:.4f}" == "-163.6635"
    np.testing.assert_allclose(batch.variance["estimate"], [1388.33, 2451.25], rtol=1e-5)
    assert "by ML" in batch.summary()


def test_estimates_stay_in_v() -> None:
    model = MODELS["john_alpha"]()
    result = fit(model.V, model.y, model.X)
    assert torch.equal(model.V.theta.detach(), result.theta)
    assert result.V is model.V


def test_start() -> None:
    model = MODELS["john_alpha"]()
    V, y, X = model.V, model.y, model.X
    best = fit(V, y, X)
    assert fit(V, y, X).n_iter == 0  # "auto": V has its own thetas now, and they are the estimates
    assert fit(V, y, X, start="current").n_iter == 0
    assert fit(V, y, X, start="data").n_iter == best.n_iter
    own = fit(V, y, X, start=torch.zeros(3, dtype=torch.float64))
    assert own.converged
    assert own.history[0].loglik != best.history[0].loglik
    with pytest.raises(ValueError, match="`start` must be 'auto', 'data', 'current' or raw thetas, got 'zero'"):
        fit(V, y, X, start="zero")
    with pytest.raises(ValueError, match="3 parameters"):
        fit(V, y, X, start=torch.zeros(2, dtype=torch.float64))


def test_a_start_on_the_natural_scale_is_used() -> None:
    y = torch.randn(20, dtype=torch.float64)
    V = AR1Matrix(20, start=[2.0, 0.9])
    assert fit(V, y, max_steps=0).theta.tolist() == AR1Matrix(20, start=[2.0, 0.9]).theta.tolist()


def test_history() -> None:
    result = fitted("john_alpha")
    assert [h.iteration for h in result.history] == list(range(1, result.n_iter + 1))
    assert result.history[-1].loglik == pytest.approx(result.loglik, abs=1e-12)
    assert result.history[-1].done
    assert result.seconds > 0
    assert all(h.trials >= 1 and h.step_norm > 0 and h.condition >= 1 for h in result.history)


def test_evaluation_is_at_the_estimates_even_if_the_last_trial_was_rejected() -> None:
    model = MODELS["sleepstudy"]()
    for most in range(1, 8):
        model.V.set_theta(torch.tensor([4.0, -1.0, -2.0, 1.0], dtype=torch.float64))
        with pytest.warns(UserWarning, match=f"The fit did not converge: the limit of {most} step"):
            result = fit(model.V, model.y, model.X, max_steps=most, tolerance=1e-30)
        assert torch.equal(result.evaluation.theta.detach(), model.V.theta.detach())
        assert result.loglik == pytest.approx(result.history[-1].loglik, abs=1e-9)


@pytest.mark.parametrize("solver", [DenseSolver(), "dense"])
def test_solver(solver: str | DenseSolver) -> None:
    assert isinstance(fitted("dyestuff", solver=solver).objective.solver, DenseSolver)


def test_aliased_columns_are_named_in_a_warning() -> None:
    model = MODELS["john_alpha"]()
    X = torch.cat([model.X, model.X[:, :1], model.X[:, 1:2] - model.X[:, 2:3]], dim=1)
    names = [*model.x_names, "again", "repR2-repR3"]
    with pytest.warns(UserWarning, match="X is rank deficient; dropped, from left to right: again, repR2-repR3."):
        result = fit(model.V, model.y, X, x_names=names)
    assert result.aliased == ["again", "repR2-repR3"]
    assert f"{result.loglik:.4f}" == "-46.5969"
    assert result.p == 3
    assert "Aliased, dropped: again, repR2-repR3" in result.summary()
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"columns \[3, 4\] depend on columns to their left"),
    ):
        fit(model.V, model.y, X, rank="error")


def test_empty_cell_of_an_interaction() -> None:
    """lme4's fit of the cake data without recipe C at 225 degrees: recipeC:temperatureT225 is dropped."""
    table = read_table("cake")
    table = table[~((table["recipe"] == "C") & (table["temperature"].astype(str).str.endswith("225")))]
    model = MixedModel(table, "angle ~ recipe * temperature", random=["replicate", "recipe:replicate"])
    with pytest.warns(UserWarning, match=r"dropped, from left to right: recipe\[T?\.?C\]?.*225"):
        result = fit(model.V, model.y, model.X, x_names=model.x_names)
    assert (result.n, result.p, model.X.shape[1]) == (255, 17, 18)
    assert f"{result.loglik:.4f}" == "-747.7592"
    np.testing.assert_allclose(result.variance["estimate"], [36.09731, 3.52966, 19.33783], rtol=1e-5)


def test_response_in_any_numeric_type() -> None:
    model = MODELS["dyestuff"]()
    for y in (model.y.to(torch.int64), model.y.to(torch.float32)):
        model.V.set_theta(torch.zeros(2, dtype=torch.float64))
        result = fit(model.V, y, model.X.float())
        assert f"{result.loglik:.4f}" == "-159.8271"
        assert result.beta.dtype == torch.float64


def test_data_with_a_history_are_taken_as_numbers() -> None:
    model = MODELS["john_alpha"]()
    given = [model.y.clone().requires_grad_(), model.X.clone().requires_grad_()]
    assert fit(model.V, *given).loglik == pytest.approx(fitted("john_alpha").loglik)
    assert given[0].grad is None


def test_float32_covariance() -> None:
    """Thetas in single precision: a fit to their digits, no crash."""
    model = MODELS["dyestuff"]()
    result = fit(model.V.float(), model.y, model.X, tolerance=1e-8)
    assert result.loglik == pytest.approx(-159.8271, abs=1e-2)


def test_tied_parameters() -> None:
    """One structure at two places is one parameter: two groups of terms with the same variance."""
    g = np.random.default_rng(0)
    a, b = np.repeat(np.arange(8), 6), np.tile(np.arange(8), 6)
    y = torch.tensor(g.normal(size=8)[a] + g.normal(size=8)[b] + 0.5 * g.normal(size=48))
    shared = ScalarMatrix(8)
    V = Sum(
        a=CovariancePropagation(DummyMatrix(a), shared),
        b=CovariancePropagation(DummyMatrix(b), shared),
        residual=ScalarMatrix(48),
    )
    result = fit(V, y)
    assert result.converged
    assert result.num_variance_parameters == 2
    assert len(result.variance) == 2
    Z = torch.cat([DummyMatrix(a)(torch.zeros(0)), DummyMatrix(b)(torch.zeros(0))], dim=1)
    joint = fit(Sum(ab=CovariancePropagation(Z.double(), ScalarMatrix(16)), residual=ScalarMatrix(48)), y)
    assert result.loglik == pytest.approx(joint.loglik, abs=1e-9)
    np.testing.assert_allclose(result.variance["estimate"], joint.variance["estimate"], rtol=1e-6)
    np.testing.assert_allclose(result.variance["std_error"], joint.variance["std_error"], rtol=1e-6)


class RandomWalk(Matrix):
    """A structure of a user's own, σ² min(i, j), in ten lines."""

    def __init__(self, n: int) -> None:
        super().__init__((n, n), ["sigma^2"], [TransformExpPow2()])

    def build(self, params: Tensor) -> Tensor:
        t = torch.arange(1, self.shape[0] + 1, dtype=params.dtype, device=params.device)
        return self.trans_params(params) * torch.minimum(t[:, None], t)


def test_a_structure_of_a_users_own() -> None:
    g = np.random.default_rng(1)
    y = torch.tensor(np.cumsum(g.normal(size=100)) + 0.5 * g.normal(size=100))
    result = fit(Sum(walk=RandomWalk(100), residual=ScalarMatrix(100)), y)
    assert result.converged
    t = np.arange(1.0, 101.0)
    known = fit(Sum(walk=KnownMatrix(np.minimum(t[:, None], t)), residual=ScalarMatrix(100)), y)
    assert result.loglik == pytest.approx(known.loglik, abs=1e-9)
    np.testing.assert_allclose(result.variance["estimate"], known.variance["estimate"], rtol=1e-6)


def test_small_units_are_no_trouble() -> None:
    """Nothing is added to a diagonal: a response of the size of 1e-9 has its own variance."""
    y = 1e-9 * torch.randn(30, dtype=torch.float64)
    result = fit(ScalarMatrix(30), y)
    assert result.variance["estimate"][0] == pytest.approx(float(y.var()), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "MAP"}, "`method` must be 'REML' or 'ML', got 'MAP'"),
        ({"x_names": ["a"]}, "`x_names` needs 3 names, got 1"),
        ({"solver": "fast"}, "no solver 'fast'"),
        ({"rank": "keep"}, "`rank` must be"),
        ({"tolerance": 0.0}, "tolerance above 0"),
        ({"max_steps": -1}, "`max_steps` must be 0 or more, got -1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    model = MODELS["john_alpha"]()
    with pytest.raises(ValueError, match=message):
        fit(model.V, model.y, model.X, **change)


def test_bad_data_come_out_before_any_step() -> None:
    V, y = ScalarMatrix(4), torch.tensor([1.0, torch.nan, 2.0, 3.0])
    with pytest.raises(ValueError, match="y holds 1 missing or infinite"):
        fit(V, y)
    with pytest.raises(ValueError, match=r"V must be of shape \(3, 3\) for 3 observations, got \(4, 4\)"):
        fit(V, y[[0, 2, 3]])
    assert float(V.theta.detach().abs().max()) == 0.0


def test_an_unstructured_residual_has_no_other_variance() -> None:
    """The moments of a balanced design: REML of an unstructured residual within subjects is the sample covariance."""
    g = np.random.default_rng(3)
    Y = g.normal(size=(40, 3)) @ np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, -0.3, 2.0]]).T
    subject = DummyMatrix(np.repeat(np.arange(40), 3))
    Z = CellMatrix(torch.arange(120) % 3, subject, ["0", "1", "2"])
    V = Sum(residual=CovariancePropagation(Z, KroneckerProduct(UnstructuredMatrix(3), IdentityMatrix(40))))
    result = fit(V, torch.tensor(Y.ravel()), torch.eye(3, dtype=torch.float64).repeat(40, 1), solver="dense")
    S = np.cov(Y.T)
    np.testing.assert_allclose(result.variance["estimate"], S[np.tril_indices(3)], rtol=1e-6)


@pytest.mark.parametrize("solver", ["mixed_model_equations", "dense", "blocks"])
def test_a_result_can_be_copied(solver: str) -> None:
    result = fitted("dyestuff", solver=solver)
    again = copy.deepcopy(result)
    assert again.loglik == result.loglik
    assert again.variance.equals(result.variance)
    assert all(p.grad is None for p in result.V.theta_parameters())


def test_a_fit_that_fails_leaves_the_thetas_as_they_were() -> None:
    model = MODELS["dyestuff"]()
    batch = model.V.operand("Batch")
    V = Sum({"a": batch, "b": copy.deepcopy(batch), "residual": ScalarMatrix(len(model.y))})
    V.set_theta(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
    with pytest.raises(ConfoundedParameters, match="a/sigma"):
        fit(V, model.y, start="data")
    assert V.theta.tolist() == [0.1, -0.2, 0.3]
    assert all(p.grad is None for p in V.theta_parameters())


def test_newton_by_blocks() -> None:
    """Second derivatives do not need a dense V where it falls into blocks."""
    result = fitted("dyestuff", direction=Observed())
    assert result.objective.solver.name == "blocks"
    assert result.converged


def test_float32_random_effects() -> None:
    """The mixed-model equations are solved in double precision whatever the thetas are kept in."""
    expected, model = fitted("sleepstudy"), MODELS["sleepstudy"]()
    result = fit(model.V.float(), model.y, model.X, solver="mixed_model_equations")
    assert result.theta_cov.dtype == np.float64
    assert result.loglik == pytest.approx(expected.loglik, abs=1e-6)
    np.testing.assert_allclose(result.blup()["blup"], expected.blup()["blup"], atol=1e-3)


@pytest.mark.parametrize("name", ["john_alpha", "sleepstudy"])
def test_a_fit_leaves_nothing_behind(name: str) -> None:
    """What is as large as V goes with the result, not with a later round of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        result = fitted(name)
        held = [weakref.ref(kept) for kept in (result.V, result.evaluation, result.evaluation.problem)]
        del result
        assert [kept() for kept in held] == [None, None, None]
    finally:
        gc.enable()


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    result = fitted("sleepstudy", verbose=True)
    solver, *steps = capsys.readouterr().out.splitlines()
    assert solver == f"solver {result.objective.solver.name}: {result.objective.choice.cost}"
    assert steps == [str(progress) for progress in result.history]
    assert steps[0].startswith("step   1  log-likelihood -8")
