"""Writes tests/reference/data/coda: CoDA's soft top-k and its layers in
float64, from the equations of arXiv:2304.04947.

    python tests/reference/make_coda.py

Needs torch and safetensors.

soft_topk_CASE holds `k`, `epsilon`, `scores`, `mask`, `direction`, the exact
`lambda` with its gradient `scores.grad` of sum(lambda * direction), and
`iterative` with `iterative.grad` for the published twenty steps.

`base` holds a pre-norm encoder of two layers without positions (the one in
test_coda.cpp), `inputs`, `attention_mask` and `target`. layers_CASE holds, for
CoDA on it, each tensor's start as `before.NAME`, the `output`, `loss`,
`gradient.NAME` of the loss, and `after.NAME` three SGD steps (0.1) later.
"""

import math
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
        s = scores[row][mask[row]].tolist()
        wanted = min(k, len(s))
        if wanted == 0:
            continue
        # The sum is at least k where the k-th highest gets 1, and at most k
        # where n entries as high as the highest get k / n each.
        high = -sorted(s)[-wanted]
        low = -max(s) + epsilon * math.log(wanted / len(s))
        for _ in range(200):
            a = (low + high) / 2
            lam = [math.exp(min(0.0, (x + a) / epsilon)) for x in s]
            low, high = (a, high) if math.fsum(lam) < wanted else (low, a)
        if wanted == len(s):
            lam = [1.0] * wanted
        result[row][mask[row]] = torch.tensor(lam)
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
                "k": torch.tensor(k),
                "epsilon": torch.tensor(epsilon),
                "scores": scores,
                "mask": mask,
                "direction": direction,
                "lambda": lam,
                "scores.grad": exact_gradient(lam, epsilon, direction),
                "iterative": steps.detach(),
                "iterative.grad": leaf.grad,
            },
            OUT / f"soft_topk_{name}.safetensors",
        )


WIDTH, HEADS, WIDE, LENGTH, LAYERS, BOTTLENECK = 8, 2, 12, 10, 2, 3
LENGTHS = torch.tensor([10, 7, 3])

# name: k or a ratio, attention, solver, epsilon, factor of the adapter
LAYER_CASES = {
    "k_to_k": (4, "k_to_k", "exact", 0.3, 1.0),
    "k_to_all": (4, "k_to_all", "exact", 0.3, 2.0),
    "iterative": (4, "k_to_k", "iterative", 0.3, 1.0),
    "ratio": (0.5, "k_to_k", "exact", 0.1, 1.0),
}


def make_base():
    generator = torch.Generator().manual_seed(100)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator) * 0.4

    base = {}
    for i in range(LAYERS):
        for name in ("query", "key", "value", "out"):
            base[f"layers.{i}.{name}.weight"] = draw(WIDTH, WIDTH)
            base[f"layers.{i}.{name}.bias"] = draw(WIDTH)
        base[f"layers.{i}.up.weight"] = draw(WIDE, WIDTH)
        base[f"layers.{i}.up.bias"] = draw(WIDE)
        base[f"layers.{i}.down.weight"] = draw(WIDTH, WIDE)
        base[f"layers.{i}.down.bias"] = draw(WIDTH)
        for name in ("norm1", "norm2"):
            base[f"layers.{i}.{name}.weight"] = 1 + draw(WIDTH)
            base[f"layers.{i}.{name}.bias"] = draw(WIDTH)
    return base


def norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * p[name + ".weight"] + p[name + ".bias"]


def linear(x, p, name):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def frozen_layer(queries, keys, p, i):
    """One sequence: what comes out for `queries` [q, d] that look at `keys`."""
    name = f"layers.{i}"
    q = linear(norm(queries, p, name + ".norm1"), p, name + ".query")
    k = linear(norm(keys, p, name + ".norm1"), p, name + ".key")
    v = linear(norm(keys, p, name + ".norm1"), p, name + ".value")
    size = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        look = (q[:, part] @ k[:, part].T / size**0.5).softmax(-1)
        heads.append(look @ v[:, part])
    x = queries + linear(torch.cat(heads, -1), p, name + ".out")
    wide = linear(norm(x, p, name + ".norm2"), p, name + ".up").relu()
    return x + linear(wide, p, name + ".down")


class ExactTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, k, epsilon):
        all_of_them = torch.ones_like(scores, dtype=torch.bool)
        lam = exact(scores[None], all_of_them[None], k, epsilon)[0]
        ctx.save_for_backward(lam)
        ctx.epsilon = epsilon
        return lam

    @staticmethod
    def backward(ctx, direction):
        (lam,) = ctx.saved_tensors
        return exact_gradient(lam, ctx.epsilon, direction), None, None


def coda(inputs, base, own, case):
    """Each sequence alone and without its padding; padded tokens see only the
    adapters."""
    size, attention, solver, epsilon, factor = case
    rows = []
    for row, length in zip(inputs, LENGTHS.tolist()):
        k = min(size, length) if size >= 1 else max(1, int(length * size + 0.5))
        for i in range(LAYERS):
            name = f"layers.{i}"
            normed = norm(row, base, name + ".norm1")
            scores = (normed @ own[f"{i}.router.weight"].T)[:length, 0]
            if k == length:
                lam = torch.ones(length) + 0 * scores
            elif solver == "exact":
                lam = ExactTopK.apply(scores, k, epsilon)
            else:
                valid = torch.ones(1, length, dtype=torch.bool)
                lam = iterative(scores[None], valid, k, epsilon)[0]
            order = sorted(range(length), key=lambda t: -scores[t].item())
            chosen = torch.tensor(sorted(order[:k]))
            few = row[chosen]
            keys = few if attention == "k_to_k" else row[:length]
            change = frozen_layer(few, keys, base, i) - few
            y = row.index_add(0, chosen, lam[chosen, None] * change)
            hidden = linear(normed, own, f"{i}.down").relu()
            row = y + factor * linear(hidden, own, f"{i}.up")
        rows.append(row)
    return torch.stack(rows)


def write_layers():
    base = make_base()
    generator = torch.Generator().manual_seed(200)
    sizes = (len(LENGTHS), LENGTH, WIDTH)
    inputs = torch.randn(sizes, generator=generator)
    target = torch.randn(sizes, generator=generator)
    mask = torch.arange(LENGTH) < LENGTHS[:, None]
    extra = {"inputs": inputs, "target": target, "attention_mask": mask.long()}
    save_file({**base, **extra}, OUT / "base.safetensors")
    for name, case in LAYER_CASES.items():
        own = {}
        for i in range(LAYERS):
            for part, shape in (
                ("router.weight", (1, WIDTH)),
                ("down.weight", (BOTTLENECK, WIDTH)),
                ("down.bias", (BOTTLENECK,)),
                ("up.weight", (WIDTH, BOTTLENECK)),
                ("up.bias", (WIDTH,)),
            ):
                start = torch.randn(shape, generator=generator) * 0.3
                own[f"{i}.{part}"] = start.requires_grad_()
        result = {"before." + key: t.detach().clone() for key, t in own.items()}
        for step in range(3):
            output = coda(inputs, base, own, case)
            loss = ((output - target).square().mean(-1) * mask).mean()
            grads = torch.autograd.grad(loss, list(own.values()))
            if step == 0:
                result["output"] = output.detach()
                result["loss"] = loss.detach()
                for key, grad in zip(own, grads):
                    assert grad.abs().max() > 1e-6, key
                    result["gradient." + key] = grad
            with torch.no_grad():
                for t, grad in zip(own.values(), grads):
                    t -= 0.1 * grad
        result.update({"after." + key: t.detach() for key, t in own.items()})
        save_file(result, OUT / f"layers_{name}.safetensors")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    write_soft_topk()
    write_layers()
