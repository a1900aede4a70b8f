"""Loads adapters that libpeft wrote with HF PEFT and compares the outputs.

    python check_with_peft.py FOLDER ...

written_adapters.py says what a FOLDER holds.
"""

import contextlib
import json
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import torch
    from peft import (
        LoraConfig,
        PeftConfig,
        PeftModel,
        PromptLearningConfig,
        get_peft_model,
        get_peft_model_state_dict,
    )
    from peft.tuners.lora.layer import MultiheadAttention
    from safetensors.torch import load_file
    from torch import nn
except ImportError as error:
    print(f"skipped: peft is not installed ({error})")
    sys.exit(77)

import written_adapters


# About PEFT itself, or its own files just as well.
PEFT_ALWAYS_SAYS = (
    "groups > 1",
    "deprecated",
    "CUDA extension",
    "boft_n_butterfly_factor",
    "vera_A and vera_B",
    "did not match any targeted module",  # a pattern for a target_parameter did
    "Sparse invariant checks",
    "Unsupported layer type",  # LayerNorm tuning, of any norm
    "base layer has no bias term",  # BEFT, which adds one in forward
)


def out_proj_added_twice():
    """Whether this PEFT adds the delta of an attention's out_proj twice, as 0.21.2 does."""
    network = nn.Sequential(nn.MultiheadAttention(2, 1))
    with torch.no_grad():
        network[0].out_proj.weight.zero_()
    model = get_peft_model(network, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    adapter = layer.base_layer.out_proj
    with torch.no_grad():
        adapter.lora_A["default"].weight.fill_(1)
        adapter.lora_B["default"].weight.fill_(1)
    layer.merge()
    return bool(adapter.get_base_layer().weight[0, 0] > 1.5)


def halve_out_proj(model):
    """Makes such a PEFT add it once; the number of layers concerned."""
    layers = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
    with torch.no_grad():
        for layer in layers:
            layer.base_layer.out_proj.lora_B["default"].weight.mul_(0.5)
    return len(layers)


@contextlib.contextmanager
def exact_decompositions():
    """PEFT's KaSA decomposes and truncates the base in float32, which rounds all of it."""
    svd = torch.linalg.svd
    torch.linalg.svd = lambda matrix, **how: svd(matrix.double(), **how)
    try:
        yield
    finally:
        torch.linalg.svd = svd


def keys_not_matched(model, folder):
    """Adapter keys that the file lacks, and keys of the file that PEFT does not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = set(get_peft_model_state_dict(model))
    present = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
    # With bias="all" PEFT writes a saved module's bias under two more names, and it always writes
    # the base weight of a layer named embed_tokens or lm_head.
    repeats = (".original_module.", ".modules_to_save.", ".base_layer.weight")
    again = {key for key in wanted if any(part in key for part in repeats)}
    return wanted - present - again, present - wanted


def check_others(folder, facts, said):
    """What is to be complained of the adapters in folders beside the one at the top.

    Those of the same tuner join it in one model, as load_adapter does; PEFT takes others alone.
    """
    top = PeftConfig.from_pretrained(folder / "adapter").peft_type
    inputs = load_file(folder / "numbers.safetensors")
    inputs.pop("output")
    complaints = []
    for path in sorted((folder / "adapter").glob("*/adapter_config.json")):
        name = path.parent.name
        network = written_adapters.base_network(folder, facts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if PeftConfig.from_pretrained(path.parent).peft_type == top:
                model = PeftModel.from_pretrained(network, folder / "adapter")
                model.load_adapter(path.parent, adapter_name=name)
                model.set_adapter(name)
            else:
                model = PeftModel.from_pretrained(network, path.parent, adapter_name=name)
        said += [str(w.message).splitlines()[0] for w in caught]
        expected = load_file(folder / f"{name}.safetensors")["output"]
        with torch.no_grad():
            output = written_adapters.run(model.eval(), inputs)
        distance = written_adapters.difference(output, expected)
        if distance > written_adapters.TOLERANCE[expected.dtype]:
            complaints.append(f"another output of {name}, by {distance:.1e}")
    return complaints


def check(folder):
    """One line of what was found, and whether all is well."""
    facts = json.loads((folder / "case.json").read_text())
    network = written_adapters.base_network(folder, facts)
    # PEFT does not load prompts and prefixes for training.
    config = PeftConfig.from_pretrained(folder / "adapter")
    trains = not isinstance(config, PromptLearningConfig)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with exact_decompositions() if getattr(config, "kasa_config", None) else contextlib.nullcontext():
            model = PeftModel.from_pretrained(network, folder / "adapter", is_trainable=trains)
        model.eval()
    said = [str(w.message).splitlines()[0] for w in caught]
    others = check_others(folder, facts, said)
    said = [text for text in said if not any(words in text for words in PEFT_ALWAYS_SAYS)]
    missing, unexpected = keys_not_matched(model, folder)
    for key, parameter in model.named_parameters():
        if "ranknum" in key:  # that AdaLoRA trains where the base is not float32
            parameter.requires_grad_(False)
    trainable = model.get_nb_trainable_parameters()[0]
    remark = ""
    if out_proj_added_twice() and halve_out_proj(model):
        remark = ", out_proj's delta halved because this PEFT adds it twice"

    distance, complaints = written_adapters.compare_outputs(folder, facts, model)
    complaints += others
    complaints += [f"missing {sorted(missing)}"] if missing else []
    complaints += [f"unexpected {sorted(unexpected)}"] if unexpected else []
    complaints += [f"warning: {text}" for text in said]
    if trains and trainable != facts["trainable"]:
        complaints.append(f"{trainable} trainable here, {facts['trainable']} there")
    trained = f"{trainable} trainable" if trains else config.peft_type.value.lower()
    text = f"{trained}, output differs by {distance:.1e}{remark}"
    return "; ".join([text, *complaints]), not complaints


if __name__ == "__main__":
    sys.exit(written_adapters.main(sys.argv[1:], check, "HF PEFT"))
