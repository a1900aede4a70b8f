"""Writes data/weighted/: what HF PEFT's add_weighted_adapter makes of several adapters.

    pip install -r requirements.txt
    python make_weighted.py [CASE ...]

One folder a case: the network's base.safetensors, one folder for each adapter that is combined, and
for each run (case.json says how) the combined adapter's tensors and the output in
expected.safetensors. What draws nothing at random is checked here against the formulas, written
out in float64 without PEFT.
"""

import copy
import json
import math
import shutil
import sys
import warnings

import make_lora  # sets the hash seed first
import networks
import torch
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

DATA = make_lora.DATA.parent / "weighted"
SEED = 11

# Weights that float32 has, to which PEFT rounds them before it decomposes.
AB = dict(adapters=["a", "b"], weights=[0.6875, -0.3125])
KINDS = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": dict(density=0.5),
    "ties_svd": dict(density=0.5),
    "dare_linear": dict(density=0.6),
    "dare_ties": dict(density=0.6),
    "dare_linear_svd": dict(density=0.6),
    "dare_ties_svd": dict(density=0.6),
    "magnitude_prune": dict(density=0.3),
    "magnitude_prune_svd": dict(density=0.3),
}


def run(name, kind, among=AB, **options):
    return dict(name=name, options=dict(combination_type=kind, **options), **among)


def every_kind(*names):
    return [run(kind, kind, **options) for kind, options in KINDS.items() if kind in names or not names]


ABC = dict(adapters=["a", "b", "c"], weights=[0.5, -1.25, 2.0])
ABD = dict(adapters=["a", "b", "d"], weights=[0.5, -1.25, 2.0])
MLP = ["fc1", "fc2"]
CONV = ["conv1", "conv2", "conv3"]

# case: network, configs of the adapters, runs
CASES = {
    "mlp": (
        "mlp",
        dict(
            a=LoraConfig(r=4, lora_alpha=8, target_modules=MLP),
            b=LoraConfig(r=4, lora_alpha=12, target_modules=MLP),
            c=LoraConfig(r=3, lora_alpha=3, target_modules=["fc2"]),
            d=LoraConfig(r=4, lora_alpha=2, target_modules=["head", "fc1"]),
        ),
        [
            *every_kind(),
            run("linear_negative", "linear", dict(AB, weights=[-1.0, -0.5])),
            run("linear_three", "linear", ABD),
            run("ties_frequency", "ties", ABD, density=0.7, majority_sign_method="frequency"),
            run("ties_svd_frequency", "ties_svd", ABC, density=0.7, majority_sign_method="frequency"),
            run("dare_ties_frequency", "dare_ties", ABD, density=0.8, majority_sign_method="frequency"),
            run("cat_unequal", "cat", ABC),
            run("svd_unequal", "svd", ABC),
            run("svd_rank", "svd", ABC, svd_rank=2),
            run("svd_clamp", "svd", AB, svd_clamp=0.9),
            run("svd_reduced", "svd", AB, svd_full_matrices=False),
            run("dare_unequal", "dare_linear_svd", ABC, density=0.5),
            run("one", "cat", dict(adapters=["c"], weights=[1.5])),
            run("all_kept", "dare_ties", AB, density=1.0),
        ],
    ),
    "gaussian": (
        "mlp",
        dict(
            a=LoraConfig(r=4, lora_alpha=8, target_modules=r"fc[12]", init_lora_weights="gaussian"),
            b=LoraConfig(r=4, lora_alpha=8, target_modules=r"fc2|fc1.*", init_lora_weights="gaussian"),
        ),
        every_kind("linear", "dare_linear", "dare_ties_svd"),
    ),
    "embedding": (
        "tokens",
        dict(
            a=LoraConfig(r=4, lora_alpha=8, target_modules=["emb", "fc"]),
            b=LoraConfig(r=4, lora_alpha=4, target_modules=["emb"]),
        ),
        every_kind(),
    ),
    "conv2d": (
        "conv2d",
        dict(
            a=LoraConfig(r=3, lora_alpha=6, target_modules=CONV),
            b=LoraConfig(r=3, lora_alpha=3, target_modules=CONV),
        ),
        every_kind(),
    ),
    "conv1d": (
        "conv1d",
        dict(
            a=LoraConfig(r=4, lora_alpha=8, target_modules=["conv"]),
            b=LoraConfig(r=4, lora_alpha=2, target_modules=["conv"]),
        ),
        every_kind("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
    ),
    "gpt2": (
        "gpt2_mlp",
        dict(
            a=LoraConfig(r=3, lora_alpha=6, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True),
            b=LoraConfig(r=3, lora_alpha=3, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True),
        ),
        every_kind(),
    ),
    "ia3": (
        "mlp",
        dict(
            a=IA3Config(target_modules=MLP, feedforward_modules=["fc2"]),
            b=IA3Config(target_modules=["fc1", "fc2", "head"], feedforward_modules=["fc2"]),
        ),
        [dict(name="linear", options={}, adapters=["a", "b"], weights=[0.7, 0.5])],
    ),
}


def randomise(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            elif "ia3_" in name:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))


def prune(t, density):
    flat = t.flatten()
    kept = flat.abs().argsort(descending=True, stable=True)[: int(density * len(flat))]
    out = torch.zeros_like(flat)
    out[kept] = flat[kept]
    return out.view(t.shape)


