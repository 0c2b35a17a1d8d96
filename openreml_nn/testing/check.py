"""`check_matrix`: every law of the contract of `Matrix`, for any structure, also a user's own."""

import copy
import math

import torch
from torch import Tensor

from openreml_nn.covariance import Matrix
from openreml_nn.testing import derivatives, modules, values
from openreml_nn.testing.case import Case, Law, LawBroken, domains

LAWS = (
    Law("the matrix is pure in its parameters", values.purity, 3),  # first, because it needs copies without a past
    Law("`shape` and dtype are those of the matrix", values.shape),
    Law("a covariance is symmetric", values.symmetry),
    Law("a covariance is positive definite", values.definiteness),
    Law("names, thetas and leaves agree", modules.names, 1),
    Law("without parameters the module's own are taken", values.own_theta, 1),
    Law("`matmul` and `rmatmul` are products with the matrix", values.products, 5),
    Law("`submatrix`, `entries`, `diagonal` and `is_diagonal` agree with the matrix", values.elements, 5),
    Law("`level_blocks` and `common_block` agree with the matrix", values.level_blocks, 3),
    Law("`add_to` adds the matrix, with its gradient", values.in_place_sum, 3),
    Law("`sandwich` and its diagonal, elements and sum agree with the matrix", values.sandwich, 2),
    Law("`natural` has a value for each of `natural_names`, and `from_natural` inverts it", values.natural),
    Law("`rescale` multiplies the matrix", values.scale, 5),
    Law("`trans_grad` is the derivative of `trans_params`", derivatives.transforms, 5),
    Law("`grad` is the derivative", derivatives.jacobian),
    Law("`torch.func` transforms `build`", derivatives.function_transforms, 3),
    Law("second derivatives are finite and right", derivatives.second_derivative, 3),
    Law("earlier calls do not matter for a gradient", derivatives.own_gradient, 1),
    Law("a dictionary stands for the flat tensor", modules.dictionaries, 2),
    Law("`no_grad_index` is `requires_grad`", modules.fixed_parameters, 1),
    Law("deep copies and pickles are equal and independent", modules.copies, 2),
    Law("`state_dict` holds the thetas and not the cache", modules.state, 2),
    Law("dtypes follow the parameters and `float()`, `double()`", modules.dtypes, 2),
    Law("the matrix moves between devices", modules.devices, 1),
)


def check_matrix(
    matrix: Matrix, *, covariance: bool = True, definite: bool = True, thetas: int = 20, seed: int = 0
) -> None:
    """Check that a matrix keeps every law of the contract of `Matrix`, at its own and at random raw thetas.

    Args:
        matrix: The matrix, of a structure or operator of this package or of one's own; it is not changed.
        covariance: Whether it must be symmetric and positive definite; False for a design or a factor.
        definite: False where a covariance may be singular (positive semi-definite).
        thetas: Number of random thetas, standard normal; the module's own come in addition.
        seed: Seed of the random thetas.

    Raises:
        LawBroken: A law does not hold; the message says which one, at which theta, and by how much.

    Example:
        >>> from openreml_nn.covariance import AR1Matrix
        >>> check_matrix(AR1Matrix(4))
    """
    own = matrix.theta.detach()
    points = _points(matrix, own, thetas, seed)
    case = Case(copy.deepcopy(matrix), points, covariance, definite, seed)
    for law in LAWS:
        for theta in points[: law.thetas]:
            try:
                law.holds(case, theta.clone())
            except Exception as error:
                raise LawBroken(_message(matrix, law, theta, error)) from error


def _message(matrix: Matrix, law: Law, theta: Tensor, error: Exception) -> str:
    what = str(error) if isinstance(error, LawBroken) else f"{type(error).__name__}: {error}"
    values = zip(matrix.param_names, theta.tolist(), strict=True)
    at = ", ".join(f"{name} = {value:.6g}" for name, value in values)
    return f"`{type(matrix).__name__}` breaks the law: {law.name}. At raw theta ({at}): {what}."


def _points(matrix: Matrix, own: Tensor, count: int, seed: int) -> Tensor:
    """The module's own thetas (unless on a boundary) and random ones, inside the domains of the transforms."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, matrix.num_params, generator=generator, dtype=torch.float64)
    ends = domains(matrix)
    for i, (low, high) in enumerate(ends):
        if low > -math.inf:
            drawn[:, i] = low + drawn[:, i].abs()
        elif high < math.inf:
            drawn[:, i] = high - drawn[:, i].abs()
    inside = all(low < x < high for x, (low, high) in zip(own.tolist(), ends, strict=True))
    drawn = drawn.to(own.device)
    return torch.cat([own.to(torch.float64)[None], drawn]) if inside else drawn
