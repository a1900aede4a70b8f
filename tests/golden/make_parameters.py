"""Writes data/parameters/: LoRA on parameters, trainable tokens inside LoRA, and SHiRA, by HF PEFT.

    pip install -r requirements.txt
    python make_parameters.py [CASE ...]

The folders have the form of make_lora.py's, whose machinery this uses. Every number is checked
here against the equations in float64, written out below without PEFT.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import make_lora  # sets the hash seed first
import make_tuners
import torch
from make_lora import PREFIX
from make_tuners import case
from safetensors.torch import save_file

make_lora.DATA = Path(__file__).resolve().parent / "data" / "parameters"
layers_of_lora = make_lora.effective_parameters

ALPHA = dict(r=2, lora_alpha=3)
NONE = dict(target_modules=[])
STACKS = dict(target_parameters=["experts.up", "experts.down"])
FC = dict(target_modules=["fc1", "fc2"])

CASES = [
    case("experts", "Lora", "experts", dict(**ALPHA, **NONE, **STACKS)),
    case("experts_and_layers", "Lora", "experts", dict(
        **ALPHA, target_modules=["fc", "head"], use_rslora=True,
        target_parameters=["experts.up", "down", "experts.router"],
        rank_pattern={"experts.up": 3, "fc": 1}, alpha_pattern={"down": 2})),
    case("experts_transposed", "Lora", "experts_transposed", dict(**ALPHA, **NONE, **STACKS)),
    case("experts_square", "Lora", "experts_square", dict(**ALPHA, **NONE, **STACKS)),
    case("experts_bfloat16", "Lora", "experts", dict(**ALPHA, **NONE, **STACKS),
         base_dtype=torch.bfloat16),
    case("matrix", "Lora", "mlp", dict(
        **ALPHA, target_modules=["fc2"], target_parameters=["fc1.weight"])),
    case("matrix_bias", "Lora", "mlp", dict(
        **ALPHA, **NONE, target_parameters=["fc1.weight", "fc2.weight"], bias="lora_only")),
    case("matrix_bias_all", "Lora", "mlp", dict(
        **ALPHA, target_modules=["fc2"], target_parameters=["fc1.weight"], bias="all")),
    case("matrix_head", "Lora", "mlp", dict(
        **ALPHA, **NONE, target_parameters=["fc1.weight"], modules_to_save=["head"])),
    case("embedding", "Lora", "tokens", dict(
        **ALPHA, target_modules=["fc"], target_parameters=["emb.weight"])),
    case("conv1d", "Lora", "conv1d", dict(
        **ALPHA, target_modules=["head"], target_parameters=["conv.weight"])),
    case("gpt2", "Lora", "gpt2_mlp", dict(
        **ALPHA, **NONE, target_parameters=["c_fc.weight", "c_proj.weight"])),
    case("tokens", "Lora", "tokens", dict(
        **ALPHA, target_modules=["fc"], trainable_token_indices={"emb": [7, 1]})),
    case("tokens_list", "Lora", "causal_tokens", dict(
        **ALPHA, target_modules=["lm_head"], trainable_token_indices=[0, 3],
        exclude_modules=["embed_tokens"])),
    case("tokens_and_parameter", "Lora", "causal_tokens", dict(
        **ALPHA, **NONE, target_parameters=["lm_head.weight"],
        trainable_token_indices={"embed_tokens": [10]})),
    case("shira", "Shira", "mlp", dict(r=2, random_seed=3, **FC)),
    case("shira_no_seed", "Shira", "bert", dict(r=1, target_modules=["query", "value"])),
    case("shira_head", "Shira", "mlp", dict(
        r=1, random_seed=11, target_modules="fc.*", modules_to_save=["head"])),
]

INITIAL = [
    case("init_kaiming", "Lora", "experts", dict(
        **ALPHA, target_modules=["fc"], **STACKS, rank_pattern={"up": 3})),
    case("init_gaussian", "Lora", "experts", dict(
        **ALPHA, target_modules=["fc"], **STACKS, rank_pattern={"up": 3},
        init_lora_weights="gaussian")),
    case("init_random", "Lora", "experts", dict(
        **ALPHA, target_modules=["fc"], **STACKS, rank_pattern={"up": 3},
        init_lora_weights=False)),
    case("init_shira", "Shira", "mlp", dict(r=2, random_seed=5, init_weights=False, **FC)),
    case("init_shira_no_seed", "Shira", "mlp", dict(r=1, **FC)),
]


# ---- The equations --------------------------------------------------------------------------


def parameter_of(network, config, module, depth):
    """The path of the parameter that the wrapper `depth` below the outermost one adapts."""
    wanted = config.get("target_parameters") or []
    own = [
        f"{module}.{key}"
        for key, _ in network.get_submodule(module).named_parameters(recurse=False)
        if any(f"{module}.{key}" == t or f"{module}.{key}".endswith("." + t) for t in wanted)
    ]
    return own[len(own) - 1 - depth] if own else None


def stack_delta(weight, transposed, a, b):
    """One expert after the other; columns of B are dealt out to the experts in turn."""
    experts = weight.shape[0]
    rank = a.shape[0] // experts
    result = []
    for e in range(experts):
        product = b[:, e::experts] @ a[e * rank : (e + 1) * rank]
        result.append(product.T if transposed else product)
    return torch.stack(result)


def effective_parameters(network, base, config, adapter):
    result = dict(base)
    rest = {}
    for key, tensor in adapter.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".shira_weight"):
            module = name.removesuffix(".shira_weight")
            row, column = adapter[key.replace("_weight", "_indices")].long()
            place = torch.zeros_like(result[module + ".weight"])
            place = place.index_put((row, column), tensor)
            result[module + ".weight"] = result[module + ".weight"] + place
            continue
        if name.endswith(".token_adapter.trainable_tokens_delta"):
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            tokens = config["trainable_token_indices"]
            tokens = tokens if isinstance(tokens, list) else tokens[module]
            rows = list(result[module + ".weight"])
            for place, token in enumerate(tokens):
                rows[token] = tensor[place]
            result[module + ".weight"] = torch.stack(rows)
            continue
        if ".lora_" in name:
            inner = name[: name.index(".lora_")]
            depth = inner.count(".base_layer")
            module = inner.replace(".base_layer", "")
            path = parameter_of(network, config, module, depth)
            if path is not None:
                if name.endswith(".lora_A.weight"):
                    a, b = tensor, adapter[key.replace("lora_A", "lora_B")]
                    weight = result[path]
                    r = make_lora.pattern_value(config["rank_pattern"], path, config["r"])
                    alpha = make_lora.pattern_value(
                        config["alpha_pattern"], path, config["lora_alpha"])
                    s = alpha / r**0.5 if config["use_rslora"] else alpha / r
                    turned = getattr(network.get_submodule(module), "is_transposed", False)
                    delta = b @ a if weight.dim() == 2 else stack_delta(weight, turned, a, b)
                    result[path] = weight + s * delta
                continue
        if ".shira_indices" not in name:
            rest[key] = tensor
    return layers_of_lora(network, result, config, rest)


# ---- Initial values -------------------------------------------------------------------------


def write_initial(one):
    """What each tensor starts as after torch.manual_seed(0)."""
    folder = make_lora.DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = make_lora.base_network(one)
    torch.manual_seed(0)
    model = make_tuners.peft.get_peft_model(base, make_tuners.config_class(**one.config))
    tensors = make_tuners.peft.get_peft_model_state_dict(model)
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file({"initial." + k: v.clone() for k, v in tensors.items()},
              folder / "expected.safetensors")
    facts = {"network": one.network, "seed": 0}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{one.name:26s} {len(tensors)} tensors")


def main():
    make_lora.LoraConfig = make_tuners.config_class
    warnings.simplefilter("ignore")
    make_lora.effective_parameters = effective_parameters
    wanted = sys.argv[1:]
    for one in CASES + INITIAL:
        if not wanted or one.name in wanted:
            make_tuners.current = one
            make_lora.write(one) if one in CASES else write_initial(one)
            make_tuners.share_base(one)


if __name__ == "__main__":
    main()
