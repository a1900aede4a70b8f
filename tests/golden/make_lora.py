"""Writes the LoRA golden files under data/lora/: what HF PEFT saves, and what it computes.

    pip install -r requirements.txt
    python make_lora.py [CASE ...]

One folder a case; README.md beside this script says what is in it. Every number is checked
here against the published equations in float64 before it is written. Where PEFT is wrong (the
case says how), the equations' numbers are written instead. The files come out identical on
every run on one kind of CPU.
"""

import json
import math
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Optional

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets: fix their order
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import networks

DATA = Path(__file__).resolve().parent / "data" / "lora"
PREFIX = "base_model.model."
LEARNING_RATE = 0.1
STEPS = 3
DROPOUT_SEED = 17
PEFT_VERSION = "0.21.2"

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@dataclass
class Case:
    name: str
    network: str
    config: dict
    base_dtype: torch.dtype = torch.float32
    train: bool = False  # run in train mode, seeded just before the forward
    edit: Optional[Callable] = None  # changes the saved folder
    peft_loads: bool = True  # whether PEFT itself can read the edited folder
    peft_wrong: str = ""  # why the equations are written instead of PEFT's numbers
    mergeable: bool = True
    optional_keys: list = field(default_factory=list)  # keys that a re-save may leave out
    note: str = ""


# ---- Editing what PEFT saved ----------------------------------------------------------------


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def write_weights(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def write_config(folder, config):
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text)


def change_config(**changes):
    def edit(folder):
        write_config(folder, {**config_of(folder), **changes})

    return edit


def minimal_config(folder):
    kept = ("peft_type", "r", "lora_alpha", "target_modules")
    write_config(folder, {key: config_of(folder)[key] for key in kept})


def change_keys(rename):
    def edit(folder):
        write_weights(folder, {rename(key): value for key, value in weights_of(folder).items()})

    return edit


def to_float16(folder):
    write_weights(folder, {key: value.half() for key, value in weights_of(folder).items()})


