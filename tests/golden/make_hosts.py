"""Writes data/hosts/: weight deltas of HF PEFT on the tiny transformers of data/models.

    pip install -r requirements.txt
    python make_hosts.py [CASE ...]

One folder a case, without base weights: they are data/models/NETWORK. Outputs (zero where the
query is padding), gradients of the mean-square distance to a random target, three steps of SGD
and merged weights are PEFT's, and are checked here against the equations in float64. T5 does not
divide its scores by the root of their width, so rounding grows: there PEFT runs in float64, and
case.json says how far its own float32 is from that ("peft_float32_error").
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import make_lora  # sets the hash seed first
import make_dora
import make_lora_init
import make_parameters
import make_tuners
import torch
import transformers
from make_tuners import case
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_models

DATA = Path(__file__).resolve().parent / "data" / "hosts"
TASKS = dict(bert="SEQ_CLS", gpt2="CAUSAL_LM", llama="CAUSAL_LM")
TASKS.update(t5_v1_0="SEQ_2_SEQ_LM", t5_v1_1="SEQ_2_SEQ_LM")
LORA = dict(r=3, lora_alpha=6)
GPT2 = dict(target_modules=["c_attn", "0.mlp.c_proj", "1.mlp.c_fc"], fan_in_fan_out=True)
C_ATTN = dict(target_modules=["h.1.attn.c_attn"], fan_in_fan_out=True)
QV = dict(target_modules=["q_proj", "v_proj"])
ALL = dict(target_modules="all-linear")
T5 = dict(target_modules=["1.layer.0.SelfAttention.q", "EncDecAttention.v", "wo"])
T5_TWO = dict(target_modules=["encoder.block.1.layer.0.SelfAttention.k", "0.layer.1.EncDecAttention.v"])
BERT = dict(target_modules=["0.attention.self.query", "1.intermediate.dense"])

CASES = [
    case("gpt2_lora", "Lora", "gpt2", dict(**LORA, **GPT2)),
    case("gpt2_dora", "Lora", "gpt2", dict(
        **LORA, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    case("gpt2_lora_tokens", "Lora", "gpt2", dict(
        **LORA, **C_ATTN, trainable_token_indices=[5, 11, 40])),
    case("gpt2_lora_tokens_by_name", "Lora", "gpt2", dict(
        **LORA, **C_ATTN, trainable_token_indices={"lm_head": [5, 7], "wte": [5, 7]})),
    case("gpt2_lora_parameters", "Lora", "gpt2", dict(
        **LORA, target_modules=[], target_parameters=["attn.c_attn.weight", "0.mlp.c_fc.weight"])),
    case("gpt2_ada_lora", "AdaLora", "gpt2", dict(
        init_r=3, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True)),
    case("gpt2_vera", "Vera", "gpt2", dict(
        r=4, target_modules=["c_attn", "0.mlp.c_fc"], fan_in_fan_out=True)),
    case("gpt2_fourier_ft", "FourierFT", "gpt2", dict(
        n_frequency=20, scaling=10.0, target_modules=["c_attn"], fan_in_fan_out=True)),
    case("gpt2_pissa", "Lora", "gpt2", dict(**LORA, **C_ATTN, init_lora_weights="pissa")),
    case("gpt2_tokens", "TrainableTokens", "gpt2", dict(token_indices=[3, 17])),
    case("gpt2_layer_norm", "LNTuning", "gpt2", dict(target_modules=["ln_1", "ln_f"])),
    case("llama_lora", "Lora", "llama", dict(**LORA, **ALL)),
    case("llama_lora_layers", "Lora", "llama", dict(
        **LORA, target_modules=["q_proj", "k_proj", "down_proj"], layers_to_transform=[1],
        layers_pattern="layers", rank_pattern={"k_proj": 2}, alpha_pattern={"mlp.down_proj": 9})),
    case("llama_lora_head", "Lora", "llama", dict(**LORA, **QV, modules_to_save=["lm_head"])),
    case("llama_lora_embeddings", "Lora", "llama", dict(
        **LORA, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    case("llama_lora_tokens", "Lora", "llama", dict(
        **LORA, **QV, trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [6]})),
    case("llama_dora", "Lora", "llama", dict(**LORA, **QV, use_dora=True, use_rslora=True)),
    case("llama_vera", "Vera", "llama", dict(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])),
    case("llama_oft", "OFT", "llama", dict(oft_block_size=4, **QV)),
    case("llama_boft", "BOFT", "llama", dict(boft_block_size=4, **QV)),
    case("llama_hra", "HRA", "llama", dict(r=2, **QV)),
    case("llama_loha", "LoHa", "llama", dict(r=2, alpha=4, target_modules=["k_proj", "up_proj"])),
    case("llama_lokr", "LoKr", "llama", dict(r=2, alpha=4, target_modules=["v_proj", "up_proj"])),
    case("llama_shira", "Shira", "llama", dict(r=1, random_seed=2, **QV)),
    case("llama_ada_lora", "AdaLora", "llama", dict(init_r=2, total_step=10, **QV)),
    case("llama_fourier_ft", "FourierFT", "llama", dict(
        n_frequency=20, scaling=10.0, target_modules=["k_proj", "0.mlp.up_proj"])),
    case("llama_tokens", "TrainableTokens", "llama", dict(token_indices=[3, 17])),
    case("llama_beft", "Beft", "llama", dict(target_modules=["v_proj"]), mergeable=False),
    case("llama_pissa", "Lora", "llama", dict(**LORA, **QV, init_lora_weights="pissa")),
    case("llama_olora", "Lora", "llama", dict(
        **LORA, target_modules=["k_proj", "down_proj"], init_lora_weights="olora")),
    case("llama_orthogonal", "Lora", "llama", dict(
        r=4, lora_alpha=8, target_modules=["v_proj"], init_lora_weights="orthogonal")),
    case("t5_lora", "Lora", "t5_v1_0", dict(**LORA, **T5)),
    case("t5_lora_tokens", "Lora", "t5_v1_0", dict(
        **LORA, target_modules=["EncDecAttention.v"], trainable_token_indices=[8, 21])),
    case("t5_lora_gated", "Lora", "t5_v1_1", dict(
        **LORA, target_modules=r"decoder.*wi_1")),
    case("t5_tokens", "TrainableTokens", "t5_v1_0", dict(token_indices=[5, 6])),
    case("t5_ada_lora", "AdaLora", "t5_v1_0", dict(
        init_r=2, total_step=10, target_modules=["wo", "SelfAttention.k"])),
    case("t5_dora", "Lora", "t5_v1_0", dict(**LORA, **T5_TWO, use_dora=True)),
    case("t5_vera", "Vera", "t5_v1_0", dict(r=4, **T5_TWO)),
    case("t5_oft", "OFT", "t5_v1_0", dict(oft_block_size=4, **T5_TWO)),
    case("t5_boft", "BOFT", "t5_v1_0", dict(boft_block_size=4, **T5_TWO)),
    case("t5_hra", "HRA", "t5_v1_0", dict(r=2, **T5_TWO)),
    case("t5_loha", "LoHa", "t5_v1_0", dict(r=2, alpha=4, **T5_TWO)),
    case("t5_lokr", "LoKr", "t5_v1_0", dict(r=2, alpha=4, target_modules=["1.layer.0.SelfAttention.o"])),
    case("t5_shira", "Shira", "t5_v1_0", dict(r=1, random_seed=2, **T5_TWO)),
    case("t5_fourier_ft", "FourierFT", "t5_v1_0", dict(n_frequency=20, scaling=10.0, **T5_TWO),
         peft_wrong="PEFT 0.21.2 transforms in float32 whatever the base is"),
    case("t5_beft", "Beft", "t5_v1_0", dict(target_modules=["EncDecAttention.v"]), mergeable=False),
    case("t5_layer_norm", "LNTuning", "t5_v1_1", dict(target_modules=["layer_norm"])),
    case("bert_lora", "Lora", "bert", dict(**LORA, target_modules=["query", "value"], bias="lora_only")),
    case("bert_lora_embeddings", "Lora", "bert", dict(
        **LORA, target_modules=["word_embeddings", "dense"], exclude_modules=["pooler.dense"])),
    case("bert_ada_lora", "AdaLora", "bert", dict(
        init_r=2, total_step=10, target_modules=["query", "value"])),
    case("bert_shira", "Shira", "bert", dict(r=1, target_modules=["key"])),
    case("bert_dora", "Lora", "bert", dict(**LORA, **BERT, use_dora=True)),
    case("bert_pissa", "Lora", "bert", dict(**LORA, **BERT, init_lora_weights="pissa")),
    case("bert_lora_tokens", "Lora", "bert", dict(
        **LORA, target_modules=["1.attention.self.value"], trainable_token_indices=[3, 17])),
    case("bert_tokens", "TrainableTokens", "bert", dict(
        token_indices=[3, 17], target_modules=["word_embeddings"])),
    case("bert_vera", "Vera", "bert", dict(r=4, **BERT)),
    case("bert_oft", "OFT", "bert", dict(oft_block_size=4, **BERT)),
    case("bert_boft", "BOFT", "bert", dict(boft_block_size=4, **BERT)),
    case("bert_hra", "HRA", "bert", dict(r=2, **BERT)),
    case("bert_loha", "LoHa", "bert", dict(r=2, alpha=4, **BERT)),
    case("bert_lokr", "LoKr", "bert", dict(r=2, alpha=4, **BERT)),
    case("bert_fourier_ft", "FourierFT", "bert", dict(n_frequency=20, scaling=10.0, **BERT)),
    case("bert_beft", "Beft", "bert", dict(target_modules=["value", "1.intermediate.dense"])),
]


# ---- What PEFT computes ---------------------------------------------------------------------


def dtype_of(one):
    return torch.float64 if one.network.startswith("t5") else torch.float32


def base_network(one, dtype=torch.float32):
    network = tiny_models.load(one.network).to(dtype)
    network.name_or_path = one.network  # goes into adapter_config.json
    return network


def inputs_of(one):
    ids, mask = tiny_models.padded_ids(one.network, "right")
    call = dict(input_ids=ids, attention_mask=mask)
    if one.network.startswith("t5"):
        decoder_ids, decoder_mask, _ = tiny_models.t5_targets()
        call.update(decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask)
    return call


def output_of(network, call):
    """Logits, zero where the query is padding."""
    logits = network(**call).logits
    if logits.dim() == 2:
        return logits
    mask = call.get("decoder_attention_mask", call["attention_mask"])
    return logits * mask.unsqueeze(-1)


def save_adapter(one, folder):
    torch.manual_seed(0)
    options = dict(one.config, task_type=TASKS[one.network])
    model = get_peft_model(base_network(one), make_tuners.config_class(**options))
    generator = torch.Generator().manual_seed(3)
    size = 0.02 if one.network.startswith("t5") else 0.1  # T5's softmax is steep
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in key:
                    parameter.mul_(1 + 0.1 * noise)
                else:
                    parameter.add_(size * noise)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def load_adapter(one, folder, dtype):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base_network(one, dtype), folder, is_trainable=True)
    complaints = [str(w.message) for w in caught if "missing" in str(w.message)]
    assert not complaints, (one.name, complaints)
    for key, parameter in model.named_parameters():
        if "ranknum" in key:  # that AdaLoRA trains where the base is not float32
            parameter.requires_grad_(False)
    return model.eval()


def trainable_by_file_key(model):
    """As make_lora's; tied tensors, that are in the file twice, by the name that PEFT trains."""
    names = {p: name.replace(".default", "") for name, p in model.named_parameters()}
    saved = get_peft_model_state_dict(model)
    return {
        names[p] if names[p] in saved else key: p
        for key, p in make_lora.trainable_by_file_key(model).items()
    }


