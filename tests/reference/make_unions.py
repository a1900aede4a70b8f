"""Writes tests/reference/data/unions: gates, MAM and UniPELT in float64.

    python tests/reference/make_unions.py

Needs torch and safetensors. The equations are those of arXiv:2110.04366 and
arXiv:2110.07577; the gates are UniPELT's published ones, a sigmoid a token
averaged over the sequence, and the same over the real tokens alone.

`base` holds a BERT of two layers by its HF names (the one in test_unions.cpp),
`token_ids`, `attention_mask` and `direction`. CASE holds an adapter by the
names that Adapter::named_parameters() gives, its `output`, and `gradient.NAME`
of sum(output * direction).
"""

import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "data" / "unions"
D, HEADS, LAYERS, FFN, VOCAB, POSITIONS = 8, 2, 2, 12, 11, 10
BATCH, LENGTH, PREFIX, RANK, BOTTLENECK = 3, 5, 3, 2, 4
torch.set_default_dtype(torch.float64)


def base_network():
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, D),
        "embeddings.position_embeddings.weight": (POSITIONS, D),
        "embeddings.token_type_embeddings.weight": (2, D),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.self.query", D, D),
            ("attention.self.key", D, D),
            ("attention.self.value", D, D),
            ("attention.output.dense", D, D),
            ("intermediate.dense", FFN, D),
            ("output.dense", D, FFN),
        ):
            shapes[layer + name + ".weight"] = (rows, columns)
            shapes[layer + name + ".bias"] = (rows,)
        norms += [layer + "attention.output.LayerNorm", layer + "output.LayerNorm"]
    base = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    for name in norms:
        base[name + ".weight"] = 1 + 0.2 * torch.randn(D)
        base[name + ".bias"] = 0.2 * torch.randn(D)
    return base


def gate(x, weight, bias, mask):
    """One number an example, [batch, 1, 1]; mask None averages over all."""
    each = torch.sigmoid(x @ weight + bias)
    if mask is None:
        mean = each.mean(1)
    else:
        mean = (each * mask).sum(1) / mask.sum(1)
    return mean.view(-1, 1, 1)


def run(base, adapter, token_ids, mask, gates, scaling):
    """`gates`: "none", "all" or "tokens"."""

    def linear(name, x):
        return F.linear(x, base[name + ".weight"], base[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, (D,), base[name + ".weight"], base[name + ".bias"], 1e-12)

    def opened(name, x, part=0):
        if gates == "none":
            return torch.ones(BATCH, 1, 1)
        return gate(
            x,
            adapter[name + "gate.weight"][part],
            adapter[name + "gate.bias"][part],
            mask.double() if gates == "tokens" else None,
        )

    def lora(name, x):
        y = linear(name, x)
        if name + ".lora_A.weight" in adapter:
            term = x @ adapter[name + ".lora_A.weight"].T @ adapter[name + ".lora_B.weight"].T
            y = y + term * opened(name + ".", x)
        return y

    def bottleneck(name, x):
        h = F.relu(F.linear(x, adapter[name + ".adapter_down.0.weight"], adapter[name + ".adapter_down.0.bias"]))
        return F.linear(h, adapter[name + ".adapter_up.weight"], adapter[name + ".adapter_up.bias"])

    def heads(x):
        return x.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2)

    h = norm(
        "embeddings.LayerNorm",
        base["embeddings.word_embeddings.weight"][token_ids]
        + base["embeddings.position_embeddings.weight"][:LENGTH]
        + base["embeddings.token_type_embeddings.weight"][0],
    )
    table = adapter["prompt_embeddings"].view(PREFIX, 2 * LAYERS, HEADS, D // HEADS)
    blocks = table.permute(1, 2, 0, 3)  # [key and value a layer, heads, l, d / heads]
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        own = layer + "attention.self."
        g = opened("", h, i).unsqueeze(-1)
        key = torch.cat([blocks[2 * i] * g, heads(linear(own + "key", h))], 2)
        value = torch.cat([blocks[2 * i + 1] * g, heads(lora(own + "value", h))], 2)
        scores = heads(lora(own + "query", h)) @ key.transpose(2, 3) / math.sqrt(D // HEADS)
        seen = F.pad(mask, (PREFIX, 0), value=1).bool()[:, None, None]
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
        a = linear(layer + "attention.output.dense", (weights @ value).transpose(1, 2).flatten(2))
        h = norm(layer + "attention.output.LayerNorm", a + h)
        f = linear(layer + "output.dense", F.gelu(linear(layer + "intermediate.dense", h)))
        if layer + "output.dense.adapter_up.weight" in adapter:
            f = f + scaling * bottleneck(layer + "output.dense", h)
        v = f + h
        name = layer + "output.LayerNorm"
        h = norm(name, v)
        if name + ".adapter_up.weight" in adapter:
            h = norm(name, v + bottleneck(name, h) * opened(name + ".", h))
    return h


def prefix():
    return {"prompt_embeddings": torch.randn(PREFIX, 2 * LAYERS * D)}


def add_bottleneck(adapter, name):
    for key, shape in (
        ("adapter_down.0.weight", (BOTTLENECK, D)),
        ("adapter_down.0.bias", (BOTTLENECK,)),
        ("adapter_up.weight", (D, BOTTLENECK)),
        ("adapter_up.bias", (D,)),
    ):
        adapter[f"{name}.{key}"] = 0.5 * torch.randn(shape)


def add_gate(adapter, name, parts=1):
    adapter[name + "gate.weight"] = 0.7 * torch.randn(parts, D)
    adapter[name + "gate.bias"] = 0.7 * torch.randn(parts)


def mam():
    adapter = prefix()
    for i in range(LAYERS):
        add_bottleneck(adapter, f"encoder.layer.{i}.output.dense")
    return adapter


def unipelt():
    adapter = prefix()
    add_gate(adapter, "", LAYERS)
    for i in range(LAYERS):
        for part in ("query", "value"):
            name = f"encoder.layer.{i}.attention.self.{part}."
            adapter[name + "lora_A.weight"] = 0.5 * torch.randn(RANK, D)
            adapter[name + "lora_B.weight"] = 0.5 * torch.randn(D, RANK)
            add_gate(adapter, name)
        add_bottleneck(adapter, f"encoder.layer.{i}.output.LayerNorm")
        add_gate(adapter, f"encoder.layer.{i}.output.LayerNorm.")
    return adapter


def main():
    torch.manual_seed(0)
    OUT.mkdir(parents=True, exist_ok=True)
    base = base_network()
    token_ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2, 2:] = 0
    direction = torch.randn(BATCH, LENGTH, D) * mask.unsqueeze(-1)
    save_file(
        {
            **base,
            "token_ids": token_ids,
            "attention_mask": mask,
            "direction": direction,
        },
        OUT / "base.safetensors",
    )
    for name, adapter, gates in (
        ("mam", mam(), "none"),
        ("unipelt", unipelt(), "tokens"),
        ("unipelt_published", unipelt(), "all"),
    ):
        for value in adapter.values():
            value.requires_grad_()
        output = run(base, adapter, token_ids, mask, gates, scaling=2.0)
        (output * direction).sum().backward()
        tensors = {key: value.detach() for key, value in adapter.items()}
        tensors["output"] = output.detach()
        for key, value in adapter.items():
            tensors["gradient." + key] = value.grad
        save_file(tensors, OUT / f"{name}.safetensors")


if __name__ == "__main__":
    main()
