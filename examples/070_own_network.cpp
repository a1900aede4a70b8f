// Methods that no weight can carry, in a transformer of one's own: prompts and
// prefixes want one place in it (ExtraTokens), routers and side networks
// another (LayerLoop). With these two, every method is one attach.
//
// Prints:
//   Houlsby             3504  loss 1.693 -> 1.185  detached, the base
//   parallel adapter    1656  loss 1.796 -> 0.295  detached, the base
//   (IA)3                384  loss 1.757 -> 1.663  detached, the base
//   prompt tuning        320  loss 1.593 -> 1.576  detached, the base
//   prefix tuning       1920  loss 1.793 -> 1.692  detached, the base
//   CoDA, 6 of 12       1752  loss 1.615 -> 0.320  detached, the base
//   ladder side tuning  3099  loss 1.705 -> 0.396  detached, the base

#include <peft/peft.h>
#include <torch/torch.h>

#include <fmt/format.h>

using torch::Tensor;
namespace nn = torch::nn;

constexpr int64_t kWords = 100, kTags = 5, kPositions = 40;
constexpr int64_t kWidth = 32, kLayers = 3, kHeads = 4;

struct BlockImpl : nn::Module { // names say which layer is which
  explicit BlockImpl(int64_t width) : d(width) {}

  Tensor forward(
      const peft::LayerCall& call,
      const Tensor& mask,
      peft::KeyValues* past) {
    const auto split = [](const Tensor& x) { // [batch, heads, n, head size]
      return x.unflatten(-1, {kHeads, -1}).transpose(1, 2);
    };
    // Keys may be of more tokens than queries (a router's), and stand behind
    // others (a prefix's).
    auto k = split(key(call.context)), v = split(value(call.context));
    if (past != nullptr) {
      std::tie(k, v) = past->update(call.layer, k, v);
    }
    const auto q = split(query(call.hidden));
    const auto mixed = at::scaled_dot_product_attention(q, k, v, mask);
    const auto h = call.hidden + out_proj(mixed.transpose(1, 2).flatten(2));
    return norm(h + fc2(torch::relu(fc1(h))));
  }

  int64_t d;
  nn::Linear query = register_module("query", nn::Linear(d, d));
  nn::Linear key = register_module("key", nn::Linear(d, d));
  nn::Linear value = register_module("value", nn::Linear(d, d));
  nn::Linear out_proj = register_module("out_proj", nn::Linear(d, d));
  nn::Linear fc1 = register_module("fc1", nn::Linear(d, 2 * d));
  nn::Linear fc2 = register_module("fc2", nn::Linear(2 * d, d));
  nn::LayerNorm norm =
      register_module("norm", nn::LayerNorm(nn::LayerNormOptions({d})));
};

struct TaggerImpl : nn::Module {
  TaggerImpl() {
    for (int64_t i = 0; i < kLayers; ++i) {
      blocks->push_back(std::make_shared<BlockImpl>(kWidth));
    }
    register_module("extra_tokens", extra_tokens);
    register_module("layer_loop", layer_loop);
  }

  // Token ids and their mask [batch, n] -> logits [batch, n, kTags].
  Tensor forward(const Tensor& ids, const Tensor& attention_mask) {
    auto tokens = extra_tokens->forward({embed(ids), attention_mask});
    const auto mask = tokens.attention_mask.unsqueeze(1).unsqueeze(1);
    const auto run = [&](nn::Module& each, const peft::LayerCall& call) {
      return each.as<BlockImpl>()->forward(
          call,
          call.attention(mask, tokens.past()),
          call.side ? nullptr : tokens.key_values());
    };
    const auto h = layer_loop->forward(
        tokens.embeds + place(tokens.positions()),
        tokens.attention_mask.slice(1, tokens.past()),
        *blocks,
        run);
    return head(h.hidden.slice(1, tokens.prepended));
  }

  peft::ExtraTokens extra_tokens{
      peft::ExtraTokensOptions(kWidth, kLayers, kHeads, kWidth / kHeads)
          .max_positions(kPositions)
          .word_embeddings("embed")};
  peft::LayerLoop layer_loop{peft::LayerLoopOptions(kWidth, kLayers)
                                 .num_heads(kHeads)
                                 .side_block([](int64_t, int64_t reduction) {
                                   return std::make_shared<BlockImpl>(
                                       kWidth / reduction);
                                 })};
  nn::Embedding embed = register_module("embed", nn::Embedding(kWords, kWidth));
  nn::Embedding place =
      register_module("place", nn::Embedding(kPositions, kWidth));
  nn::ModuleList blocks = register_module("blocks", nn::ModuleList());
  nn::Linear head = register_module("head", nn::Linear(kWidth, kTags));
};
TORCH_MODULE(Tagger);

// Trains one method for a moment; whether the loss fell and the base came back.
template <class Options>
bool show(const char* name, Tagger& net, const Options& options) {
  const auto ids = torch::randint(kWords, {4, 12});
  const auto mask = torch::arange(12) < torch::tensor({{12}, {9}, {12}, {7}});
  const auto base = net->forward(ids, mask).detach();
  auto adapter = peft::attach(*net, options);
  const auto count = adapter.num_parameters();
  torch::optim::AdamW optimizer(adapter.parameters(), 1e-2);
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    auto loss = nn::functional::cross_entropy(
        net->forward(ids, mask).flatten(0, 1), ids.flatten() % kTags);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    first = step == 0 ? last : first;
  }
  adapter.detach();
  const bool same = torch::equal(net->forward(ids, mask), base);
  fmt::print("{:18}{:6}  loss {:.3f} -> {:.3f}  ", name, count, first, last);
  fmt::print("detached, {} base\n", same ? "the" : "NOT the");
  return same && last < first;
}

int main() {
  torch::manual_seed(0);
  Tagger net;
  bool good = show("Houlsby", net, peft::HoulsbyOptions(8));
  good &= show("parallel adapter", net, peft::ParallelAdapterOptions(8));
  good &= show("(IA)3", net, peft::Ia3Options());
  good &= show("prompt tuning", net, peft::PromptOptions(10).init("vocab"));
  good &= show("prefix tuning", net, peft::PrefixOptions(10));
  good &= show("CoDA, 6 of 12", net, peft::CodaOptions(6).bottleneck(8));
  good &= show("ladder side tuning", net, peft::LadderOptions(4));
  return good ? 0 : 1;
}
