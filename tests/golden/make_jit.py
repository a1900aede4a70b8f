"""Writes the TorchScript golden files under data/jit/, or traces a real model.

    python make_jit.py                            the small files
    python make_jit.py --trace MODEL_DIR OUT.pt   a Hugging Face encoder (MiniLM, say), traced for
                                                  (input_ids, attention_mask) -> last_hidden_state

The networks hold the weights of data/lora/mlp and data/lora/bert, so the adapters and the
expected values there apply to them too.
"""

import os
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # scripting writes sets: fix their order
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from torch import nn

import networks

DATA = Path(__file__).resolve().parent / "data" / "jit"

torch.set_num_threads(1)


class ScriptedMlp(nn.Module):
    """The mlp written with a branch, so that scripting it leaves control flow in the graph."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.fc2(torch.tanh(self.fc1(x))))
        if self.training:
            hidden = torch.nn.functional.dropout(hidden, 0.1)
        return self.head(hidden)


def trace(network, tensors):
    """A trace with HF's module names and one output tensor."""
    forward = type(network).forward
    if not isinstance(network, tuple(networks.PLAIN)):

        def one_output(self, input_ids, attention_mask):
            return networks.one_output(forward(self, input_ids, attention_mask))

        network.forward = one_output.__get__(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(network, tuple(tensors))


def without_debug_files(path):
    """Drops the source positions, which hold this machine's paths; the rest stays as it was."""
    entries = []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                entries.append((entry.filename, archive.read(entry)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def write(name, module, tensors):
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    module.save(str(folder / "model.pt"))
    without_debug_files(folder / "model.pt")
    output = torch.jit.load(str(folder / "model.pt"))(*tensors)
    expected = {f"input.{i}": t for i, t in enumerate(tensors)}
    save_file({**expected, "output": output.detach()}, folder / "expected.safetensors")
    size = (folder / "model.pt").stat().st_size
    print(f"{name:14s} {size} bytes, {len(list(module.named_parameters()))} parameters")


def main():
    if sys.argv[1:2] == ["--trace"]:
        trace_real(*sys.argv[2:])
        return
    mlp = networks.build("mlp", seed=1)
    write("mlp_traced", trace(mlp, networks.inputs("mlp", 2)), networks.inputs("mlp", 2))
    scripted = ScriptedMlp().eval()
    scripted.load_state_dict(mlp.state_dict())
    write("mlp_scripted", torch.jit.script(scripted), networks.inputs("mlp", 2))
    bert = networks.build("bert", seed=1)
    write("bert_traced", trace(bert, networks.inputs("bert", 2)), networks.inputs("bert", 2))


def trace_real(source, target):
    from transformers import AutoModel

    network = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    ids = torch.randint(1000, 2000, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    forward = type(network).forward

    def last_hidden_state(self, input_ids, attention_mask):
        return forward(self, input_ids, attention_mask).last_hidden_state

    network.forward = last_hidden_state.__get__(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, (ids, mask))
    traced.save(target)
    other = torch.randint(1000, 2000, (3, 9), generator=torch.Generator().manual_seed(1))
    loaded = torch.jit.load(target)
    difference = (
        (loaded(other, torch.ones_like(other)) - network(other, torch.ones_like(other))).abs().max()
    )
    print(
        f"{target}: {Path(target).stat().st_size} bytes; another batch differs by {difference:.1e}"
    )


if __name__ == "__main__":
    main()
