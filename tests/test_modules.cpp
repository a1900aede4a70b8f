// Unmodified torch::nn modules under an adapter. Each row is a module and a
// way to call it; the oracle is a twin of the module with the effective weights
// written into it, and plain autograd on that twin.

#include "adapted.h"

#include <sstream>

namespace test_modules {

namespace nn = torch::nn;
using peft::LoraOptions;
using peft::Targets;
using torch::ScalarType;
using torch::Tensor;

namespace {

struct Built {
  std::shared_ptr<nn::Module> module;
  std::function<Tensor()> run;
};

enum class Path { fast, materialised };

struct Case {
  std::string name;
  LoraOptions options;
  Path path;
  std::function<Built(ScalarType)> build;
};

/// Inputs and parameters are drawn in float64, so that every dtype sees the
/// same numbers.
Tensor draw(at::IntArrayRef sizes, ScalarType dtype) {
  return torch::randn(sizes, torch::kDouble).to(dtype);
}

Tensor ids(at::IntArrayRef sizes, int64_t count) {
  return torch::randint(count, sizes, torch::kLong);
}

/// `call` draws its inputs; every run draws the same ones.
template <class Holder>
Case row(
    std::string name,
    LoraOptions options,
    Path path,
    std::function<Holder()> make,
    std::function<Tensor(Holder&, ScalarType)> call) {
  return {
      std::move(name),
      std::move(options),
      path,
      [make, call](ScalarType dtype) {
        Holder holder = make();
        torch::NoGradGuard no_grad;
        for (auto& p : holder->parameters()) {
          p.copy_(draw(p.sizes(), torch::kDouble) * 0.3);
        }
        holder->to(dtype);
        holder->eval();
        return Built{holder.ptr(), [holder, call, dtype]() mutable {
                       torch::manual_seed(77);
                       return call(holder, dtype);
                     }};
      }};
}

/// The root module and everything below it that has a matrix.
LoraOptions root(int64_t r = 2) {
  return LoraOptions(r)
      .alpha(2. * static_cast<double>(r))
      .targets(Targets::where([](const std::string& name, const nn::Module&) {
        return name.empty();
      }));
}

LoraOptions all_linear() {
  return LoraOptions(2).alpha(4).targets(Targets::all_linear());
}

LoraOptions names(Targets targets) {
  return LoraOptions(2).alpha(4).targets(std::move(targets));
}

template <class Conv, class Options>
Case conv(
    std::string name,
    Options options,
    std::vector<int64_t> input,
    int64_t r = 2) {
  return row<Conv>(
      std::move(name),
      root(r),
      Path::fast,
      [options] { return Conv(options); },
      [input](Conv& m, ScalarType t) { return m(draw(input, t)); });
}

template <class Conv, class Options>
Case transposed(std::string name, Options options, std::vector<int64_t> input) {
  return row<Conv>(
      std::move(name),
      root(),
      Path::materialised,
      [options] { return Conv(options); },
      [input](Conv& m, ScalarType t) { return m(draw(input, t)); });
}

Tensor attend(
    nn::MultiheadAttention& m,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v) {
  const auto [output, weights] = m(q, k, v);
  return at::cat({output.flatten(), weights.flatten()});
}

std::vector<Case> linear_cases() {
  const auto linear = [] { return nn::Linear(5, 7); };
  return {
      row<nn::Linear>(
          "Linear, 2-D",
          root(),
          Path::fast,
          linear,
          [](nn::Linear& m, ScalarType t) {
            return m(draw({3, 5}, t));
          }),
      row<nn::Linear>(
          "Linear, 3-D",
          root(),
          Path::fast,
          linear,
          [](nn::Linear& m, ScalarType t) {
            return m(draw({2, 3, 5}, t));
          }),
      row<nn::Linear>(
          "Linear, no rows",
          root(),
          Path::fast,
          linear,
          [](nn::Linear& m, ScalarType t) {
            return at::cat({m(draw({0, 5}, t)), m(draw({1, 5}, t))});
          }),
      row<nn::Linear>(
          "Linear, 1-D",
          root(),
          Path::fast,
          linear,
          [](nn::Linear& m, ScalarType t) { return m(draw({5}, t)); }),
      row<nn::Linear>(
          "Linear without bias, strided input",
          root(),
          Path::fast,
          [] { return nn::Linear(nn::LinearOptions(5, 7).bias(false)); },
          [](nn::Linear& m, ScalarType t) {
            return m(draw({2, 5, 3}, t).transpose(1, 2));
          }),
      row<nn::Bilinear>(
          "Bilinear",
          root(),
          Path::materialised,
          [] { return nn::Bilinear(3, 4, 5); },
          [](nn::Bilinear& m, ScalarType t) {
            return m(draw({2, 3}, t), draw({2, 4}, t));
          }),
      row<nn::Sequential>(
          "Sequential, one target",
          names({"2"}),
          Path::fast,
          [] {
            return nn::Sequential(
                nn::Linear(5, 6), nn::ReLU(), nn::Linear(6, 3));
          },
          [](nn::Sequential& m, ScalarType t) {
            return m->forward(draw({4, 5}, t));
          }),
      row<nn::Sequential>(
          "Sequential, all linear layers",
          all_linear(),
          Path::fast,
          [] {
            return nn::Sequential(
                nn::Linear(5, 6),
                nn::LayerNorm(nn::LayerNormOptions({6})),
                nn::GELU(),
                nn::Linear(6, 3));
          },
          [](nn::Sequential& m, ScalarType t) {
            return m->forward(draw({4, 5}, t));
          }),
      row<nn::ModuleList>(
          "ModuleList",
          all_linear(),
          Path::fast,
          [] { return nn::ModuleList(nn::Linear(5, 5), nn::Linear(5, 5)); },
          [](nn::ModuleList& m, ScalarType t) {
            Tensor x = draw({2, 5}, t);
            for (const auto& layer : *m) {
              x = layer->as<nn::Linear>()->forward(x).tanh();
            }
            return x;
          }),
      row<nn::AdaptiveLogSoftmaxWithLoss>(
          "AdaptiveLogSoftmaxWithLoss",
          all_linear(),
          Path::fast,
          [] {
            return nn::AdaptiveLogSoftmaxWithLoss(
                nn::AdaptiveLogSoftmaxWithLossOptions(8, 12, {4, 8})
                    .div_value(2.));
          },
          [](nn::AdaptiveLogSoftmaxWithLoss& m, ScalarType t) {
            return m->log_prob(draw({3, 8}, t));
          }),
  };
}

std::vector<Case> attention_cases() {
  const auto attention = [] { return nn::MultiheadAttention(8, 2); };
  const auto self = [](nn::MultiheadAttention& m, ScalarType t) {
    const Tensor x = draw({5, 2, 8}, t);
    return attend(m, x, x, x);
  };
  return {
      row<nn::MultiheadAttention>(
          "attention, self", all_linear(), Path::fast, attention, self),
      row<nn::MultiheadAttention>(
          "attention, default targets",
          LoraOptions(2).alpha(4),
          Path::fast,
          attention,
          self),
      row<nn::MultiheadAttention>(
          "attention, only k",
          all_linear().enable_lora({false, true, false}),
          Path::fast,
          attention,
          self),
      row<nn::MultiheadAttention>(
          "attention, q, k and v apart",
          all_linear().enable_lora({true, true, true}),
          Path::fast,
          attention,
          self),
      row<nn::MultiheadAttention>(
          "attention, in_proj_weight by name",
          names({"in_proj_weight"}),
          Path::fast,
          attention,
          self),
      row<nn::MultiheadAttention>(
          "attention, cross",
          all_linear(),
          Path::fast,
          attention,
          [](nn::MultiheadAttention& m, ScalarType t) {
            const Tensor q = draw({5, 2, 8}, t), k = draw({7, 2, 8}, t);
            return attend(m, q, k, k);
          }),
      row<nn::MultiheadAttention>(
          "attention, three inputs, default targets",
          LoraOptions(2).alpha(4),
          Path::fast,
          attention,
          [](nn::MultiheadAttention& m, ScalarType t) {
            return attend(
                m, draw({5, 2, 8}, t), draw({7, 2, 8}, t), draw({7, 2, 8}, t));
          }),
      row<nn::MultiheadAttention>(
          "attention, kdim and vdim",
          all_linear(),
          Path::fast,
          [] {
            return nn::MultiheadAttention(
                nn::MultiheadAttentionOptions(8, 2).kdim(6).vdim(6));
          },
          [](nn::MultiheadAttention& m, ScalarType t) {
            return attend(
                m, draw({5, 2, 8}, t), draw({7, 2, 6}, t), draw({7, 2, 6}, t));
          }),
      row<nn::MultiheadAttention>(
          "attention, bias_kv and zero attention, no bias",
          all_linear(),
          Path::fast,
          [] {
            return nn::MultiheadAttention(nn::MultiheadAttentionOptions(8, 2)
                                              .bias(false)
                                              .add_bias_kv(true)
                                              .add_zero_attn(true));
          },
          self),
      row<nn::TransformerEncoder>(
          "TransformerEncoder",
          all_linear(),
          Path::fast,
          [] {
            return nn::TransformerEncoder(nn::TransformerEncoderOptions(
                nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(12),
                2));
          },
          [](nn::TransformerEncoder& m, ScalarType t) {
            return m(draw({5, 2, 8}, t));
          }),
      row<nn::TransformerDecoder>(
          "TransformerDecoder",
          all_linear(),
          Path::fast,
          [] {
            return nn::TransformerDecoder(nn::TransformerDecoderOptions(
                nn::TransformerDecoderLayerOptions(8, 2).dim_feedforward(12),
                1));
          },
          [](nn::TransformerDecoder& m, ScalarType t) {
            return m(draw({5, 2, 8}, t), draw({4, 2, 8}, t));
          }),
  };
}

std::vector<Case> recurrent_cases() {
  const auto m = Path::materialised;
  return {
      row<nn::LSTM>(
          "LSTM",
          root(),
          m,
          [] { return nn::LSTM(4, 5); },
          [](nn::LSTM& l, ScalarType t) {
            const auto [y, state] = l(draw({6, 2, 4}, t));
            return at::cat({y.flatten(), std::get<1>(state).flatten()});
          }),
      row<nn::LSTM>(
          "LSTM, two directions, two layers, one weight by name",
          names({"weight_hh_l1_reverse"}),
          m,
          [] {
            return nn::LSTM(nn::LSTMOptions(4, 5)
                                .num_layers(2)
                                .bidirectional(true)
                                .batch_first(true));
          },
          [](nn::LSTM& l, ScalarType t) {
            return std::get<0>(l(draw({2, 6, 4}, t)));
          }),
      row<nn::LSTM>(
          "LSTM, proj_size",
          root(),
          m,
          [] { return nn::LSTM(nn::LSTMOptions(4, 5).proj_size(3)); },
          [](nn::LSTM& l, ScalarType t) {
            return std::get<0>(l(draw({6, 2, 4}, t)));
          }),
      row<nn::LSTM>(
          "LSTM, packed",
          root(),
          m,
          [] { return nn::LSTM(4, 5); },
          [](nn::LSTM& l, ScalarType t) {
            const auto packed = nn::utils::rnn::pack_padded_sequence(
                draw({6, 2, 4}, t), torch::tensor({6, 3}));
            return std::get<0>(l->forward_with_packed_input(packed)).data();
          }),
      row<nn::GRU>(
          "GRU",
          root(),
          m,
          [] { return nn::GRU(nn::GRUOptions(4, 5).num_layers(2)); },
          [](nn::GRU& l, ScalarType t) {
            return std::get<0>(l(draw({6, 2, 4}, t)));
          }),
      row<nn::RNN>(
          "RNN",
          root(),
          m,
          [] { return nn::RNN(4, 5); },
          [](nn::RNN& l, ScalarType t) {
            return std::get<0>(l(draw({6, 2, 4}, t)));
          }),
      row<nn::LSTMCell>(
          "LSTMCell",
          root(),
          m,
          [] { return nn::LSTMCell(4, 5); },
          [](nn::LSTMCell& l, ScalarType t) {
            return std::get<1>(
                l(draw({2, 4}, t),
                  std::make_tuple(draw({2, 5}, t), draw({2, 5}, t))));
          }),
      row<nn::GRUCell>(
          "GRUCell",
          root(),
          m,
          [] { return nn::GRUCell(4, 5); },
          [](nn::GRUCell& l, ScalarType t) {
            return l(draw({2, 4}, t), draw({2, 5}, t));
          }),
      row<nn::RNNCell>(
          "RNNCell",
          names({"weight_hh"}),
          m,
          [] { return nn::RNNCell(4, 5); },
          [](nn::RNNCell& l, ScalarType t) {
            return l(draw({2, 4}, t), draw({2, 5}, t));
          }),
  };
}

std::vector<Case> embedding_cases() {
  const auto bag = [](auto mode) {
    return [mode] {
      return nn::EmbeddingBag(nn::EmbeddingBagOptions(9, 4).mode(mode));
    };
  };
  const auto use_bag = [](nn::EmbeddingBag& m, ScalarType) {
    return m(ids({7}, 9), torch::tensor({0, 3, 5}));
  };
  return {
      row<nn::Embedding>(
          "Embedding",
          root(),
          Path::fast,
          [] { return nn::Embedding(9, 4); },
          [](nn::Embedding& m, ScalarType) {
            return m(ids({2, 5}, 9));
          }),
      row<nn::EmbeddingBag>(
          "EmbeddingBag, sum",
          root(),
          Path::materialised,
          bag(torch::kSum),
          use_bag),
      row<nn::EmbeddingBag>(
          "EmbeddingBag, mean",
          root(),
          Path::materialised,
          bag(torch::kMean),
          use_bag),
      row<nn::EmbeddingBag>(
          "EmbeddingBag, max",
          root(),
          Path::materialised,
          bag(torch::kMax),
          use_bag),
      row<nn::EmbeddingBag>(
          "EmbeddingBag, weighted",
          root(),
          Path::materialised,
          bag(torch::kSum),
          [](nn::EmbeddingBag& m, ScalarType t) {
            return m(ids({7}, 9), torch::tensor({0, 3, 5}), draw({7}, t));
          }),
  };
}

std::vector<Case> convolution_cases() {
  using C1 = nn::Conv1dOptions;
  using C2 = nn::Conv2dOptions;
  using C3 = nn::Conv3dOptions;
  std::vector<Case> cases = {
      conv<nn::Conv1d>("Conv1d", C1(3, 4, 3), {2, 3, 8}),
      conv<nn::Conv1d>(
          "Conv1d, stride, dilation, padding, no bias",
          C1(3, 4, 3).stride(2).dilation(2).padding(1).bias(false),
          {2, 3, 9}),
      conv<nn::Conv1d>("Conv1d, groups", C1(4, 6, 3).groups(2), {2, 4, 8}),
      conv<nn::Conv1d>("Conv1d without a batch", C1(3, 4, 3), {3, 8}),
      conv<nn::Conv2d>("Conv2d", C2(3, 4, 3).padding(1), {2, 3, 5, 6}),
      conv<nn::Conv2d>("Conv2d, 1x1", C2(3, 4, 1), {2, 3, 4, 4}),
      conv<nn::Conv2d>(
          "Conv2d, uneven kernel, stride, padding and dilation",
          C2(3, 4, {3, 2}).stride({2, 1}).padding({1, 0}).dilation({1, 2}),
          {2, 3, 7, 6}),
      conv<nn::Conv2d>(
          "Conv2d, groups", C2(4, 6, 3).groups(2).stride(2), {2, 4, 7, 7}),
      conv<nn::Conv2d>(
          "Conv2d, depthwise",
          C2(4, 8, 3).groups(4).padding(1),
          {2, 4, 5, 5},
          4),
      conv<nn::Conv2d>(
          "Conv2d, same padding",
          C2(3, 4, {3, 2}).padding(torch::kSame),
          {2, 3, 5, 5}),
      conv<nn::Conv2d>(
          "Conv2d, valid padding",
          C2(3, 4, 3).padding(torch::kValid),
          {2, 3, 5, 5}),
      conv<nn::Conv3d>("Conv3d", C3(2, 4, 2), {1, 2, 4, 4, 3}),
      conv<nn::Conv3d>(
          "Conv3d, stride, groups, dilation",
          C3(2, 4, {2, 1, 2})
              .stride({1, 2, 1})
              .dilation({1, 1, 2})
              .groups(2)
              .padding({0, 1, 1}),
          {1, 2, 4, 4, 4}),
      transposed<nn::ConvTranspose1d>(
          "ConvTranspose1d",
          nn::ConvTranspose1dOptions(3, 4, 3).stride(2),
          {2, 3, 5}),
      transposed<nn::ConvTranspose2d>(
          "ConvTranspose2d, groups",
          nn::ConvTranspose2dOptions(4, 6, 3).groups(2).padding(1),
          {2, 4, 4, 4}),
      transposed<nn::ConvTranspose3d>(
          "ConvTranspose3d",
          nn::ConvTranspose3dOptions(2, 3, 2),
          {1, 2, 3, 3, 2}),
  };
  auto modes = [&](auto add) {
    add("zeros", torch::kZeros);
    add("reflect", torch::kReflect);
    add("replicate", torch::kReplicate);
    add("circular", torch::kCircular);
  };
  modes([&](const std::string& mode, auto value) {
    cases.push_back(conv<nn::Conv1d>(
        "Conv1d, padding mode " + mode,
        C1(3, 4, 3).padding(2).padding_mode(value),
        {2, 3, 8}));
    cases.push_back(conv<nn::Conv2d>(
        "Conv2d, padding mode " + mode,
        C2(4, 4, 3).padding({1, 2}).groups(2).padding_mode(value),
        {2, 4, 5, 6}));
    cases.push_back(conv<nn::Conv3d>(
        "Conv3d, padding mode " + mode,
        C3(2, 4, 2).padding(1).padding_mode(value),
        {1, 2, 3, 3, 3}));
    cases.push_back(conv<nn::Conv2d>(
        "Conv2d, same padding and mode " + mode,
        C2(3, 4, 3).padding(torch::kSame).padding_mode(value),
        {2, 3, 5, 5}));
  });
  return cases;
}

/// ΔW written out from the definition, for s = 2.
Tensor change(const peft::LoraDelta& delta, at::IntArrayRef sizes) {
  using Layout = peft::detail::LoraLayout;
  const Tensor &A = delta.lora_A, &B = delta.lora_B;
  const auto& config = delta.config();
  switch (config.layout) {
    case Layout::matrix:
      return (2 * at::matmul(B, A)).reshape(sizes);
    case Layout::transposed:
    case Layout::embedding:
      return 2 * at::matmul(B, A).t();
    case Layout::convolution: {
      const auto groups = config.groups;
      std::vector<Tensor> blocks;
      const auto up = B.chunk(groups), down = A.chunk(groups);
      for (int64_t j = 0; j < groups; ++j) {
        blocks.push_back(at::einsum(
            "orxyz,rixyz->oixyz",
            {up[j].reshape({up[j].size(0), up[j].size(1), 1, 1, 1}),
             down[j].reshape({down[j].size(0), down[j].size(1), -1, 1, 1})}));
      }
      return 2 * at::cat(blocks).reshape(sizes);
    }
    case Layout::blocks: {
      std::vector<Tensor> rows;
      const auto width = sizes[0] / 3, r = delta.r();
      int64_t k = 0;
      for (const bool on : config.enabled) {
        rows.push_back(
            on ? 2 *
                    at::matmul(
                        B.slice(0, k * width, (k + 1) * width),
                        A.slice(0, k * r, (k + 1) * r))
               : torch::zeros({width, sizes[1]}, A.options()));
        k += on ? 1 : 0;
      }
      return at::cat(rows);
    }
  }
  return {};
}

/// Closeness relative to the largest entry, as sums of products round.
Comparison near(const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined() || b.numel() == 0) {
    return close(a, b);
  }
  const double scale = std::max(1.0, b.detach().abs().max().item<double>());
  return close(a / scale, b / scale);
}

std::vector<Tensor> copies(nn::Module& module) {
  std::vector<Tensor> result;
  for (const auto& item : peft::detail::base_parameters(module)) {
    result.push_back(peft::base(item.second).detach().clone());
  }
  return result;
}

void randomise(const peft::Adapter& adapter) {
  torch::NoGradGuard no_grad;
  torch::manual_seed(5);
  for (auto p : adapter.parameters()) {
    p.copy_(draw(p.sizes(), torch::kDouble) * 0.4);
  }
}

void check_bits(nn::Module& module, const std::vector<Tensor>& expected) {
  const auto now = copies(module);
  REQUIRE(now.size() == expected.size());
  for (size_t i = 0; i < now.size(); ++i) {
    CHECK(equal_bits(now[i], expected[i]));
  }
}

void check(const Case& one, ScalarType dtype) {
  seed(1);
  Built built = one.build(dtype);
  seed(1);
  Built twin = one.build(dtype);
  nn::Module& module = *built.module;
  const auto base = copies(module);
  // LibTorch multiplies a 3-D input with strides in another order when the
  // weight requires grad; the bits of the frozen module are those that count.
  const Tensor y_trainable = built.run().detach();
  for (auto& p : module.parameters()) {
    p.set_requires_grad(false);
  }
  const Tensor y0 = built.run();
  std::vector<std::string> operators;
  {
    torch::NoGradGuard no_grad;
    operators = adapted::operator_names([&] { built.run(); });
  }
  const auto count = module.parameters().size();

  auto adapter = peft::attach(module, one.options);
  const Tensor start = built.run(); // B = 0
  CHECK((equal_bits(start, y0) || equal_bits(start, y_trainable)));
  const auto calls = adapted::watch(adapter);
  randomise(adapter);

  // The twin holds the effective weights as leaves of its own.
  std::vector<Tensor> weights, changes;
  auto theirs = twin.module->named_parameters();
  for (const auto& record : adapter.shared_state()->sites) {
    Tensor weight = theirs[record.parameters.front()];
    const auto& delta = dynamic_cast<peft::LoraDelta&>(*record.delta);
    changes.push_back(change(delta, weight.sizes()));
    {
      torch::NoGradGuard no_grad;
      weight.copy_(weight + changes.back());
    }
    weights.push_back(weight.set_requires_grad(true));
  }

  const Tensor y = built.run(), expected = twin.run();
  CHECK(y.scalar_type() == dtype);
  CHECK(near(y, expected));
  CHECK(!close(y, y0));
  {
    torch::NoGradGuard no_grad;
    CHECK(near(built.run(), expected));
  }
  {
    c10::InferenceMode inference;
    CHECK(near(built.run(), expected));
  }
  CHECK((calls->effective == 0) == (one.path == Path::fast));
  CHECK((calls->fast() > 0) == (one.path == Path::fast));

  // Gradients: the twin's, sent on through W + 2 B A.
  const auto found = adapted::gradients(y, adapter.parameters());
  const auto through = adapted::gradients(expected, weights);
  const auto wanted =
      torch::autograd::grad(changes, adapter.parameters(), through);
  for (size_t i = 0; i < wanted.size(); ++i) {
    CHECK(near(found[i], wanted[i]));
  }

  adapter.disable();
  CHECK(equal_bits(built.run(), y0));
  CHECK(!built.run().requires_grad());
  adapter.enable();

  adapter.merge();
  {
    torch::NoGradGuard no_grad;
    CHECK(near(built.run(), expected));
  }
  adapter.unmerge();
  check_bits(module, base);
  CHECK(equal_bits(built.run(), y));

  // A step of an optimizer made from all of the model's parameters.
  const auto before = adapter.parameters();
  std::vector<Tensor> old;
  for (const auto& p : before) {
    old.push_back(p.detach().clone());
  }
  torch::optim::AdamW optimizer(
      module.parameters(), torch::optim::AdamWOptions(0.01).weight_decay(0.1));
  built.run().pow(2).sum().backward();
  optimizer.step();
  check_bits(module, base);
  for (size_t i = 0; i < old.size(); ++i) {
    CHECK(!equal_bits(before[i].detach(), old[i]));
  }

  torch::NoGradGuard no_grad;
  const Tensor trained = built.run();
  peft::merge(module);
  CHECK(near(built.run(), trained));
  CHECK(module.parameters().size() == count);
  for (const auto& p : module.parameters()) {
    CHECK(!peft::is_adapted(p));
  }
  CHECK(adapted::operator_names([&] { built.run(); }) == operators);
}

void check_all(const std::vector<Case>& cases) {
  for (const auto dtype : {torch::kDouble, torch::kFloat}) {
    INFO(dtype);
    adapted::for_each_row(cases, [&](const Case& one) { check(one, dtype); });
  }
}

} // namespace

