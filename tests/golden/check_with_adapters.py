"""Loads bottleneck adapters that libpeft wrote with `adapters` and compares the outputs.

    hub/bin/python check_with_adapters.py FOLDER ...

written_adapters.py says what a FOLDER holds, make_adapter_hub.py how `hub` is made.
"""

import json
import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    import adapters
    import torch
    from safetensors.torch import load_file
except ImportError as error:
    print(f"skipped: adapters is not installed ({error})")
    sys.exit(77)

import written_adapters

logging.getLogger("adapters").propagate = False  # what loading says is collected below
logging.getLogger("adapters").addHandler(logging.NullHandler())


class Messages(logging.Handler):
    """Warnings of the library, which tells in them what of a file it did not use."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def check(folder):
    facts = json.loads((folder / "case.json").read_text())
    network = written_adapters.base_network(folder, facts)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    adapters.init(network)
    with_head = (folder / "adapter" / "model_head.safetensors").exists()
    messages = Messages()
    logging.getLogger("adapters").addHandler(messages)
    try:
        name = network.load_adapter(
            str(folder / "adapter"), with_head=with_head, use_safetensors=True
        )
    finally:
        logging.getLogger("adapters").removeHandler(messages)
    network.set_active_adapters(name)
    network.eval()

    state = network.state_dict()
    wanted = {key for key in state if f".adapters.{name}." in key}
    file = load_file(folder / "adapter" / "adapter.safetensors")
    if with_head:
        file.update(load_file(folder / "adapter" / "model_head.safetensors"))
        wanted |= {key for key in state if key.startswith("classifier.")}
    different = [key for key in wanted & set(file) if not torch.equal(state[key], file[key])]
    moved = [
        key
        for key in set(before) & set(state)
        if key not in file and not torch.equal(before[key], state[key])
    ]
    distance, complaints = written_adapters.compare_outputs(folder, facts, network)
    for what, keys in (
        ("missing", wanted - set(file)),
        ("unexpected", set(file) - wanted),
        ("not loaded", different),
        ("base changed", moved),
    ):
        complaints += [f"{what} {sorted(keys)}"] if keys else []
    complaints += [f"warning: {text}" for text in messages.texts]
    trained = sum(value.numel() for value in file.values())
    if trained != facts["trainable"]:
        complaints.append(f"{trained} trained here, {facts['trainable']} there")
    text = f"{trained} trained, output differs by {distance:.1e}"
    return "; ".join([text, *complaints]), not complaints


if __name__ == "__main__":
    sys.exit(written_adapters.main(sys.argv[1:], check, "adapters"))
