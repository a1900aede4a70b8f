"""Writes tests/reference/data/unified: S3Delta's search (arXiv:2206.07382) and
SparseAdapter's masks (arXiv:2210.04284) in float64, from their equations and
from what their published code does.

    python tests/reference/make_unified.py

Needs torch and safetensors.

Both are on a network of two linear layers, y = fc2(tanh(fc1(x))), whose tensors
are `base.NAME`, with `x`, `y` and, for the search, `x_val`, `y_val`.

search_CASE: modules are LoRA of rank 1 on fc1 and fc2 and the biases of both,
`numel` their sizes. `start.NAME` is what they train; after step i there are
`alpha.i`, `p.i`, `after.i.NAME` and the samples `u.i` of its two draws.

sparse: LoRA of rank 2, `start.NAME`; mask.SCORE.ROUNDS.NAME is what stays of
each after pruning to 0.4 of all entries.
"""

import math
import pathlib

import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "data" / "unified"
torch.set_default_dtype(torch.float64)

BUDGET, BETA = 11, 0.7
LR, DECAY, ALPHA_LR, CLIP = 0.05, 0.1, 0.1, 0.3
# name: order, gradient of the shift, stretch
CASES = {
    "detached": (2, "detached", (0.0, 1.0)),
    "implicit": (2, "implicit", (0.0, 1.0)),
    "first": (1, "detached", (0.0, 1.0)),
    "stretched": (2, "detached", (-0.2, 1.2)),
}


def network():
    g = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.randn(*sizes, generator=g)
    return {
        "fc1.weight": draw(5, 4),
        "fc1.bias": draw(5),
        "fc2.weight": draw(3, 5),
        "fc2.bias": draw(3),
    }


def forward(base, x, delta):
    """delta(name, parameter) is the parameter that takes part."""
    h = torch.tanh(
        x @ delta("fc1.weight", base["fc1.weight"]).T
        + delta("fc1.bias", base["fc1.bias"])
    )
    return h @ delta("fc2.weight", base["fc2.weight"]).T + delta(
        "fc2.bias", base["fc2.bias"]
    )


# ~~~~ S3Delta ~~~~

MODULES = ["fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias"]


def solve(alpha, numel):
    """Bisection for b."""
    low, high = alpha.min() - 50, alpha.max() + 50
    for _ in range(200):
        b = (low + high) / 2
        if (torch.sigmoid((alpha - b) / BETA) * numel).sum() > BUDGET:
            low = b
        else:
            high = b
    return (low + high) / 2


def sample(alpha, numel, u, gradient, stretch):
    b = solve(alpha.detach(), numel)
    if gradient == "implicit":
        # One Newton step from the solution has the derivative of the root.
        p = torch.sigmoid((alpha - b) / BETA)
        slope = -(numel * p * (1 - p)).sum().detach() / BETA
        b = b - ((p * numel).sum() - BUDGET) / slope
    p = torch.sigmoid((alpha - b) / BETA)
    if gradient == "detached":
        p = p / p.sum() * p.sum().detach()
    s = torch.sigmoid(torch.log(u * p / ((1 - u) * (1 - p))))
    low, high = stretch
    z = (s * (high - low) + low).clamp(0, 1)
    if z.sum() == 0:
        i = p.argmax()
        z = torch.nn.functional.one_hot(i, len(p)) * p
    return z


def clip(grads):
    norm = torch.stack([g.norm() for g in grads]).norm()
    return [g * (CLIP / (norm + 1e-6)).clamp(max=1) for g in grads]


class Search:
    def __init__(self, order, gradient, stretch):
        self.order, self.gradient, self.stretch = order, gradient, stretch
        self.base = network()
        g = torch.Generator().manual_seed(1)
        draw = lambda *sizes: torch.randn(*sizes, generator=g)
        self.w = {
            "fc1.lora_A.weight": draw(1, 4),
            "fc1.lora_B.weight": draw(5, 1),
            "fc2.lora_A.weight": draw(1, 5),
            "fc2.lora_B.weight": draw(3, 1),
            "fc1.bias": self.base["fc1.bias"] + draw(5),
            "fc2.bias": self.base["fc2.bias"] + draw(3),
        }
        self.x, self.y = draw(6, 4), draw(6, 3)
        self.x_val, self.y_val = draw(6, 4), draw(6, 3)
        self.numel = torch.tensor([9.0, 8.0, 5.0, 3.0])
        self.alpha = torch.zeros(4, requires_grad=True)
        for p in self.w.values():
            p.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.w.values(), lr=LR, weight_decay=DECAY
        )
        self.alpha_optimizer = torch.optim.AdamW(
            [self.alpha], lr=ALPHA_LR, weight_decay=0
        )
        self.generator = torch.Generator().manual_seed(3)

    def loss(self, w, x, y, u):
        z = dict(
            zip(
                MODULES,
                sample(self.alpha, self.numel, u, self.gradient, self.stretch),
            )
        )

        def delta(name, parameter):
            layer, kind = name.split(".")
            if kind == "bias":
                return parameter + z[name] * (w[name] - parameter)
            ba = w[layer + ".lora_B.weight"] @ w[layer + ".lora_A.weight"]
            return parameter + z[name] * 2.0 * ba

        return ((forward(self.base, x, delta) - y) ** 2).mean()

    def virtual(self, grads):
        """w after AdamW, whose own state stays."""
        result = {}
        for (name, w), g in zip(self.w.items(), grads):
            state = self.optimizer.state[w]
            t = int(state.get("step", 0)) + 1
            m = 0.9 * state.get("exp_avg", torch.zeros_like(w)) + 0.1 * g
            v = 0.999 * state.get("exp_avg_sq", torch.zeros_like(w)) + 0.001 * g * g
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            step = w.detach() * (1 - LR * DECAY) - LR * m_hat / (
                v_hat.sqrt() + 1e-8
            )
            result[name] = step.detach().requires_grad_(True)
        return result

    def step(self):
        grad = torch.autograd.grad
        u = torch.rand(4, generator=self.generator)
        w = self.w
        if self.order == 2:
            w = self.virtual(
                grad(self.loss(self.w, self.x, self.y, u), list(self.w.values()))
            )
        validation = self.loss(w, self.x_val, self.y_val, u)
        g, *d = grad(validation, [self.alpha] + list(w.values()))
        if self.order == 2:
            eps = 0.01 / (torch.cat([e.reshape(-1) for e in d]).norm() + 1e-6)
            sides = []
            for sign in (1, -1):
                moved = {
                    name: p.detach() + sign * eps * e
                    for (name, p), e in zip(self.w.items(), d)
                }
                loss = self.loss(moved, self.x, self.y, u)
                sides.append(grad(loss, self.alpha)[0])
            g = g - LR * (sides[0] - sides[1]) / (2 * eps)
        (self.alpha.grad,) = clip([g])
        self.alpha_optimizer.step()

        u_new = torch.rand(4, generator=self.generator)
        grads = grad(
            self.loss(self.w, self.x, self.y, u_new), list(self.w.values())
        )
        for p, g in zip(self.w.values(), clip(grads)):
            p.grad = g
        self.optimizer.step()
        return torch.stack([u, u_new]), validation