def to_pickle(folder):
    torch.save(weights_of(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


# ---- Cases ----------------------------------------------------------------------------------

QV = dict(r=4, lora_alpha=8, target_modules=["query", "value"])
MHA_NOTE = (
    "PEFT 0.21.2 adds the out_proj delta twice, in forward and in merge (its pull request 3774); "
    "its gradients are those of adding it once to a weight that holds it twice"
)

CASES = [
    Case("mlp", "mlp", dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"])),
    Case("rslora", "mlp", dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"], use_rslora=True)),
    Case(
        "patterns",
        "stack",
        dict(
            QV,
            rank_pattern={
                "encoder.layer.0.query": 2,
                "query": 6,
                r"^decoder\.block\.[01]\.value": 3,
            },
            alpha_pattern={"value": 5, r"encoder\.layer\.[12]\.query": 3},
        ),
        note="the first pattern in the file's (sorted) order that matches the end of the name wins",
    ),
    Case(
        "layers",
        "stack",
        dict(QV, layers_to_transform=1),
        note="no layers_pattern: any list of layers",
    ),
    Case("layers_pattern", "stack", dict(QV, layers_to_transform=[0, 2], layers_pattern=["layer"])),
    Case("regex", "stack", dict(QV, target_modules=r".*\.(layer\.[02]|block\.1)\.(query|value)")),
    Case("exclude", "stack", dict(QV, exclude_modules=["encoder.layer.1.query", "block.0.value"])),
    Case("exclude_regex", "stack", dict(QV, exclude_modules=r"decoder\..*")),
    Case("bias_all", "mlp", dict(r=4, lora_alpha=8, target_modules=["fc1"], bias="all")),
    Case(
        "bias_lora_only", "mlp", dict(r=4, lora_alpha=8, target_modules=["fc1"], bias="lora_only")
    ),
    Case(
        "lora_bias", "mlp", dict(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], lora_bias=True)
    ),
    Case(
        "modules_to_save",
        "mlp",
        dict(r=4, lora_alpha=8, target_modules=["fc1"], modules_to_save=["head"]),
    ),
    Case(
        "modules_to_save_bias_all",
        "mlp",
        dict(r=4, lora_alpha=8, target_modules=["fc1"], modules_to_save=["head"], bias="all"),
        optional_keys=[
            PREFIX + "head.modules_to_save.bias",
            PREFIX + "head.original_module.bias",
        ],
        note="PEFT writes head.bias three times; the plain name holds the trained one",
    ),
    Case("embedding", "tokens", dict(r=4, lora_alpha=8, target_modules=["emb"])),
    Case("embedding_linear", "tokens", dict(r=4, lora_alpha=8, target_modules=["emb", "fc"])),
    Case(
        "embedding_padded",
        "tokens_padded",
        dict(r=4, lora_alpha=8, target_modules=["emb"]),
        note="the padding column of A gets no gradient, B gets that of every token",
    ),
    Case(
        "embed_tokens",
        "causal_tokens",
        dict(r=4, lora_alpha=8, target_modules=["embed_tokens"]),
        optional_keys=[PREFIX + "embed_tokens.base_layer.weight"],
        note="PEFT stores the base weight of an adapted embed_tokens or lm_head",
    ),
    Case(
        "tied_output",
        "tied",
        dict(r=4, lora_alpha=8, target_modules=["out"]),
        mergeable=False,
        note="one weight, used twice, adapted in one use only: PEFT's merge would change the other too",
    ),
    Case("conv1d", "conv1d", dict(r=4, lora_alpha=8, target_modules=["conv"])),
    Case("conv2d", "conv2d", dict(r=4, lora_alpha=8, target_modules=["conv1", "conv2", "conv3"])),
    Case(
        "conv2d_bias",
        "conv2d",
        dict(r=3, lora_alpha=8, target_modules=["conv1", "conv3"], lora_bias=True),
    ),
    Case("conv3d", "conv3d", dict(r=4, lora_alpha=8, target_modules=["conv"])),
    Case(
        "conv2d_dilated",
        "conv2d_dilated",
        dict(r=4, lora_alpha=8, target_modules=["conv"]),
        peft_wrong="PEFT drops dilation from lora_A and fails",
    ),
    Case(
        "conv2d_circular",
        "conv2d_circular",
        dict(r=4, lora_alpha=8, target_modules=["conv"]),
        peft_wrong="PEFT drops padding_mode from lora_A: its forward and its merge differ",
    ),
    Case(
        "conv2d_reflect",
        "conv2d_reflect",
        dict(r=4, lora_alpha=8, target_modules=["conv"]),
        peft_wrong="PEFT drops padding_mode from lora_A: its forward and its merge differ",
    ),
    Case(
        "conv2d_groups",
        "conv2d_groups",
        dict(r=4, lora_alpha=8, target_modules=["conv"]),
        mergeable=False,
        note="lora_A sees all input channels, lora_B is grouped: no grouped weight equals the sum",
    ),
    Case(
        "attention",
        "attention",
        dict(r=4, lora_alpha=8, target_modules=["attn"]),
        peft_wrong=MHA_NOTE,
    ),
    Case(
        "attention_batch_first",
        "attention_batch_first",
        dict(r=4, lora_alpha=8, target_modules=["attn"]),
        peft_wrong=MHA_NOTE,
    ),
    Case(
        "attention_bias_all",
        "attention",
        dict(r=4, lora_alpha=8, target_modules=["attn"], bias="all"),
        peft_wrong=MHA_NOTE,
        note='bias="all" means names that end in ".bias": in_proj_bias stays frozen',
    ),
    Case(
        "minimal_config",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]),
        edit=minimal_config,
    ),
    Case(
        "no_prefix",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]),
        edit=change_keys(lambda key: key.removeprefix(PREFIX)),
        peft_loads=False,
    ),
    Case(
        "adapter_name_in_keys",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]),
        edit=change_keys(lambda key: key.replace(".weight", ".default.weight")),
        peft_loads=False,
    ),
    Case(
        "float16_file",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]),
        edit=to_float16,
    ),
    Case(
        "bfloat16_base",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]),
        base_dtype=torch.bfloat16,
        note="the adapter stays float32; output.float64 is the exact value",
    ),
    Case(
        "bert",
        "bert",
        dict(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
    ),
    Case("bert_all_linear", "bert", dict(r=2, lora_alpha=4, target_modules="all-linear")),
    Case(
        "all_linear_word",
        "mlp",
        dict(r=2, lora_alpha=4, target_modules="all-linear"),
        edit=change_config(target_modules="all-linear"),
    ),
    Case("pickle", "mlp", dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]), edit=to_pickle),
    Case(
        "unknown_field",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"]),
        edit=change_config(field_of_the_future={"list": [1, 2.5, None], "word": "kept"}),
    ),
    Case(
        "dropout",
        "mlp",
        dict(r=8, lora_alpha=16, target_modules=["fc1", "fc2"], lora_dropout=0.1),
        train=True,
        note="torch.manual_seed(17) just before each forward",
    ),
]


