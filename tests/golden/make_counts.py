"""Numbers of trainable parameters in networks of published sizes, by HF PEFT.

    python make_counts.py        writes data/counts/peft.json

Networks are made on the meta device, so that no weight is allocated.
"""

import json
import pathlib

import peft
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "data" / "counts"


def networks():
    bert, t5 = transformers.BertConfig, transformers.T5Config
    large = dict(hidden_size=1024, num_hidden_layers=24,
                 num_attention_heads=16, intermediate_size=4096)
    t5_base = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    t5_large = dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24,
                    num_heads=16)
    return {
        "bert-base": (transformers.BertModel, bert()),
        "bert-large": (transformers.BertModel, bert(**large)),
        "roberta-base": (
            transformers.RobertaModel,
            transformers.RobertaConfig(
                vocab_size=50265, max_position_embeddings=514,
                type_vocab_size=1)),
        "t5-base": (transformers.T5ForConditionalGeneration, t5(**t5_base)),
        "t5-large": (transformers.T5ForConditionalGeneration, t5(**t5_large)),
        "llama-7b": (transformers.LlamaForCausalLM, transformers.LlamaConfig()),
    }


def configs(name):
    seq2seq, causal = name.startswith("t5"), name.startswith("llama")
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM" if causal else (
        "FEATURE_EXTRACTION")
    yield "lora", peft.LoraConfig(r=8)
    # BERT's default there, "output.dense", means the attention's too.
    if seq2seq or causal:
        keys = (["k", "v", "wo"] if seq2seq else
                ["k_proj", "v_proj", "down_proj"])
        yield "ia3", peft.IA3Config(
            target_modules=keys, feedforward_modules=keys[2:])
    yield "prompt", peft.PromptTuningConfig(task_type=task,
                                            num_virtual_tokens=20)
    yield "p_tuning", peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=20, encoder_hidden_size=128)
    yield "prefix", peft.PrefixTuningConfig(task_type=task,
                                            num_virtual_tokens=20)
    yield "prefix_projection", peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=20, prefix_projection=True,
        encoder_hidden_size=512)


def main():
    result = {"peft": peft.__version__}
    for name, (kind, config) in networks().items():
        row = {}
        for method, options in configs(name):
            with torch.device("meta"):
                network = kind(config)
                row["base"] = sum(p.numel() for p in network.parameters())
                try:
                    model = peft.get_peft_model(network, options)
                except Exception as error:
                    print(name, method, "refused:", str(error)[:80])
                    continue
            row[method] = sum(
                p.numel() for p in model.parameters() if p.requires_grad)
        result[name] = row
        print(name, row)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "peft.json").write_text(json.dumps(result, indent=2) + "\n")


main()