def combine(kind, tensors, weights, density, sign):
    """The papers' formulas, entry by entry; none for DARE."""
    if kind in ("ties", "magnitude_prune"):
        tensors = [prune(t, density) for t in tensors]
    if kind != "ties":
        return sum(w * t for w, t in zip(weights, tensors))
    out = torch.zeros_like(tensors[0]).flatten()
    for i, entries in enumerate(zip(*(t.flatten().tolist() for t in tensors))):
        votes = sum(entries) if sign == "total" else sum((e > 0) - (e < 0) for e in entries)
        elected = 1 if votes >= 0 else -1
        held = [w * e for w, e in zip(weights, entries) if (e > 0) - (e < 0) == elected]
        out[i] = sum(held) / max(1, len(held))
    return out.view(tensors[0].shape)


def check(model, configs, one, merged, network):
    """The combined adapter against the formulas."""
    options = dict(one["options"])
    kind = options.get("combination_type", "linear")
    if "dare" in kind and options["density"] < 1 or "svd_clamp" in options or "svd_rank" in options:
        return
    kind = kind.replace("dare_", "")
    kind = "linear" if len(one["adapters"]) == 1 else kind
    states = {
        name: {k: v.double() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
        for name in one["adapters"]
    }
    for key in merged:
        part = [(n, w) for n, w in zip(one["adapters"], one["weights"]) if key in states[n]]
        if "ia3" in key:
            want = sum(w * states[n][key] for n, w in part)
            assert make_lora.distance(merged[key], want) < 1e-6, (one["name"], key)
        if "lora" not in key or ("_A" not in key):
            continue
        other = key.replace("_A", "_B")
        a = [states[n][key] for n, _ in part]
        b = [states[n][other] for n, _ in part]
        s = [w * configs[n].lora_alpha / configs[n].r for n, w in part]
        density, sign = options.get("density", 1), options.get("majority_sign_method", "total")
        def product(a, b):
            delta = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1))
            module = network.get_submodule(key.removeprefix(make_lora.PREFIX).split(".lora_")[0])
            embedding = isinstance(module, torch.nn.Embedding)
            turned = embedding or type(module).__name__ == "Conv1D"
            return delta.T if turned else delta
        if kind == "cat":
            want = sum(x * product(p, q) for x, p, q in zip(s, a, b))
            got = product(merged[key].double(), merged[other].double())
        elif kind.endswith("svd"):
            f = kind.removesuffix("_svd").replace("svd", "linear")
            changes = [
                configs[n].lora_alpha / configs[n].r * product(p, q)
                for (n, _), p, q in zip(part, a, b)
            ]
            full = combine(f, changes, [w for _, w in part], density, sign)
            rank = merged[key].shape[0]
            u, v, w = torch.linalg.svd(full)
            want = u[:, :rank] @ torch.diag(v[:rank]) @ w[:rank]
            got = product(merged[key].double(), merged[other].double())
        else:
            root = [math.sqrt(abs(x)) for x in s]
            signed = [r if x >= 0 else -r for r, x in zip(root, s)]
            want = combine(kind, a, signed, density, sign)
            assert make_lora.distance(merged[other], combine(kind, b, root, density, sign)) < 1e-6
            got = merged[key]
        assert make_lora.distance(got, want) < 2e-6, (one["name"], key, make_lora.distance(got, want))


def combined(model, one, inputs):
    """The combined adapter's tensors, and the output with it."""
    copied = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        copied.add_weighted_adapter(
            one["adapters"], one["weights"], adapter_name="merged", **one["options"]
        )
    copied.set_adapter("merged")
    merged = get_peft_model_state_dict(copied, adapter_name="merged")
    output = networks.run(copied.eval(), inputs).detach()
    assert torch.isfinite(output).all(), one
    return merged, output


def numbered(name, merged, output):
    tensors = {f"{name}.{key}": value.detach().clone() for key, value in merged.items()}
    tensors[f"{name}.output"] = output
    return {key: value.contiguous() for key, value in tensors.items()}


def write(name):
    network, configs, runs = CASES[name]
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = networks.build(network, seed=1)
    save_file({k: v.detach().clone() for k, v in base.named_parameters()}, folder / "base.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *others = configs
        model = get_peft_model(base, configs[first], adapter_name=first).eval()
        for other in others:
            model.add_adapter(other, configs[other])
        randomise(model)
        model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    for adapter in configs:
        (folder / adapter / "README.md").unlink(missing_ok=True)
    inputs = networks.inputs(network, seed=2)
    tensors = {f"input.{i}": t for i, t in enumerate(inputs)}
    for one in runs:
        merged, output = combined(model, one, inputs)
        check(model, configs, one, merged, networks.build(network, seed=1))
        tensors.update(numbered(one["name"], merged, output))
        if "svd" in one["name"]:  # two decompositions in float32 agree less than two sums
            double = [t.double() if t.is_floating_point() else t for t in inputs]
            merged, output = combined(copy.deepcopy(model).double(), one, double)
            tensors.update(numbered("float64." + one["name"], merged, output))
    save_file(tensors, folder / "expected.safetensors")
    facts = dict(network=network, seed=SEED, adapters=list(configs), runs=runs)
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{name:12s} {len(runs)} runs")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        write(case)
