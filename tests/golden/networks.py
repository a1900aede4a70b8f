"""The networks of the golden files. tests/networks.h holds the same ones in C++.

Every network is built by `build(name)`, owns the parameter names that its C++ twin owns, and
is called with the tensors of `inputs(name, generator)`.
"""

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 16)
        self.fc2 = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return torch.tanh(self.query(x)) + self.value(x)


class Encoder(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.layer = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


class Decoder(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.block = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return x


class Stack(nn.Module):
    """Numbered layers under two different names, for layers_to_transform and the patterns."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(8, 3)
        self.decoder = Decoder(8, 2)

    def forward(self, x):
        return self.decoder(self.encoder(x)) / 8


class Tokens(nn.Module):
    def __init__(self, padding_idx=None):
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.fc = nn.Linear(6, 4)

    def forward(self, ids):
        return self.fc(torch.tanh(self.emb(ids)))


class Tied(nn.Module):
    """An embedding and an output layer that share one weight."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.emb(ids)))


class CausalTokens(nn.Module):
    """Layers with the names by which HF PEFT knows embeddings: it then saves their base weights too."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.embed_tokens(ids)))


class ConvNet1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class ConvNet2d(nn.Module):
    """Uneven kernel, stride and padding; "same" padding; a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.conv2 = nn.Conv2d(8, 5, 3, padding="same", bias=False)
        self.conv3 = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(60, 3)

    def forward(self, x):
        x = torch.tanh(self.conv1(x))
        x = torch.tanh(self.conv2(x))
        return self.head(torch.tanh(self.conv3(x)).flatten(1))


class ConvPlain2d(nn.Module):
    """One 3x3 convolution from 4 to 6 channels on 6x6 pictures; the options vary by case."""

    def __init__(self, head_in, **options):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, **options)
        self.head = nn.Linear(head_in, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class ConvNet3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=(0, 1, 0))
        self.head = nn.Linear(72, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


class Gpt2Mlp(nn.Module):
    """GPT-2's feed-forward block: Conv1D keeps its weight as [in, out]."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_fc = Conv1D(12, 6)
        self.c_proj = Conv1D(5, 12)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_fc(x)))


class Experts(nn.Module):
    """Three matrices up and three down in a parameter each, read by einsum, bmm and one by one."""

    def __init__(self, hidden, transposed):
        super().__init__()
        self.is_transposed = transposed  # HF PEFT asks for it
        up, down = (3, hidden, 4), (3, 4, hidden)
        if transposed:
            up, down = down, up
        self.router = nn.Parameter(torch.zeros(3, 4))
        self.up = nn.Parameter(torch.zeros(up))
        self.down = nn.Parameter(torch.zeros(down))

    def forward(self, x):
        up = self.up if self.is_transposed else self.up.transpose(1, 2)
        hidden = torch.tanh(torch.einsum("ni,eio->eno", x, up))
        down = self.down if self.is_transposed else self.down.transpose(1, 2)
        share = torch.softmax(nn.functional.linear(x, self.router), -1)
        mixed = (torch.bmm(hidden, down) * share.t().unsqueeze(-1)).sum(0)
        one = self.down[1] if self.is_transposed else self.down[1].t()
        return mixed + hidden[1] @ one


class Mixture(nn.Module):
    def __init__(self, hidden=5, transposed=False):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.experts = Experts(hidden, transposed)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.experts(torch.tanh(self.fc(x))))


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        attn_implementation="eager",
    )
    return BertModel(config)


NETWORKS = {
    "mlp": Mlp,
    "stack": Stack,
    "tokens": Tokens,
    "tokens_padded": lambda: Tokens(padding_idx=2),
    "tied": Tied,
    "causal_tokens": CausalTokens,
    "conv1d": ConvNet1d,
    "conv2d": ConvNet2d,
    "conv2d_dilated": lambda: ConvPlain2d(96, padding=1, dilation=2),
    "conv2d_circular": lambda: ConvPlain2d(216, padding=1, padding_mode="circular"),
    "conv2d_reflect": lambda: ConvPlain2d(54, padding=1, stride=2, padding_mode="reflect"),
    "conv2d_groups": lambda: ConvPlain2d(216, padding=1, groups=2),
    "conv3d": ConvNet3d,
    "attention": lambda: Attention(batch_first=False),
    "attention_batch_first": lambda: Attention(batch_first=True),
    "gpt2_mlp": Gpt2Mlp,
    "experts": Mixture,
    "experts_transposed": lambda: Mixture(transposed=True),
    "experts_square": lambda: Mixture(hidden=4),
    "bert": bert,
}


PLAIN = (
    Mlp,
    Stack,
    Tokens,
    Tied,
    CausalTokens,
    ConvNet1d,
    ConvNet2d,
    ConvPlain2d,
    ConvNet3d,
    Attention,
    Experts,
    Mixture,
)


def build(name, seed=None):
    """The network, in eval mode, with every parameter drawn anew from `seed` when one is given."""
    network = NETWORKS[name]().eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if "LayerNorm.weight" in key:
                    parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
                else:
                    spread = 0.3 if parameter.dim() == 1 else 1 / parameter[0].numel() ** 0.5
                    parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            for module in network.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return network


def inputs(name, seed):
    """The tensors that the network is called with."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if name == "mlp":
        return [normal(5, 10)]
    if name == "stack":
        return [normal(2, 3, 8)]
    if name == "gpt2_mlp":
        return [normal(2, 3, 6)]
    if name.startswith("experts"):
        return [normal(5, 6)]
    if name in ("tokens", "tokens_padded", "tied", "causal_tokens"):
        return [torch.randint(0, 11, (3, 4), generator=generator)]
    if name == "bert":
        mask = torch.ones(2, 7, dtype=torch.int64)
        mask[1, 5:] = 0
        return [torch.randint(0, 30, (2, 7), generator=generator), mask]
    if name == "conv1d":
        return [normal(2, 3, 8)]
    if name == "conv2d":
        return [normal(2, 3, 6, 6)]
    if name.startswith("conv2d_"):
        return [normal(2, 4, 6, 6)]
    if name == "conv3d":
        return [normal(2, 2, 3, 4, 4)]
    if name.startswith("attention"):
        return [normal(4, 2, 8)]
    raise KeyError(name)


def run(network, tensors):
    """One output tensor, whatever the network returns."""
    return one_output(network(*tensors))


def one_output(output):
    """A tensor as it is; BERT's hidden states plus its pooled output, so that every weight counts."""
    if isinstance(output, torch.Tensor):
        return output
    return output.last_hidden_state + output.pooler_output[:, None]
