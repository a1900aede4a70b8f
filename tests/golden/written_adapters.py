"""What check_with_peft.py and check_with_adapters.py share: both run the networks of adapters that
libpeft wrote, and compare.

    python check_with_....py FOLDER ...

A FOLDER is one case, or holds cases. A case has case.json (network, dtype, trainable),
adapter/ (what peft::save wrote) and numbers.safetensors: the inputs (input.0, ...) and the
output. The network is one of networks.py with base.safetensors, or, "from": "models", one of
data/models. Exit status: 0 all equal, 1 a difference, 77 the library is not installed.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import networks
import tiny_models

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1.6e-2}
T5_TOLERANCE = 5e-6  # in float32: its scores are not divided by the root of their width


def base_network(folder, facts):
    dtype = getattr(torch, facts["dtype"])
    if facts.get("from") == "models":
        return tiny_models.load(facts["network"]).to(dtype)
    network = networks.build(facts["network"]).to(dtype)
    base = load_file(folder / "base.safetensors")
    problems = network.load_state_dict(base, strict=False)
    assert not problems.unexpected_keys, problems
    assert not set(problems.missing_keys) & {k for k, _ in network.named_parameters()}, problems
    return network


def run(model, numbers):
    """The output; zero where the query is padding."""
    inputs = {key: value for key, value in sorted(numbers.items()) if key != "output"}
    if "input_ids" not in inputs:
        return networks.run(model, list(inputs.values()))
    with torch.no_grad():
        output = model(**inputs)
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    if output.dim() == 2:
        return output
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    front = output.shape[1] - mask.shape[1]  # virtual tokens
    return output * nn.functional.pad(mask, (front, 0), value=1).unsqueeze(-1)


def difference(left, right):
    """The largest difference, relative to the largest value."""
    left, right = left.double(), right.double()
    return ((left - right).abs().max() / right.abs().max()).item()


def compare_outputs(folder, facts, model):
    """How far the output is from libpeft's, and what is to be complained of."""
    numbers = load_file(folder / "numbers.safetensors")
    output = run(model, numbers)
    assert output.shape == numbers["output"].shape, (output.shape, numbers["output"].shape)
    distance = difference(output, numbers["output"])
    allowed = TOLERANCE[getattr(torch, facts["dtype"])]
    if facts["network"].startswith("t5") and facts["dtype"] == "float32":
        allowed = T5_TOLERANCE
    return distance, [] if distance <= allowed else ["another output"]


def main(arguments, check, library):
    """Runs `check(folder)`, which gives one line and whether all is well, on every case."""
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
    print(f"{len(cases) - failed} of {len(cases)} adapters give the same output in {library}")
    return 1 if failed else 0
