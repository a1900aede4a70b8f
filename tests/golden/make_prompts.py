"""Writes data/prompts/: multitask prompts, cartridges and CPT by HF PEFT.

    pip install -r requirements.txt
    python make_prompts.py [CASE ...]

As make_additive.py, whose parts it uses: the networks are those of data/models, one folder a case,
and every number of PEFT is compared here with a second computation in float64 that uses nothing of
PEFT. What these tuners want beside their text is in reference.safetensors too: task_ids a row,
input_type_mask a token.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import make_additive as additive  # first: it fixes the order of sets

import peft
import torch
from peft import CartridgeConfig, CPTConfig, MultitaskPromptTuningConfig, get_peft_model
from peft.peft_model import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_models

DATA = Path(__file__).resolve().parent / "data" / "prompts"
VIRTUAL = additive.VIRTUAL
TASK_IDS = (2, 0, 2)  # a row each; task 1 is of no row


@dataclass
class Case(additive.Case):
    targets: str = "ids"  # T5's decoder gets "ids", or the labels, of which it makes them


MPT = dict(num_tasks=3, num_ranks=2)
CPT = dict(
    cpt_token_ids=[5, 9, 7, 11, 6, 30, 8, 12],
    cpt_mask=[1] * 8,
    # Two examples: a template, two words, the template of the answer and the answer.
    cpt_tokens_type_mask=[1, 2, 3, 4, 5, 6, 7, 8],
    opt_weighted_loss_type="decay",
    opt_loss_decay_factor=0.9,
    opt_projection_epsilon=2.0,
    opt_projection_format_epsilon=1.0,
)

CASES = [
    Case("mpt_bert", "bert", MultitaskPromptTuningConfig, MPT),
    Case("mpt_gpt2", "gpt2", MultitaskPromptTuningConfig, MPT),
    Case("mpt_llama", "llama", MultitaskPromptTuningConfig, dict(num_tasks=3, num_ranks=1)),
    Case(
        "mpt_t5_v1_0",
        "t5_v1_0",
        MultitaskPromptTuningConfig,
        MPT,
        targets="labels",
        note="2 * 4 rows: the encoder's and the decoder's, both of which PEFT uses",
    ),
    Case(
        "mpt_encoder_t5_v1_0",
        "t5_v1_0",
        MultitaskPromptTuningConfig,
        dict(num_transformer_submodules=1, **MPT),
        targets="labels",
    ),
    Case("cartridge_bert", "bert", CartridgeConfig, {}),
    Case("cartridge_gpt2", "gpt2", CartridgeConfig, {}),
    Case("cartridge_llama", "llama", CartridgeConfig, dict(num_frozen_tokens=2), seed=4),
    Case("cartridge_free_llama", "llama", CartridgeConfig, dict(num_frozen_tokens=0), seed=5),
    Case("cartridge_t5_v1_0", "t5_v1_0", CartridgeConfig, additive.T5_HEADS),
    Case("cpt_gpt2", "gpt2", CPTConfig, CPT),
    Case("cpt_llama", "llama", CPTConfig, {**CPT, "opt_weighted_loss_type": "none"}),
]


def is_multitask(case):
    return case.kind is MultitaskPromptTuningConfig


def is_cpt(case):
    return case.kind is CPTConfig


def virtual_tokens(case):
    return len(CPT["cpt_token_ids"]) if is_cpt(case) else VIRTUAL


def config_of(case):
    options = dict(case.options, task_type=additive.TASKS[case.network])
    if not is_cpt(case):
        options["num_virtual_tokens"] = VIRTUAL
    return case.kind(**options)


def inputs_of(case):
    """What the network is called with, labels included."""
    call = additive.inputs_of(case)
    if is_multitask(case):
        call["task_ids"] = torch.tensor(TASK_IDS)
    if case.targets == "labels":
        call.pop("decoder_input_ids")
        if case.options.get("num_transformer_submodules") == 1:
            call.pop("decoder_attention_mask")  # PEFT lengthens it, and the decoder not
    if is_cpt(case):
        # The first token of each row is a template, the last two are the answer.
        types = torch.full_like(call["input_ids"], 2)
        types[:, 0] = 1
        for row, length in enumerate(call["attention_mask"].sum(1).tolist()):
            types[row, length - 2 : length] = 4
            types[row, length:] = 0
        call["input_type_mask"] = types
    return call


def own_inputs(case):
    """inputs_of with fresh tensors: PEFT adds to input_type_mask in place."""
    return {key: value.clone() for key, value in inputs_of(case).items()}


# ---- Adapters by PEFT -----------------------------------------------------------------------


def randomise(case, model):
    """Trained-looking values for everything, frozen tokens included."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "prompt_encoder" not in key and not parameter.requires_grad:
                continue
            if is_cpt(case) and "delta_embedding" not in key:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "prompt_encoder" not in key:  # a head
                parameter.add_(0.2 * noise)
            elif "delta_embedding" in key:  # some of it beyond epsilon; labels do not move
                types = torch.tensor(case.options["cpt_tokens_type_mask"])
                parameter.copy_(0.05 * noise * (types % 4 != 0).unsqueeze(1))
            elif "prefix_task" in key:
                parameter.copy_(0.9 * noise)
            else:
                parameter.copy_(0.8 * noise)


