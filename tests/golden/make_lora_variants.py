"""Writes data/lora_variants/: KaSA, BD-LoRA, MonteCLoRA and VeLoRA as HF PEFT has them, and what it computes.

    pip install -r requirements.txt
    python make_lora_variants.py [CASE ...]

The folders have the form of make_lora.py's, whose machinery this uses. What does not draw in
training is checked here against the equations in float64, with a decomposition of its own for KaSA,
whose numbers are the equations' (PEFT rounds the base when it truncates it, by some 1e-6; `peft.output`
is its own).
`regularization` is the penalty of training at the weights of the file, and `penalty.KEY` its gradient;
`evaluated` the output in evaluation where the case is one of training.
"""

import shutil
import sys
import warnings
from pathlib import Path

import make_lora  # sets the hash seed first
import make_lora_init
import peft
import torch
from make_lora import Case
from safetensors.torch import load_file, save_file
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

DATA = make_lora.DATA = Path(__file__).resolve().parent / "data" / "lora_variants"
PREFIX = make_lora.PREFIX

FC = dict(r=4, lora_alpha=6, target_modules=["fc1", "fc2"])
QV = dict(r=4, lora_alpha=8, target_modules=["query", "value"])
PATTERNS = dict(rank_pattern={"value": 2}, alpha_pattern={"layer.0.query": 3})
FC_PATTERNS = dict(rank_pattern={"fc2": 2}, alpha_pattern={"fc1": 3})
BF16 = dict(base_dtype=torch.bfloat16)
KASA = dict(kasa_config=peft.KasaConfig(beta=0.02, gamma=0.03))
DRAWN = dict(num_samples=3, sample_scaler=0.3, kl_loss_weight=0.01, buffer_size=1)


def bd(a=None, b=None, nblocks=2, strict=True):
    return dict(
        use_bdlora=peft.BdLoraConfig(
            target_modules_bd_a=a, target_modules_bd_b=b, nblocks=nblocks, match_strict=strict
        )
    )


def velora(init_type, **more):
    return dict(velora_config=peft.VeloraConfig(**{"num_groups": 4, "init_type": init_type, **more}))


def drawn(**more):
    return dict(monteclora_config=peft.MontecloraConfig(**{**DRAWN, **more}))


CASES = [
    Case("kasa", "mlp", dict(FC, **KASA)),
    Case("kasa_rslora", "mlp", dict(FC, use_rslora=True, **KASA)),
    Case("kasa_patterns", "mlp", dict(FC, **FC_PATTERNS, **KASA)),
    Case("kasa_lora_bias", "mlp", dict(FC, lora_bias=True, **KASA)),
    Case("kasa_head", "mlp", dict(FC, modules_to_save=["head"], bias="lora_only", **KASA)),
    Case("kasa_dropout", "mlp", dict(FC, lora_dropout=0.2, **KASA), train=True),
    Case("kasa_bfloat16", "mlp", dict(FC | dict(target_modules=["fc2"]), **KASA), **BF16),
    Case("kasa_bert", "bert", dict(r=2, lora_alpha=2, target_modules=["value"], **KASA)),
    Case("bd_lora_a", "mlp", dict(FC, **bd(a=["fc"]))),
    Case("bd_lora_b", "mlp", dict(FC, **bd(b=["fc1", "fc2"], nblocks=4))),
    Case("bd_lora_mixed", "mlp", dict(
        FC | dict(target_modules=["fc1", "fc2", "head"], use_rslora=True),
        **bd(["1"], ["c2"], strict=False)),
        note="plain LoRA at head"),
    Case("bd_lora_patterns", "stack", dict(QV, **PATTERNS, **bd(["query"], ["val"]))),
    Case("bd_lora_dropout", "mlp", dict(FC, lora_dropout=0.2, **bd(["fc1"], ["fc2"])), train=True),
    Case("bd_lora_bfloat16", "mlp", dict(FC, **bd(["fc1"], ["fc2"])), **BF16),
    Case("bd_lora_bert", "bert", dict(QV, **bd(["value"], ["query"], nblocks=4))),
    Case("monteclora", "mlp", dict(FC, **drawn()), train=True),
    Case("monteclora_entropy", "mlp", dict(
        FC, modules_to_save=["head"], use_rslora=True, **drawn(use_entropy=True, dirichlet_prior=0.7)),
        train=True),
    Case("monteclora_patterns", "mlp", dict(FC, **FC_PATTERNS, **drawn(num_samples=2)), train=True),
    Case("monteclora_one", "mlp", dict(FC, **drawn(num_samples=1)), train=True),
    Case("monteclora_gpt2", "gpt2_mlp", dict(
        r=2, lora_alpha=8, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, **drawn()),
        train=True),
    Case("velora", "mlp", dict(FC, **velora("batch_average", scale=0.7)), train=True,
         note="of 10 inputs in 4 groups two are filled up"),
    Case("velora_once", "mlp", dict(
        FC, lora_bias=True, modules_to_save=["head"], **velora("batch_average_once")), train=True),
    Case("velora_random", "mlp", dict(FC, use_rslora=True, **velora("random")), train=True),
    Case("velora_dropout", "mlp", dict(FC, lora_dropout=0.2, **velora("batch_average")), train=True),
    Case("velora_gpt2", "gpt2_mlp", dict(
        r=2, lora_alpha=8, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True,
        **velora("batch_average", num_groups=3)), train=True),
    Case("velora_eval", "mlp", dict(FC, **velora("batch_average")), note="plain LoRA in evaluation"),
]