# ---- What PEFT computes ---------------------------------------------------------------------


def base_network(case):
    return networks.build(case.network, seed=1).to(case.base_dtype)


def network_inputs(case):
    tensors = networks.inputs(case.network, seed=2)
    return [t.to(case.base_dtype) if t.is_floating_point() else t for t in tensors]


def randomise(model):
    """Trained-looking values for everything that is trainable."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_" in key and not key.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.2 * noise)


def own_parameters(case):
    """The base network's parameters by every name they have."""
    return {
        key: value.detach().clone()
        for key, value in base_network(case).named_parameters(remove_duplicate=False)
    }


def save_adapter(case, folder):
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_network(case), LoraConfig(**case.config))
        randomise(model)
        model.save_pretrained(folder)
    (folder / "README.md").unlink()
    if case.edit:
        case.edit(folder)


def load_adapter(case, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base_network(case), folder, is_trainable=True)
    complaints = [str(w.message) for w in caught if "missing" in str(w.message)]
    assert not complaints, (case.name, complaints)
    return model.train() if case.train else model.eval()


def trainable_by_file_key(model):
    """The trainable parameters by the key they are saved under (the shortest where there are two)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_peft_model_state_dict(model)
    keys = {}
    for key in sorted(saved, key=len):
        keys.setdefault(saved[key].data_ptr(), key)
    return {keys[p.data_ptr()]: p for p in model.parameters() if p.requires_grad}


def train_three_steps(forward, parameters, target):
    """The first output and gradients, and the parameters after three plain SGD steps."""
    result = {}
    optimizer = torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        output = forward()
        loss = nn.functional.mse_loss(output, target)
        loss.backward()
        if step == 0:
            result["output"] = output.detach().clone()
            for key, parameter in parameters.items():
                result["gradient." + key] = parameter.grad.clone()
            result["loss"] = loss.detach().reshape(1).clone()
        optimizer.step()
    for key, parameter in parameters.items():
        result["step." + key] = parameter.detach().clone()
    return result


def peft_results(case, folder, target):
    model = load_adapter(case, folder)
    parameters = trainable_by_file_key(model)
    tensors = network_inputs(case)

    def forward():
        if case.train:
            torch.manual_seed(DROPOUT_SEED)
        return networks.run(model, tensors)

    result = train_three_steps(forward, parameters, target)
    trainable = sum(p.numel() for p in parameters.values())
    assert trainable == model.get_nb_trainable_parameters()[0], case.name
    if case.mergeable:
        merged = load_adapter(case, folder).eval().merge_and_unload()
        names = own_parameters(case)
        for key, value in merged.state_dict().items():
            if key in names:
                result["merged." + key] = value.detach().clone()
    return result, trainable


# ---- What the equations say -----------------------------------------------------------------


def pattern_value(patterns, module, default):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def effective_parameters(network, base, config, adapter):
    """W + s B A for every adapted weight, in the dtype of the tensors given; LoRA, equation 3."""
    modules = dict(network.named_modules())
    result = dict(base)
    for key, tensor in adapter.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight") or name.endswith(".lora_embedding_A"):
            embedding = name.endswith(".lora_embedding_A")
            end = ".lora_embedding_A" if embedding else ".lora_A.weight"
            module = name.removesuffix(end).replace(".base_layer", "")
            a, b = tensor, adapter[key.removesuffix(end) + end.replace("_A", "_B")]
            rank = a.shape[0]
            owner = module.removesuffix(
                ".out_proj"
            )  # PEFT looks patterns up for the whole attention
            owner = owner if isinstance(modules.get(owner), nn.MultiheadAttention) else module
            alpha = pattern_value(config.get("alpha_pattern") or {}, owner, config["lora_alpha"])
            expected = pattern_value(config.get("rank_pattern") or {}, owner, config["r"])
            assert rank == expected, (module, rank, expected)
            scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            if embedding:
                delta = (b @ a).T
            elif a.dim() == 2:
                conv1d = type(modules[module]).__name__ == "Conv1D"  # GPT-2's, [in, out]
                delta = (b @ a).T if conv1d else b @ a
            else:
                delta = torch.einsum("or,ri...->oi...", b.flatten(1), a)
            attention = isinstance(modules[module], nn.MultiheadAttention)
            weight = module + (".in_proj_weight" if attention else ".weight")
            result[weight] = result[weight] + scale * delta
            bias = adapter.get(key.removesuffix(end) + ".lora_B.bias")
            if bias is not None:
                result[module + ".bias"] = result[module + ".bias"] + scale * bias
        elif (
            "lora_" not in name
            and ".original_module." not in name
            and ".modules_to_save." not in name
        ):
            result[name.replace(".base_layer", "")] = tensor
    return result


def ungrouped(case, network, base):
    """A grouped convolution's network as one without groups: the sum that PEFT forms needs it."""
    if case.network != "conv2d_groups":
        return network, base
    dense = networks.ConvPlain2d(216, padding=1).eval().double()
    weight = torch.zeros_like(dense.conv.weight)
    grouped = base["conv.weight"]
    half_out, half_in = grouped.shape[0] // 2, grouped.shape[1]
    weight[:half_out, :half_in] = grouped[:half_out]
    weight[half_out:, half_in:] = grouped[half_out:]
    return dense, {**base, "conv.weight": weight}


