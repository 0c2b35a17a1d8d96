"""Algebra of many small blocks, one for each level of a factor, with the level as the last axis.

Blocks of shape (a, b, L) are a · b vectors over the levels: a product of 2 × 2 blocks is eight elementwise products of
long vectors, which is several times as fast as a batch of 2 × 2 matrix products.
"""

import torch
from torch import Tensor

SLACK = 1e-7  # of the largest eigenvalue, down to which a negative one is rounding; `check_kernel` lets 1e-8 pass


def multiply(A: Tensor, B: Tensor) -> Tensor:
    """A_l B_l, shapes (a, b, L) and (b, c, L); an L of 1 stands for all levels."""
    if A.shape[1] == 1:
        return A * B
    if B.shape[2] == 1:
        return B[..., 0].mT @ A
    if A.shape[2] == 1:
        return (A[..., 0] @ B.flatten(1)).view(len(A), *B.shape[1:])
    product = A[:, 0, None] * B[None, 0]
    for k in range(1, A.shape[1]):
        product = torch.addcmul(product, A[:, k, None], B[None, k])
    return product


def transpose(A: Tensor) -> Tensor:
    """A_l', shape (b, a, L)."""
    return A.transpose(0, 1)


def identity(s: int, like: Tensor) -> Tensor:
    """I for all levels, shape (s, s, 1)."""
    return torch.eye(s, dtype=like.dtype, device=like.device)[..., None]


def eliminate(A: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""For blocks A ⪰ 0 and covariances S ⪰ 0, singular ones too: what is left of a level that is eliminated.

    An S that is indefinite by more than rounding is no covariance. With s ≤ 2 what follows from it is NaN, so that no
    number has to be read here.

    Args:
        A: Shape (s, s, L).
        S: Shape (s, s, L), or (s, s, 1) for one that all levels share.

    Returns:
        (K, N, Σ log|D|) with K = S (I + A S)⁻¹, N = (I + A S)⁻¹, both of shape (s, s, L), and D = I + Λ'AΛ, S = ΛΛ'.

    Raises:
        torch.linalg.LinAlgError: With s > 2, for an S that is indefinite or not finite.
    """
    s = len(A)
    if s == 1:
        D = 1.0 + A * torch.where(S >= 0.0, S, torch.nan)
        N = 1.0 / D
        return S * N, N, D.log().sum()
    if s == 2:
        return _eliminate_two(A, S)
    root, M = square_root(S), multiply(A, S) + identity(s, A)
    inverse, logdet = invert(multiply(multiply(root, A), root) + identity(s, A))
    return multiply(multiply(root, inverse), root), _last(torch.linalg.inv(_first(M))), logdet.sum()


def _eliminate_two(A: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By adjugates over |D| = 1 + tr(AS) + |A||S|, of which no part is negative: K = (S + |S| adj(A)) / |D|."""
    AS, signs = multiply(A, S), 2.0 * identity(2, A) - 1.0
    det_A, det_S = (torch.addcmul(M[0, 0] * M[1, 1], M[0, 1], M[1, 0], value=-1.0) for M in (A, S))
    det_D = torch.addcmul(AS[0, 0] + AS[1, 1], det_A, det_S).add_(1.0)
    trace = S[0, 0] + S[1, 1]
    least = torch.minimum(trace, torch.addcmul(det_S, trace, trace, value=_slack(S)))
    det_D = torch.where(least >= 0.0, det_D, torch.nan)
    scale = det_D.reciprocal()
    N = torch.addcmul(identity(2, A), _turned(AS), signs).mul_(scale)
    return torch.addcmul(S, _turned(A), signs * det_S).mul_(scale), N, det_D.log().sum()


def _turned(M: Tensor) -> Tensor:
    """The adjugate of 2 × 2 blocks but for the signs."""
    return M.flip(0, 1).transpose(0, 1)


def square_root(S: Tensor) -> Tensor:
    """The symmetric Λ with ΛΛ = S, S positive semi-definite up to rounding; NaN for one that is not."""
    values, vectors = torch.linalg.eigh(_first(S))
    is_covariance = values[:, :1] >= -_slack(S) * values[:, -1:]
    roots = torch.where(is_covariance, values.clamp(min=0.0), torch.nan).sqrt()
    return _last((vectors * roots[:, None]) @ vectors.mT)


def is_indefinite(G: Tensor) -> Tensor:
    """Whether a symmetric G, shape (q, q), or its diagonal, shape (q,), has an eigenvalue below those of rounding."""
    if G.ndim == 1:
        return ~(G >= 0.0).all()
    shifted = G.clone()
    diagonal = shifted.diagonal()
    diagonal.add_(_slack(G) * diagonal.max() + torch.finfo(G.dtype).tiny)  # the latter for a G of zeros
    return torch.linalg.cholesky_ex(shifted).info != 0


def _slack(like: Tensor) -> float:
    return max(SLACK, 16.0 * torch.finfo(like.dtype).eps)


def invert(M: Tensor) -> tuple[Tensor, Tensor]:
    """(M⁻¹, log|M|) of symmetric positive definite blocks, shapes (s, s, L) and (L,)."""
    L = torch.linalg.cholesky(_first(M))
    return _last(torch.cholesky_inverse(L)), 2.0 * L.diagonal(dim1=1, dim2=2).log().sum(1)


def _first(blocks: Tensor) -> Tensor:
    return blocks.permute(2, 0, 1).contiguous()


def _last(blocks: Tensor) -> Tensor:
    return blocks.permute(1, 2, 0).contiguous()
