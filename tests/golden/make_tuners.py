"""Writes data/tuners/: the weight deltas of HF PEFT beside LoRA, and what PEFT computes with them.

    pip install -r requirements.txt
    python make_tuners.py [CASE ...]

The folders have the form of make_lora.py's, whose machinery this uses. Every number is checked
here against the methods' equations in float64, written out below without PEFT. Where PEFT is
wrong (the case says how), the equations' numbers are written instead.
"""

import json
import math
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import make_lora  # sets the hash seed first
import peft
import torch
from make_lora import Case
from safetensors.torch import save_file
from torch import nn

make_lora.DATA = Path(__file__).resolve().parent / "data" / "tuners"
PREFIX = make_lora.PREFIX


@dataclass
class TunerCase(Case):
    tuner: str = ""


FC = dict(target_modules=["fc1", "fc2"])
CONV = dict(target_modules=["conv1", "conv2", "conv3"])
HEAD = dict(modules_to_save=["head"])
GROUPS = dict(target_modules=["conv"])
BANK = dict(r=2, num_vectors=7, vector_length=2, topk=2)

OFT_CONV = (
    "PEFT 0.21.2 rotates the patches of x and folds them back, which is no convolution with its "
    "merged weight where the kernel is above 1"
)
CORE_GRADIENT = (
    "PEFT 0.21.2 hands the gradients of hada_w2_a, hada_w2_b and hada_t2 wrong values where "
    "use_effective_conv2d is set (HadaWeightCP's backward uses the first core for the second)"
)
PADDING = "PEFT 0.21.2 pads the input of its delta with zeros whatever the padding mode"


def case(name, tuner, network, config, **more):
    return TunerCase(name, network, config, tuner=tuner, **more)