def ungrouped_b(case, adapter):
    """lora_B of a grouped convolution with its zero blocks written out."""
    if case.network != "conv2d_groups":
        return adapter
    key = PREFIX + "conv.lora_B.weight"
    b = adapter[key]
    rows, columns = b.shape[0] // 2, b.shape[1]
    zero = torch.zeros(rows, columns, 1, 1, dtype=b.dtype)
    dense = torch.cat([torch.cat([b[:rows], zero], 1), torch.cat([zero, b[rows:]], 1)], 0)
    return {**adapter, key: dense}


def equation_results(case, config, adapter, trainable_keys, target, double_out_proj=False):
    """Everything that `peft_results` returns, from the equations in float64."""
    network = base_network(case).double()
    base = {key: value.double() for key, value in own_parameters(case).items()}
    network, base = ungrouped(case, network, base)
    adapter = {key: value.double() for key, value in adapter.items()}
    for key in trainable_keys:
        adapter[key].requires_grad_()
    if case.network == "tokens_padded":
        padding = torch.arange(11) == network.emb.padding_idx
        network.emb.padding_idx = None
        adapter[PREFIX + "emb.lora_embedding_A"].register_hook(lambda g: g.masked_fill(padding, 0))
    tensors = [t.double() if t.is_floating_point() else t for t in network_inputs(case)]

    def weights():
        used = ungrouped_b(case, adapter)
        if double_out_proj:
            key = PREFIX + "attn.base_layer.out_proj.lora_B.weight"
            used = {**used, key: 2 * used[key]}
        return effective_parameters(network, base, config, used)

    def forward():
        output = torch.func.functional_call(network, weights(), tuple(tensors), tie_weights=False)
        return networks.one_output(output)

    merged = {"merged." + key: value.detach().clone() for key, value in weights().items()}
    trained = {key: adapter[key] for key in trainable_keys}
    result = train_three_steps(forward, trained, target.double())
    return {**result, **(merged if case.mergeable else {})}


def distance(left, right):
    """The largest difference, relative to the largest value."""
    largest = right.double().abs().max().item()
    return (left.double() - right.double()).abs().max().item() / (largest or 1)


# ---- Writing --------------------------------------------------------------------------------


def all_tensors(folder):
    pickle = folder / "adapter_model.bin"
    return torch.load(pickle, weights_only=True) if pickle.exists() else weights_of(folder)


