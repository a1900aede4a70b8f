"""Writes the bottleneck adapters of data/additive/ with AdapterHub's library `adapters`.

    python -m venv hub && hub/bin/pip install -r requirements_adapter_hub.txt
    hub/bin/python make_adapter_hub.py [CASE ...]

It needs another transformers than the other scripts, hence an environment of its own. The networks
are those of data/models; README.md says what is in a case, and where each adapter sits. Every
number is compared here with plain transformers and hooks in float64.
"""

import json
import logging
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
import transformers
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_models

# T5's softmax is in float32 by `.float()`; float64 shall stay what it is.
to_float32 = torch.Tensor.float
torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else to_float32(t)

DATA = Path(__file__).resolve().parent / "data" / "additive"
VERSION = "1.3.0"
NAME = "bottleneck"  # the adapter's name, a part of every key
LEARNING_RATE = 0.1
STEPS = 3
BOTTLENECK = dict(reduction_factor=4)  # 4 of 16

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
logging.getLogger("adapters").setLevel(logging.ERROR)


@dataclass
class Case:
    name: str
    network: str
    kind: type
    options: dict = field(default_factory=dict)
    note: str = ""


CASES = [
    Case("houlsby_bert", "bert", DoubleSeqBnConfig),
    Case("houlsby_gelu_roberta", "roberta", DoubleSeqBnConfig, dict(non_linearity="gelu")),
    Case("houlsby_gpt2", "gpt2", DoubleSeqBnConfig),
    Case("houlsby_llama", "llama", DoubleSeqBnConfig),
    Case("houlsby_t5_v1_0", "t5_v1_0", DoubleSeqBnConfig),
    Case(
        "houlsby_cross_t5_v1_1",
        "t5_v1_1",
        DoubleSeqBnConfig,
        dict(cross_adapter=True, reduction_factor=8),
        note="the decoder's cross attention has an adapter too",
    ),
    Case("pfeiffer_bert", "bert", SeqBnConfig, note="adapter_bin holds the same as a pickle"),
    Case(
        "pfeiffer_leave_out_bert",
        "bert",
        SeqBnConfig,
        dict(leave_out=[0]),
        note="AdapterDrop: no adapter in layer 0",
    ),
    Case("pfeiffer_gpt2", "gpt2", SeqBnConfig),
    Case("pfeiffer_leave_out_llama", "llama", SeqBnConfig, dict(leave_out=[1])),
    Case("pfeiffer_t5_v1_1", "t5_v1_1", SeqBnConfig),
    Case(
        "pfeiffer_leave_out_t5_v1_0",
        "t5_v1_0",
        SeqBnConfig,
        dict(leave_out=[0, 3]),
        note="layers are counted through encoder and decoder: 3 is the decoder's second",
    ),
    Case("parallel_bert", "bert", ParBnConfig),
    Case("parallel_learned_bert", "bert", ParBnConfig, dict(scaling="learned")),
    Case("parallel_gpt2", "gpt2", ParBnConfig),
    Case("parallel_learned_llama", "llama", ParBnConfig, dict(scaling="learned")),
    Case("parallel_t5_v1_0", "t5_v1_0", ParBnConfig),
]


# ---- Networks and inputs --------------------------------------------------------------------


def base_network(case):
    network = tiny_models.load(case.network)
    network.config.name_or_path = network.name_or_path = case.network  # goes into the JSON
    return network


def inputs_of(case):
    ids, mask = tiny_models.padded_ids(case.network, "right")
    call = dict(input_ids=ids, attention_mask=mask)
    if case.network == "bert":
        call["labels"] = tiny_models.class_labels()
    elif case.network.startswith("t5"):
        decoder_ids, decoder_mask, labels = tiny_models.t5_targets()
        call.update(
            decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask, labels=labels
        )
    elif case.network != "roberta":
        call["labels"] = ids.masked_fill(mask == 0, -100)
    return call