CASES = [
    case("vera", "Vera", "mlp", dict(r=6, **FC)),
    case("vera_seed", "Vera", "mlp", dict(r=6, projection_prng_key=5, d_initial=0.3, **FC, **HEAD)),
    case("vera_by_seed", "Vera", "mlp", dict(r=6, save_projection=False, **FC)),
    case("vera_bert", "Vera", "bert", dict(r=4, target_modules=["query", "value"])),
    case("vera_gpt2", "Vera", "gpt2_mlp", dict(r=4, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)),
    case("vera_bfloat16", "Vera", "mlp", dict(r=6, **FC), base_dtype=torch.bfloat16),
    case("loha", "LoHa", "mlp", dict(r=2, alpha=4, **FC)),
    case("loha_patterns", "LoHa", "mlp", dict(
        r=2, alpha=4, rank_pattern={"fc2": 3}, alpha_pattern={"fc1": 5}, **FC, **HEAD)),
    case("loha_conv2d", "LoHa", "conv2d", dict(r=2, alpha=4, **CONV)),
    case("loha_conv2d_core", "LoHa", "conv2d", dict(r=2, alpha=4, use_effective_conv2d=True, **CONV),
         peft_wrong=CORE_GRADIENT),
    case("loha_conv1d_core", "LoHa", "conv1d", dict(r=2, use_effective_conv2d=True, **GROUPS),
         peft_wrong=CORE_GRADIENT),
    case("loha_groups", "LoHa", "conv2d_groups", dict(r=2, alpha=4, **GROUPS)),
    case("loha_circular", "LoHa", "conv2d_circular", dict(r=2, **GROUPS), peft_wrong=PADDING),
    case("loha_bfloat16", "LoHa", "mlp", dict(r=2, alpha=4, **FC), base_dtype=torch.bfloat16),
    case("lokr", "LoKr", "mlp", dict(r=2, alpha=4, **FC)),
    case("lokr_both", "LoKr", "bert", dict(
        r=1, decompose_both=True, target_modules=["query", "value"])),
    case("lokr_factor", "LoKr", "mlp", dict(r=2, decompose_factor=2, **FC, **HEAD)),
    case("lokr_whole", "LoKr", "mlp", dict(r=16, **FC)),
    case("lokr_conv2d", "LoKr", "conv2d", dict(r=1, alpha=4, **CONV)),
    case("lokr_conv2d_core", "LoKr", "conv2d", dict(r=1, use_effective_conv2d=True, **CONV)),
    case("lokr_conv1d", "LoKr", "conv1d", dict(r=4, **GROUPS)),
    case("lokr_groups", "LoKr", "conv2d_groups", dict(r=2, **GROUPS)),
    case("hra", "HRA", "mlp", dict(r=4, **FC)),
    case("hra_gs", "HRA", "mlp", dict(r=3, apply_GS=True, **FC, **HEAD)),
    case("hra_bias", "HRA", "mlp", dict(r=2, bias="hra_only", **FC)),
    case("oft", "OFT", "mlp", dict(oft_block_size=2, **FC)),
    case("oft_exact", "OFT", "mlp", dict(oft_block_size=2, use_cayley_neumann=False, **FC, **HEAD)),
    case("oft_blocks", "OFT", "bert", dict(
        r=4, oft_block_size=0, num_cayley_neumann_terms=3, target_modules=["query", "value"])),
    case("oft_share", "OFT", "mlp", dict(
        oft_block_size=4, block_share=True, target_modules=["fc2"])),
    case("oft_adjusted", "OFT", "mlp", dict(oft_block_size=3, target_modules=["fc1"])),
    case("oft_embedding", "OFT", "tokens", dict(oft_block_size=3, target_modules=["emb", "fc"])),
    case("oft_conv1x1", "OFT", "conv2d", dict(oft_block_size=5, target_modules=["conv3"])),
    case("oft_conv3x3", "OFT", "conv2d_circular", dict(oft_block_size=3, target_modules=["conv"]),
         peft_wrong=OFT_CONV),
    case("boft", "BOFT", "mlp", dict(boft_block_size=2, **FC)),
    case("boft_number", "BOFT", "bert", dict(
        boft_block_size=0, boft_block_num=4, target_modules=["query", "value"])),
    case("boft_conv2d", "BOFT", "conv2d_dilated", dict(
        boft_block_size=3, target_modules=["conv"], bias="boft_only"),
         peft_wrong="PEFT 0.21.2 leaves the dilation out of its convolution; forward fails"),
    case("fourier_ft", "FourierFT", "mlp", dict(n_frequency=20, **FC)),
    case("fourier_ft_patterns", "FourierFT", "stack", dict(
        n_frequency=20, scaling=10.0, random_loc_seed=5, n_frequency_pattern={"value": 7},
        target_modules=["query", "value"])),
    case("ada_lora", "AdaLora", "mlp", dict(init_r=4, target_r=2, total_step=10, **FC)),
    case("ada_lora_bias", "AdaLora", "mlp", dict(
        init_r=3, lora_alpha=5, total_step=10, bias="lora_only", **FC, **HEAD)),
    case("ada_lora_gpt2", "AdaLora", "gpt2_mlp", dict(
        init_r=3, total_step=10, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)),
    case("ada_lora_conv2d", "AdaLora", "conv2d", dict(init_r=3, total_step=10, **CONV)),
    case("tokens", "TrainableTokens", "tokens", dict(
        token_indices=[7, 1, 10], target_modules=["emb"])),
    case("tokens_default", "TrainableTokens", "causal_tokens", dict(token_indices=[0, 3])),
    case("beft", "Beft", "mlp", dict(**FC, **HEAD)),
    case("fourier_ft_gpt2", "FourierFT", "gpt2_mlp", dict(
        n_frequency=30, scaling=10.0, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)),
    case("vblora", "VBLoRA", "mlp", dict(**BANK, **FC)),
    case("vblora_bias", "VBLoRA", "mlp", dict(
        r=3, num_vectors=9, vector_length=2, topk=3, bias="vblora_only", **FC, **HEAD)),
    case("vblora_bert", "VBLoRA", "bert", dict(
        r=2, num_vectors=5, vector_length=8, topk=4, target_modules=["query", "value"])),
    case("vblora_gpt2", "VBLoRA", "gpt2_mlp", dict(
        r=2, num_vectors=6, vector_length=3, target_modules=["c_fc"], fan_in_fan_out=True)),
    case("vblora_bfloat16", "VBLoRA", "mlp", dict(**BANK, **FC), base_dtype=torch.bfloat16),
    case("vblora_dropout", "VBLoRA", "mlp", dict(vblora_dropout=0.3, **BANK, **FC), train=True),
]


# ---- What make_lora's machinery asks of a tuner ---------------------------------------------

current = None  # the case at hand


def config_class(**fields):
    return getattr(peft, current.tuner + "Config")(**fields)


