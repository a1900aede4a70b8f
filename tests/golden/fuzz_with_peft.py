"""Random adapters of HF PEFT, to find where libpeft computes something else.

    python fuzz_with_peft.py make FOLDER [--first SEED] [--count N] [--tuner Lora ...]
    fuzz_reader FOLDER                # fuzz_reader.cpp: loads, compares, writes FOLDER/*/again
    python fuzz_with_peft.py check FOLDER

`make` draws a network, an adapter on it and a way to name its layers, one folder a seed, and
writes what PEFT computes: outputs, gradients, three steps of an optimizer, merged weights,
initial values. Where PEFT 0.21.2 is known to be wrong (README.md), the equations' numbers or
none are written instead. `check` lets PEFT load what libpeft wrote, and sums up. A development
tool: ctest runs neither.
"""

import argparse
import collections
import copy
import json
import math
import random
import re
import shutil
import sys
import warnings
from pathlib import Path

import make_lora  # sets the hash seed first
import peft
import torch
from peft.tuners.fourierft.layer import FourierFTLayer
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

PREFIX = make_lora.PREFIX
CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}

# ---- Networks: what fuzz_reader.cpp builds from the same description -------------------------


class Node(nn.Module):
    """A container without a forward of its own."""


class Linear(nn.Linear):
    """In half precision as LibTorch's: it rounds before it adds the bias to more than two dimensions."""

    def forward(self, x):
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half and x.dim() != 2 and self.bias is not None:
            return torch.matmul(x, self.weight.t()) + self.bias
        return super().forward(x)


class Experts(nn.Module):
    """Matrices [experts, out, in] whose products it adds up."""

    def __init__(self, experts, inputs, outputs):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(experts, outputs, inputs) / math.sqrt(inputs))

    def forward(self, x):
        x = torch.matmul(x.unsqueeze(-2).unsqueeze(-3), self.stack.transpose(1, 2))
        return x.squeeze(-2).sum(-2)


class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.__dict__["layers_of_net"] = layers
        for layer in layers:
            if "name" in layer:
                *path, last = layer["name"].split(".")
                parent = self
                for part in path:
                    if part not in parent._modules:
                        parent.add_module(part, Node())
                    parent = parent._modules[part]
                parent.add_module(last, build_layer(layer))

    def forward(self, x):
        for layer in self.layers_of_net:
            kind = layer["kind"]
            if kind == "flatten":
                x = x.flatten(1)
                continue
            module = self.get_submodule(layer["name"])
            if kind == "mha":
                x = x + module(x, x, x)[0]
            elif kind in ("layernorm", "groupnorm") or layer.get("last"):
                x = module(x)
            else:
                x = torch.tanh(module(x))
        return x


def build_layer(layer):
    kind = layer["kind"]
    if kind == "linear":
        return Linear(layer["in"], layer["out"], bias=layer["bias"])
    if kind == "hf_conv1d":
        return Conv1D(layer["out"], layer["in"])
    if kind == "embedding":
        return nn.Embedding(
            layer["rows"], layer["width"], padding_idx=layer.get("padding_idx"),
            scale_grad_by_freq=layer.get("scale_grad_by_freq", False),
        )
    if kind == "experts":
        return Experts(layer["experts"], layer["in"], layer["out"])
    if kind == "mha":
        return nn.MultiheadAttention(
            layer["width"], layer["heads"], bias=layer["bias"],
            batch_first="sequence_first" not in layer,
        )
    if kind == "layernorm":
        return nn.LayerNorm(layer["width"])
    if kind == "groupnorm":
        return nn.GroupNorm(layer["groups"], layer["width"])
    return CONVOLUTIONS[kind](
        layer["in"],
        layer["out"],
        layer["kernel"],
        stride=layer["stride"],
        padding=layer["padding"],
        dilation=layer["dilation"],
        groups=layer["groups"],
        bias=layer["bias"],
        padding_mode=layer["padding_mode"],
    )


WORDS = (
    "query key value q_proj k_proj v_proj o_proj dense fc fc1 c_attn c_fc c_proj proj lin conv conv1 "
    "conv_in to_q to_v wi_0 wo up down gate_proj in_layers q v Wq linear_1 attn2 weight_proj bias_net "
    "lora_A lora base_layer2 adapter weight1 _q Q2_K a 0_1 modules_to_save_x w.w parametrizations"
).split()
# None is called "default": PEFT drops an adapter's name wherever it stands in a key.
STYLES = [
    lambda i, word: f"encoder.layer.{i}.{word}",
    lambda i, word: f"bert.encoder.layer.{i}.attention.self.{word}",
    lambda i, word: f"model.layers.{i}.self_attn.{word}",
    lambda i, word: f"transformer.h.{i}.attn.{word}",
    lambda i, word: f"{word}_{i}",
    lambda i, word: f"{word}{i}",
    lambda i, word: f"{i}",
    lambda i, word: f"blocks.{i}.{word}.0",
    lambda i, word: f"down_blocks.{i // 2}.resnets.{i % 2}.{word}",
    lambda i, word: f"base_model.model.{i}.{word}",
    lambda i, word: f"model.model.{i}.default.{word}",
    lambda i, word: f"stage-{i}.{word}",
    lambda i, word: f"features.{10 + i}.{word}",
    lambda i, word: f"net.lora.{i}.{word}",
    lambda i, word: f"layers.{i}.experts.{i % 2}.{word}",
    lambda i, word: f"a.a.a.{i}.a.{word}.{word}",
    lambda i, word: f"m{i}_{i}.{i}.{word}_{i}.weight_norm",
    lambda i, word: f"layer{i}.base_layer_{i}.{word}",
    lambda i, word: f"one.two.three.four.five.six.seven.{i}.{word}",
    lambda i, word: f"encoder.{i}.lora_B_like.{word}",
    lambda i, word: f"{'x' * (i + 1)}.{word}",
]
HEADS = ["head", "classifier", "score", "lm_head", "output.dense", "fc_out", "99"]


