"""Laws of values: what the matrix is, and that every shortcut agrees with its dense form."""

import copy

import torch
from torch import Tensor

from openreml_nn.covariance import DiagonalMatrix, Matrix, SimpleMatrix
from openreml_nn.testing.case import Case, LawBroken, domains, require, require_close


def shape(case: Case, theta: Tensor) -> None:
    """The matrix is finite, of the shape ``shape``, and of the dtype of its parameters."""
    V = case.matrix(theta)
    require(tuple(V.shape) == tuple(case.matrix.shape), f"`shape` is {case.matrix.shape}, the matrix {tuple(V.shape)}")
    require(V.dtype == theta.dtype, f"parameters of {theta.dtype} give a matrix of {V.dtype}")
    require(bool(torch.isfinite(V).all()), "the matrix is not finite")


def symmetry(case: Case, theta: Tensor) -> None:
    """V = V', where it is to be a covariance."""
    if case.covariance:
        V = case.matrix(theta)
        require_close(V.mT, V, "the transpose", tolerance=1e-12)


def definiteness(case: Case, theta: Tensor) -> None:
    """x'Vx ≥ 0 for every x, or > 0 where it is to be definite: by the eigenvalues."""
    if not case.covariance:
        return
    V = case.matrix(theta).detach()
    eigenvalues = torch.linalg.eigvalsh(0.5 * (V + V.mT))
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    if case.definite:
        failed = bool(torch.linalg.cholesky_ex(V).info)
        require(not failed and smallest > 0, f"not positive definite, smallest eigenvalue {smallest:.3g}")
    require(smallest >= -1e-10 * abs(largest), f"not positive semi-definite, smallest eigenvalue {smallest:.3g}")


def purity(case: Case, theta: Tensor) -> None:
    """The result depends on the parameters alone: not on earlier calls, and nothing is changed by a call."""
    V, own, kept = case.matrix, case.matrix.theta.detach().clone(), theta.clone()
    others = [case.thetas[-1]] + ([theta.flip(0)] if len(set(domains(V))) == 1 else [])
    fresh = [copy.deepcopy(V) for _ in others]
    first = V(theta).detach().clone()
    for other, twin in zip(others, fresh, strict=True):
        require_close(V(other), twin(other), "the matrix at other parameters", tolerance=0.0)
        require_close(V(theta), first, "the matrix at the same parameters after another call", tolerance=0.0)
    require(torch.equal(theta, kept), "a call changes the parameters that it is given")
    require(torch.equal(V.theta, own), "a call at given parameters changes the module's own")


def own_theta(case: Case, theta: Tensor) -> None:
    """``V()`` is ``V(V.theta)``."""
    V = case.matrix
    if V.theta.dtype == theta.dtype:
        require_close(V(), V(V.theta.detach()), "the matrix at the module's own thetas", tolerance=0.0)


def products(case: Case, theta: Tensor) -> None:
    """``matmul`` is V b and ``rmatmul`` is V'b."""
    V, A = case.matrix, case.matrix.build(theta)
    right, left = case.random(A.shape[1], 3), case.random(A.shape[0], 3)
    require_close(V.matmul(theta, right), A @ right, "`matmul`")
    require_close(V.rmatmul(theta, left), A.mT @ left, "`rmatmul`")


def elements(case: Case, theta: Tensor) -> None:
    """Elements, the diagonal and its mean are those of the dense matrix; ``is_diagonal`` is true of one only."""
    V, A = case.matrix, case.matrix.build(theta)
    rows, columns = case.indices(A.shape[0], 5), case.indices(A.shape[1], 7)
    require_close(V.submatrix(theta, rows, columns), A[rows][:, columns], "`submatrix`", tolerance=1e-12)
    require_close(V.entries(theta, rows[:, None], columns), A[rows][:, columns], "`entries`", tolerance=1e-12)
    require_close(V.diagonal(theta), A.diagonal(), "`diagonal`", tolerance=1e-12)
    require_close(V.mean_diagonal(theta), A.diagonal().mean(), "`mean_diagonal`", tolerance=1e-12)
    if V.is_diagonal:
        require(A.shape[0] == A.shape[1], "`is_diagonal` is true of a matrix that is not square")
        require_close(A, torch.diag_embed(A.diagonal()), "a matrix that says it is diagonal")


