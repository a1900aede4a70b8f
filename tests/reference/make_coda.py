"""Writes tests/reference/data/coda: CoDA's soft top-k in float64, from the
equations of arXiv:2304.04947.

    python tests/reference/make_coda.py

Needs torch and safetensors. Each case holds `scores`, `mask`, `direction`, the
exact `lambda` with its gradient `scores.grad` of sum(lambda * direction), and
`iterative` with `iterative.grad` for the published twenty steps. k, epsilon and
what the iteration uses are in the file's metadata and in test_soft_topk.cpp.
"""

import pathlib

import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "data" / "coda"
torch.set_default_dtype(torch.float64)

# name: rows, n, k, epsilon, spread of the scores, lengths of the rows
CASES = {
    "plain": (3, 16, 5, 0.5, 1.0, None),
    "text": (2, 64, 16, 0.03, 1.0, None),
    "speech": (2, 64, 16, 1.0, 1.0, None),
    "wide": (2, 48, 3, 0.1, 30.0, None),
    "padded": (4, 12, 6, 0.2, 1.0, (12, 7, 6, 3)),
}


def exact(scores, mask, k, epsilon):
    """Bisection for a; the sum of min(1, exp((s + a) / epsilon)) grows with it."""
    result = torch.zeros_like(scores)
    for row in range(scores.size(0)):
        s = scores[row][mask[row]]
        wanted = min(k, s.numel())
        if wanted == s.numel():
            result[row][mask[row]] = 1.0
            continue
        # The sum is at least k where the k-th highest gets 1, and at most k
        # where n entries as high as the highest get k / n each.
        high = -s.sort(descending=True).values[wanted - 1]
        low = -s.max() + epsilon * torch.log(torch.tensor(wanted / s.numel()))
        for _ in range(200):
            a = (low + high) / 2
            total = torch.exp(((s + a) / epsilon).clamp(max=0)).sum()
            low, high = (a, high) if total < wanted else (low, a)
        result[row][mask[row]] = torch.exp(((s + a) / epsilon).clamp(max=0))
    return result


def exact_gradient(lam, epsilon, direction):
    """From differentiating sum(lambda) = k: the entries at 1 stay there."""
    inside = torch.where(lam < 1, lam, 0.0)
    total = inside.sum(-1, keepdim=True)
    mean = (inside * direction).sum(-1, keepdim=True) / total.clamp(min=1e-300)
    return inside / epsilon * (direction - mean)


def iterative(scores, mask, k, epsilon, steps=20, start=4.0, decay=0.7):
    """Block coordinate descent on the dual, with a shrinking epsilon."""
    rows = []
    for row in range(scores.size(0)):
        s = scores[row][mask[row]]
        wanted = torch.tensor(float(min(k, s.numel())))
        eps = max(start, epsilon)
        b = -s
        for _ in range(steps):
            a = eps * (wanted.log() - torch.logsumexp((s + b) / eps, 0))
            b = torch.minimum(-(s + a), torch.zeros_like(s))
            eps = max(eps * decay, epsilon)
        lam = torch.exp((s + a + b) / eps)
        rows.append(torch.zeros_like(scores[row]).masked_scatter(mask[row], lam))
    return torch.stack(rows)


def write_soft_topk():
    for i, (name, case) in enumerate(CASES.items()):
        rows, n, k, epsilon, spread, lengths = case
        generator = torch.Generator().manual_seed(i)
        scores = torch.randn(rows, n, generator=generator) * spread
        direction = torch.randn(rows, n, generator=generator)
        lengths = torch.tensor(lengths or (n,) * rows)
        mask = torch.arange(n) < lengths[:, None]
        lam = exact(scores, mask, k, epsilon)
        leaf = scores.clone().requires_grad_()
        steps = iterative(leaf, mask, k, epsilon)
        (steps * direction).sum().backward()
        short = torch.minimum(lengths, torch.tensor(k)).double()
        assert (lam.sum(-1) - short).abs().max() < 1e-9, name
        save_file(
            {
                "scores": scores,
                "mask": mask,
                "direction": direction,
                "lambda": lam,
                "scores.grad": exact_gradient(lam, epsilon, direction),
                "iterative": steps.detach(),
                "iterative.grad": leaf.grad,
            },
            OUT / f"soft_topk_{name}.safetensors",
            metadata={"k": str(k), "epsilon": str(epsilon)},
        )


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    write_soft_topk()