TEST_CASE("linear layers and containers, unmodified") {
  check_all(linear_cases());
}

TEST_CASE("attention and transformers, unmodified") {
  check_all(attention_cases());
}

TEST_CASE("recurrent layers, unmodified") {
  check_all(recurrent_cases());
}

TEST_CASE("embeddings, unmodified") {
  check_all(embedding_cases());
}

TEST_CASE("convolutions, unmodified") {
  check_all(convolution_cases());
}

TEST_CASE(
    "a TransformerEncoder: eight sites, all on the fast path, all trained") {
  seed(2);
  nn::TransformerEncoder encoder(nn::TransformerEncoderOptions(
      nn::TransformerEncoderLayerOptions(8, 2).dim_feedforward(12), 2));
  encoder->eval();
  auto adapter = peft::attach(*encoder, all_linear());
  randomise(adapter);
  CHECK(adapter.sites().size() == 8);
  const auto calls = adapted::watch(adapter);
  encoder(torch::randn({5, 2, 8})).sum().backward();
  CHECK(calls->linear == 8);
  CHECK(calls->effective == 0);
  for (const auto& p : adapter.parameters()) {
    CHECK(p.grad().defined());
  }
  for (const auto& item : peft::detail::base_parameters(*encoder)) {
    CHECK(!item.second.grad().defined());
  }
}

