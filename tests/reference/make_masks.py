"""Writes tests/reference/data/masks: Fisher information, the masks made of it
and masked training in float64, from the equations of arXiv:2111.09839 (FISH
mask) and arXiv:2109.05687 (Child-tuning) and from what their authors' programs
do.

    python tests/reference/make_masks.py

Needs torch, numpy and safetensors.

network      the start of a small classifier, `NAME`; `inputs` [N, tokens] and
             `labels` [N]. `embed.weight` is the token embedding, whose rows are
             averaged over the tokens; then layer.0, tanh, layer.1, tanh, and
             the classifier.
fisher       `label_square.NAME`, `label_absolute.NAME`, `expect_square.NAME`,
             one sample at a time; `per_batch.NAME`: mini-batches of 4, each
             tensor's gradient clipped to norm 0.05 before it is squared.
masks        `fish_R.NAME`: FISH mask with keep_ratio R and the classifier whole
             and inside the budget; `fish_no_head_R.NAME`; `child_P.NAME`:
             numpy's percentile over the parameters called "layer"; `ties_P`: of
             scores with many equal values, in `tied.NAME`.
training     `fish.NAME`, `fish_hard.NAME`, `child.NAME`, `child_hard.NAME`
             after 6 steps on batches of 4. Published: gradients masked, for
             FISH before clipping and for Child-tuning after; Child-tuning in
             Hugging Face's old AdamW, which decays last. Hard: masked entries
             put back after each step.
"""

import math
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "data" / "masks"
torch.set_default_dtype(torch.float64)

VOCABULARY, WIDTH, HIDDEN, CLASSES = 12, 5, 6, 3
SAMPLES, TOKENS, BATCH = 12, 4, 4
STEPS, RATE, DECAY, MAX_NORM = 6, 0.02, 0.1, 0.5
BETAS = (0.9, 0.999)


def make_network():
    g = torch.Generator().manual_seed(11)

    def draw(*sizes):
        return torch.randn(*sizes, generator=g) * 0.7

    network = {
        "embed.weight": draw(VOCABULARY, WIDTH),
        "layer.0.weight": draw(HIDDEN, WIDTH),
        "layer.0.bias": draw(HIDDEN),
        "layer.1.weight": draw(HIDDEN, HIDDEN),
        "layer.1.bias": draw(HIDDEN),
        "classifier.weight": draw(CLASSES, HIDDEN),
        "classifier.bias": draw(CLASSES),
    }
    inputs = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=g)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=g)
    return network, inputs, labels


def forward(p, inputs):
    h = p["embed.weight"][inputs].mean(1)
    for i in range(2):
        h = torch.tanh(h @ p[f"layer.{i}.weight"].T + p[f"layer.{i}.bias"])
    return h @ p["classifier.weight"].T + p["classifier.bias"]


def log_probabilities(p, inputs):
    logits = forward(p, inputs)
    return logits - logits.logsumexp(-1, keepdim=True)


def mean_loss(p, inputs, labels):
    rows = torch.arange(len(labels))
    return -log_probabilities(p, inputs)[rows, labels].mean()


def gradients(p, loss, keep=False):
    found = torch.autograd.grad(loss, list(p.values()), retain_graph=keep)
    return dict(zip(p, found))


def leaves(network):
    return {name: t.clone().requires_grad_() for name, t in network.items()}


def zeros(network):
    return {name: torch.zeros_like(t) for name, t in network.items()}


def fisher(network, inputs, labels):
    p = leaves(network)
    square, absolute, expect = zeros(p), zeros(p), zeros(p)
    for i in range(SAMPLES):
        one = slice(i, i + 1)
        for name, g in gradients(p, mean_loss(p, inputs[one], labels[one])).items():
            square[name] += g**2
            absolute[name] += g.abs()
        log_p = log_probabilities(p, inputs[one])[0]
        for c in range(CLASSES):
            weight = log_p[c].exp().item()
            for name, g in gradients(p, -log_p[c], keep=True).items():
                expect[name] += weight * g**2
    return square, absolute, expect


def fisher_of_batches(network, inputs, labels, max_norm):
    p = leaves(network)
    result = zeros(p)
    for begin in range(0, SAMPLES, BATCH):
        batch = slice(begin, begin + BATCH)
        for name, g in gradients(p, mean_loss(p, inputs[batch], labels[batch])).items():
            norm = g.square().sum().sqrt()
            result[name] += (g * min(1.0, max_norm / (norm.item() + 1e-6))) ** 2
    return result


def split(mask, scores):
    result, begin = {}, 0
    for name, s in scores.items():
        result[name] = mask[begin : begin + s.numel()].reshape(s.shape)
        begin += s.numel()
    return result


