"""Programs for grouped and crossed effects: mixedlm, mixedlm-rs, lme-python, GPBoost.

They get a data frame and a formula in the syntax of lme4, or arrays where they take them. Packages are imported by name
when they are asked for, since each may be missing.
"""

from importlib import import_module
from typing import Any

import numpy as np

from peers.report import Fit
from peers.workloads import Data

FORMULAS = {  # workload: (formula of lme4, the grouping factors in their order)
    "insteval": ("y ~ service + (1 | s) + (1 | d)", ["s", "d"]),
    "insteval_dept": ("y ~ service * dept + (1 | s) + (1 | d)", ["s", "d"]),
    "million": ("y ~ x + (1 + x | subject)", ["subject"]),
    "alpha": ("y ~ rep + (1 | gen) + (1 | rep_block)", ["gen", "rep_block"]),
}
FORMULAS["trials"] = FORMULAS["trials24"] = FORMULAS["alpha"]
NAMES = {"rep_block": "rep:block"}


def mixedlm(data: Data, threads: int) -> Fit:
    """`lmer` of mixedlm."""
    lmer, frame = import_module("mixedlm").lmer, _pandas(data)
    formula, groups = FORMULAS[data.workload]

    def report(result: Any) -> dict[str, Any]:
        variation = result.VarCorr()
        covariances = {group: variation.get_cov(group) for group in groups}
        return {
            "variances": _named(covariances, float(variation.residual)),
            "loglik": float(result.logLik().value),
            "iterations": int(result.function_evals),
        }

    return Fit(lambda: lmer(formula, frame), report)


def mixedlm_rs_arrays(data: Data, threads: int) -> Fit:
    """`MixedLM` of mixedlm-rs."""
    package, subject = import_module("mixedlm_rs"), data.table["subject"]
    return Fit(lambda: package.MixedLM(data.y, data.X, groups=subject, exog_re=data.X).fit(), _of_mixedlm_rs)


def mixedlm_rs_formula(data: Data, threads: int) -> Fit:
    """`mixedlm` of mixedlm-rs, with its formula."""
    package, frame = import_module("mixedlm_rs"), _pandas(data)
    return Fit(lambda: package.mixedlm("y ~ x", frame, groups="subject", re_formula="~x").fit(), _of_mixedlm_rs)


def _of_mixedlm_rs(result: Any) -> dict[str, Any]:
    return {
        "variances": _named({"subject": result.cov_re}, float(result.scale)),
        "loglik": float(result.llf),
        "iterations": int(result.diagnostics["n_objective_evaluations"]),
    }


def lme_python(data: Data, threads: int) -> Fit:
    """`lmer` of lme-python."""
    lmer, polars = import_module("lme_python").lmer, import_module("polars")
    formula, groups = FORMULAS[data.workload]
    columns = {name: column.astype(str) if name in groups else column for name, column in data.table.items()}
    frame = polars.DataFrame({name: column.tolist() for name, column in columns.items()})

    def report(result: Any) -> dict[str, Any]:
        covariances = _from_rows(result.var_corr, groups)
        return {
            "variances": _named(covariances, float(result.sigma2)),
            "loglik": float(result.log_likelihood),
            "iterations": int(result.iterations or -1),
        }

    return Fit(lambda: lmer(formula, data=frame, reml=True), report)


def gpboost(data: Data, threads: int, method: str = "default") -> Fit:
    """`GPModel` of GPBoost, by maximum likelihood: it has no other. Crossed effects are solved for iteratively.

    The log-determinant is then stochastic, so that its ℓ cannot be compared.
    """
    model_class = import_module("gpboost").GPModel
    _, groups = FORMULAS[data.workload]
    group_data = np.column_stack([data.table[name] for name in groups])

    def run() -> Any:
        model = model_class(
            group_data=group_data,
            likelihood="gaussian",
            num_parallel_threads=threads,
            matrix_inversion_method=method,
        )
        model.fit(y=data.y, X=data.X)
        return model

    def report(model: Any) -> dict[str, Any]:
        residual, *variances = np.asarray(model.get_cov_pars(), dtype=float).ravel()[: len(groups) + 1]
        named = _named({g: np.array([[v]]) for g, v in zip(groups, variances, strict=True)}, residual)
        loglik = -float(model.get_current_neg_log_likelihood())
        if method == "default":
            return {"variances": named, "note": f"stochastic ℓ = {loglik:.3f}"}
        return {"variances": named, "loglik": loglik}

    return Fit(run, report)


def gpboost_exact(data: Data, threads: int) -> Fit:
    """The same with a sparse Cholesky factor."""
    return gpboost(data, threads, "cholesky")


def _pandas(data: Data) -> Any:
    return import_module("pandas").DataFrame(data.table)


def _from_rows(rows: Any, groups: list[str]) -> dict[str, np.ndarray]:
    """Covariances of each factor from lme-python's rows (group, effect, effect, covariance, its root)."""
    covariances = {}
    for group in groups:
        own = [(first, second, value) for name, first, second, value, _ in rows if name == group]
        effects = [first for first, second, _ in own if first == second]
        C = np.zeros((len(effects), len(effects)))
        for first, second, value in own:
            i, j = effects.index(first), effects.index(second)
            C[i, j] = C[j, i] = value
        covariances[group] = C
    return covariances


def _named(covariances: dict[str, Any], residual: float) -> dict[str, float]:
    """Variances under the names that all programs share."""
    named: dict[str, float] = {}
    for group, covariance in covariances.items():
        C = np.asarray(covariance, dtype=float)
        if len(C) == 2:
            named |= {"intercept": C[0, 0], "covariance": C[1, 0], "slope": C[1, 1]}
        else:
            named[NAMES.get(group, group)] = C[0, 0]
    return {name: float(value) for name, value in (named | {"residual": residual}).items()}
