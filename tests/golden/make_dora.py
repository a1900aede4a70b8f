"""Writes the DoRA golden files, data/lora/dora_*: what HF PEFT saves with use_dora, and what it computes.

    pip install -r requirements.txt
    python make_dora.py [CASE ...]

The cases, their folders and the checks against float64 are those of make_lora.py; only the
equations differ (DoRA, equation 5): W' = m (W + s B A) / |W + s B A|, the norm without gradient.
"""

import sys

import make_lora
import torch
from make_lora import PREFIX, Case

import peft

MLP = dict(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], use_dora=True)
STACK = dict(r=4, lora_alpha=8, target_modules=["query", "value"], use_dora=True)
CONV = dict(r=4, lora_alpha=8, target_modules=["conv"], use_dora=True)

CASES = [
    Case("dora_mlp", "mlp", MLP),
    Case("dora_rslora", "mlp", dict(MLP, use_rslora=True)),
    Case("dora_bias_lora_only", "mlp", dict(MLP, target_modules=["fc1"], bias="lora_only")),
    Case("dora_modules_to_save", "mlp", dict(MLP, modules_to_save=["head"])),
    Case(
        "dora_patterns",
        "stack",
        dict(STACK, rank_pattern={"query": 6}, alpha_pattern={"value": 5}),
    ),
    Case("dora_gpt2", "gpt2_mlp", dict(MLP, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)),
    Case("dora_embedding", "tokens", dict(MLP, target_modules=["emb", "fc"])),
    Case("dora_conv1d", "conv1d", CONV),
    Case("dora_conv2d", "conv2d", dict(CONV, target_modules=["conv1", "conv2", "conv3"])),
    Case("dora_conv3d", "conv3d", CONV),
    Case(
        "dora_bfloat16_base",
        "mlp",
        MLP,
        base_dtype=torch.bfloat16,
        note="the adapter stays float32; output.float64 is the exact value",
    ),
    Case(
        "dora_dropout",
        "mlp",
        dict(MLP, lora_dropout=0.3),
        train=True,
        note="the base term sees the dropped input too; torch.manual_seed(17) before each forward",
    ),
]

sums = make_lora.effective_parameters


def effective_parameters(network, base, config, adapter):
    """Rows of W + s B A (outputs first) of length m."""
    end = ".lora_magnitude_vector"
    result = sums(
        network, base, config, {key: t for key, t in adapter.items() if not key.endswith(end)}
    )
    modules = dict(network.named_modules())
    for key, magnitude in adapter.items():
        if key.endswith(end):
            module = key.removeprefix(PREFIX).removesuffix(end)
            weight = result[module + ".weight"]
            turned = type(modules[module]).__name__ in ("Conv1D", "Embedding")
            rows = weight.T if turned else weight
            norm = rows.detach().flatten(1).norm(dim=1)
            factor = (magnitude.flatten() / norm).reshape(-1, *[1] * (rows.dim() - 1))
            rows = rows * factor
            result[module + ".weight"] = rows.T if turned else rows
    return result


def randomise(model):
    """Trained-looking values; a magnitude stays near the norm it started as."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in key:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in key:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.2 * noise)


def main():
    assert peft.__version__ == make_lora.PEFT_VERSION, peft.__version__
    make_lora.effective_parameters = effective_parameters
    make_lora.randomise = randomise
    chosen = sys.argv[1:]
    for case in CASES:
        if not chosen or case.name in chosen:
            make_lora.write(case)


if __name__ == "__main__":
    main()