def size(rng, low=1, high=13):
    wide = [rng.choice([67, 70, 97, 128])] if high > 12 and rng.random() < 0.1 else []
    return rng.choice(wide * 9 + [rng.randint(max(low, 2), high), rng.randint(low, high), 8, 6])


class Names:
    def __init__(self, rng):
        self.rng, self.count = rng, 0
        self.style = rng.choice(STYLES)
        self.words = rng.sample(WORDS, 3)

    def next(self, word=None):
        name = self.style(self.count, word or self.rng.choice(self.words))
        self.count += 1
        return name


def linear_layers(rng, names, width, depth, hf=True, norms=True, experts=False):
    """Some layers on a last axis of `width`; the layers and the width behind them."""
    layers = []
    for _ in range(depth):
        norms = norms and width > 3  # of two numbers it leaves a sign
        kind = rng.choices(["linear", "hf_conv1d", "layernorm"], [6, 2 if hf else 0, 2 if norms else 0])[0]
        if kind == "layernorm":
            word = rng.choice(["ln_1", "norm", "LayerNorm", "input_layernorm"])
            layers.append(dict(kind=kind, name=names.next(word), width=width))
            continue
        out = rng.choice([size(rng), width])
        layer = {"kind": kind, "name": names.next(), "in": width, "out": out}
        if experts and rng.random() < 0.15:
            layer.update(kind="experts", experts=rng.randint(1, 4))
        if layer["kind"] == "linear":
            layer["bias"] = rng.random() < 0.7
        layers.append(layer)
        width = out
    return layers, width


def head(rng, width):
    return {
        "kind": "linear", "name": rng.choice(HEADS), "in": width, "out": size(rng, 1, 6),
        "bias": rng.random() < 0.7, "last": True,
    }