def peft_results(one, folder, target, dtype):
    model = load_adapter(one, folder, dtype)
    parameters = trainable_by_file_key(model)
    call = inputs_of(one)
    result = make_lora.train_three_steps(lambda: output_of(model, call), parameters, target.to(dtype))
    trainable = sum(p.numel() for p in parameters.values())
    assert trainable == model.get_nb_trainable_parameters()[0], one.name
    if not one.mergeable:
        return result, trainable
    merged = load_adapter(one, folder, dtype).merge_and_unload()
    base = dict(base_network(one, dtype).named_parameters(remove_duplicate=False))
    for key, value in merged.state_dict().items():
        if key in base and not torch.equal(base[key], value):
            result["merged." + key] = value.detach().clone()
    return result, trainable


# ---- What the equations say -----------------------------------------------------------------


def effective_parameters(network, base, config, adapter):
    if config.get("init_lora_weights") in ("pissa", "olora"):
        make_lora_init.current = make_tuners.current
        return make_lora_init.effective_parameters(network, base, config, adapter)
    if make_tuners.current.tuner == "LNTuning":
        names = {key: key.removeprefix(make_lora.PREFIX).replace(".ln_tuning_layers", "") for key in adapter}
        return {**base, **{names[key]: tensor for key, tensor in adapter.items()}}
    if config.get("use_dora"):
        return make_dora.effective_parameters(network, base, config, adapter)
    if make_tuners.current.tuner not in ("Lora", "Shira"):
        return make_tuners.effective_parameters(network, base, config, adapter)
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict):  # by the modules' whole names
        names = [name for name, _ in network.named_modules()]
        tokens = {n: t for k, t in tokens.items() for n in names if n.endswith(k)}
    elif tokens:
        tokens = {key: tokens for key, module in network.named_modules()
                  if module is network.get_input_embeddings()}
    return make_parameters.effective_parameters(
        network, base, {**config, "trainable_token_indices": tokens}, adapter)