def run(network, call):
    """Logits and loss; RoBERTa's hidden states and the mean of their squares. Zero at padding."""
    output = network(**call)
    mask = call.get("decoder_attention_mask", call["attention_mask"]).unsqueeze(-1)
    if not hasattr(output, "logits"):
        hidden = output.last_hidden_state * mask
        return hidden, hidden.pow(2).mean()
    logits = output.logits
    return (logits * mask if logits.dim() == 3 else logits), output.loss


# ---- Adapters by the library ----------------------------------------------------------------


def make_adapter(case, folder):
    torch.manual_seed(0)
    network = base_network(case)
    adapters.init(network)
    network.add_adapter(NAME, config=case.kind(**{**BOTTLENECK, **case.options}))
    network.train_adapter(NAME)
    freeze_lm_head(network)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("scaling"):
                parameter.copy_(1.5 + 0.3 * noise)
            elif key.endswith("adapter_down.0.bias"):
                parameter.copy_(noise.abs())  # keeps the ReLUs open
            elif "adapters" in key:
                parameter.copy_(0.4 * noise)
            else:
                parameter.add_(0.2 * noise)
    head = case.network == "bert"
    save(network, folder / "adapter", head, use_safetensors=True)
    if case.name == "pfeiffer_bert":
        save(network, folder / "adapter_bin", head, use_safetensors=False)
    return network.eval()


def save(network, folder, with_head, use_safetensors):
    network.save_adapter(str(folder), NAME, with_head=with_head, use_safetensors=use_safetensors)


def freeze_lm_head(network):
    """train_adapter() leaves an untied lm_head trainable; here only classifiers are trained."""
    if hasattr(network, "lm_head"):
        network.lm_head.weight.requires_grad_(False)


def load_adapter(case, folder):
    network = base_network(case)
    adapters.init(network)
    loaded = network.load_adapter(
        str(folder), with_head=case.network == "bert", use_safetensors=True
    )
    network.train_adapter(loaded)
    freeze_lm_head(network)
    return network.eval()


def trainable_parameters(network):
    return {key: value for key, value in network.named_parameters() if value.requires_grad}


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


# ---- The same by hooks ----------------------------------------------------------------------


def bottleneck(case, parameters, place):
    """scale * up(g(down(x))) with the parameters under `place`; None where there are none."""
    base = f"{place}.adapters.{NAME}."
    if base + "adapter_up.weight" not in parameters:
        return None
    activation = case.options.get(
        "non_linearity", "silu" if case.kind is DoubleSeqBnConfig else "relu"
    )
    scale = parameters.get(base + "scaling", 4.0 if case.kind is ParBnConfig else 1.0)

    def apply(x):
        down = nn.functional.linear(
            x, parameters[base + "adapter_down.0.weight"], parameters[base + "adapter_down.0.bias"]
        )
        hidden = getattr(nn.functional, activation)(down)
        return scale * nn.functional.linear(
            hidden, parameters[base + "adapter_up.weight"], parameters[base + "adapter_up.bias"]
        )

    return apply


def first(output):
    return output[0] if isinstance(output, tuple) else output


def with_first(output, value):
    return (value, *output[1:]) if isinstance(output, tuple) else value


def adapt_post_norm(case, module, adapter):
    """BERT: the module is LayerNorm(dense(x) + residual)."""

    def forward(x, residual):
        h = module.dense(x)
        if case.kind is DoubleSeqBnConfig:
            h = h + adapter(h)
        elif case.kind is SeqBnConfig:
            h = h + adapter(module.LayerNorm(h + residual))
        else:
            h = h + adapter(residual)
        return module.LayerNorm(h + residual)

    module.forward = forward


def adapt_pre_norm(case, half, adapter):
    """T5: the module is x + f(norm(x)), its first input is x."""

    def hook(module, inputs, keywords, output):
        x = inputs[0] if inputs else keywords["hidden_states"]
        y = first(output)
        at = {DoubleSeqBnConfig: y - x, SeqBnConfig: y, ParBnConfig: x}[case.kind]
        return with_first(output, y + adapter(at))

    half.register_forward_hook(hook, with_kwargs=True)


