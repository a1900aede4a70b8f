#pragma once

/// The networks of tests/golden/networks.py as plain torch::nn modules, with
/// the same module and parameter names.

#include <peft/models/bert.h>
#include <peft/models/gpt2.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace networks {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

/// A module and how to call it with the tensors of a golden file.
struct Network {
  std::shared_ptr<torch::nn::Module> module;
  std::function<Tensor(const Tensors&)> run;
};

struct Mlp : torch::nn::Module {
  torch::nn::Linear fc1{register_module("fc1", torch::nn::Linear(10, 16))};
  torch::nn::Linear fc2{register_module("fc2", torch::nn::Linear(16, 12))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(12, 3))};

  Tensor forward(const Tensor& x) {
    return head(torch::tanh(fc2(torch::tanh(fc1(x)))));
  }
};

struct BlockImpl : torch::nn::Module {
  torch::nn::Linear query{register_module("query", torch::nn::Linear(8, 8))};
  torch::nn::Linear value{register_module(
      "value",
      torch::nn::Linear(torch::nn::LinearOptions(8, 8).bias(false)))};

  Tensor forward(const Tensor& x) {
    return torch::tanh(query(x)) + value(x);
  }
};
TORCH_MODULE(Block);

/// Blocks under "<list>.0", "<list>.1", ...
struct BlocksImpl : torch::nn::Module {
  BlocksImpl(const std::string& list, int depth) {
    register_module(list, blocks);
    for (int i = 0; i < depth; ++i) {
      blocks->push_back(Block());
    }
  }

  Tensor forward(Tensor x) {
    for (const auto& block : *blocks) {
      x = block->as<BlockImpl>()->forward(x);
    }
    return x;
  }

  torch::nn::ModuleList blocks;
};
TORCH_MODULE(Blocks);

/// Numbered layers under two different names, for layers_to_transform and the
/// patterns.
struct Stack : torch::nn::Module {
  Blocks encoder{register_module("encoder", Blocks("layer", 3))};
  Blocks decoder{register_module("decoder", Blocks("block", 2))};

  Tensor forward(const Tensor& x) {
    return decoder(encoder(x)) / 8;
  }
};

struct Tokens : torch::nn::Module {
  explicit Tokens(torch::nn::EmbeddingOptions options)
      : emb(register_module("emb", torch::nn::Embedding(options))) {}

  Tensor forward(const Tensor& ids) {
    return fc(torch::tanh(emb(ids)));
  }

  torch::nn::Embedding emb;
  torch::nn::Linear fc{register_module("fc", torch::nn::Linear(6, 4))};
};

/// An embedding and an output layer, which share one weight when `tied`.
struct Words : torch::nn::Module {
  Words(const std::string& first, const std::string& last, bool tied)
      : emb(register_module(first, torch::nn::Embedding(11, 6))),
        out(register_module(
            last,
            torch::nn::Linear(torch::nn::LinearOptions(6, 11).bias(false)))) {
    if (tied) {
      out->weight = emb->weight;
    }
  }

  Tensor forward(const Tensor& ids) {
    return out(torch::tanh(emb(ids)));
  }

  torch::nn::Embedding emb;
  torch::nn::Linear out;
};

struct ConvNet1d : torch::nn::Module {
  torch::nn::Conv1d conv{register_module(
      "conv",
      torch::nn::Conv1d(
          torch::nn::Conv1dOptions(3, 6, 3).stride(2).padding(1)))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(24, 3))};

  Tensor forward(const Tensor& x) {
    return head(torch::tanh(conv(x)).flatten(1));
  }
};

