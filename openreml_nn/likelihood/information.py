"""Information matrices of the raw thetas, with respect to the free parameters of V."""

from collections.abc import Callable

import torch
from torch import Tensor

from openreml_nn.solvers import Evaluation


def average_information(evaluation: Evaluation) -> Tensor:
    r"""AI = ½ W'PW, column k of W being V̇_k P y: the average of observed and expected for a V linear in its parameters.

    The same formula serves the restricted and the full likelihood.

    Returns:
        Shape (k, k) for the k free parameters.

    Source: Gilmour, Thompson & Cullis (1995), Biometrics 51, 1440-1450.
    """
    AI = 0.5 * evaluation.inner(evaluation.working_variates())
    return 0.5 * (AI + AI.mT)


def fisher_information(evaluation: Evaluation) -> Tensor:
    r"""Expected information of the restricted likelihood, ½ tr(P V̇_k P V̇_j); one n × n matrix a parameter."""
    V, theta = evaluation.problem.V, evaluation.theta.detach()
    directions = V.free_columns(torch.eye(len(theta), dtype=theta.dtype, device=theta.device)).mT
    PV = [evaluation.project(torch.func.jvp(V.build, (theta,), (d,))[1]) for d in directions]
    return 0.5 * torch.stack([torch.stack([(A * B.mT).sum() for B in PV]) for A in PV])


def observed_information(evaluation: Evaluation, loglik: Callable[[Evaluation], Tensor]) -> Tensor:
    r"""−∂²ℓ/∂θ∂θ', by automatic differentiation of ``loglik``: exact, at several factorisations for each parameter."""
    problem = evaluation.problem
    theta = evaluation.theta.detach().clone().requires_grad_()
    free = problem.V.free_index
    with torch.enable_grad():
        (score,) = torch.autograd.grad(loglik(problem.evaluate(theta)), theta, create_graph=True)
        rows = [torch.autograd.grad(score[k], theta, retain_graph=True)[0][free] for k in free]
    H = torch.stack(rows)
    return -0.5 * (H + H.mT)