def adapt_block(case, block, inner, norm, adapter):
    """GPT-2, LLaMA: `inner` is f, `norm` what stands before it, the block ends behind it."""
    if case.kind is DoubleSeqBnConfig:
        inner.register_forward_hook(
            lambda module, inputs, output: with_first(
                output, first(output) + adapter(first(output))
            )
        )
        return
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def hook(module, inputs, output):
        x, y = seen.pop(), first(output)
        return with_first(output, y + adapter(y if case.kind is SeqBnConfig else x))

    block.register_forward_hook(hook)


def places_of(case, name, module):
    """Where a module takes adapters: the name in the file, and what puts one there."""
    kind = module.__class__.__name__
    if kind in ("BertSelfOutput", "BertOutput", "RobertaSelfOutput", "RobertaOutput"):
        return {name: lambda adapter: adapt_post_norm(case, module, adapter)}
    if kind in ("T5LayerFF", "T5LayerSelfAttention", "T5LayerCrossAttention"):
        return {name: lambda adapter: adapt_pre_norm(case, module, adapter)}
    if kind == "GPT2Block":
        attention, before, between = module.attn, module.ln_1, module.ln_2
    elif kind == "LlamaDecoderLayer":
        attention = module.self_attn
        before, between = module.input_layernorm, module.post_attention_layernorm
    else:
        return {}
    return {
        name + ".attention_adapters": lambda adapter: adapt_block(
            case, module, attention, before, adapter
        ),
        name + ".output_adapters": lambda adapter: adapt_block(
            case, module, module.mlp, between, adapter
        ),
    }


def adapt(case, network, parameters):
    """Puts hooks for all adapters; the number of adapters found."""
    found = 0
    for name, module in network.named_modules():
        for place, attach in places_of(case, name, module).items():
            adapter = bottleneck(case, parameters, place)
            if adapter is not None:
                attach(adapter)
                found += 1
    return found


def statement_results(case, start, call):
    network = base_network(case).double()
    parameters = {key: value.detach().double().requires_grad_() for key, value in start.items()}
    wanted = sum(key.endswith("adapter_up.weight") for key in parameters)
    assert adapt(case, network, parameters) == wanted, case.name
    heads = {key: value for key, value in parameters.items() if "adapters" not in key}

    def forward():
        return run(lambda **kw: torch.func.functional_call(network, heads, (), kw), call)

    return train_three_steps(forward, parameters)


def distance(left, right):
    """The largest difference, relative to the largest value."""
    left, right = left.double(), right.double()
    return ((left - right).abs().max() / right.abs().max().clamp_min(1e-30)).item()


# ---- Writing --------------------------------------------------------------------------------


def write(case):
    folder = DATA / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written = make_adapter(case, folder)
    network = load_adapter(case, folder / "adapter")
    call = inputs_of(case)
    with torch.no_grad():
        assert torch.equal(run(written, call)[0], run(network, call)[0]), case.name
    parameters = trainable_parameters(network)
    saved = set(load_file(folder / "adapter" / "adapter.safetensors"))
    assert saved == {key for key in parameters if "adapters" in key}, case.name
    trainable = sum(parameter.numel() for parameter in parameters.values())
    start = {key: value.detach().clone() for key, value in parameters.items()}
    result = train_three_steps(lambda: run(network, call), parameters)
    exact = statement_results(case, start, call)
    worst = max((distance(result[key], exact[key]), key) for key in exact)
    assert set(exact) == set(result) and worst[0] < 2e-5, (case.name, worst)
    for key, value in exact.items():
        assert key == "output" or (value != 0).float().mean() > 0.4, (case.name, key)

    if case.network.startswith("t5"):  # whose float32 is more than 1e-6 off
        result["exact.output"] = exact["output"]
    save_file(
        {key: value.detach().clone().contiguous() for key, value in {**call, **result}.items()},
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
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*.*"))
    print(
        f"{case.name:28s} {trainable:5d} trainable {size / 1e3:5.1f} kB, "
        f"farthest from float64: {worst[0]:.1e} ({worst[1]})"
    )


def main():
    assert (
        adapters.__version__ == VERSION
    ), f"these files are those of adapters {VERSION}, found {adapters.__version__}"
    for case in CASES:
        if len(sys.argv) == 1 or case.name in sys.argv:
            write(case)


if __name__ == "__main__":
    main()