/// Uneven kernel, stride and padding; "same" padding; a 1x1 convolution.
struct ConvNet2d : torch::nn::Module {
  torch::nn::Conv2d conv1{register_module(
      "conv1",
      torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 8, {3, 2})
                            .stride({2, 1})
                            .padding({1, 0})))};
  torch::nn::Conv2d conv2{register_module(
      "conv2",
      torch::nn::Conv2d(torch::nn::Conv2dOptions(8, 5, 3)
                            .padding(torch::kSame)
                            .bias(false)))};
  torch::nn::Conv2d conv3{register_module("conv3", torch::nn::Conv2d(5, 4, 1))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(60, 3))};

  Tensor forward(const Tensor& x) {
    const auto hidden = torch::tanh(conv2(torch::tanh(conv1(x))));
    return head(torch::tanh(conv3(hidden)).flatten(1));
  }
};

/// One 3x3 convolution from 4 to 6 channels on 6x6 pictures.
struct ConvPlain2d : torch::nn::Module {
  ConvPlain2d(int64_t head_in, const torch::nn::Conv2dOptions& options)
      : conv(register_module("conv", torch::nn::Conv2d(options))),
        head(register_module("head", torch::nn::Linear(head_in, 3))) {}

  Tensor forward(const Tensor& x) {
    return head(torch::tanh(conv(x)).flatten(1));
  }

  torch::nn::Conv2d conv;
  torch::nn::Linear head;
};

struct ConvNet3d : torch::nn::Module {
  torch::nn::Conv3d conv{register_module(
      "conv",
      torch::nn::Conv3d(
          torch::nn::Conv3dOptions(2, 4, 2).stride({1, 2, 1}).padding(
              {0, 1, 0})))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(72, 3))};

  Tensor forward(const Tensor& x) {
    return head(torch::tanh(conv(x)).flatten(1));
  }
};

struct Attention : torch::nn::Module {
  explicit Attention(bool batch_first_) : batch_first(batch_first_) {}

  Tensor forward(const Tensor& x) {
    const auto t = batch_first ? x.transpose(0, 1) : x;
    const auto y = std::get<0>(attn->forward(t, t, t));
    return head(batch_first ? y.transpose(0, 1) : y);
  }

  bool batch_first; // LibTorch's attention always takes [length, batch, width]
  torch::nn::MultiheadAttention attn{
      register_module("attn", torch::nn::MultiheadAttention(8, 2))};
  torch::nn::Linear head{register_module("head", torch::nn::Linear(8, 3))};
};

/// GPT-2's feed-forward block: Conv1D keeps its weight as [in, out].
struct Gpt2Mlp : torch::nn::Module {
  peft::models::Conv1D c_fc{
      register_module("c_fc", peft::models::Conv1D(6, 12))};
  peft::models::Conv1D c_proj{
      register_module("c_proj", peft::models::Conv1D(12, 5))};

  Tensor forward(const Tensor& x) {
    return c_proj(torch::tanh(c_fc(x)));
  }
};

/// Three matrices up and three down in a parameter each, read by einsum, bmm
/// and one by one.
struct ExpertsImpl : torch::nn::Module {
  ExpertsImpl(int64_t hidden, bool transposed_) : transposed(transposed_) {
    const std::vector<int64_t> wide{3, hidden, 4}, narrow{3, 4, hidden};
    router = register_parameter("router", torch::zeros({3, 4}));
    up = register_parameter("up", torch::zeros(transposed ? narrow : wide));
    down = register_parameter("down", torch::zeros(transposed ? wide : narrow));
  }

  Tensor forward(const Tensor& x) {
    const auto turned = [this](const Tensor& w) {
      return transposed ? w : w.transpose(-2, -1);
    };
    const auto hidden =
        torch::tanh(torch::einsum("ni,eio->eno", {x, turned(up)}));
    const auto share =
        torch::softmax(torch::nn::functional::linear(x, router), -1);
    const auto mixed =
        (torch::bmm(hidden, turned(down)) * share.t().unsqueeze(-1)).sum(0);
    return mixed + torch::matmul(hidden[1], turned(down[1]));
  }

  bool transposed;
  Tensor router, up, down;
};
TORCH_MODULE(Experts);

