"""Writes data/lora_init/: LoRA that HF PEFT starts as PiSSA, OLoRA or orthogonal, and what it
computes; its conversion to a plain LoRA; steps of its LoRA+ and LoRA-FA optimizers.

    pip install -r requirements.txt
    python make_lora_init.py [CASE ...]

The folders have the form of make_lora.py's, whose machinery this uses. Every number is checked
here against W + s (B A - B0 A0) in float64, with B0 A0 from a decomposition of its own.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import make_lora  # sets the hash seed first
import peft
import torch
from make_lora import Case
from peft.optimizers import create_loraplus_optimizer, lorafa
from safetensors.torch import load_file, save_file
from torch import nn

make_lora.DATA = Path(__file__).resolve().parent / "data" / "lora_init"
PREFIX = make_lora.PREFIX
LOAD_SEED = 5

FC = dict(r=3, lora_alpha=6, target_modules=["fc1", "fc2"])
QV = dict(r=4, lora_alpha=8, target_modules=["query", "value"])
C1D = dict(r=2, lora_alpha=8, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)
PATTERNS = dict(rank_pattern={"value": 2}, alpha_pattern={"layer.0.query": 3})
HEAD = dict(modules_to_save=["head"])
BF16 = dict(base_dtype=torch.bfloat16)


def case(name, network, init, config, **more):
    return Case(name, network, dict(config, init_lora_weights=init), **more)


CASES = [
    case("pissa", "mlp", "pissa", dict(FC, **HEAD)),
    case("pissa_rslora", "mlp", "pissa", dict(FC, use_rslora=True)),
    case("pissa_patterns", "stack", "pissa", dict(QV, **PATTERNS)),
    case("pissa_gpt2", "gpt2_mlp", "pissa", C1D),
    case("pissa_bfloat16", "mlp", "pissa", FC, **BF16),
    case("pissa_full_rank", "mlp", "pissa", dict(FC, r=11, target_modules=["fc1", "head"]),
         note="r is above the rank of both weights: A and B have 10 and 3"),
    case("pissa_embedding", "tokens", "pissa", dict(r=3, lora_alpha=6, target_modules=["emb", "fc"]),
         note="PEFT starts embeddings as it always does"),
    case("pissa_dropout", "mlp", "pissa", dict(FC, lora_dropout=0.2), train=True,
         note="dropout is for B A x, not for B0 A0 x"),
    case("pissa_dora", "mlp", "pissa", dict(FC, use_dora=True)),
    case("pissa_dora_dropout", "mlp", "pissa", dict(FC, use_dora=True, lora_dropout=0.2),
         train=True),
    case("pissa_niter", "mlp", "pissa_niter_4", FC, note="PEFT draws again when it loads"),
    case("pissa_niter_gpt2", "gpt2_mlp", "pissa_niter_2", C1D),
    case("olora", "mlp", "olora", dict(FC, **HEAD)),
    case("olora_rslora", "mlp", "olora", dict(FC, use_rslora=True)),
    case("olora_patterns", "stack", "olora", dict(QV, **PATTERNS)),
    case("olora_bfloat16", "mlp", "olora", FC, **BF16),
    case("olora_dora", "bert", "olora", dict(QV, use_dora=True)),
    case("orthogonal", "mlp", "orthogonal", dict(FC, r=4)),
    case("orthogonal_gpt2", "gpt2_mlp", "orthogonal", C1D),
]


# ---- What make_lora's machinery asks of a start ----------------------------------------------

current = None  # the case at hand
base_network = make_lora.base_network


def is_part(init):
    return init.startswith("pissa") or init == "olora"


def randomise(model):
    """A trained-looking distance from the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def seeded_base_network(one):
    """What is drawn after it, by loading, is the same every time."""
    network = base_network(one)
    torch.manual_seed(LOAD_SEED)
    return network


def taken_off(module, weight, r, scale):
    """s B0 A0 for a weight [out, in]."""
    init = current.config["init_lora_weights"]
    if "niter" in init:  # what PEFT drew
        layer = peft.get_peft_model(
            make_lora.base_network(current), peft.LoraConfig(**current.config)
        ).base_model.model.get_submodule(module)
        residual = layer.get_base_layer().weight.detach().double()
        return weight - (residual.T if layer.fan_in_fan_out else residual)
    if init == "olora":
        q, r_rows = torch.linalg.qr(weight)
        return scale * q[:, :r] @ r_rows[:r]
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    top = vectors[:, values.argsort(descending=True)[:r]]
    return weight @ top @ top.T


