"""Writes data/gguf/: LoRA adapters of HF PEFT, and the GGUF files of them for llama.cpp.

    pip install -r requirements.txt gguf==0.19.0
    python make_gguf.py

The networks are those of data/models. The files are written by gguf-py, llama.cpp's own writer,
with its names of tensors, and, for the order of LLaMA's rows, the formula of llama.cpp's
converter. `expected.gguf` is float32; llama has `float16.gguf` and `bfloat16.gguf` too.
"""

import json
import shutil
import warnings

import make_lora  # sets the hash seed first
import gguf
import tiny_models
import torch
from gguf.quants import quantize
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

DATA = make_lora.DATA.parent / "gguf"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEADS = dict(heads=4, kv_heads=2)

# case: network, architecture, config, what the order of rows needs
CASES = {
    "llama": ("llama", "llama", dict(r=4, lora_alpha=8, target_modules=LLAMA), HEADS),
    "llama_embedding": (
        "llama", "llama", dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head"]), {}),
    "llama_rslora": (
        "llama", "llama",
        dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]), HEADS),
    "llama_patterns": (
        "llama", "llama",
        dict(r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*": 5},
             target_modules=["q_proj", "v_proj"]), HEADS),
    "qwen2": ("llama", "qwen2", dict(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj"]), {}),
    "gpt2": (
        "gpt2", "gpt2",
        dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), {}),
    "bert": (
        "bert", "bert",
        dict(r=2, lora_alpha=8,
             target_modules=["query", "key", "value", "intermediate.dense", "output.dense"]), {}),
    "t5_v1_0": ("t5_v1_0", "t5", dict(r=2, lora_alpha=8, target_modules=["q", "k", "v", "o", "wi", "wo"]), {}),
    "t5_v1_1": (
        "t5_v1_1", "t5", dict(r=2, lora_alpha=8, target_modules=["q", "v", "wi_0", "wi_1", "wo"]), {}),
}


def for_rope(b, heads):
    """The rows of a query or key projection as llama.cpp has them."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)


def tensors_of(model, case):
    """The pairs of the GGUF file in the network's order, and their alpha."""
    _, architecture, config, order = CASES[case]
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(arch, 4)
    state = get_peft_model_state_dict(model)
    modules = [n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")]
    alpha, result = None, []
    for module in modules:
        key = make_lora.PREFIX + module
        embedding = key + ".lora_embedding_A" in state
        a = state[key + (".lora_embedding_A" if embedding else ".lora_A.weight")]
        b = state[key + (".lora_embedding_B" if embedding else ".lora_B.weight")]
        s = model.base_model.model.get_submodule(module).scaling["default"]
        alpha = s * a.shape[0] if alpha is None else alpha
        if s * a.shape[0] != alpha:
            b = b * (s * a.shape[0] / alpha)
        name = names.get_name(module.removeprefix("bert.") + ".weight", try_suffixes=(".weight",))
        if name == "token_embd.weight":
            a = a.T
        if architecture == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
            b = for_rope(b, order["heads" if "attn_q" in name else "kv_heads"])
        result += [(name + ".lora_a", a), (name + ".lora_b", b)]
    return alpha, result


def write_gguf(path, architecture, alpha, tensors, dtype):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors:
        data = tensor.detach().contiguous().numpy()
        writer.add_tensor(name, quantize(data, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(case):
    network, architecture, config, order = CASES[case]
    folder = DATA / case
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_models.load(network), LoraConfig(**config))
        make_lora.randomise(model)
        model.peft_config["default"].base_model_name_or_path = None  # a path of this machine
        model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    alpha, tensors = tensors_of(model, case)
    types = gguf.GGMLQuantizationType
    kinds = {"expected": types.F32}
    if case == "llama":
        kinds.update(float16=types.F16, bfloat16=types.BF16)
    for name, dtype in kinds.items():
        write_gguf(folder / f"{name}.gguf", architecture, alpha, tensors, dtype)
    facts = dict(network=network, architecture=architecture, **order)
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{case:16s} {len(tensors)} tensors, alpha {alpha:g}")


if __name__ == "__main__":
    for name in CASES:
        write(name)
