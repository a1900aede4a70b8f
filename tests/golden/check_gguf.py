"""Reads GGUF adapters that libpeft wrote with gguf-py and compares what they add to each weight.

    python check_gguf.py FOLDER ...

A FOLDER holds case.json (architecture, heads, kv_heads), adapter/ (the same LoRA as HF PEFT's
files) and adapter.gguf, or folders of that kind. Exit status: 0 all equal, 1 a difference, 77
gguf is not installed.
"""

import json
import math
import re
import sys
from pathlib import Path

try:
    import gguf
    import torch
    from safetensors.torch import load_file
except ImportError as error:
    print(f"skipped: gguf is not installed ({error})")
    sys.exit(77)


def field(reader, key):
    return reader.get_field(key).contents()


def scaling(config, module, rank):
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def from_rope(rows, heads):
    """llama.cpp's order of a query's or key's rows back to HF's."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def tensor(reader, name):
    entry = next(t for t in reader.tensors if t.name == name)
    assert entry.data_offset % 32 == 0, (name, entry.data_offset)
    shape = tuple(int(n) for n in reversed(entry.shape))
    values = gguf.quants.dequantize(entry.data, entry.tensor_type)
    return torch.from_numpy(values.reshape(shape).copy()).double()


def check(folder):
    facts = json.loads((folder / "case.json").read_text())
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "adapter.type") == "lora"
    assert field(reader, "general.architecture") == facts["architecture"]
    alpha = field(reader, "adapter.lora.alpha")
    assert alpha != 0
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == facts["architecture"])
    names = gguf.get_tensor_name_map(arch, 64)
    found, worst = 0, 0.0
    for key, value in state.items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?", key)
        if not match:
            continue
        module, embedding = match[1], match[2]
        a, b = value.double(), state[key.replace("_A", "_B")].double()
        want = scaling(config, module, a.shape[0]) * (b @ a)
        name = names.get_name(module.removeprefix("bert.") + ".weight", try_suffixes=(".weight",))
        a, b = tensor(reader, name + ".lora_a"), tensor(reader, name + ".lora_b")
        got = alpha / b.shape[1] * (b @ (a.T if embedding else a))
        if facts["architecture"] == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
            got = from_rope(got, facts["heads" if "attn_q" in name else "kv_heads"])
        assert got.shape == want.shape, (name, got.shape, want.shape)
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
        found += 1
    assert 2 * found == len(reader.tensors), (found, len(reader.tensors))
    assert worst < facts.get("tolerance", 1e-6), worst
    return f"{found} weights, changes differ by {worst:.1e}"


if __name__ == "__main__":
    failed = 0
    folders = [
        folder
        for argument in map(Path, sys.argv[1:])
        for folder in ([argument] if (argument / "case.json").exists() else sorted(argument.iterdir()))
    ]
    for folder in folders:
        try:
            print(f"ok     {folder.name:20s} {check(folder)}")
        except Exception as error:
            failed += 1
            print(f"FAILED {folder.name:20s} {type(error).__name__}: {error}")
    print(f"{len(folders) - failed} of {len(folders)} files say in gguf-py what the adapters say")
    sys.exit(1 if failed or not folders else 0)