def effective_parameters(network, base, config, adapter):
    modules = dict(network.named_modules())
    result = dict(base)
    for key, tensor in adapter.items():
        name = key.removeprefix(PREFIX)
        if name.endswith("lora_A.weight") or name.endswith("lora_embedding_A"):
            embedding = name.endswith("lora_embedding_A")
            end = ".lora_embedding_A" if embedding else ".lora_A.weight"
            module = name.removesuffix(end)
            b = adapter[key.removesuffix(end) + end.replace("_A", "_B")]
            r = make_lora.pattern_value(config["rank_pattern"], module, config["r"])
            alpha = make_lora.pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
            scale = alpha / (r**0.5 if config["use_rslora"] else r)
            turned = embedding or type(modules[module]).__name__ == "Conv1D"
            weight = base[module + ".weight"]
            weight = weight.T if turned else weight
            assert tensor.shape[0] == (r if embedding else min(r, *weight.shape)), module
            new = weight + scale * b @ tensor
            if is_part(config["init_lora_weights"]) and not embedding:
                new = new - taken_off(module, weight, r, scale)
            magnitude = adapter.get(PREFIX + module + ".lora_magnitude_vector")
            if magnitude is not None:
                new = new * (magnitude / new.detach().norm(dim=1)).unsqueeze(1)
            result[module + ".weight"] = new.T if turned else new
        elif "lora_" not in name:
            result[name] = tensor
    return result


def share_base(one):
    """Lets the case name the base of make_lora.py's that is the same, instead of its own."""
    folder = make_lora.DATA / one.name
    own = (folder / "base.safetensors").read_bytes()
    facts = json.loads((folder / "case.json").read_text())
    facts["load_seed"] = LOAD_SEED
    for other in sorted((make_lora.DATA.parent / "lora").iterdir()):
        file = other / "base.safetensors"
        if file.exists() and file.read_bytes() == own:
            facts["base"] = f"../../lora/{other.name}/base.safetensors"
            (folder / "base.safetensors").unlink()
            break
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")


# ---- What A and B start as -------------------------------------------------------------------

INITIAL = [
    case("init_pissa", "mlp", "pissa", FC),
    case("init_pissa_bfloat16", "mlp", "pissa", FC, **BF16),
    case("init_pissa_gpt2", "gpt2_mlp", "pissa", C1D),
    case("init_pissa_niter", "mlp", "pissa_niter_1", FC),
    case("init_pissa_niter_gpt2", "gpt2_mlp", "pissa_niter_3", C1D),
    case("init_olora", "mlp", "olora", FC),
    case("init_olora_bfloat16", "mlp", "olora", FC, **BF16),
    case("init_orthogonal", "mlp", "orthogonal", dict(FC, r=4)),
    case("init_orthogonal_bfloat16", "mlp", "orthogonal", dict(FC, r=2), **BF16),
    case("init_gaussian_bfloat16", "tokens", "gaussian", dict(
        r=4, lora_alpha=4, target_modules=["emb", "fc"]), **BF16),
    case("init_orthogonal_embedding", "tokens", "orthogonal", dict(
        r=4, lora_alpha=4, target_modules=["emb", "fc"])),
]


