"""Programs for one kernel, σ_g² K + σ_e² I: jamma and fastlmm, which diagonalise K; and the diagonalisation alone."""

from importlib import import_module
from typing import Any

from peers.report import Fit
from peers.workloads import Data


def jamma(data: Data, threads: int) -> Fit:
    """The null model of jamma: eigendecomposition of K, then a search for the ratio of variances."""
    import_module("loguru").logger.remove()
    eigen = import_module("jamma.lmm").eigendecompose_kinship
    search = import_module("jamma.lmm.likelihood").compute_null_model_lambda
    K, X, y = data.more["K"], data.X, data.y

    def run() -> Any:
        values, U = eigen(K.copy(), check_memory=False, show_progress=False)  # it overwrites K
        UtX, Uty = U.T @ X, U.T @ y
        ratio, loglik = search(values, UtX, Uty, X.shape[1])
        return values, UtX, Uty, ratio, loglik

    def report(result: Any) -> dict[str, Any]:
        values, UtX, Uty, ratio, loglik = result
        w = 1.0 / (ratio * values + 1.0)
        XtWy = UtX.T @ (w * Uty)
        beta = import_module("numpy").linalg.solve(UtX.T @ (w[:, None] * UtX), XtWy)
        residual = float((w * Uty) @ Uty - XtWy @ beta) / (data.n - X.shape[1])
        variances = {"kernel": float(ratio) * residual, "residual": residual}
        return {"variances": variances, "loglik": float(loglik) - data.half_logdet_XtX}

    return Fit(run, report)


def fastlmm(data: Data, threads: int) -> Fit:
    """`LMM` of FaST-LMM, K given."""
    model_class = import_module("fastlmm.inference.lmm").LMM
    K, X, y = data.more["K"], data.X, data.y

    def run() -> Any:
        model = model_class()
        model.setK(K0=K.copy())
        model.setX(X)
        model.sety(y)
        return model.findH2(REML=True)

    def report(result: Any) -> dict[str, Any]:
        share, total = float(result["h2"]), float(result["sigma2"])
        variances = {"kernel": share * total, "residual": (1.0 - share) * total}
        return {"variances": variances, "loglik": -float(result["nLL"]) - data.half_logdet_XtX}

    return Fit(run, report)


def eigh(data: Data, threads: int) -> Fit:
    """One eigendecomposition of K by torch, and nothing else."""
    torch = import_module("torch")
    torch.set_num_threads(threads)
    K = torch.from_numpy(data.more["K"])
    return Fit(lambda: torch.linalg.eigh(K), lambda result: {"note": "no fit"})
