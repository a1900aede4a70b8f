"""Writes data/adapters/: folders of several adapters, pickled adapters, and what a hot-swap gives.

    pip install -r requirements.txt
    python make_adapters.py

All on the mlp of networks.py; README.md says what is in the folders.
"""

import json
import shutil
import warnings
import zipfile
from pathlib import Path

import make_lora  # sets the hash seed first
import peft
import torch
from make_lora import Case, base_network, network_inputs, own_parameters
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import save_file

import networks

DATA = Path(__file__).resolve().parent / "data" / "adapters"
MLP = Case("adapters", "mlp", {})
FC = ["fc1", "fc2"]
PEFT_WRONG = "pattern"  # PEFT 0.21.2 swaps in alpha / r, whatever rank_pattern says of a module


def randomise(model, name, seed, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key.split(".") and "ranknum" not in key:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def output(model):
    with torch.no_grad():
        return networks.run(model.eval(), network_inputs(MLP)).clone()


def without_cards(folder):
    for card in folder.rglob("README.md"):
        card.unlink()


def write_several():
    """"default" at the top, "second" beside it (both LoRA), "style" (LoKr) and "tone" ((IA)3)."""
    folder = DATA / "several"
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    expected = {}
    model = get_peft_model(base_network(MLP), LoraConfig(r=4, lora_alpha=8, target_modules=FC))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=["fc2"]))
    randomise(model, "default", 1)
    randomise(model, "second", 2)
    for name in ("default", "second"):
        model.set_adapter(name)
        expected["output." + name] = output(model)
    model.base_model.set_adapter(["default", "second"])
    expected["output.both"] = output(model)
    model.save_pretrained(adapter)
    others = {
        "style": peft.LoKrConfig(r=2, alpha=4, target_modules=FC),
        "tone": peft.IA3Config(target_modules=FC, feedforward_modules=["fc2"]),
    }
    for seed, (name, config) in enumerate(others.items(), start=3):
        model = get_peft_model(base_network(MLP), config, adapter_name=name)
        randomise(model, name, seed)
        expected["output." + name] = output(model)
        model.save_pretrained(adapter)
    without_cards(adapter)
    finish(folder, expected, {})


def write_pickles():
    """adapter_model.bin as PEFT writes it; "cuda" as if it had been saved from a GPU."""
    configs = {
        "lora": LoraConfig(r=2, target_modules=FC, modules_to_save=["head"]),
        "oft": peft.OFTConfig(oft_block_size=2, target_modules=FC),
        "ada_lora": peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=FC),
        "ia3": peft.IA3Config(target_modules=FC, feedforward_modules=["fc2"]),
        "vera": peft.VeraConfig(r=4, target_modules=FC),
        "tokens_of_gpu": LoraConfig(r=2, target_modules=FC),
    }
    for seed, (name, config) in enumerate(configs.items(), start=5):
        folder = DATA / ("pickle_" + name)
        model = get_peft_model(base_network(MLP), config)
        randomise(model, "default", seed, size=0.1)
        expected = {"output": output(model)}
        model.save_pretrained(folder / "adapter", safe_serialization=False)
        without_cards(folder)
        if name == "tokens_of_gpu":
            save_from_gpu(folder / "adapter" / "adapter_model.bin")
            folder = folder.rename(DATA / "pickle_cuda")
        finish(folder, expected, {})


def save_from_gpu(path):
    """Rewrites the place of the tensors that torch.save noted: cpu becomes cuda:0."""
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    text = lambda word: b"X" + len(word).to_bytes(4, "little") + word
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, data in records:
            if info.filename.endswith("data.pkl"):
                assert text(b"cpu") in data
                data = data.replace(text(b"cpu"), text(b"cuda:0"))
            archive.writestr(zipfile.ZipInfo(info.filename, info.date_time), data)


def write_hotswap():
    """Each adapter, and what the model gives after it was swapped in for "first"."""
    folder = DATA / "hotswap"
    configs = {
        "first": dict(r=4, lora_alpha=8, target_modules=FC),
        "same_rank": dict(r=4, lora_alpha=3, target_modules=FC),
        "lower": dict(r=2, lora_alpha=5, target_modules=FC),
        "pattern": dict(r=3, lora_alpha=5, rank_pattern={"fc1": 1}, target_modules=FC),
        "higher": dict(r=6, lora_alpha=5, target_modules=FC),
        "fewer": dict(r=4, lora_alpha=8, target_modules=["fc2"]),
    }
    expected = {}
    for seed, (name, config) in enumerate(configs.items(), start=11):
        model = get_peft_model(base_network(MLP), LoraConfig(**config))
        randomise(model, "default", seed)
        model.save_pretrained(folder / name)
        without_cards(folder / name)
        fresh = output(model)
        model = PeftModel.from_pretrained(base_network(MLP), folder / "first")
        hotswap_adapter(model, str(folder / name), "default", torch_device="cpu")
        expected["output." + name] = output(model)
        same = (expected["output." + name] - fresh).abs().max() < 1e-6 * fresh.abs().max()
        assert same != (name == PEFT_WRONG), name
        if not same:
            expected["peft.output." + name] = expected["output." + name]
            expected["output." + name] = fresh
    finish(folder, expected, {})


def finish(folder, expected, facts):
    tensors = {f"input.{i}": t for i, t in enumerate(network_inputs(MLP))}
    save_file({**tensors, **expected}, folder / "expected.safetensors")
    facts = {"network": "mlp", "mode": "eval", "base": "../base.safetensors", **facts}
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{folder.name:26s} {sorted(expected)}")


def main():
    warnings.simplefilter("ignore")
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    save_file(own_parameters(MLP), DATA / "base.safetensors")
    write_several()
    write_pickles()
    write_hotswap()


if __name__ == "__main__":
    main()
