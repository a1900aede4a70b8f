"""Writes data/models/: tiny transformers with random weights, and what transformers computes.

    pip install -r requirements.txt
    python make_models.py [NETWORK ...]

One folder a network: model.safetensors and config.json as `save_pretrained` writes them, and
reference.safetensors; README.md beside this script lists its tensors. The adapters of
data/additive sit on these networks.
"""

import json
import os
import shutil
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutput

import tiny_models
from tiny_models import PAD

NEW_TOKENS = 8
MARGIN = 1e-2  # by how much every greedy choice must win, so that rounding cannot change it

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def randomise(network, seed):
    """Every parameter drawn anew: none is zero, one, or so small that a mistake hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            name = key.lower()
            if parameter.dim() == 1 and key.endswith("weight"):  # LayerNorm, RMSNorm
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name or "shared" in name:
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(1.2 / min(parameter.shape) ** 0.5 * noise)
    return network.eval()


def forget_padding(output, mask):
    """Zeros where the query is padding: what padding sees is nobody's result."""
    return output * mask.unsqueeze(-1)


def encoder_reference(name, network):
    """BERT with its pooler, head and loss; RoBERTa's hidden states only."""
    pad = PAD[name]
    result = {}
    for side in ("right", "left"):
        ids, mask = tiny_models.padded_ids(name, side)
        call = dict(input_ids=ids, attention_mask=mask)
        result.update({f"{side}.{key}": value for key, value in call.items()})
        with torch.no_grad():
            if name == "roberta":
                hidden = network(**call).last_hidden_state
            else:
                inner = network.bert(**call)
                hidden = inner.last_hidden_state
                result[side + ".pooled"] = inner.pooler_output
                result[side + ".logits"] = network(**call).logits
                types = tiny_models.token_types(ids)
                typed = network.bert(**call, token_type_ids=types).last_hidden_state
                result[side + ".token_type_ids"] = types
                result[side + ".hidden_typed"] = forget_padding(typed, mask)
        result[side + ".hidden"] = forget_padding(hidden, mask)
    if name == "bert":
        call = {key: result["right." + key] for key in ("input_ids", "attention_mask")}
        labels = tiny_models.class_labels()
        loss = network(**call, labels=labels).loss
        loss.backward()
        result.update(labels=labels, loss=loss)
        add_gradients(result, network)
    assert (result["right.input_ids"][result["right.attention_mask"] == 0] == pad).all()
    return result


def add_gradients(result, network):
    """The loss's gradients for the parameters that WATCHED names."""
    for key in tiny_models.WATCHED[type(network).__name__]:
        result["gradient." + key] = network.get_parameter(key).grad