TEST_CASE(
    "every base dtype: the output keeps it, the adapter has at least float32") {
  std::vector<Case> cases;
  for (auto list :
       {linear_cases(),
        attention_cases(),
        recurrent_cases(),
        embedding_cases(),
        convolution_cases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  for (const auto dtype :
       {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf}) {
    INFO(dtype);
    adapted::for_each_row(cases, [&](const Case& one) {
      seed(1);
      Built built = one.build(dtype);
      seed(1);
      Built exact = one.build(torch::kDouble);
      Tensor y0;
      if (error_of([&] { y0 = built.run().detach(); }) != "") {
        return; // LibTorch has no such kernel on this machine
      }
      for (auto& p : built.module->parameters()) {
        p.set_requires_grad(false);
      }
      const Tensor y_trainable = y0;
      y0 = built.run();
      const auto base = copies(*built.module);
      auto adapter = peft::attach(*built.module, one.options);
      auto reference = peft::attach(*exact.module, one.options);
      for (const auto& p : adapter.parameters()) {
        CHECK(
            p.scalar_type() ==
            (dtype == torch::kDouble ? torch::kDouble : torch::kFloat));
      }
      const Tensor start = built.run();
      CHECK((equal_bits(start, y0) || equal_bits(start, y_trainable)));
      randomise(adapter);
      randomise(reference);
      Tensor y;
      const std::string error = error_of([&] { y = built.run(); });
      CHECK(error == "");
      if (!y.defined()) {
        return;
      }
      CHECK(y.scalar_type() == y0.scalar_type());
      const Tensor wanted = exact.run();
      // Half precision rounds at every layer: judged as a whole.
      const double distance =
          ((y.to(torch::kDouble) - wanted).norm() / wanted.norm())
              .item<double>();
      CHECK(distance < 4 * tolerance(dtype).rtol + 1e-6);
      y.to(torch::kFloat).sum().backward();
      for (const auto& p : adapter.parameters()) {
        CHECK(p.grad().defined());
        CHECK(p.grad().scalar_type() == p.scalar_type());
      }
      adapter.disable();
      CHECK(equal_bits(built.run(), y0));
      adapter.enable();
      adapter.merge();
      torch::NoGradGuard no_grad;
      const Tensor merged = built.run();
      CHECK(
          ((merged.to(torch::kDouble) - wanted).norm() / wanted.norm())
              .item<double>() < 4 * tolerance(dtype).rtol + 1e-6);
      adapter.unmerge();
      check_bits(*built.module, base);
    });
  }
}

TEST_CASE("every module under autocast to bfloat16") {
  std::vector<Case> cases;
  for (auto list :
       {linear_cases(),
        attention_cases(),
        recurrent_cases(),
        embedding_cases(),
        convolution_cases()}) {
    cases.insert(cases.end(), list.begin(), list.end());
  }
  adapted::for_each_row(cases, [&](const Case& one) {
    seed(1);
    Built built = one.build(torch::kFloat);
    Tensor y0;
    const bool runs = error_of([&] {
                        adapted::Autocast autocast;
                        y0 = built.run().detach();
                      }) == "";
    if (!runs) {
      return; // not without an adapter either
    }
    auto adapter = peft::attach(*built.module, one.options);
    randomise(adapter);
    const Tensor exact = built.run();
    Tensor y;
    {
      adapted::Autocast autocast;
      y = built.run();
    }
    CHECK(y.scalar_type() == y0.scalar_type());
    CHECK(((y - exact).norm() / exact.norm()).item<double>() < 0.05);
    y.to(torch::kFloat).sum().backward();
    for (const auto& p : adapter.parameters()) {
      CHECK(p.grad().defined());
      CHECK(p.grad().scalar_type() == torch::kFloat);
    }
  });
}

TEST_CASE("a sparse embedding has a sparse gradient under an adapter") {
  seed(3);
  nn::Embedding table(nn::EmbeddingOptions(9, 4).sparse(true));
  const Tensor W = table->weight.detach().clone();
  const auto index = torch::tensor({1, 5, 5});
  auto adapter = peft::attach(*table, root().init("random"));
  const auto& delta = adapted::lora(adapter);
  const Tensor expected =
      at::embedding(W + 2 * at::matmul(delta.lora_B, delta.lora_A).t(), index);
  const Tensor y = table(index);
  CHECK(close(y, expected));
  const auto found = adapted::gradients(y, {delta.lora_A, delta.lora_B});
  const auto wanted =
      adapted::gradients(expected, {delta.lora_A, delta.lora_B});
  CHECK(found[0].is_sparse());
  CHECK(close(found[0].to_dense(), wanted[0]));
  CHECK(!found[1].is_sparse());
  CHECK(close(found[1], wanted[1]));
}

TEST_CASE(
    "padding_idx and scale_grad_by_freq act on the adapter as in HF PEFT") {
  for (const bool by_frequency : {false, true}) {
    seed(4);
    nn::Embedding table(
        nn::EmbeddingOptions(9, 4).padding_idx(2).scale_grad_by_freq(
            by_frequency));
    table->to(torch::kDouble);
    const Tensor W = table->weight.detach().clone();
    const auto index = torch::tensor({{2, 3, 3}, {8, 2, 1}});
    auto adapter = peft::attach(*table, root().init("random"));
    const auto& delta = adapted::lora(adapter);
    const Tensor value = W + change(delta, W.sizes());
    const Tensor y = table(index);
    CHECK(close(y, at::embedding(value, index))); // the padding row as well
    // Gradients for A stop at the padding row; those for B do not.
    const Tensor expected = at::embedding(W, index) +
        2 *
            at::matmul(
                at::embedding(delta.lora_A.t(), index, 2, by_frequency),
                delta.lora_B.t());
    const auto found = adapted::gradients(y, adapter.parameters());
    CHECK(adapted::all_close(
        found, adapted::gradients(expected, adapter.parameters())));
    CHECK(found[0].select(1, 2).abs().sum().item<double>() == 0);
    CHECK(found[0].select(1, 3).abs().sum().item<double>() > 0);
    adapter.disable();
    CHECK(equal_bits(table(index), at::embedding(W, index)));
    adapter.enable();
    adapter.merge();
    CHECK(close(peft::base(table->weight), value));
    adapter.unmerge();
    CHECK(equal_bits(peft::base(table->weight), W));
  }
}

TEST_CASE("weights in channels_last order") {
  seed(5);
  nn::Conv2d conv(nn::Conv2dOptions(4, 6, 3).padding(1));
  conv->to(torch::kDouble);
  conv->weight.set_data(
      conv->weight.detach().contiguous(at::MemoryFormat::ChannelsLast));
  const Tensor W = conv->weight.detach().clone();
  auto adapter = peft::attach(*conv, root().init("random"));
  const Tensor x = torch::randn({2, 4, 5, 5}, torch::kDouble)
                       .contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor E = W + change(adapted::lora(adapter), W.sizes());
  CHECK(close(conv(x), at::conv2d(x, E, conv->bias, 1, 1)));
  CHECK(close(conv->weight.flatten(1) + 0, E.flatten(1)));
  CHECK(close(conv->weight + 0, E));
  adapter.merge();
  CHECK(conv->weight.is_contiguous(at::MemoryFormat::ChannelsLast));
  CHECK(close(peft::base(conv->weight), E));
  adapter.unmerge();
  CHECK(equal_bits(peft::base(conv->weight), W));
}

} // namespace test_modules
