"""The tiny transformers of data/models, and the token ids that the golden files feed them."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5LayerNorm

DATA = Path(__file__).resolve().parent / "data" / "models"
TRANSFORMERS = "5.23.0"  # the version that wrote data/models
NAMES = ("bert", "roberta", "gpt2", "llama", "t5_v1_0", "t5_v1_1", "t5_deep")
SEEDS = dict(bert=11, roberta=12, gpt2=4, llama=1, t5_v1_0=194, t5_v1_1=3, t5_deep=11)
PAD = dict(bert=0, roberta=1, gpt2=0, llama=0, t5_v1_0=0, t5_v1_1=0, t5_deep=0)
LENGTHS = (9, 6, 4)  # tokens in each row of a batch
VOCABULARY = 48

ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
NO_WORDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
T5 = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    d_kv=6,
    d_ff=24,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    eos_token_id=None,
    pad_token_id=0,
)


def classes():
    """For each network: its class and its config."""
    return {
        "bert": (BertForSequenceClassification, BertConfig(**ENCODER, num_labels=3)),
        "roberta": (
            RobertaModel,
            RobertaConfig(**ENCODER, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5),
        ),
        "gpt2": (
            GPT2LMHeadModel,
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=32,
                n_embd=16,
                n_layer=2,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **NO_WORDS,
            ),
        ),
        "llama": (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                **NO_WORDS,
            ),
        ),
        "t5_v1_0": (T5ForConditionalGeneration, T5Config(**T5, feed_forward_proj="relu")),
        "t5_v1_1": (
            T5ForConditionalGeneration,
            T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        ),
        "t5_deep": (
            T5ForConditionalGeneration,
            T5Config(
                **{**T5, "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 3}
            ),
        ),
    }


# Parameters whose gradient is stored beside the loss: one that everything flows back to, and one
# inside the first layer.
WATCHED = dict(
    BertForSequenceClassification=(
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
    ),
    GPT2LMHeadModel=("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"),
    LlamaForCausalLM=(
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
    ),
    T5ForConditionalGeneration=(
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
)


def norm(self, x):
    """T5LayerNorm in the precision of x; transformers 5.23.0 takes the mean in float32."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


T5LayerNorm.forward = norm


def new(name):
    kind, config = classes()[name]
    config._attn_implementation = "eager"
    network = kind(config, **network_options(kind))
    if name == "t5_v1_1":  # transformers 5 ties them when it builds, not when it loads
        network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().clone())
    return network


def network_options(kind):
    return dict(add_pooling_layer=False) if kind is RobertaModel else {}


def load(name):
    """The network with its weights of data/models, in eval mode."""
    kind = classes()[name][0]
    network = kind.from_pretrained(
        DATA / name, attn_implementation="eager", dtype=torch.float32, **network_options(kind)
    )
    if name == "t5_v1_1":
        assert network.lm_head.weight is not network.shared.weight
        assert not getattr(network.config, "scale_decoder_outputs", False)
    return network.eval()


def padded_ids(name, side):
    """Three rows of 9, 6 and 4 random tokens, padded on the right or on the left; and the mask."""
    generator = torch.Generator().manual_seed(100 + SEEDS[name])
    ids = torch.full((len(LENGTHS), max(LENGTHS)), PAD[name])
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        tokens = torch.randint(4, VOCABULARY, (length,), generator=generator)
        place = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, place] = tokens
        mask[row, place] = 1
    return ids, mask


def token_types(ids):
    """The second half of the tokens is the second sentence."""
    return (torch.arange(ids.shape[1]) > ids.shape[1] // 2).long().expand(ids.shape).contiguous()


def class_labels():
    return torch.tensor([2, 0, 1])


def t5_targets():
    """Decoder ids, their mask, and the labels they are shifted from (-100 is padding)."""
    generator = torch.Generator().manual_seed(200)
    labels = torch.randint(4, VOCABULARY, (len(LENGTHS), 7), generator=generator)
    for row, length in enumerate((7, 4, 6)):
        labels[row, length:] = -100
    ids = torch.zeros_like(labels)
    ids[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)
    return ids, (labels != -100).long(), labels