def equation_results(one, config, adapter, keys, target):
    network = base_network(one, torch.float64)
    tied = [key for key, p in network.named_parameters(remove_duplicate=False)
            if p is network.get_input_embeddings().weight]
    base = {key: value.detach().double()
            for key, value in network.named_parameters(remove_duplicate=False)}
    adapter = {key: value.double() for key, value in adapter.items()}
    for key in keys:
        adapter[key].requires_grad_()

    def weights():
        result = effective_parameters(network, base, config, adapter)
        moved = sorted(
            (key for key in tied if result[key] is not base[key]),
            key=lambda key: not result[key].requires_grad,
        )  # of a tensor's names the one that trains first
        return {**result, **{key: result[moved[0]] for key in tied if moved}}

    call = inputs_of(one)

    class Wrapped(nn.Module):
        """Keyword arguments, and BERT's and the decoders' logits in one form."""

        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self):
            return output_of(self.inner, call)

    wrapped = Wrapped()

    def forward():
        own = {"inner." + key: value for key, value in weights().items()}
        return torch.func.functional_call(wrapped, own, (), tie_weights=False)

    merged = {"merged." + key: value.detach().clone() for key, value in weights().items()
              if one.mergeable and not torch.equal(value, base[key])}
    trained = {key: adapter[key] for key in keys}
    return {**make_lora.train_three_steps(forward, trained, target.double()), **merged}


