"""Writes tests/reference/data/ladder: ladder side tuning in float64, from the
equations of arXiv:2206.06522.

    python tests/reference/make_ladder.py

Needs torch and safetensors. `bert` is an encoder, `t5` an encoder-decoder, both
tiny and random. A file holds the network ("base."), the side networks' start
("side.", the blocks pruned), what comes out ("hidden"), gradients of the sum of
hidden * direction ("grad.") and the parameters after three steps of plain
gradient descent ("after."). Sizes and options are those of test_ladder.cpp.
"""

import math
import pathlib

import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "data" / "ladder"
torch.set_default_dtype(torch.float64)

REDUCTION, TEMPERATURE, RATE = 2, 0.1, 0.05
HEADS = 2


def linear(p, name, x):
    y = x @ p[name + ".weight"].T
    return y + p[name + ".bias"] if name + ".bias" in p else y


def attention(q, k, v, bias, scale):
    split = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    scores = split(q) @ split(k).transpose(-1, -2) * scale + bias
    return (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)


# BERT: norm(x + attention), norm(x + feed-forward)


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return (
        centred / (variance + 1e-12).sqrt() * p[name + ".weight"] + p[name + ".bias"]
    )


def bert_block(p, x, bias):
    q, k, v = (linear(p, f"attention.self.{n}", x) for n in ("query", "key", "value"))
    context = attention(q, k, v, bias, (q.size(-1) / HEADS) ** -0.5)
    x = layer_norm(
        p,
        "attention.output.LayerNorm",
        x + linear(p, "attention.output.dense", context),
    )
    inner = linear(p, "intermediate.dense", x)
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return layer_norm(p, "output.LayerNorm", x + linear(p, "output.dense", inner))


def bert_base(p, tokens):
    words = p["embeddings.word_embeddings.weight"][tokens]
    places = p["embeddings.position_embeddings.weight"][: tokens.size(1)]
    types = p["embeddings.token_type_embeddings.weight"][0]
    return layer_norm(p, "embeddings.LayerNorm", words + places + types)


# T5: x + attention(norm(x)), x + feed-forward(norm(x))


def rms_norm(weight, x):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def bucket(distance, bidirectional, buckets=8, longest=12):
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    wide = math.log(distance / exact) / math.log(longest / exact) * (buckets - exact)
    return first + min(exact + int(wide), buckets - 1)


def position_bias(table, n, bidirectional):
    rows = [[bucket(k - q, bidirectional) for k in range(n)] for q in range(n)]
    return table[torch.tensor(rows)].permute(2, 0, 1)


def t5_attention(p, name, x, source, bias):
    q, k, v = linear(p, name + ".q", x), *(
        linear(p, f"{name}.{n}", source) for n in "kv"
    )
    return linear(p, name + ".o", attention(q, k, v, bias, 1.0))


def t5_block(p, x, bias, encoded=None, cross_bias=None):
    normed = rms_norm(p["layer.0.layer_norm.weight"], x)
    x = x + t5_attention(p, "layer.0.SelfAttention", normed, normed, bias)
    last = 1
    if encoded is not None:
        normed = rms_norm(p["layer.1.layer_norm.weight"], x)
        x = x + t5_attention(p, "layer.1.EncDecAttention", normed, encoded, cross_bias)
        last = 2
    normed = rms_norm(p[f"layer.{last}.layer_norm.weight"], x)
    dense = f"layer.{last}.DenseReluDense"
    return x + linear(p, dense + ".wo", linear(p, dense + ".wi", normed).relu())


# The ladder


def ladder(side, states, kept, block):
    h = linear(side, "first_down", states[0])
    for i in kept:
        mu = torch.sigmoid(side[f"gate.{i}"] / TEMPERATURE)
        h = mu * h + (1 - mu) * linear(side, f"down.{i}", states[i + 1])
        h = block(below(side, f"block.{i}"), h)
    return h


def below(p, prefix):
    return {
        k[len(prefix) + 1 :]: v for k, v in p.items() if k.startswith(prefix + ".")
    }


# Pruning: the units with the largest sums of magnitudes, in rising order


def top(score, keep):
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:keep])


