"""Algebra of many small symmetric blocks, in closed form where batched LAPACK would cost more than it computes."""

import torch
from torch import Tensor


def eliminate(A: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""For blocks A ⪰ 0 and covariances S ⪰ 0, singular ones too: what is left of a level that is eliminated.

    Args:
        A: Shape (L, s, s).
        S: Shape (L, s, s), or (1, s, s) for one that all levels share.

    Returns:
        (K, N, Σ log|D|) with K = S (I + A S)⁻¹, N = (I + A S)⁻¹, both of shape (L, s, s), and D = I + Λ'AΛ, S = ΛΛ'.
    """
    if A.shape[1] == 1:
        D = 1.0 + A * S
        N = 1.0 / D
        return S * N, N, D.log().sum()
    root = square_root(S)
    I = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    inverse, logdets = invert(root @ A @ root + I)
    K = root @ inverse @ root
    M = A @ S + I
    if A.shape[1] == 2:  # adjugate over determinant: a difference I − A K would lose what is left of a large A S
        adjugate = torch.stack([M[:, 1, 1], -M[:, 0, 1], -M[:, 1, 0], M[:, 0, 0]], dim=1).reshape(-1, 2, 2)
        return K, adjugate * (-logdets).exp()[:, None, None], logdets.sum()
    return K, torch.linalg.inv(M), logdets.sum()


def square_root(S: Tensor) -> Tensor:
    """The symmetric Λ with ΛΛ = S, S positive semi-definite up to rounding."""
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp(min=0.0).sqrt()[..., None, :]) @ vectors.mT


def invert(M: Tensor) -> tuple[Tensor, Tensor]:
    """(M⁻¹, log|M|) of symmetric positive definite blocks, shapes (L, s, s) and (L,)."""
    if M.shape[1] == 2:
        a, b, c = M[:, 0, 0], M[:, 1, 0], M[:, 1, 1]
        schur = c - b * b / a
        top = 1.0 / a + (b / a).square() / schur
        off = -b / (a * schur)
        inverse = torch.stack([top, off, off, 1.0 / schur], dim=1).reshape(-1, 2, 2)
        return inverse, a.log() + schur.log()
    L = torch.linalg.cholesky(M)
    return torch.cholesky_inverse(L), 2.0 * L.diagonal(dim1=1, dim2=2).log().sum(1)
