"""Writes tests/reference/data/sparse: sparse training of a small network in
float64.

    python tests/reference/make_sparse.py

Needs torch, safetensors and peft.

Both files hold `x`, `target`, the network's start as `before.NAME` (fc1, fc2
and head, tanh between them) and the final `output`; the loss is the mean square.

`shira` is HF PEFT's SHiRA (r 2, seed 3) on fc1 and fc2 after three SGD steps:
`indices.LAYER`, the places of its mask in the flattened weight, and
`values.LAYER`, what it has learned there.

`lt_sft` is lottery-ticket sparse fine-tuning after arXiv:2110.07560: four SGD
steps on everything with the pull towards the start, the entries of fc1 and fc2
that moved most (`mask.NAME`), back to the start, four more steps on those and
on the head, without the pull (`after.NAME`). `full.NAME` is where the first
phase ended.
"""

import pathlib

import peft
import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "data" / "sparse"
torch.set_default_dtype(torch.float64)


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(10, 16)
        self.fc2 = torch.nn.Linear(16, 12)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def start():
    torch.manual_seed(0)
    model = Mlp()
    tensors = {"x": torch.randn(6, 10), "target": torch.randn(6, 3)}
    for name, p in model.named_parameters():
        tensors[f"before.{name}"] = p.detach().clone()
    return model, tensors


def loss_of(model, tensors):
    return (model(tensors["x"]) - tensors["target"]).square().mean()


def save(name, tensors):
    OUT.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    save_file(tensors, OUT / f"{name}.safetensors")


def shira():
    model, tensors = start()
    config = peft.ShiraConfig(r=2, random_seed=3, target_modules=["fc1", "fc2"])
    wrapped = peft.get_peft_model(model, config)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.double()
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(wrapped, tensors).backward()
        optimizer.step()
    for name in ("fc1", "fc2"):
        layer = getattr(wrapped.base_model.model, name)
        row, column = layer.shira_indices["default"].long()
        tensors[f"indices.{name}"] = row * layer.in_features + column
        tensors[f"values.{name}"] = layer.shira_weight["default"]
    tensors["output"] = wrapped(tensors["x"])
    save("shira", tensors)


def lt_sft(k=40, rate=0.5, pull=0.1):
    model, tensors = start()
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    maskable = [n for n in parameters if not n.startswith("head")]

    def step(loss, masks):
        grads = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, p), g in zip(parameters.items(), grads):
                p -= rate * (g * masks[name] if name in masks else g)

    def before(name):
        return tensors[f"before.{name}"]

    for _ in range(4):
        moved = sum((p - before(n)).abs().sum() for n, p in parameters.items())
        step(loss_of(model, tensors) + pull * moved / total, {})
    moved = {n: (parameters[n] - before(n)).abs().detach() for n in maskable}
    every = torch.cat([moved[n].flatten() for n in maskable])
    threshold = every.sort(descending=True).values[k - 1]
    masks = {n: moved[n] >= threshold for n in maskable}
    assert sum(int(m.sum()) for m in masks.values()) == k
    with torch.no_grad():
        for name, p in parameters.items():
            tensors[f"full.{name}"] = p.clone()
            p.copy_(before(name))
    for _ in range(4):
        step(loss_of(model, tensors), masks)
    for name, p in parameters.items():
        tensors[f"after.{name}"] = p
    for name, mask in masks.items():
        tensors[f"mask.{name}"] = mask
    tensors["output"] = model(tensors["x"])
    save("lt_sft", tensors)


shira()
lt_sft()