struct Mixture : torch::nn::Module {
  Mixture(int64_t hidden, bool transposed)
      : experts(register_module("experts", Experts(hidden, transposed))) {}

  Tensor forward(const Tensor& x) {
    return head(experts(torch::tanh(fc(x))));
  }

  torch::nn::Linear fc{register_module("fc", torch::nn::Linear(6, 4))};
  Experts experts;
  torch::nn::Linear head{register_module("head", torch::nn::Linear(4, 3))};
};

/// The last hidden states plus the pooled output, so that every weight counts.
struct Bert : peft::models::BertModelImpl {
  Bert()
      : peft::models::BertModelImpl(peft::models::BertOptions()
                                        .vocab_size(30)
                                        .hidden_size(16)
                                        .num_hidden_layers(2)
                                        .num_attention_heads(2)
                                        .intermediate_size(32)
                                        .max_position_embeddings(12)) {}

  Tensor call(const Tensor& ids, const Tensor& mask) {
    const auto hidden = forward(ids, mask);
    return hidden + pooler(hidden).unsqueeze(1);
  }
};

/// A module that takes one tensor.
template <typename Module>
Network one_input(std::shared_ptr<Module> module) {
  return {module, [module](const Tensors& inputs) {
            return module->forward(inputs.at(0));
          }};
}

template <typename Module, typename... Arguments>
Network make(Arguments&&... arguments) {
  return one_input(
      std::make_shared<Module>(std::forward<Arguments>(arguments)...));
}

/// The network that networks.py calls `name`, in eval mode.
inline Network build(const std::string& name) {
  const auto conv = [] { return torch::nn::Conv2dOptions(4, 6, 3).padding(1); };
  Network network;
  if (name == "mlp") {
    network = make<Mlp>();
  } else if (name == "stack") {
    network = make<Stack>();
  } else if (name == "tokens") {
    network = make<Tokens>(torch::nn::EmbeddingOptions(11, 6));
  } else if (name == "tokens_padded") {
    network = make<Tokens>(torch::nn::EmbeddingOptions(11, 6).padding_idx(2));
  } else if (name == "tied") {
    network = make<Words>("emb", "out", true);
  } else if (name == "causal_tokens") {
    network = make<Words>("embed_tokens", "lm_head", false);
  } else if (name == "conv1d") {
    network = make<ConvNet1d>();
  } else if (name == "conv2d") {
    network = make<ConvNet2d>();
  } else if (name == "conv2d_dilated") {
    network = make<ConvPlain2d>(96, conv().dilation(2));
  } else if (name == "conv2d_circular") {
    network = make<ConvPlain2d>(216, conv().padding_mode(torch::kCircular));
  } else if (name == "conv2d_reflect") {
    network =
        make<ConvPlain2d>(54, conv().stride(2).padding_mode(torch::kReflect));
  } else if (name == "conv2d_groups") {
    network = make<ConvPlain2d>(216, conv().groups(2));
  } else if (name == "conv3d") {
    network = make<ConvNet3d>();
  } else if (name == "attention") {
    network = make<Attention>(false);
  } else if (name == "attention_batch_first") {
    network = make<Attention>(true);
  } else if (name == "gpt2_mlp") {
    network = make<Gpt2Mlp>();
  } else if (name == "experts") {
    network = make<Mixture>(5, false);
  } else if (name == "experts_transposed") {
    network = make<Mixture>(5, true);
  } else if (name == "experts_square") {
    network = make<Mixture>(4, false);
  } else if (name == "bert") {
    auto bert = std::make_shared<Bert>();
    network = {bert, [bert](const Tensors& inputs) {
                 return bert->call(inputs.at(0), inputs.at(1));
               }};
  } else {
    TORCH_CHECK(false, "there is no network named '", name, "'");
  }
  network.module->eval();
  return network;
}

} // namespace networks
