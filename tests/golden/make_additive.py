"""Writes data/additive/: (IA)3, prompt tuning, P-tuning and prefix tuning by HF PEFT.

    pip install -r requirements.txt
    python make_additive.py [CASE ...]

The networks are those of data/models (make_models.py). One folder a case; README.md beside this
script says what is in it and what PEFT does. Every number of PEFT is compared here with a
second computation in float64 that uses nothing of PEFT: scaled weights, embeddings put in front,
a key/value cache filled by hand. Where PEFT itself is inconsistent the case keeps both numbers.
"""

import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets: fix their order
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from peft import (
    IA3Config,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

import networks
import tiny_models

DATA = Path(__file__).resolve().parent / "data" / "additive"
PEFT_VERSION = "0.21.2"
LEARNING_RATE = 0.1
STEPS = 3
NEW_TOKENS = 6
VIRTUAL = 4
MARGIN = 1e-3  # by how much a greedy choice wins

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()

TASKS = dict(bert="SEQ_CLS", gpt2="CAUSAL_LM", llama="CAUSAL_LM")
TASKS.update(t5_v1_0="SEQ_2_SEQ_LM", t5_v1_1="SEQ_2_SEQ_LM", t5_deep="SEQ_2_SEQ_LM")
T5_HEADS = dict(token_dim=24)  # heads of 6: PEFT would take the width, 16, for heads of 4


@dataclass
class Case:
    name: str
    network: str
    kind: type
    options: dict
    merged: bool = False  # store the merged weights
    seed: int = 3
    note: str = ""


CASES = [
    Case(
        "ia3_bert",
        "bert",
        IA3Config,
        {},
        note='the default "output.dense" is also the end of attention.output.dense',
    ),
    Case(
        "ia3_bert_explicit",
        "bert",
        IA3Config,
        dict(
            target_modules=["query", "value", "intermediate.dense", "pooler.dense"],
            feedforward_modules=["intermediate.dense"],
            modules_to_save=["classifier"],
        ),
        merged=True,
    ),
    Case(
        "ia3_bert_regex",
        "bert",
        IA3Config,
        dict(
            target_modules=r".*\.(key|value|layer\.\d+\.output\.dense)",
            feedforward_modules=r".*\.layer\.\d+\.output\.dense",
        ),
        note="one string each: a regular expression for the whole name",
    ),
    Case(
        "ia3_gpt2",
        "gpt2",
        IA3Config,
        dict(fan_in_fan_out=True),
        merged=True,
        note="c_attn is query, key and value in one: all three are scaled",
    ),
    Case("ia3_llama", "llama", IA3Config, {}),
    Case("ia3_t5_v1_0", "t5_v1_0", IA3Config, {}),
    Case(
        "ia3_t5_v1_1",
        "t5_v1_1",
        IA3Config,
        dict(target_modules=["k", "v", "wi_1"], feedforward_modules=[]),
        note="as T-Few has it: the linear half of the gate, scaled at its output",
    ),
    Case(
        "ia3_conv2d",
        "conv2d",
        IA3Config,
        dict(
            target_modules=["conv1", "conv2", "conv3", "head"],
            feedforward_modules=["conv2", "head"],
        ),
        merged=True,
    ),
    Case(
        "ia3_conv2d_groups",
        "conv2d_groups",
        IA3Config,
        dict(target_modules=["conv"], feedforward_modules=["conv"]),
        merged=True,
    ),
    Case("prompt_bert", "bert", PromptTuningConfig, {}),
    Case("prompt_gpt2", "gpt2", PromptTuningConfig, {}, seed=3),
    Case("prompt_llama", "llama", PromptTuningConfig, {}),
    Case(
        "prompt_t5_v1_0",
        "t5_v1_0",
        PromptTuningConfig,
        {},
        note="two submodules by default: 2 * 4 rows, of which PEFT uses the first 4",
    ),
    Case("prompt_t5_v1_1", "t5_v1_1", PromptTuningConfig, dict(num_transformer_submodules=1)),
    Case("ptuning_mlp_bert", "bert", PromptEncoderConfig, dict(encoder_hidden_size=8)),
    Case(
        "ptuning_mlp_llama", "llama", PromptEncoderConfig, dict(encoder_hidden_size=8), seed=5
    ),
    Case(
        "ptuning_lstm_gpt2",
        "gpt2",
        PromptEncoderConfig,
        dict(encoder_hidden_size=4, encoder_reparameterization_type="LSTM"),
    ),
    Case(
        "ptuning_lstm_t5_v1_1",
        "t5_v1_1",
        PromptEncoderConfig,
        dict(
            encoder_hidden_size=4, encoder_reparameterization_type="LSTM", encoder_num_layers=1
        ),
        note="the LSTM reads 2 * 4 rows, the network gets the first 4 of its results",
    ),
    Case("prefix_bert", "bert", PrefixTuningConfig, {}),
    Case("prefix_gpt2", "gpt2", PrefixTuningConfig, {}),
    Case("prefix_llama", "llama", PrefixTuningConfig, {}, seed=4),
    Case(
        "prefix_t5_v1_0",
        "t5_v1_0",
        PrefixTuningConfig,
        T5_HEADS,
        note="with an even number of layers PEFT uses half of the prefix, each part twice",
    ),
    Case(
        "prefix_t5_deep",
        "t5_deep",
        PrefixTuningConfig,
        {},
        note="with an odd number of layers it uses all of it, in another order",
    ),
    Case(
        "prefix_mlp_gpt2",
        "gpt2",
        PrefixTuningConfig,
        dict(prefix_projection=True, encoder_hidden_size=6),
    ),
    Case(
        "prefix_mlp_llama",
        "llama",
        PrefixTuningConfig,
        dict(prefix_projection=True, encoder_hidden_size=6),
    ),
    Case(
        "prefix_mlp_t5_v1_1",
        "t5_v1_1",
        PrefixTuningConfig,
        dict(prefix_projection=True, encoder_hidden_size=6, **T5_HEADS),
    ),
]


# ---- Networks and inputs --------------------------------------------------------------------


def is_tiny(case):
    return case.network in tiny_models.NAMES


def base_network(case):
    if not is_tiny(case):
        return networks.build(case.network, seed=1)
    network = tiny_models.load(case.network)
    network.name_or_path = case.network  # goes into adapter_config.json
    network.requires_grad_(False)
    return network


def config_of(case):
    options = dict(case.options)
    if case.kind is not IA3Config:
        options["num_virtual_tokens"] = VIRTUAL
    if is_tiny(case):
        options["task_type"] = TASKS[case.network]
    return case.kind(**options)


def inputs_of(case, side="right"):
    """What the network is called with, labels included."""
    if not is_tiny(case):
        generator = torch.Generator().manual_seed(5)
        return {
            "input.0": networks.inputs(case.network, seed=2)[0],
            "target": torch.randn(2, 3, generator=generator),
        }
    ids, mask = tiny_models.padded_ids(case.network, side)
    call = dict(input_ids=ids, attention_mask=mask)
    if case.network == "bert":
        call["labels"] = tiny_models.class_labels()
    elif case.network.startswith("t5"):
        decoder_ids, decoder_mask, labels = tiny_models.t5_targets()
        call.update(
            decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask, labels=labels
        )
    else:
        call["labels"] = ids.masked_fill(mask == 0, -100)
    return call


def run(network, call):
    """Logits and loss."""
    if "input.0" in call:
        output = network(call["input.0"])
        return output, nn.functional.mse_loss(output, call["target"])
    output = network(**call)
    return output.logits, output.loss


def forget_padding(case, logits, mask):
    """Zero where the query is padding; virtual tokens in front are no padding."""
    if not is_tiny(case) or case.network == "bert":
        return logits
    front = logits.shape[1] - mask.shape[1]
    return logits * nn.functional.pad(mask, (front, 0), value=1).unsqueeze(-1)


def mask_of(call):
    return call.get("decoder_attention_mask", call.get("attention_mask"))


# ---- Adapters by PEFT -----------------------------------------------------------------------


def randomise(case, model):
    """Trained-looking values for everything that is trainable: no zero, no one."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "ia3_l" in key:
                parameter.copy_(1 + 0.4 * noise)
            elif "prompt_encoder" not in key:  # a head
                parameter.add_(0.2 * noise)
            elif key.endswith("embedding.weight"):
                parameter.copy_(0.8 * noise)
            elif "mlp_head" in key and key.endswith(".bias"):
                parameter.copy_(noise.abs())  # keeps the ReLUs open
            else:
                parameter.copy_(0.5 * noise)


def has_encoder(case):
    """Whether the adapter's file holds only what an encoder made."""
    return case.kind is PromptEncoderConfig or case.options.get("prefix_projection", False)


def make_adapter(case, folder):
    """Writes the adapter's files; the model that wrote them, in eval mode."""
    torch.manual_seed(0)
    model = get_peft_model(base_network(case), config_of(case)).eval()
    randomise(case, model)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    if has_encoder(case):
        save_file(encoder_of(model), folder / "encoder.safetensors", metadata={"format": "pt"})
    return model


def encoder_of(model):
    return {
        key: value.detach().clone()
        for key, value in model.prompt_encoder["default"].state_dict().items()
    }


def load_adapter(case, folder, trainable):
    return PeftModel.from_pretrained(
        base_network(case), folder / "adapter", is_trainable=trainable
    ).eval()


def trainable_parameters(case, model):
    """By the key of the adapter's file, or of encoder.safetensors."""
    saved = get_peft_model_state_dict(model)
    keys = {value.data_ptr(): key for key, value in saved.items()}
    result = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if has_encoder(case) and "prompt_encoder." in name:
            key = name.split("prompt_encoder.default.")[1]
        elif "prompt_encoder." in name:
            key = "prompt_embeddings"
        else:
            key = keys[parameter.data_ptr()]
        result[key] = parameter
    return result


def train_three_steps(forward, parameters):
    result = {}
    optimizer = torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        output, loss = forward()
        loss.backward()
        if step == 0:
            result["output"] = output.detach().clone()
            result["loss"] = loss.detach().reshape(1).clone()
            for key, parameter in parameters.items():
                result["gradient." + key] = parameter.grad.clone()
        optimizer.step()
    for key, parameter in parameters.items():
        result["step." + key] = parameter.detach().clone()
    return result


# ---- The same without PEFT ------------------------------------------------------------------


def scaled_weights(case, network, vectors):
    """(IA)3: diag(l) W and l b, or W diag(l) where the input is scaled."""
    modules = dict(network.named_modules())
    result = {}
    for key, vector in vectors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
        if not key.endswith(".ia3_l"):
            result[name] = vector  # a head
            continue
        module = modules[name]
        l = vector.flatten()
        at_input = is_feedforward(case, name)
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        if isinstance(module, nn.Conv2d) and at_input:
            per_group = l.view(module.groups, 1, -1)
            rows = weight.shape[0] // module.groups
            per_row = per_group.expand(-1, rows, -1).reshape(weight.shape[:2])
            result[name + ".weight"] = weight * per_row[:, :, None, None]
        elif isinstance(module, nn.Conv2d):
            result[name + ".weight"] = weight * l[:, None, None, None]
        else:
            stored_transposed = not isinstance(module, nn.Linear)  # GPT-2's Conv1D
            column = at_input != stored_transposed
            result[name + ".weight"] = weight * (l[None, :] if column else l[:, None])
        if bias is not None and not at_input:
            result[name + ".bias"] = bias.detach() * l
    return result


def is_feedforward(case, name):
    chosen = case.options.get("feedforward_modules")
    if chosen is None:
        chosen = dict(bert=["output.dense"], gpt2=["mlp.c_proj"], llama=["down_proj"]).get(
            case.network, ["wo"]
        )
    if isinstance(chosen, str):
        return name.endswith("output.dense") and "attention" not in name
    return any(name == each or name.endswith("." + each) for each in chosen)


def encoded(case, parameters):
    """What the encoder makes of its parameters: the embeddings or the flat prefix."""
    if not has_encoder(case):
        return parameters["prompt_embeddings"]
    rows = parameters["embedding.weight"]

    def dense(x, name):
        return x @ parameters[name + ".weight"].T + parameters[name + ".bias"]

    if case.kind is PrefixTuningConfig:
        return dense(torch.tanh(dense(rows, "transform.0")), "transform.2")
    if case.options.get("encoder_reparameterization_type") == "LSTM":
        layers = case.options.get("encoder_num_layers", 2)
        for layer in range(layers):
            rows = torch.cat(
                [lstm(rows, parameters, f"l{layer}"), lstm(rows, parameters, f"l{layer}_reverse")],
                1,
            )
        return dense(torch.relu(dense(rows, "mlp_head.0")), "mlp_head.2")
    hidden = torch.relu(dense(rows, "mlp_head.0"))
    return dense(torch.relu(dense(hidden, "mlp_head.2")), "mlp_head.4")


def lstm(rows, parameters, suffix):
    """One direction of one layer; gates in PyTorch's order: input, forget, cell, output."""
    w_in, w_hidden, b_in, b_hidden = (
        parameters[f"lstm_head.{part}_{suffix}"]
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = rows.new_zeros(w_hidden.shape[1])
    results = {}
    order = range(len(rows))
    for i in reversed(order) if suffix.endswith("reverse") else order:
        gates = w_in @ rows[i] + b_in + w_hidden @ hidden + b_hidden
        enter, forget, new, out = gates.chunk(4)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        results[i] = hidden
    return torch.stack([results[i] for i in order])


def layer_rows(case, config):
    """For each layer, which of the 2 * layers blocks of the flat prefix are its key and value."""
    blocks = 2 * config.num_layers
    if case.network.startswith("t5"):  # PEFT doubles the blocks and deals them out by four
        return [(4 * i % blocks, (4 * i + 1) % blocks) for i in range(config.num_layers)]
    return [(2 * i, 2 * i + 1) for i in range(config.num_layers)]


def prefix_cache(case, config, flat, batch):
    """Keys and values of every layer, [batch, heads, virtual tokens, head size] each."""
    heads = config.num_attention_heads
    blocks = flat.view(VIRTUAL, 2 * config.num_layers, heads, -1).permute(1, 2, 0, 3)
    layers = [
        tuple(blocks[i].expand(batch, -1, -1, -1) for i in pair)
        for pair in layer_rows(case, config)
    ]
    cache = DynamicCache(layers)
    return EncoderDecoderCache(cache, DynamicCache()) if case.network.startswith("t5") else cache


def statement(case, config, network, call, parameters):
    """Logits and loss of the adapted network, computed without PEFT."""
    if case.kind is IA3Config:
        weights = scaled_weights(case, network, parameters)
        if "input.0" in call:
            output = torch.func.functional_call(network, weights, (call["input.0"],))
            return output, nn.functional.mse_loss(output, call["target"])
        output = torch.func.functional_call(network, weights, (), dict(call))
        return output.logits, output.loss
    heads = {
        key.removeprefix("base_model."): value
        for key, value in parameters.items()
        if key.startswith("base_model.")
    }
    call = dict(call)
    ids = call["input_ids"]
    batch, length = ids.shape
    ones = torch.ones(batch, VIRTUAL, dtype=call["attention_mask"].dtype)
    rows = encoded(case, parameters)
    if case.kind is PrefixTuningConfig:
        call["past_key_values"] = prefix_cache(case, config, rows, batch)
        which = "decoder_attention_mask" if case.network.startswith("t5") else "attention_mask"
        call[which] = torch.cat([ones, call[which]], 1)
        if not case.network.startswith("t5"):
            call["position_ids"] = torch.arange(VIRTUAL, VIRTUAL + length).expand(batch, -1)
    else:
        embeds = network.get_input_embeddings()(call.pop("input_ids"))
        front = rows[:VIRTUAL].expand(batch, -1, -1)
        call["inputs_embeds"] = torch.cat([front, embeds], 1)
        call["attention_mask"] = torch.cat([ones, call["attention_mask"]], 1)
        if not case.network.startswith("t5"):
            call["position_ids"] = torch.arange(VIRTUAL + length).expand(batch, -1)
            if case.network != "bert":
                call["labels"] = torch.cat([-100 * ones, call["labels"]], 1)
    if case.network == "bert" and case.kind is PrefixTuningConfig:
        # The classifier takes no cache: the encoder, its pooler and the head one after another.
        labels = call.pop("labels")
        pooled = network.bert(**call).pooler_output
        logits = nn.functional.linear(pooled, heads["classifier.weight"], heads["classifier.bias"])
        return logits, nn.functional.cross_entropy(logits, labels)
    output = torch.func.functional_call(network, heads, (), call)
    return output.logits, output.loss


def statement_results(case, config, start, call):
    network = base_network(case).double()
    parameters = {key: value.detach().double().requires_grad_() for key, value in start.items()}
    call = {
        key: value.double() if value.is_floating_point() else value for key, value in call.items()
    }
    return train_three_steps(
        lambda: statement(case, config, network, call, parameters), parameters
    )


def distance(left, right):
    """The largest difference, relative to the largest value."""
    left, right = left.double(), right.double()
    return ((left - right).abs().max() / right.abs().max().clamp_min(1e-30)).item()


# ---- Generation, and padding on the left ----------------------------------------------------


def generate(model, **call):
    result = model.generate(
        **call,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(result.scores).topk(2).values
    margin = (best[..., 0] - best[..., 1]).min().item()
    assert margin > MARGIN, f"a greedy choice wins by {margin} only: take another seed"
    return result.sequences[:, -NEW_TOKENS:]


def row_alone(ids, mask, row):
    return ids[row : row + 1, mask[row] == 1]


def generation_results(case, model):
    """Greedy generation, checked against generation without a cache."""
    if case.network.startswith("t5"):
        call = {k: v for k, v in inputs_of(case).items() if k in ("input_ids", "attention_mask")}
        tokens = generate(model, **call)
        assert len({tuple(row.tolist()) for row in tokens}) > 1, tokens
        decoder = torch.zeros(len(tokens), 1, dtype=torch.int64)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                logits = model(**call, decoder_input_ids=decoder).logits[:, -1]
            decoder = torch.cat([decoder, logits.argmax(-1)[:, None]], 1)
        assert torch.equal(decoder[:, 1:], tokens), (decoder, tokens)
        return {"generate.right": tokens}
    ids, mask = tiny_models.padded_ids(case.network, "left")
    rows = [row_alone(ids, mask, row) for row in range(len(ids))]
    alone = torch.cat([generate(model, input_ids=row) for row in rows])
    for row, tokens in zip(rows, alone):
        for token in tokens:
            with torch.no_grad():
                best = model(input_ids=row).logits[0, -1].argmax()
            assert best == token, (best, token)
            row = torch.cat([row, token.reshape(1, 1)], 1)
    assert all(len(set(row.tolist())) > 1 for row in alone), alone
    assert len({tuple(row.tolist()) for row in alone}) == len(alone), alone
    result = {"generate.alone": alone}
    padded = generate(model, input_ids=ids, attention_mask=mask)
    if case.kind is PrefixTuningConfig:
        assert torch.equal(padded, alone)
    else:  # PEFT gives up the position ids that generate() makes
        assert not torch.equal(padded, alone)
        result["peft.generate.left"] = padded
    return result


def left_padded_results(case, model):
    """What each token gets when the padding is in front, with and without position ids."""
    call = inputs_of(case, "left")
    call.pop("labels")
    mask = call["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone = torch.zeros(0)
    with torch.no_grad():
        without = forget_padding(case, model(**call).logits, mask)
        given = forget_padding(case, model(**call, position_ids=positions).logits, mask)
        for row in range(len(mask)):
            logits = model(input_ids=row_alone(call["input_ids"], mask, row)).logits[0]
            if row == 0:
                alone = torch.zeros_like(given)
            length = int(mask[row].sum())
            front = alone.shape[1] - mask.shape[1]
            alone[row, :front] = logits[:front]
            alone[row, alone.shape[1] - length :] = logits[front:]
    result = {"left.input_ids": call["input_ids"], "left.attention_mask": mask}
    result["left.position_ids"] = positions
    result["left.alone"] = alone
    if case.kind is PrefixTuningConfig:
        assert distance(given, alone) < 1e-5, case.name
        assert distance(without, alone) > 1e-3, case.name
    else:
        assert torch.equal(given, without), "PEFT ignores position ids under a prompt"
        assert distance(without, alone) > 1e-3, case.name
    result["peft.left.output"] = without
    return result


# ---- Writing --------------------------------------------------------------------------------


def merged_results(case, folder, plain):
    """PEFT's merged weights of the adapted modules; they must give the same output."""
    merged = load_adapter(case, folder, trainable=False).merge_and_unload()
    with torch.no_grad():
        output, _ = run(merged, inputs_of(case))
    assert distance(forget_padding(case, output, mask_of(inputs_of(case))), plain) < 1e-5
    if not case.merged:
        return {}
    before = base_network(case).state_dict()
    return {
        "merged." + key: value.detach().clone()
        for key, value in merged.state_dict().items()
        if not torch.equal(value, before[key])
    }


def write(case):
    folder = DATA / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = make_adapter(case, folder)
    call = inputs_of(case)
    mask = mask_of(call)
    loaded = load_adapter(case, folder, trainable=False)
    if case.kind is IA3Config:  # the others PEFT does not load for training
        model = load_adapter(case, folder, trainable=True)
    parameters = trainable_parameters(case, model)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    assert trainable == model.get_nb_trainable_parameters()[0]
    start = {key: value.detach().clone() for key, value in parameters.items()}

    extra = {}
    if case.network in ("gpt2", "llama") and case.kind is not IA3Config and not has_encoder(case):
        extra.update(left_padded_results(case, loaded))
    if is_tiny(case) and case.network != "bert" and case.kind is not IA3Config:
        extra.update(generation_results(case, loaded))
    if case.network == "bert" and case.kind is not IA3Config:
        types = tiny_models.token_types(call["input_ids"])
        with torch.no_grad():
            extra["token_type_ids"] = types
            extra["output_typed"] = loaded(**call, token_type_ids=types).logits

    def forward():
        output, loss = run(model, call)
        return (output if mask is None else forget_padding(case, output, mask)), loss

    result = train_three_steps(forward, parameters)
    with torch.no_grad():
        again = run(loaded, call)[0]
    assert distance(forget_padding(case, again, mask), result["output"]) < 1e-6, case.name
    config = model.peft_config["default"]
    exact = statement_results(case, config, start, call)
    if mask is not None:
        exact["output"] = forget_padding(case, exact["output"], mask)
    worst = max(
        (distance(result[key], exact[key]), key)
        for key in exact
        if exact[key].abs().max() > 0 or result[key].abs().max() > 0
    )
    assert set(exact) == set(result) and worst[0] < 2e-5, (case.name, worst)
    if case.network.startswith("t5"):  # whose float32 is more than 1e-6 off
        extra["exact.output"] = exact["output"]
    unused = [
        key
        for key in result
        if key.startswith("gradient.") and (result[key] == 0).float().mean() > 0.4
    ]
    if case.kind is IA3Config:
        extra.update(merged_results(case, folder, result["output"]))
    if has_encoder(case):
        extra["step.prompt_embeddings"] = model.get_prompt_embedding_to_save("default")

    tensors = {**call, **result, **extra}
    save_file(
        {key: value.detach().clone().contiguous() for key, value in tensors.items()},
        folder / "reference.safetensors",
        metadata={"format": "pt"},
    )
    facts = {
        "network": case.network,
        "trainable": trainable,
        "learning_rate": LEARNING_RATE,
        "steps": STEPS,
        "note": case.note,
    }
    if case.kind is PrefixTuningConfig:
        facts["layer_rows"] = layer_rows(case, config)
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*.*"))
    print(
        f"{case.name:22s} {trainable:5d} trainable {size / 1e3:5.1f} kB, "
        f"farthest from float64: {worst[0]:.1e} ({worst[1]})"
        + (f", many zeros in {unused}" if unused else "")
    )


def main():
    assert (
        peft.__version__ == PEFT_VERSION
    ), f"these files are PEFT {PEFT_VERSION}'s, found {peft.__version__}"
    for case in CASES:
        if len(sys.argv) == 1 or case.name in sys.argv:
            write(case)


if __name__ == "__main__":
    main()