def fish_mask(scores, ratio, head):
    """Authors' order: the parameters' own; the head is all ones."""
    body = {n: s for n, s in scores.items() if not head or "classifier" not in n}
    flat = torch.cat([s.reshape(-1) for s in body.values()])
    assert len(flat.unique()) == len(flat) or flat.eq(0).any()
    total = sum(s.numel() for s in scores.values())
    keep = int(total * ratio) - (total - len(flat))
    assert 0 < keep <= flat.ne(0).sum()  # no ties at the threshold
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(keep)[1]] = True
    result = split(mask, body)
    for name, s in scores.items():
        result.setdefault(name, torch.ones_like(s, dtype=torch.bool))
    return {name: result[name] for name in scores}


def child_mask(scores, p):
    body = {n: s for n, s in scores.items() if "layer" in n}
    flat = np.concatenate([s.reshape(-1).numpy() for s in body.values()])
    threshold = np.percentile(flat, (1 - p) * 100)
    return {n: s >= threshold for n, s in body.items()}


def clip(grads, max_norm):
    norm = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return {name: g * factor for name, g in grads.items()}


class AdamW:
    """torch's: decays first. `old`: Hugging Face's, decays last, and epsilon
    beside the uncorrected second moment."""

    def __init__(self, network, old):
        self.m, self.v, self.t, self.old = zeros(network), zeros(network), 0, old
        self.eps = 1e-6 if old else 1e-8

    def step(self, network, grads):
        self.t += 1
        first, second = 1 - BETAS[0] ** self.t, 1 - BETAS[1] ** self.t
        result = {}
        for name, w in network.items():
            g = grads[name]
            self.m[name] = BETAS[0] * self.m[name] + (1 - BETAS[0]) * g
            self.v[name] = BETAS[1] * self.v[name] + (1 - BETAS[1]) * g * g
            if self.old:
                size = RATE * math.sqrt(second) / first
                w = w - size * self.m[name] / (self.v[name].sqrt() + self.eps)
                result[name] = w - RATE * DECAY * w
            else:
                w = w - RATE * DECAY * w
                corrected = (self.v[name] / second).sqrt() + self.eps
                result[name] = w - RATE * (self.m[name] / first) / corrected
        return result


def train(network, inputs, labels, mask, before_clipping, hard):
    optimizer = AdamW(network, old=not before_clipping)
    network = dict(network)

    def masked(grads):
        return {n: g * mask[n] if n in mask else g for n, g in grads.items()}

    for step in range(STEPS):
        batch = slice(BATCH * step % SAMPLES, BATCH * step % SAMPLES + BATCH)
        p = leaves(network)
        grads = gradients(p, mean_loss(p, inputs[batch], labels[batch]))
        if before_clipping:
            grads = clip(masked(grads), MAX_NORM)
        else:
            grads = masked(clip(grads, MAX_NORM))
        after = optimizer.step(network, grads)
        for name in mask if hard else ():
            after[name] = torch.where(mask[name], after[name], network[name])
        network = after
    return network


def named(prefix, tensors):
    return {f"{prefix}.{name}": t.contiguous() for name, t in tensors.items()}


def write(name, tensors):
    OUT.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: t.detach().clone().contiguous() for key, t in tensors.items()},
        OUT / f"{name}.safetensors",
    )


def main():
    network, inputs, labels = make_network()
    write("network", {**network, "inputs": inputs, "labels": labels})

    square, absolute, expect = fisher(network, inputs, labels)
    batches = fisher_of_batches(network, inputs, labels, 0.05)
    write(
        "fisher",
        {
            **named("label_square", square),
            **named("label_absolute", absolute),
            **named("expect_square", expect),
            **named("per_batch", batches),
        },
    )

    masks = {}
    for ratio in (0.2, 0.5):
        masks.update(named(f"fish_{ratio}", fish_mask(square, ratio, head=True)))
        masks.update(
            named(f"fish_no_head_{ratio}", fish_mask(square, ratio, head=False))
        )
    tied = {n: (s / s.max() * 4).floor() for n, s in square.items()}
    for p in (0.05, 0.3, 0.5, 1.0):
        masks.update(named(f"child_{p}", child_mask(batches, p)))
        masks.update(named(f"ties_{p}", child_mask(tied, p)))
    write("masks", {**masks, **named("tied", tied)})

    fish, child = fish_mask(square, 0.5, head=True), child_mask(batches, 0.3)
    # Sites of the head are whole in the hard case too.
    trained = {
        **named("fish", train(network, inputs, labels, fish, True, False)),
        **named("fish_hard", train(network, inputs, labels, fish, True, True)),
        **named("child", train(network, inputs, labels, child, False, False)),
        **named("child_hard", train(network, inputs, labels, child, False, True)),
    }
    write("training", trained)


if __name__ == "__main__":
    main()