def write(case):
    folder = DATA / case.name
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(case, folder / "adapter")
    readable = folder / "adapter"
    if not case.peft_loads:  # let PEFT read the folder as it was before the edit
        readable = folder / "as_saved"
        save_adapter(replace(case, edit=None), readable)

    base = own_parameters(case)
    save_file(base, folder / "base.safetensors")
    output = networks.run(base_network(case), network_inputs(case))
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(output.shape, generator=generator).to(case.base_dtype)

    config = {**LoraConfig(**case.config).to_dict(), **config_of(readable)}
    adapter = all_tensors(readable)
    if case.peft_wrong and "dilat" in case.peft_wrong:
        peft, keys = {}, sorted(adapter)
        trainable = sum(adapter[key].numel() for key in keys)
    else:
        peft, trainable = peft_results(case, readable, target)
        keys = sorted(key.removeprefix("gradient.") for key in peft if key.startswith("gradient."))
    if not case.peft_loads:
        shutil.rmtree(readable)

    expected, worst = peft, None
    if not case.train:
        exact = equation_results(case, config, adapter, keys, target)
        if case.network.startswith(
            "attention"
        ):  # PEFT is what we say it is: right but for the factor
            twice = equation_results(case, config, adapter, keys, target, double_out_proj=True)
            assert distance(peft["output"], twice["output"]) < 1e-6, case.name
            assert distance(peft["output"], exact["output"]) > 1e-2, case.name
            for key in (k for k in twice if k.startswith("merged.")):
                assert distance(peft[key], twice[key]) < 1e-6, (case.name, key)
        if case.peft_wrong:
            expected = {key: value.float() for key, value in exact.items()}
            if peft:
                expected["peft.output"] = peft["output"]
        else:
            assert set(exact) == set(peft), set(exact) ^ set(peft)
            allowed = 1e-5 if case.base_dtype == torch.float32 else 4e-2
            worst = max((distance(peft[key], exact[key]), key) for key in exact)
            assert worst[0] < allowed, (case.name, worst)
            if case.base_dtype != torch.float32:
                expected["output.float64"] = exact["output"]

    tensors = {f"input.{i}": t for i, t in enumerate(network_inputs(case))}
    tensors["target"] = target
    save_file(
        {k: v.contiguous() for k, v in {**tensors, **expected}.items()},
        folder / "expected.safetensors",
    )
    facts = {
        "network": case.network,
        "trainable": trainable,
        "mode": "train" if case.train else "eval",
        "seed": DROPOUT_SEED,
        "learning_rate": LEARNING_RATE,
        "steps": STEPS,
        "base_dtype": str(case.base_dtype).removeprefix("torch."),
        "mergeable": case.mergeable,
        "optional_keys": case.optional_keys,
        "peft_wrong": case.peft_wrong,
        "note": case.note,
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(
        f"{case.name:26s} {trainable:5d} trainable, farthest from float64: "
        + (f"{worst[0]:.1e} ({worst[1]})" if worst else "-")
    )


# ---- Initial values -------------------------------------------------------------------------

INITIAL = {
    "init_mlp": ("mlp", ["fc1", "fc2"]),
    "init_tokens": ("tokens", ["emb", "fc"]),
    "init_conv2d": ("conv2d", ["conv1", "conv2", "conv3"]),
}


def write_initial(name):
    """lora_A (an embedding's B) as drawn after torch.manual_seed(0).

    PEFT's layers draw twice before the values they keep: what nn.Linear and nn.Embedding start as.
    """
    network, targets = INITIAL[name]
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {}
    for word, init in (("kaiming", True), ("gaussian", "gaussian")):
        base = networks.build(network, seed=1)
        torch.manual_seed(0)
        model = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=init)
        )
        saved = get_peft_model_state_dict(model)
        for key, value in saved.items():
            tensors[f"{word}.{key}"] = value.clone()
    save_file(own_parameters(Case(name, network, {})), folder / "base.safetensors")
    save_file(tensors, folder / "expected.safetensors")
    facts = {"network": network, "targets": targets, "r": 4, "alpha": 8, "seed": 0}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{name:26s} {len(tensors)} tensors")


# ---- What must be refused -------------------------------------------------------------------


def drop_key(key):
    return lambda folder: write_weights(
        folder, {k: v for k, v in weights_of(folder).items() if k != PREFIX + key}
    )


def add_key(key, shape):
    return lambda folder: write_weights(
        folder, {**weights_of(folder), PREFIX + key: torch.ones(shape)}
    )


def truncate(file, keep):
    def edit(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * keep)])

    return edit