def randomise(model):
    """Trained-looking values: rotations stay small, as their cut-off series wants."""
    generator = torch.Generator().manual_seed(3)
    size = {"OFT": 0.1, "BOFT": 0.4, "LoKr": 0.3, "AdaLora": 0.3}.get(current.tuner, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise)


# ---- The equations --------------------------------------------------------------------------


def pattern(config, field, module, default):
    return make_lora.pattern_value(config.get(field) or {}, module, default)


def vera_matrix(config, t, shared, matrix):
    a = shared["vera_A"][:, : matrix.shape[1]]
    b = shared["vera_B"][: matrix.shape[0]]
    lambda_b, lambda_d = t["vera_lambda_b"], t["vera_lambda_d"]
    return matrix + torch.diag(lambda_b) @ b @ torch.diag(lambda_d) @ a


def vera_projections(config, shapes):
    """A and B from the seed: uniform with variance 2 / fan_in."""
    columns, rows = max(s[1] for s in shapes), max(s[0] for s in shapes)
    generator = torch.Generator().manual_seed(config["projection_prng_key"])
    draw = lambda n, m: torch.empty(n, m).uniform_(
        -math.sqrt(3) * math.sqrt(2) / math.sqrt(m),
        math.sqrt(3) * math.sqrt(2) / math.sqrt(m),
        generator=generator,
    )
    a = draw(config["r"], columns)
    return {"vera_A": a.double(), "vera_B": draw(rows, config["r"]).double()}


def vblora(config, t, bank, matrix):
    def pieces(name):
        if name + "_topk_weights" in t:
            given, places = t[name + "_topk_weights"], t[name + "_topk_indices"].long()
            given = torch.cat([given, 1 - given.sum(-1, keepdim=True)], -1)
            weights = torch.zeros(*places.shape[:2], len(bank), dtype=given.dtype)
            weights = weights.scatter(-1, places, given)
        else:
            least = t[name].sort(-1, descending=True).values[..., config["topk"] - 1].unsqueeze(-1)
            weights = t[name].exp() * (t[name] >= least)
            weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("nmv,vl->nml", weights, bank)

    a, b = pieces("vblora_logits_A"), pieces("vblora_logits_B")
    a = torch.stack([torch.cat(list(row)) for row in a])  # [r, in]
    b = torch.cat([piece.T for piece in b])  # [out, r]
    return matrix + b @ a


def cores(t, a, b):
    return torch.einsum("ijkl,ip,jq->pqkl", t, a, b)


def loha(config, t, module, weight):
    r = pattern(config, "rank_pattern", module, config["r"])
    s = pattern(config, "alpha_pattern", module, config["alpha"]) / r
    factors = []
    for i in "12":
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        factors.append(cores(t[f"hada_t{i}"], a, b) if f"hada_t{i}" in t else a @ b)
    return weight + s * (factors[0] * factors[1]).reshape(weight.shape)


def lokr(config, t, module, weight):
    r = pattern(config, "rank_pattern", module, config["r"])
    s = pattern(config, "alpha_pattern", module, config["alpha"]) / r
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = cores(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    if w2.dim() == 3:  # PEFT takes w1 for [1, l, m]: the same product in another order
        product = torch.einsum("lm,knz->klnmz", w1, w2)
        return weight + s * product.reshape(weight.shape)
    # Σ over the four indices, without torch.kron.
    rest = w2.reshape(w2.shape[0], w2.shape[1], -1)
    product = torch.einsum("lm,knz->lkmnz", w1, rest)
    return weight + s * product.reshape(weight.shape)


def hra(config, t, weight):
    matrix = weight.flatten(1)
    u = t["hra_u"]
    if config["apply_GS"]:
        u, r = torch.linalg.qr(u)
        return (matrix - 2 * matrix @ u @ u.T).view(weight.shape)
    for i in range(u.shape[1]):
        v = u[:, i] / u[:, i].norm()
        matrix = matrix @ (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v))
    return matrix.view(weight.shape)