def level_blocks(case: Case, theta: Tensor) -> None:
    """Blocks by level are those of the dense matrix, zero elsewhere; a common block is the one of every level."""
    V, A = case.matrix, case.matrix.build(theta)
    size = A.shape[0]
    for count in [c for c in range(1, size + 1) if size % c == 0 and A.shape[0] == A.shape[1]]:
        blocks, common = V.level_blocks(theta, count), V.common_block(theta, count)
        require(blocks is not None or common is None, f"{count} levels have a `common_block` and no `level_blocks`")
        if blocks is not None and common is not None:
            require_close(common.expand_as(blocks), blocks, f"`common_block` of {count} levels")
        if blocks is not None:
            effects = size // count
            grid = A.reshape(effects, count, effects, count)
            require_close(blocks, torch.einsum("albl->lab", grid), f"`level_blocks` of {count} levels")
            between = grid * (1.0 - torch.eye(count, dtype=A.dtype, device=A.device)[:, None, :])
            require_close(between, torch.zeros_like(grid), f"the covariance between {count} uncorrelated levels")


def in_place_sum(case: Case, theta: Tensor) -> None:
    """``add_to`` adds the matrix, and the gradient reaches both what it is added to and the parameters."""
    V, base = case.matrix, case.random(*case.matrix.shape)
    _same_sum(lambda x: V.build(x), lambda out, x: V.add_to(out, x), base, theta, "`add_to`")


def sandwich(case: Case, theta: Tensor) -> None:
    """Z C Z' with this matrix as Z, for a dense and for a diagonal C."""
    Z, size = case.matrix, case.matrix.shape[1]
    C = case.random(size, size)
    inners: list[Matrix] = [SimpleMatrix(C + C.mT), DiagonalMatrix(size)]
    for inner in inners:
        own = case.random(inner.num_params)
        name = f"with {type(inner).__name__}"

        def dense(x: Tensor, inner: Matrix = inner) -> Tensor:
            A = Z.build(theta)
            return A @ inner.build(x) @ A.mT

        require_close(Z.sandwich(theta, inner, own), dense(own), f"`sandwich` {name}")
        diagonal = dense(own).diagonal()
        require_close(Z.sandwich_diagonal(theta, inner, own), diagonal, f"`sandwich_diagonal` {name}")
        require_close(Z.sandwich_mean_diagonal(theta, inner, own), diagonal.mean(), f"`sandwich_mean_diagonal` {name}")
        rows, columns = case.indices(Z.shape[0], 4)[:, None], case.indices(Z.shape[0], 3)
        got = Z.sandwich_entries(theta, inner, own, rows, columns)
        require_close(got, dense(own)[rows, columns], f"`sandwich_entries` {name}")
        _same_sum(
            dense,
            lambda out, x, inner=inner: Z.add_sandwich_to(out, theta, inner, x),
            case.random(Z.shape[0], Z.shape[0]),
            own,
            f"`add_sandwich_to` {name}",
        )


def _same_sum(build, add_to, base: Tensor, params: Tensor, what: str) -> None:  # type: ignore[no-untyped-def]
    """``add_to(out, params)`` returns out + build(params), and the gradients of a function of it agree."""
    leaf = [(base.clone().requires_grad_(), params.clone().requires_grad_()) for _ in range(2)]
    got = add_to(leaf[0][0].clone(), leaf[0][1])
    expected = leaf[1][0] + build(leaf[1][1])
    require_close(got, expected, what)
    grads = [
        torch.autograd.grad((total * base).sum(), inputs, allow_unused=True, materialize_grads=True)
        for total, inputs in ((got, leaf[0]), (expected, leaf[1]))
    ]
    for mine, dense, of in zip(*grads, ("what it adds to", "the parameters"), strict=True):
        require_close(mine, dense, f"the gradient of {what} with respect to {of}")


def natural(case: Case, theta: Tensor) -> None:
    """``natural`` has a finite value for each of its names, and ``from_natural`` leads back to the same matrix."""
    V = case.matrix
    values = V.natural(theta)
    require(values.shape == (len(V.natural_names),), "`natural` and `natural_names` differ in length")
    require(bool(torch.isfinite(values).all()), "`natural` is not finite")
    require(len(set(V.natural_names)) == len(V.natural_names), f"`natural_names` repeat: {V.natural_names}")
    require_close(V(V.from_natural(values.detach())), V(theta), "the matrix at `from_natural` of them", tolerance=1e-7)


def scale(case: Case, theta: Tensor) -> None:
    """V(``rescale(theta, c)``) = c V(theta) where the matrix has a scale."""
    V, powers = case.matrix, case.matrix.scale_powers
    require(len(powers) == V.num_params, f"`scale_powers` has length {len(powers)} for {V.num_params} parameters")
    if any(powers):
        for factor in (4.0, 0.01):
            got, what = V(V.rescale(theta, factor)), f"the matrix at `rescale(theta, {factor})`"
            try:
                require_close(got, factor * V(theta), what)
            except LawBroken as broken:
                cure = "1 for a variance, 0.5 for a standard deviation, 0 for a correlation or a length"
                raise LawBroken(f"{broken}. Override the property `scale_powers`, here {powers}: {cure}") from None