def training_state(case, model):
    """What libpeft keeps beside the file, by its names there."""
    encoder = model.prompt_encoder["default"]
    return {
        "embedding.weight": encoder.embedding.weight,
        "delta_embedding.weight": encoder.delta_embedding.weight,
    }


def make_adapter(case, folder):
    torch.manual_seed(0)
    model = get_peft_model(additive.base_network(case), config_of(case)).eval()
    randomise(case, model)
    if is_cpt(case):
        state = {k: v.detach().clone() for k, v in training_state(case, model).items()}
        save_file(state, folder / "encoder.safetensors", metadata={"format": "pt"})
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink()
    return model


def trainable_parameters(case, model):
    """By the key of the adapter's file, or of encoder.safetensors."""
    names = {
        "embedding.weight": "prompt_embeddings",
        "trainable_embedding": "prompt_embeddings",
    }
    result = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = key.split("prompt_encoder.default.")[-1]
        if own == key:  # a head
            own = "base_model." + key.removeprefix("base_model.").replace(
                "modules_to_save.default.", ""
            )
        result[names.get(own, own)] = parameter
    return result


# ---- The same without PEFT ------------------------------------------------------------------


def front_rows(case, parameters, fixed):
    """The embeddings in front of each row, [rows, virtual tokens of all stacks, width]."""
    if is_cpt(case):
        delta = parameters["delta_embedding.weight"]
        types = torch.tensor(case.options["cpt_tokens_type_mask"])
        width = delta.shape[1]
        epsilon = torch.full((len(types),), 1e-10, dtype=delta.dtype)
        epsilon[types % 4 == 2] = case.options["opt_projection_epsilon"] * (width / 2048) ** 0.5
        for kind in (1, 3):
            epsilon[types % 4 == kind] = (
                case.options["opt_projection_format_epsilon"] * (width / 2048) ** 0.5
            )
        with torch.no_grad():  # PEFT projects the parameter itself in every forward
            norm = delta.norm(dim=1)
            delta.mul_((epsilon / torch.maximum(norm, epsilon)).unsqueeze(1))
        moves = (types % 4 != 0).to(delta.dtype).unsqueeze(1)
        moving = delta * moves + (delta * (1 - moves)).detach()
        return (fixed["embedding.weight"] + moving).unsqueeze(0)
    cols, rows = parameters["prefix_task_cols"], parameters["prefix_task_rows"]
    return torch.stack(
        [parameters["prompt_embeddings"] * (cols[task] @ rows[task]) for task in TASK_IDS]
    )


def cpt_loss(case, logits, call):
    """The mean over the answers' tokens, those of the prompt's examples included."""
    options = case.options
    context = torch.tensor(options["cpt_tokens_type_mask"])
    losses = []
    for row in range(len(logits)):
        types = call["input_type_mask"][row]
        types = torch.cat([context, torch.where(types > 0, types + context.max(), types)])
        words = torch.cat([torch.tensor(options["cpt_token_ids"]), call["labels"][row]])
        answers = [t for t in types[1:].unique().tolist() if t > 0 and t % 4 == 0]
        for place in range(1, len(types)):
            kind = int(types[place])
            if kind not in answers or words[place] == -100:
                continue
            weight = 1.0
            if options["opt_weighted_loss_type"] == "decay":
                later = sum(other > kind for other in answers)
                weight = options["opt_loss_decay_factor"] ** later
            losses.append(-weight * logits[row, place - 1].log_softmax(0)[words[place]])
    return torch.stack(losses).mean()


def statement(case, config, network, call, parameters, fixed):
    """Logits and loss of the adapted network, computed without PEFT."""
    heads = {
        key.removeprefix("base_model."): value
        for key, value in parameters.items()
        if key.startswith("base_model.")
    }
    call = dict(call)
    given = dict(call)
    call.pop("task_ids", None)
    call.pop("input_type_mask", None)
    is_t5 = case.network.startswith("t5")
    ids = call["input_ids"]
    batch, length = ids.shape
    count = virtual_tokens(case)
    ones = torch.ones(batch, count, dtype=call["attention_mask"].dtype)
    if case.kind is CartridgeConfig:
        rows = torch.cat([fixed["frozen"], parameters["prompt_embeddings"]])
        call["past_key_values"] = additive.prefix_cache(case, config, rows, batch)
        which = "decoder_attention_mask" if is_t5 else "attention_mask"
        call[which] = torch.cat([ones, call[which]], 1)
        if not is_t5:
            call["position_ids"] = torch.arange(count, count + length).expand(batch, -1)
        if case.network == "bert":
            labels = call.pop("labels")
            pooled = network.bert(**call).pooler_output
            logits = nn.functional.linear(
                pooled, heads["classifier.weight"], heads["classifier.bias"]
            )
            return logits, nn.functional.cross_entropy(logits, labels)
    else:
        rows = front_rows(case, parameters, fixed).expand(batch, -1, -1)
        embeds = network.get_input_embeddings()(call.pop("input_ids"))
        call["inputs_embeds"] = torch.cat([rows[:, :count], embeds], 1)
        call["attention_mask"] = torch.cat([ones, call["attention_mask"]], 1)
        if not is_t5:
            call["position_ids"] = torch.arange(count + length).expand(batch, -1)
            if case.network != "bert":
                call["labels"] = torch.cat([-100 * ones, call["labels"]], 1)
        elif rows.shape[1] > count:
            words, mask, _ = tiny_models.t5_targets()
            embeds = network.get_input_embeddings()(words)
            call["decoder_inputs_embeds"] = torch.cat([rows[:, count:], embeds], 1)
            call["decoder_attention_mask"] = torch.cat([ones, mask], 1)
            call["labels"] = torch.cat([-100 * ones, call["labels"]], 1)
    if is_cpt(case):
        call.pop("labels")
    output = torch.func.functional_call(network, heads, (), call)
    loss = cpt_loss(case, output.logits, given) if is_cpt(case) else output.loss
    return output.logits, loss