def pickle_a_module(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.manual_seed(0)
    torch.save(nn.Linear(2, 2), folder / "adapter_model.bin")


MLP = dict(r=4, lora_alpha=8, target_modules=["fc1", "fc2"])
HEAD = dict(MLP, modules_to_save=["head"])

# name: (config, edit, words that the error must hold; "a|b" means one of them)
NEGATIVE = {
    "missing_key": (MLP, drop_key("fc2.lora_B.weight"), ["missing|lacks|no ", "fc2.lora_B.weight"]),
    "extra_key": (
        MLP,
        add_key("fc9.lora_A.weight", (4, 10)),
        ["unexpected|extra|unused|unknown", "fc9.lora_A.weight"],
    ),
    "wrong_shape": (
        MLP,
        add_key("fc1.lora_A.weight", (6, 10)),
        ["shape", "fc1.lora_A.weight", "[6, 10]", "[4, 10]"],
    ),
    "missing_head": (HEAD, drop_key("head.weight"), ["missing|lacks|no ", "head.weight"]),
    "broken_json": (MLP, truncate("adapter_config.json", 0.5), ["adapter_config.json"]),
    "config_not_an_object": (
        MLP,
        lambda folder: (folder / "adapter_config.json").write_text("[1, 2]"),
        ["adapter_config.json", "object"],
    ),
    "unknown_peft_type": (MLP, change_config(peft_type="FOO"), ["peft_type", "FOO"]),
    "no_config": (
        MLP,
        lambda folder: (folder / "adapter_config.json").unlink(),
        ["adapter_config.json"],
    ),
    "no_weights": (
        MLP,
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ["adapter_model.safetensors"],
    ),
    "truncated_weights": (
        MLP,
        truncate("adapter_model.safetensors", 0.7),
        ["adapter_model.safetensors"],
    ),
    "pickled_object": (MLP, pickle_a_module, ["adapter_model.bin"]),
    "no_target": (MLP, change_config(target_modules=None), ["target_modules"]),
    "target_unmatched": (
        MLP,
        change_config(target_modules=["fc1", "fc2", "fcc2"]),
        ["fcc2", "fc2"],
    ),
    "rank_zero": (MLP, change_config(r=0), ["r ", "positive|at least 1", "0"]),
    "rank_is_text": (MLP, change_config(r="eight"), ["adapter_config.json", "r"]),
    "unknown_bias": (MLP, change_config(bias="some"), ["bias", "some"]),
    "trainable_tokens": (
        MLP,
        change_config(trainable_token_indices=[1, 2]),
        ["trainable_token_indices"],
    ),
    "target_parameters": (
        MLP,
        change_config(target_parameters=["fc1.weight"]),
        ["target_parameters"],
    ),
    "layer_replication": (MLP, change_config(layer_replication=[[0, 1]]), ["layer_replication"]),
}


def reaction(case, folder):
    """What PEFT does with the folder."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(base_network(case), folder)
        except Exception as error:
            return "raises " + type(error).__name__
    return "warns" if caught else "loads without a word"


def write_negative(name):
    config, edit, words = NEGATIVE[name]
    folder = DATA / ("negative_" + name)
    shutil.rmtree(folder, ignore_errors=True)
    case = Case(name, "mlp", config, edit=edit)
    save_adapter(case, folder / "adapter")
    facts = {"network": "mlp", "base": "../mlp/base.safetensors", "words": words}
    facts["peft"] = reaction(case, folder / "adapter")
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{folder.name:32s} PEFT: {facts['peft']}")


def write_sharded():
    """The mlp's base weights in two files with an index, as HF writes large models."""
    folder = DATA / "sharded_base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = own_parameters(Case("mlp", "mlp", {}))
    index = {
        "metadata": {"total_size": sum(v.numel() * 4 for v in base.values())},
        "weight_map": {},
    }
    for number, part in enumerate(
        (["fc1.weight", "fc1.bias", "head.bias"], ["fc2.weight", "fc2.bias", "head.weight"])
    ):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({key: base[key] for key in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"].update({key: file for key in part})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n"
    )
    print("sharded_base")


def main():
    assert (
        peft.__version__ == PEFT_VERSION
    ), f"these files are PEFT {PEFT_VERSION}'s, found {peft.__version__}"
    chosen = sys.argv[1:]
    for case in CASES:
        if not chosen or case.name in chosen:
            write(case)
    for name in INITIAL:
        if not chosen or name in chosen:
            write_initial(name)
    for name in NEGATIVE:
        if not chosen or "negative_" + name in chosen:
            write_negative(name)
    if not chosen or "sharded_base" in chosen:
        write_sharded()


if __name__ == "__main__":
    main()
