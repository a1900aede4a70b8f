"""Runs the adapters of data/gguf, or GGUF files of libpeft's, in llama.cpp itself.

    pip install -r requirements.txt gguf==0.19.0 llama-cpp-py-sync==0.11739
    python check_llama_cpp.py [FOLDER ...]

A FOLDER holds case.json, adapter/ and adapter.gguf, as test_gguf writes into $PEFT_GGUF_DIR;
without one the cases of data/gguf are run. The networks of data/models are written as GGUF
models, without a vocabulary; then llama.cpp's logits, with the adapter and without, are compared
with those of transformers and PEFT. LLaMA and GPT-2 only. Exit status: 0 all near, 1 not, 77
something is not installed.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import gguf
    import torch
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    from peft import PeftModel
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

import tiny_models

DATA = Path(__file__).resolve().parent / "data" / "gguf"
TOKENS = [5, 17, 40, 3, 29, 11, 8]
# Of the largest logit. ggml looks the gelu up in a table of half precision.
ALLOWED = {"llama": 5e-6, "gpt2": 1e-3}
HALF = 5e-2  # a file of half precision


def write_model(path, model, architecture):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if architecture == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in model.named_parameters():
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        if architecture == "llama" and "self_attn" in key and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            rows = value.shape[0]
            value = value.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, value.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(model_path, adapter_path=None):
    ffi, lib = get_ffi(), get_lib()
    model = lib.llama_model_load_from_file(str(model_path).encode(), lib.llama_model_default_params())
    assert model != ffi.NULL, "llama.cpp does not load the base"
    params = lib.llama_context_default_params()
    params.n_ctx = 32
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0
    context = lib.llama_init_from_model(model, params)
    assert context != ffi.NULL
    if adapter_path:
        adapter = lib.llama_adapter_lora_init(model, str(adapter_path).encode())
        assert adapter != ffi.NULL, "llama.cpp does not load the adapter"
        list_of = ffi.new("struct llama_adapter_lora *[]", [adapter])
        assert lib.llama_set_adapters_lora(context, list_of, 1, ffi.new("float[]", [1.0])) == 0
    batch = lib.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for i, token in enumerate(TOKENS):
        batch.token[i] = token
        batch.pos[i] = i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1
    assert lib.llama_decode(context, batch) == 0
    count = tiny_models.VOCABULARY
    rows = [ffi.unpack(lib.llama_get_logits_ith(context, i), count) for i in range(len(TOKENS))]
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return torch.tensor(rows)


def distance(left, right):
    return ((left - right).abs().max() / right.abs().max()).item()


def check(folder):
    facts = json.loads((folder / "case.json").read_text())
    network = facts.get("network", facts["architecture"])
    model = tiny_models.load(network).eval()
    ids = torch.tensor([TOKENS])
    text, well = [], True
    allowed = ALLOWED[facts["architecture"]]
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        path = Path(scratch) / "model.gguf"
        write_model(path, model, facts["architecture"])
        base = model(ids).logits[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, folder / "adapter").eval()(ids).logits[0]
        off = distance(llama_cpp_logits(path), base)
        text.append(f"base {off:.1e}")
        well = well and off < allowed
        for file in sorted(folder.glob("*.gguf")):
            off = distance(llama_cpp_logits(path, file), adapted)
            text.append(f"{file.stem} {off:.1e}")
            half = "16" in file.stem or "tolerance" in facts
            well = well and off < (HALF if half else allowed)
    moved = distance(base, adapted)
    assert moved > 0.05, moved
    return f"{', '.join(text)} (the adapter moves them by {moved:.1e})", well


if __name__ == "__main__":
    lib = get_lib()
    ffi = get_ffi()
    silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
    if "VERBOSE" not in os.environ:
        lib.llama_log_set(silent, ffi.NULL)
    lib.llama_backend_init()
    arguments = [Path(a) for a in sys.argv[1:]] or [DATA]
    cases = [
        folder
        for a in arguments
        for folder in ([a] if (a / "case.json").exists() else sorted(a.iterdir()))
        if json.loads((folder / "case.json").read_text())["architecture"] in ("llama", "gpt2")
    ]
    failed = 0
    for folder in cases:
        text, well = check(folder)
        failed += not well
        print(f"{'ok    ' if well else 'FAILED'} {folder.name:18s} {text}")
    print(f"{len(cases) - failed} of {len(cases)} adapters act in llama.cpp as in PEFT")
    sys.exit(1 if failed or not cases else 0)