def float32_error(one, folder, target, exact):
    """How far PEFT in float32 is from `exact`, of each group of tensors the farthest."""
    single, _ = peft_results(one, folder, target, torch.float32)
    farthest = {}
    for key in exact:
        group = key.split(".")[0]
        farthest[group] = max(farthest.get(group, 0), make_lora.distance(single[key], exact[key]))
    return {group: float(f"{value:.2g}") for group, value in farthest.items() if group != "loss"}


# ---- Writing --------------------------------------------------------------------------------


def write(one):
    folder = DATA / one.name
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(one, folder / "adapter")
    call = inputs_of(one)
    shape = output_of(base_network(one), call).shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    dtype = dtype_of(one)
    result, trainable = peft_results(one, folder / "adapter", target, dtype)
    keys = sorted(k.removeprefix("gradient.") for k in result if k.startswith("gradient."))
    exact = equation_results(one, config, adapter, keys, target)
    assert set(exact) == set(result), set(exact) ^ set(result)
    worst = max((make_lora.distance(result[key], exact[key]), key) for key in exact)
    if one.peft_wrong:
        result = exact
    names = dict(base_network(one).named_parameters())  # each tensor under one name
    result = {key: value for key, value in result.items()
              if not key.startswith("merged.") or key.removeprefix("merged.") in names}
    save_file(
        {k: v.contiguous() for k, v in {**call, "target": target.to(dtype), **result}.items()},
        folder / "expected.safetensors",
    )
    facts = {
        "network": one.network,
        "trainable": trainable,
        "learning_rate": make_lora.LEARNING_RATE,
        "steps": make_lora.STEPS,
    }
    if one.peft_wrong:
        facts["peft_wrong"] = one.peft_wrong
    if not one.mergeable:
        facts["mergeable"] = False
    if dtype == torch.float64:
        facts["base_dtype"] = "float64"
        facts["peft_float32_error"] = float32_error(one, folder / "adapter", target, result)
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{one.name:26s} {trainable:5d} trainable, farthest from float64: {worst[0]:.1e} ({worst[1]})",
          flush=True)
    exactly = dtype == torch.float64 and not one.peft_wrong
    assert worst[0] < (1e-12 if exactly else 2e-5), one.name


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = sys.argv[1:]
    failed = []
    for one in CASES:
        if not wanted or one.name in wanted:
            make_tuners.current = one
            try:
                write(one)
            except Exception as error:
                failed.append(one.name)
                print(f"{one.name}: {type(error).__name__}: {error}")
    assert not failed, failed


if __name__ == "__main__":
    main()
