"""Writes tests/reference/data/reparam: intrinsic dimension (arXiv:1804.08838,
arXiv:2012.13255) and KronA (arXiv:2212.10650) in float64, by explicit matrices:
Hadamard's by Sylvester, diagonals, a permutation, and numpy's Kronecker product.

    python tests/reference/make_reparam.py

Needs numpy, torch and safetensors. The random numbers are those of torch's
generator on the CPU, in the order that random_projection.h draws them.

fastfood: for each of SIZES, drawn one after the other from seed 3 with d = 11,
`matrix.I` is P [N, d]. dense: the same by columns of length 1.

did, said: two linear layers without bias, `first` and `second`, a tanh between
them, `x`, `target`. `before.theta` (and `before.lambda`), the weights that they
make as `first.adapted`, `second.adapted`, the mean squared error `loss`, its
`gradient.theta` (and `gradient.lambda`), and `after.theta` (`after.lambda`)
three SGD steps (0.1) later. P is drawn from seed 5.

krona_CASE: `weight` [out, in], `A`, `B`, `x`, `direction`, the `product`
A kron B, `y` = x (W + s A kron B)ᵀ, and `gradient.A`, `gradient.B`,
`gradient.x` of sum(y * direction).
"""

import math
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).parent / "data" / "reparam"
SIZES = (24, 5, 1, 64, 37)
D = 11
# name: a1, a2, b1, b2, s
KRONA = {
    "square": (3, 3, 4, 4, 1.0),
    "wide": (2, 5, 3, 2, 0.5),
    "tall": (6, 1, 2, 7, 2.0),
    "all_in_a": (6, 4, 1, 1, 1.0),
    "all_in_b": (1, 1, 6, 4, 1.0),
}


def hadamard(n):
    matrix = np.ones((1, 1))
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def gaussians(count, generator):
    """Box and Muller, rounded to float32."""
    u = torch.empty(2, count, dtype=torch.float64).uniform_(generator=generator)
    u = u.numpy()
    numbers = np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1])
    return numbers.astype(np.float32).astype(np.float64)


def fastfood(size, d, generator):
    """P [size, d] as a product of matrices [n, n]."""
    n = 2 ** math.ceil(math.log2(size)) if size > 1 else 1
    used = min(n, d)
    signs = 2 * torch.randint(0, 2, (used,), generator=generator).numpy() - 1
    order = torch.randperm(n, generator=generator).numpy()
    g = gaussians(n, generator)
    B = np.diag(np.concatenate([signs, np.ones(n - used)]))
    Pi = np.eye(n)[order]
    H = hadamard(n)
    full = H @ np.diag(g) @ Pi @ H @ B
    # The published code's two divisors.
    full = full / (np.sqrt(n * np.sum(g**2)) * np.sqrt(size / n))
    P = np.zeros((size, d))
    P[:, :used] = full[:size, :used]
    return P


def dense(size, d, generator):
    P = gaussians(size * d, generator).reshape(size, d)
    P = P / np.sqrt(np.sum(P**2, axis=0, keepdims=True))
    return P.astype(np.float32).astype(np.float64)


def projections(make, sizes, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return [make(size, d, generator) for size in sizes]


def intrinsic(said):
    random = np.random.default_rng(7)
    first, second = random.normal(size=(5, 3)), random.normal(size=(2, 5))
    x, target = random.normal(size=(6, 3)), random.normal(size=(6, 2))
    d = 9 - (2 if said else 0)
    P = projections(fastfood, (first.size, second.size), d, 5)
    theta = random.normal(size=d)
    lam = random.normal(size=2) if said else np.ones(2)
    tensors = {"first": first, "second": second, "x": x, "target": target}

    def weights(theta, lam):
        return (
            first + lam[0] * (P[0] @ theta).reshape(first.shape),
            second + lam[1] * (P[1] @ theta).reshape(second.shape),
        )

    def gradients(theta, lam):
        """Of the mean squared error, by hand."""
        W1, W2 = weights(theta, lam)
        hidden = np.tanh(x @ W1.T)
        error = hidden @ W2.T - target
        dy = 2 * error / error.size
        dW2 = dy.T @ hidden
        dW1 = (dy @ W2 * (1 - hidden**2)).T @ x
        parts = [P[0].T @ dW1.ravel(), P[1].T @ dW2.ravel()]
        dtheta = lam[0] * parts[0] + lam[1] * parts[1]
        return np.mean(error**2), dtheta, np.array([p @ theta for p in parts])

    tensors["before.theta"] = theta.copy()
    W1, W2 = weights(theta, lam)
    tensors["first.adapted"], tensors["second.adapted"] = W1, W2
    loss, dtheta, dlam = gradients(theta, lam)
    tensors["loss"] = np.array(loss)
    tensors["gradient.theta"] = dtheta
    if said:
        tensors["before.lambda"] = lam.copy()
        tensors["gradient.lambda"] = dlam
    for _ in range(3):
        _, dtheta, dlam = gradients(theta, lam)
        theta = theta - 0.1 * dtheta
        lam = lam - 0.1 * dlam if said else lam
    tensors["after.theta"] = theta
    if said:
        tensors["after.lambda"] = lam
    return tensors


def krona(a1, a2, b1, b2, s):
    random = np.random.default_rng(11)
    A, B = random.normal(size=(a1, a2)), random.normal(size=(b1, b2))
    W = random.normal(size=(a1 * b1, a2 * b2))
    x = random.normal(size=(5, a2 * b2))
    direction = random.normal(size=(5, a1 * b1))
    product = np.kron(A, B)
    adapted = W + s * product
    # [a1, b1, a2, b2]: what each entry of the product is made of
    d = (s * direction.T @ x).reshape(a1, b1, a2, b2)
    return {
        "weight": W,
        "A": A,
        "B": B,
        "x": x,
        "direction": direction,
        "product": product,
        "y": x @ adapted.T,
        "gradient.A": np.einsum("ikjl,kl->ij", d, B),
        "gradient.B": np.einsum("ikjl,ij->kl", d, A),
        "gradient.x": direction @ adapted,
    }


def write(name, tensors):
    save_file(
        {k: np.array(v, order="C") for k, v in tensors.items()},
        OUT / f"{name}.safetensors",
    )


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for make in (fastfood, dense):
        P = projections(make, SIZES, D, 3)
        write(make.__name__, {f"matrix.{i}": p for i, p in enumerate(P)})
    write("did", intrinsic(False))
    write("said", intrinsic(True))
    for name, case in KRONA.items():
        write("krona_" + name, krona(*case))


if __name__ == "__main__":
    main()