def greedy(network, **call):
    """What `generate` appends or, for an encoder-decoder, the whole of what it writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = network.generate(
            **call,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    if call.get("eos_token_id") is None:
        best = torch.stack(result.scores).topk(2).values
        margin = (best[..., 0] - best[..., 1]).min().item()
        assert margin > MARGIN, f"a greedy choice wins by {margin} only: take another seed"
    return result.sequences


def check_ids(tokens):
    """Rows that repeat one token, or each other, would not show much."""
    assert all(len(set(row.tolist())) >= 3 for row in tokens), tokens
    assert len({tuple(row.tolist()) for row in tokens}) == len(tokens), tokens


def end_token(tokens):
    """A token that ends the first row early while another row goes on without it."""
    return next(token for token in tokens[0] if any((row != token).all() for row in tokens))


def decoder_reference(name, network):
    result = {}
    for side in ("right", "left"):
        ids, mask = tiny_models.padded_ids(name, side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        call = dict(input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            output = network(**call, position_ids=positions, output_hidden_states=True)
            plain = network(**call)  # transformers counts from 0 whatever the mask says
        result.update(
            {
                side + ".input_ids": ids,
                side + ".attention_mask": mask,
                side + ".position_ids": positions,
                side + ".hidden": forget_padding(output.hidden_states[-1], mask),
                side + ".logits": forget_padding(output.logits, mask),
            }
        )
        if name == "gpt2" and side == "left":
            result["left.logits_without_position_ids"] = forget_padding(plain.logits, mask)
        else:  # the same positions, or rotary ones, of which only differences count
            torch.testing.assert_close(
                forget_padding(plain.logits, mask), result[side + ".logits"], rtol=0, atol=1e-5
            )
    labels = result["right.input_ids"].masked_fill(result["right.attention_mask"] == 0, -100)
    loss = network(
        result["right.input_ids"], attention_mask=result["right.attention_mask"], labels=labels
    ).loss
    loss.backward()
    result.update(labels=labels, loss=loss)
    add_gradients(result, network)

    ids, mask = tiny_models.padded_ids(name, "left")
    result["generate.left"] = greedy(network, input_ids=ids, attention_mask=mask)
    longest = ids[:1]
    assert mask[0].all()
    result["generate.plain"] = greedy(network, input_ids=longest)
    assert torch.equal(result["generate.plain"][0], result["generate.left"][0])
    alone = greedy(network, input_ids=ids[1:2, mask[1] == 1])[0]
    assert torch.equal(alone, result["generate.left"][1, -len(alone) :]), "padding shows"
    check_ids(result["generate.left"][:, ids.shape[1] :])

    end = end_token(result["generate.left"][:, ids.shape[1] :])
    stopped = greedy(network, input_ids=ids, attention_mask=mask, eos_token_id=end.item())
    result["generate.end_token"] = end.reshape(1)
    result["generate.left_until_end"] = stopped
    return result


def t5_reference(name, network):
    result = {}
    decoder_ids, decoder_mask, labels = tiny_models.t5_targets()
    result.update(
        {
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
            "labels": labels,
        }
    )
    for side in ("right", "left"):
        ids, mask = tiny_models.padded_ids(name, side)
        call = dict(input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            encoded = network.get_encoder()(**call).last_hidden_state
            output = network(
                encoder_outputs=BaseModelOutput(encoded),
                attention_mask=mask,
                decoder_input_ids=decoder_ids,
                decoder_attention_mask=decoder_mask,
                output_hidden_states=True,
            )
        result.update(
            {
                side + ".input_ids": ids,
                side + ".attention_mask": mask,
                side + ".encoder_hidden": forget_padding(encoded, mask),
                side + ".hidden": forget_padding(output.decoder_hidden_states[-1], decoder_mask),
                side + ".logits": forget_padding(output.logits, decoder_mask),
            }
        )
        result["generate." + side] = greedy(network, **call)
        check_ids(result["generate." + side][:, 1:])
    assert torch.equal(result["generate.right"], result["generate.left"]), "padding's side matters"
    # `labels` alone: transformers shifts them right itself and gives no decoder mask.
    output = network(
        result["right.input_ids"], attention_mask=result["right.attention_mask"], labels=labels
    )
    output.loss.backward()
    assert torch.equal(network._shift_right(labels), decoder_ids)
    result.update(loss=output.loss)
    add_gradients(result, network)
    end = end_token(result["generate.right"][:, 1:])
    result["generate.end_token"] = end.reshape(1)
    result["generate.right_until_end"] = greedy(
        network,
        input_ids=result["right.input_ids"],
        attention_mask=result["right.attention_mask"],
        eos_token_id=end.item(),
    )
    return result


def save(name, network, folder):
    network.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "t5_v1_1":  # as published: transformers 5 would write that the head is tied
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = network.lm_head.weight.detach()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = False
        del config["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write(name):
    folder = tiny_models.DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    network = randomise(tiny_models.new(name), tiny_models.SEEDS[name])
    save(name, network, folder)
    network = tiny_models.load(name)
    kind = (
        encoder_reference
        if name in ("bert", "roberta")
        else t5_reference if name.startswith("t5") else decoder_reference
    )
    tensors = {
        key: value.detach().reshape(value.shape or (1,)).clone().contiguous()
        for key, value in kind(name, network).items()
    }
    assert all(value.isfinite().all() for value in tensors.values())
    save_file(tensors, folder / "reference.safetensors", metadata={"format": "pt"})
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:10s} {size / 1e3:6.1f} kB, {len(tensors)} tensors")


def main():
    assert transformers.__version__ == tiny_models.TRANSFORMERS, transformers.__version__
    for name in sys.argv[1:] or tiny_models.NAMES:
        write(name)


if __name__ == "__main__":
    main()
