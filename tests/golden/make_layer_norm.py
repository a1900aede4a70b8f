"""Writes data/layer_norm/: LayerNorm tuning by HF PEFT.

    pip install -r requirements.txt
    python make_layer_norm.py

The networks are those of data/models (make_models.py). A folder holds the adapter as PEFT wrote
it (values made non-trivial), its output and loss, the gradients and the values after three steps
of SGD by the file's keys. Before anything is written, the output is computed again in float64
with the values put into a network that knows no PEFT.
"""

import json
import os
import shutil
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets: fix their order
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LNTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

import tiny_models

DATA = Path(__file__).resolve().parent / "data" / "layer_norm"
LEARNING_RATE = 0.1
STEPS = 3
CASES = {
    "bert": dict(
        task_type="SEQ_CLS", target_modules=["LayerNorm"], modules_to_save=["classifier"]
    ),
    "llama": dict(task_type="CAUSAL_LM"),  # PEFT knows what LLaMA's norms are called
}

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def base_network(name):
    network = tiny_models.load(name)
    network.name_or_path = name  # goes into adapter_config.json
    return network.requires_grad_(False)


def call_of(name):
    ids, mask = tiny_models.padded_ids(name, "right")
    labels = tiny_models.class_labels() if name == "bert" else ids.masked_fill(mask == 0, -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def randomise(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.2 * noise)


def by_key(model):
    """Trainable parameters by the key of the adapter's file."""
    saved = get_peft_model_state_dict(model)
    keys = {value.data_ptr(): key for key, value in saved.items()}
    return {keys[p.data_ptr()]: p for p in model.parameters() if p.requires_grad}


def plain_loss(name, parameters):
    """Logits and loss in float64, without PEFT."""
    network = base_network(name).double()
    values = {
        key.removeprefix("base_model.model.").replace(".ln_tuning_layers", ""): value
        for key, value in parameters.items()
    }
    known = dict(network.named_parameters())
    assert set(values) <= set(known), set(values) - set(known)
    with torch.no_grad():
        for key, value in values.items():
            known[key].copy_(value)
        output = network(**call_of(name))
    return output.logits, output.loss


def close(left, right, tolerance):
    scale = right.abs().max().clamp_min(1e-30)
    assert ((left.double() - right.double()).abs().max() / scale).item() < tolerance


def make(name, options):
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = get_peft_model(base_network(name), LNTuningConfig(**options)).eval()
    randomise(model)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()

    call = call_of(name)
    parameters = by_key(model)
    result = {key: value for key, value in call.items()}
    plain = plain_loss(name, parameters)
    optimizer = torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        output = model(**call)
        output.loss.backward()
        if step == 0:
            close(output.logits, plain[0], 2e-6)
            close(output.loss, plain[1], 2e-6)
            result["output"] = output.logits.detach().clone()
            result["loss"] = output.loss.detach().reshape(1).clone()
            for key, parameter in parameters.items():
                result["gradient." + key] = parameter.grad.clone()
        optimizer.step()
    for key, parameter in parameters.items():
        result["step." + key] = parameter.detach().clone()
    mask = call["attention_mask"]
    if name != "bert":  # what a padded query gives is nobody's business
        result["output"] = result["output"] * mask.unsqueeze(-1)
    save_file(result, folder / "reference.safetensors")
    facts = dict(
        trainable=sum(p.numel() for p in parameters.values()),
        learning_rate=LEARNING_RATE,
        steps=STEPS,
    )
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(name, facts)


for case in CASES.items():
    make(*case)
