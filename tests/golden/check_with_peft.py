"""Loads adapters that libpeft wrote with HF PEFT and compares the outputs.

    python check_with_peft.py FOLDER ...

A FOLDER is one case, or holds cases. A case has case.json (network, dtype, trainable),
base.safetensors, adapter/ (what peft::save wrote) and numbers.safetensors (input.0, ...,
output). Exit status: 0 all equal, 1 a difference, 77 PEFT is not installed.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora.layer import MultiheadAttention
    from safetensors.torch import load_file
    from torch import nn
except ImportError as error:
    print(f"skipped: peft is not installed ({error})")
    sys.exit(77)

import networks

torch.set_num_threads(1)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}


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


def difference(left, right):
    """The largest difference, relative to the largest value."""
    left, right = left.double(), right.double()
    return ((left - right).abs().max() / right.abs().max()).item()


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


def check(folder):
    """One line of what was found, and whether all is well."""
    facts = json.loads((folder / "case.json").read_text())
    dtype = getattr(torch, facts["dtype"])
    network = networks.build(facts["network"]).to(dtype)
    base = load_file(folder / "base.safetensors")
    problems = network.load_state_dict(base, strict=False)
    assert not problems.unexpected_keys, problems
    assert not set(problems.missing_keys) & {k for k, _ in network.named_parameters()}, problems

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(network, folder / "adapter", is_trainable=True).eval()
    said = [str(w.message).splitlines()[0] for w in caught]
    said = [text for text in said if "groups > 1" not in text and "deprecated" not in text]
    missing, unexpected = keys_not_matched(model, folder)
    trainable = model.get_nb_trainable_parameters()[0]
    remark = ""
    if out_proj_added_twice() and halve_out_proj(model):
        remark = ", out_proj's delta halved because this PEFT adds it twice"

    numbers = load_file(folder / "numbers.safetensors")
    inputs = [numbers[key] for key in sorted(numbers) if key.startswith("input.")]
    distance = difference(networks.run(model, inputs), numbers["output"])
    complaints = [f"missing {sorted(missing)}"] if missing else []
    complaints += [f"unexpected {sorted(unexpected)}"] if unexpected else []
    complaints += [f"warning: {text}" for text in said]
    if trainable != facts["trainable"]:
        complaints.append(f"{trainable} trainable here, {facts['trainable']} there")
    if not distance <= TOLERANCE[dtype]:
        complaints.append("another output")
    text = f"{trainable} trainable, output differs by {distance:.1e}{remark}"
    return "; ".join([text, *complaints]), not complaints


def main(arguments):
    cases = []
    for argument in map(Path, arguments):
        cases += (
            [argument]
            if (argument / "case.json").exists()
            else sorted(path.parent for path in argument.glob("*/case.json"))
        )
    if not cases:
        print("there is no case in", *arguments)
        return 1
    failed = 0
    for folder in cases:
        try:
            text, well = check(folder)
        except Exception as error:
            text, well = f"{type(error).__name__}: {error}", False
        failed += not well
        print(f"{'ok    ' if well else 'FAILED'} {folder.name:26s} {text}")
    print(f"{len(cases) - failed} of {len(cases)} adapters give the same output in HF PEFT")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