def convolution(rng, names, kind, channels, side):
    """A convolution and the side behind it."""
    dims = int(kind[4])
    kernel = [rng.choice([1, 2, 3, 3]) for _ in range(dims)]
    if rng.random() < 0.5:
        kernel = [kernel[0]] * dims
    stride = [rng.choice([1, 1, 2]) for _ in range(dims)]
    dilation = [rng.choice([1, 1, 1, 1, 2]) for _ in range(dims)] if rng.random() < 0.4 else [1] * dims
    groups = rng.choice([1, 1, 1, 2, 3]) if rng.random() < 0.5 else 1
    channels_out = groups * rng.randint(1, 5)
    mode = rng.choice(["zeros"] * 5 + ["circular", "reflect", "replicate"])
    if dims == 3 and mode == "reflect":
        mode = "zeros"
    padding = [rng.choice([0, 1, (k - 1) // 2 + 1 if mode == "zeros" else 1]) for k in kernel]
    if mode == "zeros" and stride == [1] * dims and rng.random() < 0.2:
        padding = rng.choice(["same", "valid"])
    layer = {
        "kind": kind, "name": names.next(), "in": channels, "out": channels_out, "kernel": kernel,
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "bias": rng.random() < 0.7, "padding_mode": mode,
    }
    if channels % groups:
        layer["groups"] = 1
    return layer


def draw_network(rng, tuner):
    names = Names(rng)
    families = ["features", "tokens", "pictures", "signal", "volume"]
    weights = {
        "Lora": [4, 4, 3, 2, 1], "IA3": [4, 2, 3, 0, 1], "LoHa": [4, 1, 4, 2, 0],
        "LoKr": [4, 1, 4, 2, 0], "HRA": [4, 1, 3, 0, 0], "OFT": [4, 3, 2, 0, 0],
        "BOFT": [4, 1, 3, 0, 0], "AdaLora": [4, 1, 3, 0, 0], "TrainableTokens": [0, 1, 0, 0, 0],
        "LNTuning": [4, 2, 2, 0, 0],
    }.get(tuner, [4, 2, 0, 0, 0])
    family = rng.choices(families, weights)[0]
    batch = rng.choice([1, 2, 3, 5])
    layers = []
    if family == "features":
        width = size(rng)
        shape = rng.choice([[batch, width], [batch, rng.randint(1, 5), width], [2, 3, 2, width]])
        if tuner != "Lora" and rng.random() < 0.05:  # DoRA of PEFT's makes a row of it
            shape = [width]
        layers, out = linear_layers(rng, names, width, rng.randint(1, 4), experts=tuner == "Lora")
        layers.append(head(rng, out))
    elif family == "tokens":
        rows, heads = rng.randint(4, 20), rng.choice([1, 2, 4])
        width = heads * rng.randint(1, 4)
        shape = [batch, rng.randint(1, 6)]
        word = rng.choice(["wte", "embed_tokens", "emb", "word_embeddings", "shared"])
        name = rng.choice([word, f"model.{word}", f"embeddings.{word}"])
        layer = dict(kind="embedding", name=name, rows=rows, width=width)
        layers = [layer]
        has_mha = tuner == "Lora" and rng.random() < 0.35
        if not has_mha and rng.random() < 0.3:
            layer["padding_idx"] = rng.randrange(rows)
        if rng.random() < 0.15:
            layer["scale_grad_by_freq"] = True
        if has_mha:
            layers.append(dict(kind="mha", name=names.next(), width=width, heads=heads, bias=rng.random() < 0.7))
        more, out = linear_layers(rng, names, width, rng.randint(0, 3), experts=tuner == "Lora")
        layers += [*more, head(rng, out)]
    else:
        kind = {"pictures": "conv2d", "signal": "conv1d", "volume": "conv3d"}[family]
        channels, side = rng.randint(1, 6), {"conv1d": 12, "conv2d": 8, "conv3d": 6}[kind]
        shape = [batch, channels] + [side + rng.randint(0, 1) for _ in range(int(kind[4]))]
        for _ in range(rng.randint(1, 2)):
            layers.append(convolution(rng, names, kind, channels, side))
            channels = layers[-1]["out"]
            if rng.random() < 0.15:
                layers.append(dict(kind="groupnorm", name=names.next("norm"), width=channels, groups=1))
        layers.append(dict(kind="flatten"))
        with torch.no_grad():
            width = Net(layers)(torch.zeros(shape)).shape[1]
        more, out = linear_layers(rng, names, width, rng.randint(0, 1), hf=False, norms=False)
        layers += [*more, head(rng, out)]
    return layers, shape


# ---- Adapters -------------------------------------------------------------------------------

KINDS = {
    "Lora": "linear hf_conv1d embedding conv1d conv2d conv3d mha",
    "AdaLora": "linear hf_conv1d conv2d",
    "Vera": "linear hf_conv1d",
    "LoHa": "linear conv1d conv2d",
    "LoKr": "linear conv1d conv2d",
    "HRA": "linear conv2d",
    "OFT": "linear embedding conv2d",
    "BOFT": "linear conv2d",
    "FourierFT": "linear hf_conv1d",
    "IA3": "linear hf_conv1d conv2d conv3d",
    "LNTuning": "layernorm groupnorm linear",
    "TrainableTokens": "embedding",
    "Beft": "linear",
    "Shira": "linear",
}
NO_LAYERS = {"IA3", "LNTuning", "TrainableTokens", "Beft", "Shira"}  # no layers_to_transform
NO_EXCLUDE = {"TrainableTokens", "Beft", "Vera", "Shira"}
BIASES = {"Lora": "lora_only", "AdaLora": "lora_only", "Vera": "vera_only", "HRA": "hra_only",
          "OFT": "oft_only", "BOFT": "boft_only", "FourierFT": "fourier_only"}


def suffix(rng, name):
    parts = name.split(".")
    return ".".join(parts[-rng.randint(1, len(parts)):])


def name_layers(rng, tuner, chosen, modules, linears):
    """target_modules and what goes with it, that mean `chosen` or some other layers."""
    way = rng.choice(["full", "suffix", "suffix", "suffix", "regex", "all-linear"])
    has_mha = any(name.endswith(".out_proj") for name in modules)
    if way == "all-linear" and not has_mha:
        return dict(target_modules="all-linear")
    if way == "regex":
        ends = [re.escape(suffix(rng, name)) for name in chosen]
        ends = [re.sub(r"\d+", lambda m: rng.choice([m[0], r"\d+", r"[0-9]"]), end) for end in ends]
        opening = rng.choice([r".*\.", r"(.*\.)?", r"^.*", r"(?:.+\.)*"])
        return dict(target_modules=opening + "(" + "|".join(sorted(set(ends))) + ")" + rng.choice(["", "$"]))
    if way == "full":
        return dict(target_modules=sorted(chosen))
    names = sorted({suffix(rng, name) for name in chosen})
    result = dict(target_modules=names)
    if tuner not in NO_LAYERS and rng.random() < 0.3:
        numbers = [int(n) for name in chosen for n in re.findall(r"\.(\d+)\.", "." + name)] or [0]
        pick = sorted({rng.choice(numbers) for _ in range(rng.randint(1, 2))})
        result["layers_to_transform"] = pick[0] if rng.random() < 0.4 else pick
        lists = [m for name in chosen for m in re.findall(r"([^.]+)\.\d+\.", name)]
        if lists and rng.random() < 0.5:
            pattern = sorted({rng.choice(lists)})
            result["layers_pattern"] = pattern[0] if rng.random() < 0.5 else pattern
    return result


def patterns(rng, names, values):
    result = {}
    for name in rng.sample(sorted(names), rng.randint(1, len(names))):
        key = rng.choice([name, suffix(rng, name), "^" + re.escape(name), re.sub(r"\d+", r"\\d+", name)])
        result[key] = rng.choice(values)
    return result


def own_fields(rng, tuner, layers):
    """Fields of the tuner's own; `layers` are those it adapts, by name."""
    chance = lambda p: rng.random() < p
    r, alpha = rng.choice([1, 2, 3, 4, 5, 8, 16]), rng.choice([1, 2, 3, 4, 7, 8, 16, 32])
    with_bias = [l for l in layers.values() if l.get("bias", True)]
    f = {}
    if tuner == "Lora":
        f = dict(r=r, lora_alpha=alpha, use_rslora=chance(0.2), use_dora=chance(0.2))
        if chance(0.2):
            f["rank_pattern"] = patterns(rng, layers, [1, 2, 3, 6])
        if chance(0.2):
            f["alpha_pattern"] = patterns(rng, layers, [1, 3, 5, 12])
        plain = all(l["kind"] not in ("embedding", "mha") for l in layers.values())
        if not f["use_dora"] and len(with_bias) == len(layers) and plain and chance(0.15):
            f["lora_bias"] = True
        if chance(0.15):
            f["init_lora_weights"] = rng.choice([False, "gaussian", True])
        if chance(0.2) and all(l["kind"] not in ("embedding", "mha") for l in layers.values()):
            f["lora_dropout"] = rng.choice([0.1, 0.3])
        linear = all(l["kind"] in ("linear", "hf_conv1d") for l in layers.values())
        if linear and not f["use_dora"] and not f.get("lora_bias") and chance(0.15):
            most = min(min(l["in"], l["out"]) for l in layers.values())
            lies = any(l["kind"] == "hf_conv1d" for l in layers.values())
            init = rng.choice(["pissa", "orthogonal"] if lies else ["pissa", "olora", "orthogonal"])
            f.update(r=max(1, min(r, most)), init_lora_weights=init)
            f.pop("rank_pattern", None)
            if init == "orthogonal":
                f["r"] += f["r"] % 2
    elif tuner == "AdaLora":
        f = dict(init_r=r, target_r=max(1, r // 2), lora_alpha=alpha, total_step=100, tinit=10, tfinal=20,
                 deltaT=rng.choice([1, 5]), orth_reg_weight=rng.choice([0.5, 0.1]))
        if chance(0.2):
            f["lora_dropout"] = 0.2
    elif tuner == "Vera":
        f = dict(r=r, projection_prng_key=rng.randint(0, 99), save_projection=chance(0.6),
                 d_initial=rng.choice([0.1, 0.5]), init_weights=chance(0.8))
        if chance(0.2):
            f["vera_dropout"] = 0.2
    elif tuner in ("LoHa", "LoKr"):
        f = dict(r=r, alpha=alpha, use_effective_conv2d=chance(0.4))
        if chance(0.2):
            f["rank_pattern"] = patterns(rng, layers, [1, 2, 3, 6])
        if chance(0.2):
            f["alpha_pattern"] = patterns(rng, layers, [1, 3, 5, 12])
        if chance(0.15):
            f["rank_dropout"] = 0.3
        if tuner == "LoKr":
            f.update(decompose_both=chance(0.3), decompose_factor=rng.choice([-1, -1, 2, 3, 4]))
            f["init_weights"] = rng.choice([True, True, False, "lycoris"])
            if chance(0.3):
                f["rank_dropout_scale"] = True
    elif tuner == "HRA":
        f = dict(r=r, apply_GS=chance(0.3), init_weights=chance(0.7))
        inputs = [l["in"] * math.prod(l.get("kernel", [])) for l in layers.values()]
        if r > min(inputs):  # no more than so many directions are orthogonal
            f["apply_GS"] = False
    elif tuner == "OFT":
        f = dict(use_cayley_neumann=chance(0.6), block_share=chance(0.2), num_cayley_neumann_terms=rng.choice([5, 3, 4, 6]),
                 init_weights=chance(0.7))
        f.update(dict(r=rng.choice([1, 2, 3, 4]), oft_block_size=0) if chance(0.4) else
                 dict(oft_block_size=rng.choice([2, 3, 4, 5, 8])))
        if chance(0.15):
            f.update(coft=True, eps=rng.choice([1e-4, 1e-2]))
        if chance(0.1):
            f["module_dropout"] = 0.3
    elif tuner == "BOFT":
        size = rng.choice([1, 2, 3, 4, 5, 8])
        f = rng.choice([dict(boft_block_size=size), dict(boft_block_num=size, boft_block_size=0)])
        f["init_weights"] = chance(0.7)
        if chance(0.1):
            f["boft_dropout"] = 0.3
    elif tuner == "FourierFT":
        f = dict(n_frequency=rng.choice([1, 2, 5, 10, 20]), scaling=rng.choice([150.0, 10.0, 300.0, 7.5]),
                 random_loc_seed=rng.choice([777, 1, 42]), init_weights=chance(0.3))
        if chance(0.3):
            f["n_frequency_pattern"] = patterns(rng, layers, [1, 2, 3, 4])
    elif tuner == "IA3":
        names = sorted(layers)
        f = dict(init_ia3_weights=chance(0.7))
        f["feedforward_modules"] = "?"  # chosen with the targets
    elif tuner == "TrainableTokens":
        rows = min(l["rows"] for l in layers.values())
        f = dict(token_indices=rng.sample(range(rows), rng.randint(1, min(4, rows))), init_weights=chance(0.8))
    elif tuner == "Beft":
        f = dict(init_weights=chance(0.8))
    elif tuner == "Shira":
        f = dict(r=rng.choice([1, 2, 3]), random_seed=rng.choice([None, 0, 5]), init_weights=chance(0.7))
    if tuner in BIASES and chance(0.25):
        f["bias"] = rng.choice(["all", BIASES[tuner]])
    return f


def matched(config, modules):
    """The modules that PEFT adapts, and whether an exclusion had something to exclude."""
    found = [(m, check_target_module_exists(config, m)) for m in modules]
    excluded = [m for m, one in found if isinstance(one, _ExcludedModule)]
    return [m for m, one in found if one and not isinstance(one, _ExcludedModule)], excluded


def draw_config(rng, tuner, layers, network):
    """A config of PEFT's and the layers it adapts, by name; None where the draw made no sense."""
    by_name = {l["name"]: l for l in layers if "name" in l}
    modules = [name for name, _ in network.named_modules() if name]
    fitting = [n for n, l in by_name.items() if l["kind"] in KINDS[tuner].split() and fits(tuner, l)]
    if not fitting:
        return None
    chosen = rng.sample(fitting, rng.randint(1, len(fitting)))
    linears = [n for n, l in by_name.items() if l["kind"] in ("linear", "hf_conv1d")]
    fields = name_layers(rng, tuner, chosen, modules, linears)
    others = [n for n in by_name if n not in chosen]
    if others and rng.random() < 0.25 and tuner != "TrainableTokens":
        count = min(len(others), rng.choice([1, 1, 2]))
        fields["modules_to_save"] = [rng.choice([n, suffix(rng, n)]) for n in rng.sample(others, count)]
    make = getattr(peft, tuner + "Config")
    if tuner == "IA3":
        fields["feedforward_modules"] = []
    probe = dict(fields)
    if probe["target_modules"] == "all-linear":
        probe["target_modules"] = linears
    adapted, _ = matched(make(**probe, **({"total_step": 100} if tuner == "AdaLora" else {})), modules)
    wrong = [n for n in adapted if n not in fitting]
    if wrong and tuner not in NO_EXCLUDE:
        fields["exclude_modules"] = (
            "|".join(map(re.escape, wrong)) if rng.random() < 0.3 else sorted(wrong)
        )
        probe["exclude_modules"] = fields["exclude_modules"]
        adapted = [n for n in adapted if n in fitting]
    elif wrong:
        return None
    if tuner not in NO_EXCLUDE and len(adapted) > 1 and not wrong and rng.random() < 0.15:
        out = rng.choice(adapted)
        fields["exclude_modules"] = [out]
        adapted = [n for n in adapted if n != out]
    if not adapted:
        return None
    fields.update(own_fields(rng, tuner, {n: by_name[n] for n in adapted}))
    if tuner == "IA3":
        if isinstance(fields["target_modules"], str):
            only = rng.sample(adapted, rng.randint(0, len(adapted)))
            fields["feedforward_modules"] = "|".join(map(re.escape, only)) if only else []
            if only and rng.random() < 0.3 and fields["target_modules"] != "all-linear":
                fields["feedforward_modules"] = fields["target_modules"]
        else:
            names = fields["target_modules"]
            fields["feedforward_modules"] = rng.sample(names, rng.randint(0, len(names)))
    if tuner == "Lora":
        more_of_lora(rng, fields, by_name, adapted)
    if any(l["kind"] == "hf_conv1d" for l in (by_name[n] for n in adapted)) and rng.random() < 0.6:
        fields["fan_in_fan_out"] = True
    if tuner in ("LNTuning",):
        fields.pop("fan_in_fan_out", None)
    return fields, {n: by_name[n] for n in adapted}


def more_of_lora(rng, fields, by_name, adapted):
    """Rows of an embedding and parameters of modules that LoRA adapts beside layers."""
    saved = fields.get("modules_to_save", [])
    for name, layer in by_name.items():
        is_saved = any(f".{m}." in f".{name}." for m in saved)
        if layer["kind"] == "embedding" and name not in adapted and not is_saved and rng.random() < 0.3:
            tokens = rng.sample(range(layer["rows"]), rng.randint(1, min(4, layer["rows"])))
            fields["trainable_token_indices"] = (
                tokens if name.endswith("embed_tokens") and rng.random() < 0.5 else {suffix(rng, name): tokens}
            )
        hidden = "base_layer" in name  # from PEFT, which drops the word
        if layer["kind"] == "experts" and not is_saved and not hidden and rng.random() < 0.8:
            if {"lora_dropout", "lora_bias"} & set(fields) or fields["use_dora"]:
                continue
            entry = rng.choice([name, suffix(rng, name)]) + ".stack"
            fields["target_parameters"] = sorted({*fields.get("target_parameters", []), entry})
    if "target_parameters" in fields and rng.random() < 0.3:
        fields["rank_pattern"] = {fields["target_parameters"][0]: rng.choice([1, 2, 3])}


def is_convolution(layer):
    return layer["kind"] in CONVOLUTIONS


def fits(tuner, layer):
    """What PEFT can adapt at all, without computing nonsense that no equation repeats."""
    if is_convolution(layer):
        plain = layer["padding_mode"] == "zeros"
        undilated = set(layer["dilation"]) == {1}
        # PEFT takes stride and padding of the first dimension, and no dilation.
        even = all(len(set(layer[k])) == 1 for k in ("stride", "padding"))
        if tuner in ("HRA", "BOFT") and not even:
            return False
        if tuner in ("OFT", "BOFT", "HRA", "AdaLora"):
            square = len(set(layer["kernel"])) == 1
            return undilated and plain and (layer["groups"] == 1) and square and not isinstance(layer["padding"], str)
    return True


def trusted(tuner, fields, adapted):
    """Which of PEFT's numbers stand: True, or "equations", or what remains."""
    convolutions = [l for l in adapted.values() if is_convolution(l)]
    odd = [l for l in convolutions if l["padding_mode"] != "zeros" or set(l["dilation"]) != {1}]
    if tuner == "Lora":
        grouped = any(l["groups"] > 1 for l in convolutions)
        if any(l["kind"] == "mha" for l in adapted.values()) or odd:
            if grouped or fields.get("lora_dropout"):
                return None
            return ["merged"] if fields.get("use_dora") else "equations"
        return ["output", "gradient"] if grouped else ["output", "gradient", "merged"]
    if tuner in ("LoHa", "LoKr", "AdaLora", "BOFT", "HRA"):
        if any(l["padding_mode"] != "zeros" for l in convolutions):
            return ["merged"]
        if tuner == "LoHa" and fields.get("use_effective_conv2d") and any(max(l["kernel"]) > 1 for l in convolutions):
            return ["output", "merged"]
    if tuner == "OFT" and any(max(l["kernel"]) > 1 for l in convolutions):
        return ["merged"]
    if tuner == "Beft" and any(not l.get("bias", True) for l in adapted.values()):
        return ["output", "gradient"]
    return ["output", "gradient", "merged"]


# ---- What PEFT computes ---------------------------------------------------------------------

fourier_of_peft = FourierFTLayer.get_delta_weight


def fourier_delta(layer, adapter):
    """FourierFT's update; of float64 PEFT makes a float32, no measure for float32."""
    spectrum = layer.fourierft_spectrum[adapter]
    if spectrum.dtype != torch.float64:
        return fourier_of_peft(layer, adapter)
    dense = torch.zeros(layer.out_features, layer.in_features, dtype=spectrum.dtype)
    dense = dense.index_put(tuple(layer.indices[adapter]), spectrum)
    return torch.fft.ifft2(dense).real * layer.fourierft_scaling[adapter]


def draw_input(rng, layers, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    if layers[0]["kind"] == "embedding":
        return torch.randint(0, layers[0]["rows"], shape, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def randomise(model, tuner, seed):
    generator = torch.Generator().manual_seed(seed + 2)
    size = {"OFT": 0.1, "BOFT": 0.4, "LoKr": 0.3, "AdaLora": 0.3}.get(tuner, 0.5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if "lora_" in key and not key.endswith(".bias") and tuner == "Lora" and "magnitude" not in key:
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.add_(size * noise)


class Case:
    def __init__(self, seed, tuners, dtype=None):
        rng = self.rng = random.Random(seed)
        self.seed = seed
        self.tuner = rng.choice(tuners)
        self.dtype = rng.choices(
            [torch.float32, torch.bfloat16, torch.float16, torch.float64], [72, 13, 9, 6])[0]
        if dtype:
            self.dtype = getattr(torch, dtype)
        wanted = self.dtype
        for _ in range(100):
            self.layers, self.shape = draw_network(rng, self.tuner)
            drawn = draw_config(rng, self.tuner, self.layers, Net(self.layers))
            if drawn:
                self.fields, self.adapted = drawn
                # Of float64 PEFT rounds these to float32 on the way.
                rounds = self.tuner == "LoHa" or self.fields.get("coft")
                rounds = rounds and wanted == torch.float64
                decomposes = self.fields.get("init_lora_weights") in ("pissa", "olora", "orthogonal")
                self.dtype = torch.float32 if rounds or decomposes else wanted
                self.trust = trusted(self.tuner, self.fields, self.adapted)
                if self.trust:
                    break
        else:
            raise ValueError("no network fits")
        dropouts = [v for k, v in self.fields.items() if "dropout" in k and v and k != "rank_dropout_scale"]
        self.train = bool(dropouts) and rng.random() < 0.7
        self.train &= self.tuner != "OFT"  # PEFT makes its module_dropout and never calls it
        self.name = rng.choice(["default", "default", "german", "a_b", "v2"])
        self.optimizer = rng.choice(["sgd", "adamw"])
        self.edit = self.draw_edit(rng)
        self.has_second = (
            self.tuner in ("Lora", "LoHa", "LoKr", "FourierFT", "IA3", "HRA", "OFT")
            and self.dtype in (torch.float32, torch.float64)
            and isinstance(self.trust, list) and "output" in self.trust
            and not {"modules_to_save", "trainable_token_indices"} & set(self.fields)
            and self.fields.get("bias", "none") == "none"
            and not isinstance(self.fields.get("init_lora_weights"), str)
            and not self.fields.get("use_dora")  # the second's norm: of the bare base in PEFT
            and rng.random() < 0.4
        )

    def draw_edit(self, rng):
        if rng.random() < 0.8 or self.tuner == "Shira":
            return ""
        edits = ["bin", "float16", "bfloat16", "no_prefix", "named_keys"]
        return rng.choice(edits + ["refused"] * (self.tuner == "Lora"))

    def apply_edit(self, folder, saved):
        """Another form of the same file; returns the words of a refusal."""
        weights = saved / "adapter_model.safetensors"
        tensors = load_file(weights)
        if self.edit in ("float16", "bfloat16"):
            return ""
        shutil.copytree(saved, folder / "original")
        shutil.copy(weights, folder / "original.safetensors")
        if self.edit == "bin":
            torch.save(tensors, saved / "adapter_model.bin")
            weights.unlink()
        elif self.edit == "no_prefix":
            if not any(layer.get("name", "").startswith(("base_model", "model.")) for layer in self.layers):
                save_file({k.removeprefix(PREFIX): v for k, v in tensors.items()}, weights)
        elif self.edit == "named_keys":
            ends = (".lora_A.weight", ".lora_B.weight")
            named = lambda k: k[: -len(".weight")] + f".{self.name}.weight" if k.endswith(ends) else k
            save_file({named(k): v for k, v in tensors.items()}, weights)
        elif self.edit == "refused":
            change, word = self.rng.choice([
                ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
                ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
                ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
                ({"use_qalora": True}, "use_qalora is set"),
                ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
                ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
                ({"r": 0}, "r must be positive"),
                ({"r": self.fields["r"] + 40, "rank_pattern": {}}, "shape"),
                ({"target_modules": ["no_such_layer"]}, "matches nothing"),
            ])
            path = saved / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
            return word
        return ""

    def second(self, saved, folder):
        """Another adapter on the same layers, and the output of both."""
        fields = copy.deepcopy(self.fields)
        if "r" in fields and self.tuner != "OFT":
            fields["r"] = max(1, fields["r"] - 1)
        fields.pop("rank_pattern", None)
        torch.manual_seed(self.seed + 8)
        model = peft.get_peft_model(self.network(), getattr(peft, self.tuner + "Config")(**fields))
        randomise(model, self.tuner, self.seed + 9)
        model.save_pretrained(folder / "second")
        (folder / "second" / "README.md").unlink(missing_ok=True)
        model = self.load(saved)
        model.load_adapter(folder / "second", "second")
        model.base_model.set_adapter(["default", "second"])
        # OFT's forward rotates the inputs of a Linear in the other order than its merge.
        return (model.merge_and_unload() if self.tuner == "OFT" else model).eval()

    def network(self):
        torch.manual_seed(self.seed)
        network = Net(self.layers)
        with torch.no_grad():
            for key, p in network.named_parameters():
                if "norm" in key.lower() or "ln_" in key or p.dim() == 1:
                    p.add_(0.2 * torch.randn(p.shape))
        return network.to(self.dtype).eval()

    def config(self):
        return getattr(peft, self.tuner + "Config")(**copy.deepcopy(self.fields))

    def load(self, folder):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(self.network(), folder, is_trainable=True)
        missing = [str(w.message) for w in caught if "missing" in str(w.message)]
        assert not missing, missing
        for key, parameter in model.named_parameters():
            if ".ranknum." in key:  # PEFT trains it where the base is not float32
                parameter.requires_grad_(False)
        return model.train(self.train)

    def results(self, model, x, target, double=False):
        parameters = make_lora.trainable_by_file_key(model)

        def forward():
            if self.train:
                torch.manual_seed(self.seed)
            return model(x)

        return self.three_steps(forward, parameters, target)

    def three_steps(self, forward, parameters, target):
        values = list(parameters.values())
        optimizer = (
            torch.optim.SGD(values, lr=0.1)
            if self.optimizer == "sgd"
            else torch.optim.AdamW(values, lr=0.01, eps=1e-3, weight_decay=0.01)
        )
        result = {}
        for step in range(3):
            optimizer.zero_grad()
            output = forward()
            loss = nn.functional.mse_loss(output, target)
            loss.backward()
            if step == 0:
                result["output"] = output.detach().clone()
                for key, p in parameters.items():
                    result["gradient." + key] = (
                        torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    )
            optimizer.step()
        for key, p in parameters.items():
            result["step." + key] = p.detach().clone()
        return result

    def merged(self, folder, double=False):
        model = self.load(folder)
        model = (model.double() if double else model).eval().merge_and_unload()
        names = dict(self.network().named_parameters())
        return {k: v.detach().clone() for k, v in model.state_dict().items() if k in names}, model

    def equations(self, folder, x, target, dtype):
        """LoRA from W + s B A, for what PEFT gets wrong."""
        network = self.network().to(dtype)
        base = {k: v.detach() for k, v in network.named_parameters()}
        adapter = {k: v.to(dtype).requires_grad_() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        config = json.loads((folder / "adapter_config.json").read_text())

        def weights():
            return make_lora.effective_parameters(network, base, config, adapter)

        forward = lambda: torch.func.functional_call(network, weights(), (x,))
        merged = {k: v.detach().clone() for k, v in weights().items()}
        return self.three_steps(forward, adapter, target), merged

    def write(self, root):
        folder = root / f"{self.seed:05d}_{self.tuner}"
        shutil.rmtree(folder, ignore_errors=True)
        saved = folder / "adapter"
        network = self.network()
        torch.manual_seed(self.seed + 7)
        before = peft.get_peft_model(network, self.config(), adapter_name=self.name)
        initial = {
            "initial." + k: v.clone()
            for k, v in peft.get_peft_model_state_dict(before, adapter_name=self.name).items()
        }
        randomise(before, self.tuner, self.seed)
        before.save_pretrained(saved)
        if self.name != "default":
            shutil.move(saved / self.name, folder / "named")
            shutil.rmtree(saved)
            shutil.move(folder / "named", saved)
        if (saved / "README.md").exists():
            (saved / "README.md").unlink()
        if self.edit in ("float16", "bfloat16"):
            weights = saved / "adapter_model.safetensors"
            rounded = lambda t: t.to(getattr(torch, self.edit)) if t.is_floating_point() else t
            save_file({k: rounded(v) for k, v in load_file(weights).items()}, weights)
        x = draw_input(self.rng, self.layers, self.shape, self.dtype, self.seed)
        with torch.no_grad():
            plain = self.network()(x)
        target = torch.randn(plain.shape, generator=torch.Generator().manual_seed(self.seed + 3)).to(self.dtype)
        wide = lambda t: t.double() if t.is_floating_point() else t
        tensors, exact = {}, {}
        if self.trust == "equations":
            exact, exact_merged = self.equations(saved, wide(x), wide(target), torch.float64)
            if self.dtype in (torch.bfloat16, torch.float16):  # nobody's rounding to compare with
                exact = {"output": exact["output"]}
            tensors = {k: v.to(torch.float32 if not k == "output" else self.dtype) for k, v in exact.items()}
            tensors.update({"merged." + k: v.to(self.dtype) for k, v in exact_merged.items()})
            exact.update({"merged." + k: v for k, v in exact_merged.items()})
        else:
            if "output" in self.trust:
                tensors = self.results(self.load(saved), x, target)
                exact = self.results(self.load(saved).double(), wide(x), wide(target))
                if "gradient" not in self.trust:
                    tensors = {"output": tensors["output"]}
            if "merged" in self.trust:
                merged, model = self.merged(saved)
                merged_exact, model_exact = self.merged(saved, double=True)
                tensors.update({"merged." + k: v for k, v in merged.items()})
                exact.update({"merged." + k: v for k, v in merged_exact.items()})
                if "output" not in self.trust:
                    with torch.no_grad():
                        tensors["output"] = model(x)
                        exact["output"] = model_exact(wide(x))
        if self.has_second:
            with torch.no_grad():
                tensors["both"] = self.second(saved, folder)(x)
        assert all(v.isfinite().all() for v in tensors.values()), "not finite"
        trainable = sum(p.numel() for p in self.load(saved).parameters() if p.requires_grad)
        base = {k: v.detach().clone() for k, v in network_parameters(self.network()).items()}
        contiguous = lambda d: {k: v.detach().contiguous().clone() for k, v in d.items()}
        save_file(contiguous(base), folder / "base.safetensors")
        expected = {"input": x, "target": target, "plain": plain, **tensors, **initial}
        expected.update({"exact." + k: v for k, v in exact.items() if k in tensors})
        save_file(contiguous(expected), folder / "expected.safetensors")
        facts = dict(
            tuner=self.tuner, layers=self.layers, dtype=str(self.dtype).removeprefix("torch."),
            train=self.train, seed=self.seed, optimizer=self.optimizer, trainable=trainable,
            adapted=sorted(self.adapted), fields=repr(self.fields),
            merges=any(key.startswith("merged.") for key in tensors),
            # LoRA of PEFT's on a dilated convolution fails.
            peft_runs=self.tuner != "Lora"
            or all(set(l.get("dilation", [1])) == {1} for l in self.adapted.values()),
        )
        if self.edit:
            facts["edit"] = self.edit
            word = self.apply_edit(folder, saved)
            if word:
                facts["refusal"] = word
        (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
        return folder


def network_parameters(network):
    return dict(network.named_parameters())


# ---- The two commands -----------------------------------------------------------------------


def make(arguments):
    reasons = collections.Counter()
    count = 0
    for seed in range(arguments.first, arguments.first + arguments.count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case = Case(seed, arguments.tuner, arguments.dtype)
                case.write(arguments.folder)
            count += 1
        except Exception as error:  # PEFT cannot make this one
            shutil.rmtree(arguments.folder / f"{seed:05d}_{case.tuner}", ignore_errors=True)
            reasons[f"{case.tuner}: {type(error).__name__}: {str(error)[:110]}"] += 1
            if arguments.verbose:
                raise
    print(f"{count} cases written")
    for reason, times in sorted(reasons.items()):
        print(f"  PEFT made none {times} times: {reason}")


def check(arguments):
    """PEFT loads libpeft's files: no key missing or unexpected, the same output."""
    failures = collections.defaultdict(list)
    total = collections.Counter()
    for path in sorted(arguments.folder.glob("*/case.json")):
        folder, facts = path.parent, json.loads(path.read_text())
        result = folder / "result.json"
        if not result.exists():
            failures[facts["tuner"]].append((folder.name, ["fuzz_reader has not been here"]))
            continue
        result = json.loads(result.read_text())
        total[facts["tuner"]] += 1
        said = list(result["failures"])
        if (folder / "again").exists():
            try:
                said += check_one(folder, facts)
            except Exception as error:
                said.append(f"PEFT on ours: {type(error).__name__}: {str(error)[:200]}")
        if said:
            failures[facts["tuner"]].append((folder.name, said))
    for tuner in sorted(total):
        bad = failures[tuner]
        print(f"{tuner:16s} {total[tuner] - len(bad)} of {total[tuner]} well")
        for name, said in bad:
            for line in said[: arguments.lines]:
                print(f"    {name}: {line[:arguments.width]}")
    return 1 if any(failures.values()) else 0


def check_one(folder, facts):
    dtype = getattr(torch, facts["dtype"])
    network = Net(facts["layers"]).to(dtype)
    network.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(network, folder / "again", is_trainable=True).eval()
        wanted = set(peft.get_peft_model_state_dict(model))
    said = [f"PEFT warns: {w.message}"[:200] for w in caught if "missing" in str(w.message)]
    present = set(load_file(folder / "again" / "adapter_model.safetensors"))
    repeats = (".original_module.", ".modules_to_save.", ".base_layer.weight")
    extra = present - wanted
    lacking = {k for k in wanted - present if not any(part in k for part in repeats)}
    said += [f"unexpected in our file: {sorted(extra)[:3]}"] if extra else []
    said += [f"missing in our file: {sorted(lacking)[:3]}"] if lacking else []
    if not facts.get("peft_runs", True):
        return said
    numbers = load_file(folder / "expected.safetensors")
    given = folder / ("original" if (folder / "original").exists() else "adapter")
    # Trainable too: attention without gradients takes a fused path that rounds otherwise.
    theirs = peft.PeftModel.from_pretrained(fresh(facts, folder), given, is_trainable=True).eval()
    with torch.no_grad():
        if not torch.equal(model(numbers["input"]), theirs(numbers["input"])):
            said.append("PEFT's output of our file is not that of its own")
    return said


def fresh(facts, folder):
    network = Net(facts["layers"]).to(getattr(torch, facts["dtype"]))
    network.load_state_dict(load_file(folder / "base.safetensors"), strict=False)
    return network


def main():
    FourierFTLayer.get_delta_weight = fourier_delta
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for name, run in (("make", make), ("check", check)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("folder", type=Path)
    commands.choices["make"].add_argument("--first", type=int, default=0)
    commands.choices["make"].add_argument("--count", type=int, default=100)
    commands.choices["make"].add_argument("--tuner", nargs="+", default=list(KINDS), choices=list(KINDS))
    commands.choices["make"].add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"])
    commands.choices["make"].add_argument("--verbose", action="store_true")
    commands.choices["check"].add_argument("--lines", type=int, default=4)
    commands.choices["check"].add_argument("--width", type=int, default=240)
    arguments = parser.parse_args()
    sys.exit(arguments.run(arguments))


if __name__ == "__main__":
    main()