def statement_results(case, config, start, fixed, call):
    network = additive.base_network(case).double()
    parameters = {key: value.detach().double().requires_grad_() for key, value in start.items()}
    fixed = {key: value.detach().double() for key, value in fixed.items()}
    return additive.train_three_steps(
        lambda: statement(case, config, network, call, parameters, fixed), parameters
    )


# ---- Generation -----------------------------------------------------------------------------


def generation_results(case, model):
    """Greedy generation of each row alone, with its task, checked without a cache."""
    ids, mask = tiny_models.padded_ids(case.network, "right")
    result = []
    for row in range(len(ids)):
        words = additive.row_alone(ids, mask, row)
        more = dict(task_ids=torch.tensor(TASK_IDS[row : row + 1])) if is_multitask(case) else {}
        tokens = additive.generate(model, input_ids=words, **more)
        result.append(tokens)
        for token in tokens[0]:
            with torch.no_grad():
                best = model(input_ids=words, **more).logits[0, -1].argmax()
            assert best == token, (best, token)
            words = torch.cat([words, token.reshape(1, 1)], 1)
    return {"generate.alone": torch.cat(result)}


# ---- Writing --------------------------------------------------------------------------------


def forget_padding(case, logits, call):
    mask = call.get("decoder_attention_mask")
    if mask is None:
        mask = call["attention_mask"]
        if case.network.startswith("t5"):
            mask = tiny_models.t5_targets()[1]
    return additive.forget_padding(case, logits, mask)


def write(case):
    folder = DATA / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = make_adapter(case, folder)
    call = inputs_of(case)
    loaded = PeftModel.from_pretrained(
        additive.base_network(case), folder / "adapter", is_trainable=False
    ).eval()
    parameters = trainable_parameters(case, model)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    assert trainable == model.get_nb_trainable_parameters()[0]
    start = {key: value.detach().clone() for key, value in parameters.items()}
    encoder = model.prompt_encoder["default"]
    fixed = {}
    if is_cpt(case):
        fixed["embedding.weight"] = encoder.embedding.weight
    if case.kind is CartridgeConfig:
        frozen = encoder.frozen_embedding
        fixed["frozen"] = torch.zeros(0, start["prompt_embeddings"].shape[1])
        if frozen is not None:
            fixed["frozen"] = frozen
    fixed = {key: value.detach().clone() for key, value in fixed.items()}

    extra = {}
    if case.network in ("gpt2", "llama"):
        extra.update(generation_results(case, loaded))

    def forward():
        output, loss = additive.run(model, own_inputs(case))
        return forget_padding(case, output, call), loss

    result = additive.train_three_steps(forward, parameters)
    again = own_inputs(case)
    with torch.no_grad():
        again = forget_padding(case, additive.run(loaded, again)[0], call)
    assert additive.distance(again, result["output"]) < 1e-6, case.name
    config = model.peft_config["default"]
    exact = statement_results(case, config, start, fixed, call)
    exact["output"] = forget_padding(case, exact["output"], call)
    worst = max((additive.distance(result[key], exact[key]), key) for key in exact)
    assert set(exact) == set(result) and worst[0] < 2e-5, (case.name, worst)
    if is_cpt(case):
        with torch.no_grad():  # an output projects; the file has what it makes
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
        "learning_rate": additive.LEARNING_RATE,
        "steps": additive.STEPS,
        "note": case.note,
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*.*"))
    print(
        f"{case.name:22s} {trainable:5d} trainable {size / 1e3:5.1f} kB, "
        f"farthest from float64: {worst[0]:.1e} ({worst[1]})"
    )


def main():
    assert (
        peft.__version__ == additive.PEFT_VERSION
    ), f"these files are PEFT {additive.PEFT_VERSION}'s, found {peft.__version__}"
    for case in CASES:
        if len(sys.argv) == 1 or case.name in sys.argv:
            write(case)


if __name__ == "__main__":
    main()