def units(name, is_bert):
    """What the rows and the columns of a parameter count."""
    last = name.split(".")[-2]
    if "relative_attention_bias" in name:
        return None
    if "norm" in name.lower():
        return ("width",)
    if last in ("query", "key", "value", "q", "k", "v"):
        rows, columns = "heads", "width"
    elif last == "o" or "attention.output.dense" in name:
        rows, columns = "width", "heads"
    elif last == "wi" or "intermediate" in name:
        rows, columns = "inner", "width"
    else:
        assert last == "wo" or name.startswith("output.dense"), name
        rows, columns = "width", "inner"
    if rows == "heads" or columns == "heads":
        where = "self" if is_bert else name.split(".")[2]
        rows, columns = (
            f"heads {where}" if u == "heads" else u for u in (rows, columns)
        )
    return (rows, columns) if name.endswith("weight") else (rows,)


def prune(stacks, is_bert):
    """stacks: lists of blocks' parameters, which share the width's units."""
    scores = {}
    for s, stack in enumerate(stacks):
        for b, block in enumerate(stack):
            for name, value in block.items():
                kinds = units(name, is_bert)
                for d, kind in enumerate(kinds or ()):
                    key = kind if kind == "width" else (s, b, kind)
                    others = [e for e in range(value.dim()) if e != d]
                    sums = value.abs().sum(others) if others else value.abs()
                    scores[key] = scores.get(key, 0) + sums
    kept = {}
    for key, score in scores.items():
        if "heads" in key[-1]:
            size = len(score) // HEADS
            kept[key] = [
                h * size + i
                for h in range(HEADS)
                for i in top(
                    score[h * size : (h + 1) * size].tolist(), size // REDUCTION
                )
            ]
        else:
            kept[key] = top(score.tolist(), len(score) // REDUCTION)
    result = []
    for s, stack in enumerate(stacks):
        result.append([])
        for b, block in enumerate(stack):
            pruned = {}
            for name, value in block.items():
                for d, kind in enumerate(units(name, is_bert) or ()):
                    key = kind if kind == "width" else (s, b, kind)
                    value = value.index_select(d, torch.tensor(kept[key]))
                pruned[name] = value
            result[-1].append(pruned)
    return result, torch.tensor(kept["width"])


def maps(width, kept, with_up):
    """The linear maps and gates, as a training that has begun would have them."""
    narrow = width // REDUCTION
    p = {}
    for name in ["first_down"] + [f"down.{i}" for i in kept]:
        p[name + ".weight"] = torch.randn(narrow, width) * width**-0.5
        p[name + ".bias"] = torch.randn(narrow) * 0.1
    for i in kept:
        p[f"gate.{i}"] = torch.randn(1) * 0.1
    if with_up:
        p["up.weight"] = torch.randn(width, narrow) * narrow**-0.5
        p["up.bias"] = torch.randn(width) * 0.1
    return p


def write(name, base, side, run, direction, extra):
    side = {k: v.clone().requires_grad_() for k, v in side.items()}
    tensors = dict(extra, direction=direction)
    tensors |= {"base." + k: v for k, v in base.items()}
    tensors |= {"side." + k: v.detach().clone() for k, v in side.items()}
    for step in range(3):
        hidden = run(side)
        grads = torch.autograd.grad((hidden * direction).sum(), list(side.values()))
        if step == 0:
            tensors["hidden"] = hidden.detach()
            tensors |= {"grad." + k: g for k, g in zip(side, grads)}
        with torch.no_grad():
            for p, g in zip(side.values(), grads):
                p -= RATE * g
    tensors |= {"after." + k: v.detach() for k, v in side.items()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, OUT / f"{name}.safetensors"
    )


def random_blocks(prefix, count, shapes):
    return {
        f"{prefix}.{i}.{k}": torch.randn(s) * 0.3 + (k.lower().count("norm.weight"))
        for i in range(count)
        for k, s in shapes.items()
    }


def make_bert():
    torch.manual_seed(0)
    width, inner, layers, kept = 8, 12, 3, (0, 2)
    shapes = {}
    for n in ("query", "key", "value"):
        shapes[f"attention.self.{n}.weight"] = (width, width)
        shapes[f"attention.self.{n}.bias"] = (width,)
    for n, (rows, columns) in {
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }.items():
        shapes[n + ".weight"] = (rows, columns)
        shapes[n + ".bias"] = (rows,)
    for n in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes[n + ".weight"] = shapes[n + ".bias"] = (width,)
    base = random_blocks("encoder.layer", layers, shapes)
    for n, rows in (("word", 11), ("position", 6), ("token_type", 2)):
        base[f"embeddings.{n}_embeddings.weight"] = torch.randn(rows, width)
    base["embeddings.LayerNorm.weight"] = torch.ones(width)
    base["embeddings.LayerNorm.bias"] = torch.zeros(width)

    tokens = torch.randint(1, 11, (3, 5))
    mask = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    bias = torch.where(mask, 0.0, -torch.inf)[:, None, None]
    blocks = [below(base, f"encoder.layer.{i}") for i in range(layers)]
    states = [bert_base(base, tokens)]
    for p in blocks:
        states.append(bert_block(p, states[-1], bias))

    pruned, _ = prune([[blocks[i] for i in kept]], is_bert=True)
    side = maps(width, kept, with_up=True)
    for i, p in zip(kept, pruned[0]):
        side |= {f"block.{i}.{k}": v for k, v in p.items()}

    def run(side):
        h = ladder(side, states, kept, lambda p, h: bert_block(p, h, bias))
        return linear(side, "up", h)

    # Of padding nothing is asked.
    direction = torch.randn(3, 5, width) * mask[..., None]
    extra = {"tokens": tokens, "mask": mask.long()}
    write("bert", base, side, run, direction, extra)


def make_t5():
    torch.manual_seed(1)
    width, inner, places, layers = 8, 12, 4, 2
    kept = {"encoder": (1,), "decoder": (0, 1)}
    base = {"shared.weight": torch.randn(13, width)}
    heads = HEADS * places
    for stack in kept:
        shapes = {}
        parts = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder")
        for i, part in enumerate(parts):
            for n in "qkv":
                shapes[f"layer.{i}.{part}.{n}.weight"] = (heads, width)
            shapes[f"layer.{i}.{part}.o.weight"] = (width, heads)
            shapes[f"layer.{i}.layer_norm.weight"] = (width,)
        last = len(parts)
        shapes[f"layer.{last}.DenseReluDense.wi.weight"] = (inner, width)
        shapes[f"layer.{last}.DenseReluDense.wo.weight"] = (width, inner)
        shapes[f"layer.{last}.layer_norm.weight"] = (width,)
        base |= random_blocks(stack + ".block", layers, shapes)
        base[
            stack + ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ] = torch.randn(8, HEADS)
        base[stack + ".final_layer_norm.weight"] = 1 + torch.randn(width) * 0.3

    tokens = torch.randint(1, 13, (2, 6))
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    answer = torch.randint(1, 13, (2, 4))
    hide = torch.where(mask, 0.0, -torch.inf)[:, None, None]
    later = torch.full((4, 4), -torch.inf).triu(1)

    def bias_of(stack, blocks):
        table = blocks["layer.0.SelfAttention.relative_attention_bias.weight"]
        if stack == "encoder":
            return position_bias(table, 6, True) + hide
        return position_bias(table, 4, False) + later

    states = {}
    for stack, ids in (("encoder", tokens), ("decoder", answer)):
        blocks = [below(base, f"{stack}.block.{i}") for i in range(layers)]
        bias = bias_of(stack, blocks[0])
        states[stack] = [base["shared.weight"][ids]]
        for p in blocks:
            more = () if stack == "encoder" else (memory, hide)
            states[stack].append(t5_block(p, states[stack][-1], bias, *more))
        memory = rms_norm(base[stack + ".final_layer_norm.weight"], states[stack][-1])

    pruned, columns = prune(
        [
            [below(base, f"{stack}.block.{i}") for i in which]
            for stack, which in kept.items()
        ],
        is_bert=False,
    )
    side = {}
    for (stack, which), blocks in zip(kept.items(), pruned):
        own = maps(width, which, with_up=stack == "decoder")
        for place, (i, p) in enumerate(zip(which, blocks)):
            table = "layer.0.SelfAttention.relative_attention_bias.weight"
            p.pop(table, None)
            if place == 0:
                p[table] = base[f"{stack}.block.0.{table}"]
            own |= {f"block.{i}.{k}": v for k, v in p.items()}
        own["norm.weight"] = base[stack + ".final_layer_norm.weight"][columns]
        side |= {f"{stack}.{k}": v for k, v in own.items()}

    def run(side):
        results = {}
        for stack, which in kept.items():
            own = below(side, stack)
            bias = bias_of(stack, below(own, f"block.{which[0]}"))
            more = () if stack == "encoder" else (results["encoder"], hide)
            h = ladder(
                own, states[stack], which, lambda p, h: t5_block(p, h, bias, *more)
            )
            results[stack] = rms_norm(own["norm.weight"], h)
        return linear(below(side, "decoder"), "up", results["decoder"])

    extra = {"tokens": tokens, "mask": mask.long(), "answer": answer}
    write("t5", base, side, run, torch.randn(2, 4, width), extra)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    make_bert()
    make_t5()