def write_initial(one):
    """A and B after torch.manual_seed(0), and what PEFT leaves of the base."""
    folder = make_lora.DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = make_lora.base_network(one)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**one.config))
    tensors = {"initial." + k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}
    for name in one.config["target_modules"]:
        layer = model.base_model.model.get_submodule(name)
        tensors[f"residual.{name}.weight"] = layer.get_base_layer().weight.detach().clone()
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    facts = {
        "network": one.network,
        "base_dtype": str(one.base_dtype).removeprefix("torch."),
        "seed": 0,
        "config": one.config,
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{one.name:26s} {len(tensors)} tensors")


# ---- Conversion to a plain LoRA ---------------------------------------------------------------

CONVERTED = [
    case("converted_pissa", "mlp", "pissa", FC),
    case("converted_pissa_rslora", "mlp", "pissa", dict(FC, use_rslora=True)),
    case("converted_pissa_patterns", "stack", "pissa", dict(QV, **PATTERNS)),
    case("converted_olora", "mlp", "olora", FC),
]


def write_converted(one):
    """adapter/: as trained; plain/: what path_initial_model_for_weight_conversion makes of it."""
    folder = make_lora.DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    model = peft.get_peft_model(make_lora.base_network(one), peft.LoraConfig(**one.config))
    # PEFT wants the start saved as if it were a plain LoRA's.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    model.peft_config["default"].init_lora_weights = one.config["init_lora_weights"]
    randomise(model)
    inputs = make_lora.network_inputs(one)
    output = make_lora.networks.run(model.eval(), inputs).detach()
    model.save_pretrained(folder / "adapter")
    model.save_pretrained(
        folder / "plain", path_initial_model_for_weight_conversion=str(folder / "start")
    )
    again = peft.PeftModel.from_pretrained(make_lora.base_network(one), folder / "plain").eval()
    assert make_lora.distance(make_lora.networks.run(again, inputs), output) < 2e-6
    shutil.rmtree(folder / "start")
    for name in ("adapter", "plain"):
        (folder / name / "README.md").unlink()
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file({"input.0": inputs[0], "output": output}, folder / "expected.safetensors")
    facts = {"network": one.network, "mode": "eval"}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    config = make_lora.config_of(folder / "plain")
    print(f"{one.name:26s} r {config['r']}, alpha {config['lora_alpha']}")


# ---- Optimizers -------------------------------------------------------------------------------


def write_steps(name, network, config, make_optimizer):
    """Three steps from PEFT's start: the adapter as loaded, and what trains after them."""
    folder = make_lora.DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    one = Case(name, network, config)
    torch.manual_seed(0)
    model = peft.get_peft_model(make_lora.base_network(one), peft.LoraConfig(**config))
    with torch.no_grad():  # at B = 0 nothing of A would move
        generator = torch.Generator().manual_seed(3)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    names = {p: k for k, p in make_lora.trainable_by_file_key(model).items()}
    optimizer = make_optimizer(model)
    groups = [
        {
            "names": sorted(names[p].removeprefix(PREFIX) for p in group["params"] if p in names),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in optimizer.param_groups
    ]
    inputs = make_lora.network_inputs(one)
    output = make_lora.networks.run(model.eval(), inputs)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    result = {f"input.{i}": t for i, t in enumerate(inputs)}
    result["target"] = target
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(make_lora.networks.run(model, inputs), target).backward()
        optimizer.step()
    for p, key in names.items():
        result["step." + key] = p.detach().clone()
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file(result, folder / "expected.safetensors")
    facts = {"network": network, "mode": "eval", "groups": groups}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    share_base(one)
    print(f"{name:26s} groups of {[len(g['names']) for g in groups]}")


def lora_plus(model):
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, loraplus_weight_decay=0.1,
        loraplus_lr_embedding=3e-3, betas=(0.8, 0.9))


def lora_fa(model):
    """With an eps that no step can show: PEFT adds it before the bias correction, torch after."""
    optimizer = lorafa.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    optimizer.param_groups[0]["eps"] = 1e-20
    return optimizer


STEPS = [
    ("steps_lora_plus", "tokens", dict(
        r=3, lora_alpha=6, target_modules=["emb", "fc"], bias="lora_only"), lora_plus),
    ("steps_lora_plus_bert", "bert", dict(
        r=2, lora_alpha=4, target_modules=["query", "word_embeddings"], use_dora=True,
        modules_to_save=["attention.output.LayerNorm", "pooler"]), lora_plus),
    ("steps_lora_fa", "mlp", dict(FC, **HEAD), lora_fa),
    ("steps_lora_fa_patterns", "stack", dict(QV, use_rslora=True, **PATTERNS), lora_fa),
]


def main():
    global current
    warnings.simplefilter("ignore")
    make_lora.randomise = randomise
    make_lora.base_network = seeded_base_network
    make_lora.effective_parameters = effective_parameters
    lorafa.is_bf16_available = lambda: False  # which would round the gradients
    wanted = sys.argv[1:]
    for one in CASES:
        if not wanted or one.name in wanted:
            current = one
            make_lora.write(one)
            share_base(one)
    for one in INITIAL:
        if not wanted or one.name in wanted:
            write_initial(one)
            share_base(one)
    for one in CONVERTED:
        if not wanted or one.name in wanted:
            write_converted(one)
            share_base(one)
    for name, network, config, make_optimizer in STEPS:
        if not wanted or name in wanted:
            write_steps(name, network, config, make_optimizer)


if __name__ == "__main__":
    main()