# ---- What make_lora's machinery asks of a variant ---------------------------------------------

current = None  # the case at hand
load_adapter = make_lora.load_adapter


def samplers(model):
    return [m for m in model.modules() if type(m).__name__ == "MontecloraSampler"]


def drawing_load_adapter(case, folder):
    """What it draws, it draws in forward."""
    model = load_adapter(case, folder)
    for sampler in samplers(model):
        sampler.sampler.index = sampler.sampler.buffer_size
    return model


def effective_parameters(network, base, config, adapter):
    result = dict(base)
    for key, a in adapter.items():
        name = key.removeprefix(PREFIX)
        if not name.endswith(".lora_A.weight"):
            if "lora_" not in name:
                result[name.replace(".base_layer", "")] = a
            continue
        module = name.removesuffix(".lora_A.weight")
        b = adapter[PREFIX + module + ".lora_B.weight"]
        weight = base[module + ".weight"]
        r = make_lora.pattern_value(config["rank_pattern"], module, config["r"])
        alpha = make_lora.pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / (r**0.5 if config["use_rslora"] else r)
        assert a.shape[0] == r, module
        if config["kasa_config"]:
            values, vectors = torch.linalg.eigh(weight.T @ weight)
            order = values.argsort(descending=True)[: min(weight.shape)]
            minor = vectors[:, order[-r:]]
            d = adapter[PREFIX + module + ".lora_diag"]
            result[module + ".weight"] = (
                weight - weight @ minor @ minor.T + scale * b @ torch.diag(d) @ a
            )
        else:
            n = (config["use_bdlora"] or {"nblocks": 1})["nblocks"]
            if a.shape[1] != weight.shape[1]:
                a = torch.block_diag(*a.split(r // n))
            if b.shape[1] != r:
                b = torch.block_diag(*b.split(weight.shape[0] // n))
            result[module + ".weight"] = weight + scale * b @ a
        bias = adapter.get(PREFIX + module + ".lora_B.bias")
        if bias is not None:
            result[module + ".bias"] = base[module + ".bias"] + scale * bias
    return result


# ---- The penalties of training ----------------------------------------------------------------


def right_monteclora_loss(model):
    """PEFT's, with a Dirichlet divergence that is one."""
    total, chosen = 0.0, samplers(model)
    for s in chosen:
        alpha, size = s.expert_weights_prior.exp(), s.out_features
        prior = torch.full_like(alpha, s.dirichlet_prior)
        var = (2 * s.std_prior).exp()
        kl = kl_divergence(Dirichlet(alpha), Dirichlet(prior))
        # of Wishart(size, var) from Wishart(size, 1), and of num_samples normal distributions
        kl = kl + size * kl_divergence(
            MultivariateNormal(torch.zeros(size), torch.diag(var)),
            MultivariateNormal(torch.zeros(size), torch.eye(size)),
        )
        kl = kl + s.num_samples * kl_divergence(
            MultivariateNormal(torch.zeros(size), s.gaussian_var_prior),
            MultivariateNormal(torch.zeros(size), torch.eye(size)),
        )
        wrong = 2 * (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
        theirs, entropy = s.get_variational_loss()
        assert abs(theirs - s.kl_loss_weight * (kl + wrong)) < 2e-5 * abs(theirs), (theirs, kl)
        total = total + s.kl_loss_weight * kl + entropy
    return total / len(chosen)


def exact_kasa(one, numbers):
    """The equations' numbers; PEFT's are within make_lora's bounds of them."""
    folder = DATA / one.name
    adapter = make_lora.weights_of(folder / "adapter")
    keys = [k.removeprefix("gradient.") for k in numbers if k.startswith("gradient.")]
    config = make_lora.config_of(folder / "adapter")
    exact = make_lora.equation_results(one, config, adapter, keys, numbers["target"])
    return {
        **numbers,
        **{k: v.to(numbers[k].dtype) for k, v in exact.items()},
        "peft.output": numbers["output"],
    }


def add_penalty(one):
    folder = DATA / one.name
    config, numbers = one.config, load_file(folder / "expected.safetensors")
    if "kasa_config" in config and not one.train:
        numbers = exact_kasa(one, numbers)
    if one.train:
        model = make_lora.load_adapter(one, folder / "adapter").eval()
        numbers["evaluated"] = make_lora.networks.run(model, make_lora.network_inputs(one)).detach()
    if one.base_dtype == torch.float32 and ("kasa_config" in config or "monteclora_config" in config):
        model = make_lora.load_adapter(one, folder / "adapter")
        if "kasa_config" in config:
            loss = model._get_kasa_loss()
        else:
            torch.manual_seed(make_lora.DROPOUT_SEED)
            make_lora.networks.run(model, make_lora.network_inputs(one))
            loss = right_monteclora_loss(model)
        loss.backward()
        numbers["regularization"] = loss.detach().reshape(1)
        for key, parameter in make_lora.trainable_by_file_key(model).items():
            if parameter.grad is not None:
                numbers["penalty." + key] = parameter.grad.clone()
    save_file({k: v.contiguous() for k, v in numbers.items()}, folder / "expected.safetensors")


# ---- What the tensors start as, and what is drawn ---------------------------------------------

INITIAL = [
    Case("init_kasa", "mlp", dict(FC, **KASA)),
    Case("init_kasa_random", "mlp", dict(FC, init_lora_weights=False, **KASA)),
    Case("init_bd_lora", "mlp", dict(FC, **bd(["fc1"], ["fc2"]))),
    Case("init_bd_lora_random", "mlp", dict(FC, init_lora_weights=False, **bd(["fc1"], ["fc2"]))),
    Case("init_bd_lora_bfloat16", "mlp", dict(FC, **bd(["fc1"], ["fc2"])), **BF16),
    Case("init_velora", "mlp", dict(FC, **velora("random"))),
    Case("init_monteclora", "mlp", dict(
        FC, init_lora_weights=False, **drawn(num_samples=4, sample_scaler=0.05, buffer_size=3))),
]


def write_initial(one):
    """The tensors after torch.manual_seed(0), and the outputs of five passes in training."""
    folder = DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = make_lora.base_network(one)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**one.config)).train()
    tensors = {"initial." + k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}
    if "monteclora_config" in one.config:
        inputs = make_lora.network_inputs(one)
        tensors["input.0"] = inputs[0]
        for i in range(5):
            tensors[f"drawn.{i}"] = make_lora.networks.run(model, inputs).detach().clone()
        for key, value in peft.get_peft_model_state_dict(model).items():
            if "sampler" in key:
                tensors["after." + key] = value.detach().clone()
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    config = {
        k: vars(v) if hasattr(v, "__dataclass_fields__") else v for k, v in one.config.items()
    }
    facts = {
        "network": one.network,
        "base_dtype": str(one.base_dtype).removeprefix("torch."),
        "seed": 0,
        "config": config,
    }
    (folder / "case.json").write_text(make_lora.json.dumps(facts, indent=2) + "\n")
    print(f"{one.name:26s} {len(tensors)} tensors")


def main():
    global current
    warnings.simplefilter("ignore")
    make_lora.load_adapter = drawing_load_adapter
    make_lora.effective_parameters = effective_parameters
    make_lora_init.make_lora.DATA = DATA
    wanted = sys.argv[1:]
    for one in CASES:
        if not wanted or one.name in wanted:
            current = one
            make_lora.write(one)
            add_penalty(one)
            make_lora_init.share_base(one)
    for one in INITIAL:
        if not wanted or one.name in wanted:
            write_initial(one)
            make_lora_init.share_base(one)


if __name__ == "__main__":
    main()