def write_search():
    for name, case in CASES.items():
        search = Search(*case)
        out = {"base." + k: v for k, v in search.base.items()}
        out |= {"start." + k: v.detach().clone() for k, v in search.w.items()}
        for key in ("x", "y", "x_val", "y_val", "numel"):
            out[key] = getattr(search, key)
        for i in range(3):
            out[f"u.{i}"], loss = search.step()
            out[f"validation.{i}"] = loss.detach()
            out[f"alpha.{i}"] = search.alpha.detach().clone()
            b = solve(search.alpha.detach(), search.numel)
            out[f"p.{i}"] = torch.sigmoid((search.alpha.detach() - b) / BETA)
            for k, v in search.w.items():
                out[f"after.{i}.{k}"] = v.detach().clone()
        save_file(out, OUT / f"search_{name}.safetensors")


# ~~~~ SparseAdapter ~~~~

KEEP = 0.4


def write_sparse():
    base = network()
    g = torch.Generator().manual_seed(2)
    draw = lambda *sizes: torch.randn(*sizes, generator=g)
    w = {
        "fc1.lora_A.weight": draw(2, 4),
        "fc1.lora_B.weight": draw(5, 2),
        "fc2.lora_A.weight": draw(2, 5),
        "fc2.lora_B.weight": draw(3, 2),
    }
    x, y = draw(2, 6, 4), draw(2, 6, 3)  # two batches
    out = {"base." + k: v for k, v in base.items()}
    out |= {"start." + k: v.clone() for k, v in w.items()}
    out |= {"x": x, "y": y}
    names = list(w)
    for p in w.values():
        p.requires_grad_(True)

    def loss(mask, batch):
        def delta(name, parameter):
            layer, kind = name.split(".")
            if kind == "bias":
                return parameter
            A, B = layer + ".lora_A.weight", layer + ".lora_B.weight"
            return parameter + 2.0 * (w[B] * mask[B]) @ (w[A] * mask[A])

        return ((forward(base, x[batch], delta) - y[batch]) ** 2).mean()

    def snip(mask):
        # The gradient is the mask's own.
        for m in mask.values():
            m.requires_grad_(True)
        total = sum(loss(mask, b) for b in range(2))
        grads = torch.autograd.grad(total, list(mask.values()))
        for m in mask.values():
            m.requires_grad_(False)
        return [e.abs() for e in grads]

    def grasp(mask):
        params = list(w.values())
        stopped = 0
        for b in range(2):
            grads = torch.autograd.grad(loss(mask, b), params)
            stopped = stopped + torch.cat([e.reshape(-1) for e in grads])
        total = [torch.zeros_like(p) for p in params]
        for b in range(2):
            grads = torch.autograd.grad(loss(mask, b), params, create_graph=True)
            product = (stopped * torch.cat([e.reshape(-1) for e in grads])).sum()
            for t, e in zip(total, torch.autograd.grad(product, params)):
                t += e
        scores = [(t * p).detach() for t, p in zip(total, params)]
        return [s / (sum(e.sum() for e in scores).abs() + 1e-10) for s in scores]

    def magnitude(mask):
        return [p.detach().abs() for p in w.values()]

    for score in (snip, grasp, magnitude):
        for rounds in (1, 3):
            mask = {name: torch.ones_like(w[name].detach()) for name in names}
            for e in range(rounds):
                keep = KEEP ** ((e + 1) / rounds)
                values = score(mask)
                flat = torch.cat([v.reshape(-1) for v in values])
                k = math.ceil((1.0 - keep) * flat.numel())
                threshold = torch.kthvalue(flat, k)[0]
                mask = {
                    name: torch.where(v <= threshold, 0.0, 1.0)
                    for name, v in zip(names, values)
                }
            for name in names:
                key = f"mask.{score.__name__}.{rounds}.{name}"
                out[key] = mask[name].detach()
    save_file(out, OUT / "sparse.safetensors")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    write_search()
    write_sparse()