def oft(config, t, weight, embedding):
    upper = t["oft_embedding_R.weight" if embedding else "oft_R.weight"]
    matrix = weight.flatten(1)
    b = round((1 + math.sqrt(1 + 8 * upper.shape[1])) / 2)
    blocks = []
    for row in upper.expand(matrix.shape[1] // b, -1):
        q = torch.zeros(b, b, dtype=row.dtype)
        above = torch.triu_indices(b, b, 1)
        q = q.index_put((above[0], above[1]), row)
        q = q - q.T
        one = torch.eye(b, dtype=row.dtype)
        if config["use_cayley_neumann"]:
            # I + 2Q + ... + 2Q^(k-1) + Q^k; k is 3 for 3 terms as for 4
            k = max(config["num_cayley_neumann_terms"] - 1, 3)
            r = one + sum(2 * torch.linalg.matrix_power(q, i) for i in range(1, k))
            r = r + torch.linalg.matrix_power(q, k)
        else:
            r = (one - q) @ torch.linalg.inv(one + q)
        blocks.append(r)
    rotation = torch.block_diag(*blocks)
    return (matrix @ (rotation if embedding else rotation.T)).view(weight.shape)


def boft(config, t, weight):
    matrix = weight.flatten(1)
    assert t["boft_R"].shape[0] == 1  # PEFT has no more without its CUDA extension
    blocks = []
    for free in t["boft_R"][0]:
        q = (free - free.T) / 2
        one = torch.eye(q.shape[0], dtype=q.dtype)
        blocks.append((one - q) @ torch.linalg.inv(one + q))
    return (t["boft_s"].reshape(-1, 1) * (matrix @ torch.block_diag(*blocks).T)).view(weight.shape)


def fourier_ft(config, t, module, weight):
    values = t["fourierft_spectrum"]
    n, m = weight.shape
    generator = torch.Generator().manual_seed(config["random_loc_seed"])
    places = torch.randperm(n * m, generator=generator)[: len(values)]
    # The inverse transform written out: Σ F[u, v] cos(2π (u x / n + v y / m)) / (n m).
    u, v = (places // m).double(), (places % m).double()
    x, y = torch.arange(n).double(), torch.arange(m).double()
    angle = 2 * math.pi * (
        u[:, None, None] * x[None, :, None] / n + v[:, None, None] * y[None, None, :] / m
    )
    delta = (values[:, None, None] * torch.cos(angle)).sum(0) / (n * m)
    return weight + config["scaling"] * delta


def ada_lora(config, t, weight):
    product = t["lora_B"] @ torch.diag(t["lora_E"][:, 0]) @ t["lora_A"]
    s = config["lora_alpha"] / (config["init_r"] + 1e-5)
    return weight + s * product.view(weight.shape)


def tokens(config, t, weight):
    keep = torch.ones(len(weight), 1, dtype=weight.dtype)
    keep[config["token_indices"]] = 0
    place = torch.zeros(len(weight), len(config["token_indices"]), dtype=weight.dtype)
    for column, row in enumerate(config["token_indices"]):
        place[row, column] = 1
    return weight * keep + place @ t["trainable_tokens_delta"]


def effective_parameters(network, base, config, adapter):
    modules = dict(network.named_modules())
    result = dict(base)
    by_module, shared, plain = {}, {}, {}
    for key, tensor in adapter.items():
        if key.startswith("base_model.v"):  # VeRA's matrices, VB-LoRA's bank: no layer's
            shared[key.removeprefix("base_model.")] = tensor
            continue
        name = key.removeprefix(PREFIX)
        for word in ("vera_", "vblora_", "hada_", "lokr_", "hra_", "oft_", "boft_", "fourierft_",
                     "lora_", "trainable_tokens_", "beft_"):
            at = name.find("." + word)
            if at >= 0:
                by_module.setdefault(name[:at], {})[name[at + 1 :]] = tensor
                break
        else:
            if ".original_module." not in name and ".modules_to_save." not in name:
                plain[name.replace(".base_layer", "")] = tensor
    result.update(plain)

    def turned(module):  # GPT-2's Conv1D, [in, out]
        return type(modules[module]).__name__ == "Conv1D"

    if current.tuner == "Vera" and not shared:
        shapes = [
            base[m + ".weight"].T.shape if turned(m) else base[m + ".weight"].shape
            for m in by_module
        ]
        shared = vera_projections(config, shapes)
    for module, t in by_module.items():
        weight = result[module + ".weight"]
        weight = weight.T if turned(module) else weight
        embedding = isinstance(modules[module], nn.Embedding)
        new = {
            "Vera": lambda: vera_matrix(config, t, shared, weight),
            "VBLoRA": lambda: vblora(config, t, shared["vblora_vector_bank"], weight),
            "LoHa": lambda: loha(config, t, module, weight),
            "LoKr": lambda: lokr(config, t, module, weight),
            "HRA": lambda: hra(config, t, weight),
            "OFT": lambda: oft(config, t, weight, embedding),
            "BOFT": lambda: boft(config, t, weight),
            "FourierFT": lambda: fourier_ft(config, t, module, weight),
            "AdaLora": lambda: ada_lora(config, t, weight),
            "TrainableTokens": lambda: tokens(config, t, weight),
            "Beft": lambda: weight,
        }[current.tuner]()
        result[module + ".weight"] = new.T if turned(module) else new
        if "beft_bias" in t:
            own = result.get(module + ".bias", 0)
            result[module + ".bias"] = own + t["beft_bias"][0]
    return result


# ---- Initial values, and base weights that are there already ---------------------------------

INITIAL = [
    case("init_ada_lora", "AdaLora", "mlp", dict(init_r=3, total_step=10, **FC)),
    case("init_beft", "Beft", "mlp", dict(init_weights=False, **FC)),
    case("init_vera", "Vera", "mlp", dict(
        r=6, init_weights=False, save_projection=False, **FC)),
    case("init_vblora", "VBLoRA", "mlp", dict(
        r=2, num_vectors=7, vector_length=2, init_vector_bank_bound=0.5, init_logits_std=0.3, **FC)),
    case("init_loha", "LoHa", "mlp", dict(r=2, **FC)),
    case("init_loha_core", "LoHa", "conv2d", dict(r=2, use_effective_conv2d=True, **CONV)),
    case("init_lokr", "LoKr", "mlp", dict(r=2, **FC)),
    case("init_lokr_both", "LoKr", "bert", dict(
        r=1, decompose_both=True, init_weights=False, target_modules=["query", "value"])),
    case("init_lokr_lycoris", "LoKr", "conv2d", dict(r=1, init_weights="lycoris", **CONV)),
    case("init_hra", "HRA", "mlp", dict(r=4, **FC)),
    case("init_fourier_ft", "FourierFT", "mlp", dict(n_frequency=20, **FC)),
    case("init_oft", "OFT", "mlp", dict(oft_block_size=2, init_weights=False, **FC)),
    case("init_boft", "BOFT", "mlp", dict(boft_block_size=2, init_weights=False, **FC)),
]


def write_initial(one):
    """What each tensor starts as after torch.manual_seed(0); the adapter's folder has no tensors."""
    folder = make_lora.DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    base = make_lora.base_network(one)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config_class(**one.config))
    tensors = peft.get_peft_model_state_dict(model)
    tensors = {k: v.clone() for k, v in tensors.items() if "base_model.vera_" not in k}
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    save_file({}, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file({"initial." + k: v for k, v in tensors.items()}, folder / "expected.safetensors")
    facts = {"network": one.network, "seed": 0}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{one.name:26s} {len(tensors)} tensors")


# ---- What PEFT runs and does not train -------------------------------------------------------

EVAL = [
    case("eval_vblora_topk", "VBLoRA", "mlp", dict(save_only_topk_weights=True, **BANK, **FC, **HEAD)),
    case("eval_vblora_topk_int16", "VBLoRA", "bert", dict(
        r=2, num_vectors=256, vector_length=8, topk=3, save_only_topk_weights=True,
        target_modules=["query", "value"])),
    case("eval_vblora_topk_one", "VBLoRA", "gpt2_mlp", dict(
        r=2, num_vectors=6, vector_length=3, topk=1, save_only_topk_weights=True,
        target_modules=["c_fc"], fan_in_fan_out=True)),
]


def write_eval(one):
    """The output and the merged weights of an adapter that PEFT refuses to train."""
    folder = make_lora.DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    make_lora.save_adapter(one, folder / "adapter")
    inputs = make_lora.network_inputs(one)

    def load():
        return peft.PeftModel.from_pretrained(make_lora.base_network(one), folder / "adapter").eval()

    model = load()
    with torch.no_grad():
        output = make_lora.networks.run(model, inputs)
    names = make_lora.own_parameters(one)
    merged = {k: v.clone() for k, v in load().merge_and_unload().state_dict().items() if k in names}
    try:
        make_lora.networks.run(model.train(), inputs)
        raise AssertionError("PEFT trains it")
    except RuntimeError as error:
        assert "save_only_topk_weights" in str(error), error

    config = make_lora.config_of(folder / "adapter")
    adapter = {k: v.double() for k, v in make_lora.weights_of(folder / "adapter").items()}
    exact = effective_parameters(
        make_lora.base_network(one).double(), {k: v.double() for k, v in names.items()}, config, adapter)
    distance = max(make_lora.distance(merged[k], exact[k]) for k in merged)
    assert distance < 1e-6, (one.name, distance)
    result = {f"input.{i}": t for i, t in enumerate(inputs)}
    result.update({"output": output, **{"merged." + k: v for k, v in merged.items()}})
    save_file(names, folder / "base.safetensors")
    save_file({k: v.contiguous() for k, v in result.items()}, folder / "expected.safetensors")
    savable, _ = model.base_model.get_nb_savable_parameters()
    facts = {"network": one.network, "mode": "eval", "savable": savable}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{one.name:26s} {savable} savable, farthest from float64: {distance:.1e}")


# ---- AdaLoRA's ranks ------------------------------------------------------------------------

STEPS = case("steps_ada_lora", "AdaLora", "mlp", dict(
    init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2, deltaT=2, **FC))


def write_steps(one):
    """Ten steps of SGD with PEFT's allocator: E and the masks after each, and what is saved then."""
    folder = make_lora.DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    model = peft.get_peft_model(make_lora.base_network(one), config_class(**one.config))
    randomise(model)
    model.save_pretrained(folder / "start")
    model = model.train()
    parameters = make_lora.trainable_by_file_key(model)
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.2)
    inputs = make_lora.network_inputs(one)
    output = make_lora.networks.run(model, inputs)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    result = {"input.0": inputs[0], "target": target}
    for step in range(10):
        loss = nn.functional.mse_loss(make_lora.networks.run(model, inputs), target)
        penalty = [
            torch.norm(p @ p.T - torch.eye(4)) if key.endswith("lora_A")
            else torch.norm(p.T @ p - torch.eye(4))
            for key, p in parameters.items()
            if not key.endswith("lora_E")
        ]
        (loss + 0.5 * sum(penalty) / len(penalty)).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        result[f"loss.{step}"] = loss.detach().reshape(1)
        for key, p in parameters.items():
            result[f"step.{step}.{key}"] = p.detach().clone()
    result["output"] = make_lora.networks.run(model.eval(), inputs).detach()
    model.save_pretrained(folder / "adapter")
    for name in ("start", "adapter"):
        (folder / name / "README.md").unlink()
    save_file(make_lora.own_parameters(one), folder / "base.safetensors")
    save_file(result, folder / "expected.safetensors")
    facts = {"network": one.network, "mode": "eval"}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    left = {k: int(sum(v)) for k, v in model.peft_config["default"].rank_pattern.items()}
    print(f"{one.name:26s} {left}")


def share_base(one):
    """Lets the case name the base of make_lora.py's that is the same, instead of its own."""
    folder = make_lora.DATA / one.name
    own = (folder / "base.safetensors").read_bytes()
    for other in sorted((make_lora.DATA.parent / "lora").iterdir()):
        file = other / "base.safetensors"
        if file.exists() and file.read_bytes() == own:
            facts = json.loads((folder / "case.json").read_text())
            facts["base"] = f"../../lora/{other.name}/base.safetensors"
            (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
            (folder / "base.safetensors").unlink()
            return


def main():
    global current
    make_lora.LoraConfig = config_class
    warnings.simplefilter("ignore")
    make_lora.randomise = randomise
    make_lora.effective_parameters = effective_parameters
    make_lora.ungrouped = lambda case, network, base: (network, base)
    make_lora.ungrouped_b = lambda case, adapter: adapter
    wanted = sys.argv[1:]
    for one in CASES:
        if not wanted or one.name in wanted:
            current = one
            make_lora.write(one)
            share_base(one)
    for one in INITIAL:
        if not wanted or one.name in wanted:
            current = one
            write_initial(one)
            share_base(one)
    for one in EVAL:
        if not wanted or one.name in wanted:
            current = one
            write_eval(one)
            share_base(one)
    if not wanted or STEPS.name in wanted:
        current = STEPS
        write_steps(STEPS)
        share_base(STEPS)


if __name__ == "__main__":
    main()
