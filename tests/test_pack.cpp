/// Frozen weights prepacked for the CPU: the product, its gradients, and what
/// pack_frozen and unpack do to models with and without adapters.

#include "adapted.h"
#include "meta_device.h"
#include "model_state.h"
#include "test.h"
#include "tiny_models.h"

#include <peft/functional/packed_matrix.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace test_pack {

namespace {

using peft::functional::frozen_linear;
using peft::functional::PackedMatrix;
using peft::functional::cpu::Isa;
using peft::functional::cpu::Panels;
using torch::Tensor;
namespace nn = torch::nn;

std::vector<Isa> instruction_sets() {
  std::vector<Isa> result;
  for (const auto isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= peft::functional::cpu::best_isa()) {
      result.push_back(isa);
    }
  }
  return result;
}

Tensor wide(const Tensor& t) {
  return t.detach().to(torch::kDouble);
}

/// Whether `y` is x Mᵀ (+ b) to 1e-6 of the sum of magnitudes.
Comparison is_product(
    const Tensor& y,
    const Tensor& x,
    const Tensor& M,
    const Tensor& b = {}) {
  torch::NoGradGuard no_grad;
  const auto linear = [&](auto&& change) {
    Tensor sum = at::matmul(change(wide(x)), change(wide(M)).t());
    return b.defined() ? sum + change(wide(b)) : sum;
  };
  const Tensor expected = linear([](const Tensor& t) { return t; });
  const Tensor magnitude = linear([](const Tensor& t) { return t.abs(); });
  if (y.sizes() != expected.sizes() || y.scalar_type() != torch::kFloat) {
    return {
        false, c10::str("got ", y.sizes(), ", expected ", expected.sizes())};
  }
  const Tensor wrong =
      ((wide(y) - expected).abs() > 1e-6 * magnitude).logical_or(y.isnan());
  return {
      !wrong.any().item<bool>(),
      c10::str(wrong.sum().item<int64_t>(), " of ", y.numel(), " are wrong")};
}

std::shared_ptr<const PackedMatrix> pack(const Tensor& w) {
  return std::make_shared<const PackedMatrix>(w);
}

/// Overwrites weights with zeros behind the back of their version counters,
/// and takes it back at the end: a result that does not change was computed
/// from the packed form.
class Blank {
 public:
  explicit Blank(std::vector<Tensor> weights) : weights_(std::move(weights)) {
    for (const auto& w : weights_) {
      const auto* begin = static_cast<const char*>(w.data_ptr());
      kept_.emplace_back(begin, begin + w.nbytes());
      std::memset(w.data_ptr(), 0, w.nbytes());
    }
  }
  ~Blank() {
    for (size_t i = 0; i < weights_.size(); ++i) {
      std::memcpy(weights_[i].data_ptr(), kept_[i].data(), kept_[i].size());
    }
  }
  Blank(const Blank&) = delete;
  Blank& operator=(const Blank&) = delete;

 private:
  std::vector<Tensor> weights_;
  std::vector<std::vector<char>> kept_;
};

bool has_tag(const Tensor& t) {
  return peft::detail::tag_of(t) != nullptr;
}

/// The tensors of `model` that are packed as they now are.
std::vector<Tensor> packed_weights(nn::Module& model) {
  std::vector<Tensor> result;
  for (const auto& item : peft::detail::base_parameters(model)) {
    const auto* meta = peft::detail::tag_of(item.second);
    if (meta != nullptr && meta->site->packed &&
        meta->site->packed->is_of(item.second)) {
      result.push_back(item.second);
    }
  }
  return result;
}

int64_t padded(int64_t n) {
  return (n + 15) / 16 * 16;
}
int64_t packed_bytes(const Tensor& w) {
  return 4 * (padded(w.size(0)) * w.size(1) + padded(w.size(1)) * w.size(0));
}

nn::Sequential two_layers() {
  return nn::Sequential(nn::Linear(20, 50), nn::Tanh(), nn::Linear(50, 7));
}

nn::LinearImpl& layer(nn::Sequential& model, size_t i) {
  return *model->ptr(i)->as<nn::LinearImpl>();
}

} // namespace

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ the product ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("the packed product on odd shapes, in every instruction set") {
  seed();
  const std::vector<std::pair<int64_t, int64_t>> shapes{
      {1, 1}, {3, 5}, {16, 16}, {47, 33}, {48, 64}, {65, 385}, {97, 800}};
  for (const Isa isa : instruction_sets()) {
    for (const auto& [out, k] : shapes) {
      const Tensor M = torch::randn({out, k});
      const Panels panels(M, isa);
      for (const int64_t n :
           {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 64, 130, 200}) {
        for (const int64_t r : {0, 1, 8, 20}) {
          for (const bool has_bias : {false, true}) {
            INFO(
                "isa " << static_cast<int>(isa) << " out " << out << " k " << k
                       << " n " << n << " r " << r << " bias " << has_bias);
            // Rows of x and y lie further apart than they are long.
            const Tensor x = torch::randn({n, k + 3}).narrow(1, 0, k);
            const Tensor y = at::full({n, out + 2}, -7.f);
            const Tensor t = torch::randn({n, r});
            const Tensor UT = torch::randn({r, out});
            const Tensor b = has_bias ? torch::randn({out}) : Tensor();
            panels.multiply(
                x.data_ptr<float>(),
                x.stride(0),
                n,
                y.data_ptr<float>(),
                y.stride(0),
                has_bias ? b.data_ptr<float>() : nullptr,
                r > 0 ? t.data_ptr<float>() : nullptr,
                r > 0 ? UT.data_ptr<float>() : nullptr,
                r);
            const auto right = is_product(
                y.narrow(1, 0, out),
                at::cat({x, t}, 1),
                at::cat({M, UT.t()}, 1),
                b);
            if (!right) {
              REQUIRE(right);
            }
            if (!y.narrow(1, out, 2).eq(-7.f).all().item<bool>()) {
              FAIL("written beyond the row");
            }
          }
        }
      }
    }
  }
}

TEST_CASE("threads share the packed product by columns or by rows") {
  seed(1);
  const int before = at::get_num_threads();
  const Tensor W = torch::randn({300, 500});
  const PackedMatrix packed(W);
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    for (const int64_t n : {5, 64, 700}) {
      INFO("threads " << threads << " n " << n);
      const Tensor x = torch::randn({n, 500}), y = torch::empty({n, 300});
      packed.multiply(x, y, false, {}, nullptr, nullptr, 0);
      CHECK(is_product(y, x, W));
      const Tensor dx = torch::empty({n, 500});
      packed.multiply(y, dx, true, {}, nullptr, nullptr, 0);
      CHECK(is_product(dx, y, W.t()));
    }
  }
  at::set_num_threads(before);
}

TEST_CASE("a matrix with any strides is packed, anything else is refused") {
  seed(2);
  const Tensor base = torch::randn({40, 90});
  for (const Tensor& W :
       {base, base.t(), base.slice(1, 3, 60, 2), base.slice(0, 1, 9)}) {
    const PackedMatrix packed(W);
    CHECK(packed.nbytes() == packed_bytes(W));
    const Tensor x = torch::randn({6, W.size(1)});
    const Tensor b = torch::randn({2 * W.size(0)}).slice(0, 0, {}, 2);
    const Tensor y = torch::empty({6, W.size(0)});
    packed.multiply(x, y, false, b, nullptr, nullptr, 0);
    CHECK(is_product(y, x, W, b));
    const Tensor dx = torch::empty({6, W.size(1)});
    packed.multiply(y, dx, true, {}, nullptr, nullptr, 0);
    CHECK(is_product(dx, y, W.t()));
  }
  const auto refusal = [](const Tensor& w) {
    return error_of([&] { PackedMatrix packed(w); });
  };
  CHECK(contains(refusal(torch::randn({3})), "only a matrix can be packed"));
  CHECK(contains(refusal(torch::randn({0, 3})), "shape [0, 3]"));
  CHECK(contains(refusal(Tensor()), "an undefined tensor"));
  CHECK(contains(
      refusal(torch::randn({3, 2}, torch::kDouble)), "got CPUDoubleType"));
  CHECK(contains(refusal(torch::empty({3, 2}, torch::kMeta)), "on meta"));
}

TEST_CASE("a packed matrix knows what it is of") {
  seed(3);
  Tensor W = torch::randn({8, 8});
  const PackedMatrix packed(W);
  CHECK(packed.is_of(W));
  CHECK(packed.is_of(W.t()));
  CHECK(packed.is_of(W.detach()));
  namespace cpu = peft::functional::cpu;
  CHECK(packed.serves(16) == (cpu::best_isa() != Isa::kPlain));
  CHECK_FALSE(packed.serves(0));
  CHECK_FALSE(packed.is_of(W.slice(0, 0, 4)));
  CHECK_FALSE(packed.is_of(W.view({64})));
  CHECK_FALSE(packed.is_of(W.clone()));
  CHECK_FALSE(packed.is_of(W.view(torch::kInt)));
  SECTION("a write makes it another") {
    W.detach()[0].zero_();
    CHECK_FALSE(packed.is_of(W));
  }
  SECTION("so does other memory") {
    W.set_data(W.detach().clone());
    CHECK_FALSE(packed.is_of(W));
  }
  SECTION("inference tensors count no writes") {
    c10::InferenceMode mode;
    const Tensor V = torch::randn({4, 8});
    const PackedMatrix other(V);
    CHECK(other.is_of(V));
    CHECK_FALSE(other.is_of(W));
  }
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ frozen_linear ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("frozen_linear on inputs of all kinds is at::linear") {
  seed(4);
  const Tensor W = torch::randn({30, 21}), b = torch::randn({30});
  const auto packed = pack(W);
  const std::vector<std::pair<std::string, Tensor>> inputs{
      {"matrix", torch::randn({5, 21})},
      {"batch", torch::randn({2, 3, 21})},
      {"four dimensions", torch::randn({2, 3, 2, 21})},
      {"transposed", torch::randn({21, 5}).t()},
      {"permuted", torch::randn({3, 21, 2}).permute({2, 0, 1})},
      {"every other column", torch::randn({5, 42}).slice(1, 0, 42, 2)},
      {"expanded", torch::randn({1, 21}).expand({4, 21})},
      {"one row", torch::randn({1, 21})}};
  for (const auto& [name, x] : inputs) {
    INFO(name);
    Tensor y, y_of_t;
    {
      const Blank blank({W});
      y = frozen_linear(x, W, b, packed, false);
      y_of_t = frozen_linear(
          at::matmul(x, at::eye(21, 30)), W.t(), {}, packed, true);
      c10::InferenceMode mode;
      CHECK(equal_bits(frozen_linear(x, W, b, packed, false), y));
    }
    CHECK(is_product(y, x, W, b));
    CHECK(is_product(y_of_t, at::matmul(x, at::eye(21, 30)), W.t()));
  }
  CHECK(
      frozen_linear(torch::randn({0, 21}), W, b, packed, false).sizes() ==
      at::IntArrayRef({0, 30}));
  CHECK(
      frozen_linear(torch::randn({2, 0, 21}), W, b, packed, false).sizes() ==
      at::IntArrayRef({2, 0, 30}));
  CHECK(contains(
      error_of([&] {
        frozen_linear(torch::randn({2, 20}), W, b, packed, false);
      }),
      "shapes cannot be multiplied"));
}

TEST_CASE("frozen_linear leaves to at::linear what is not plain float32") {
  seed(5);
  const Tensor W = torch::randn({9, 8}), b = torch::randn({9});
  const auto packed = pack(W);
  const auto same = [&](const Tensor& x, const std::optional<Tensor>& bias) {
    return equal_bits(
        frozen_linear(x, W, bias, packed, false), at::linear(x, W, bias));
  };
  const Tensor x = torch::randn({4, 8});
  CHECK(same(torch::randn({8}), b)); // a vector
  CHECK(same(x, torch::randn({4, 9}))); // a bias for each row
  {
    adapted::Autocast autocast;
    const Tensor y = frozen_linear(x, W, b, packed, false);
    CHECK(y.scalar_type() == torch::kBFloat16);
    CHECK(equal_bits(y, at::linear(x, W, b)));
  }
  { // a lazily negated tensor
    const Tensor z = at::imag(
        at::complex(torch::randn({4, 8}), torch::randn({4, 8})).conj());
    REQUIRE(z.is_neg());
    CHECK(same(z, b));
  }
  { // forward-mode derivatives
    const auto level = torch::autograd::ForwardADLevel::get_next_idx();
    const Tensor tangent = torch::randn({4, 8});
    const Tensor y = frozen_linear(
        at::_make_dual(x, tangent, static_cast<int64_t>(level)),
        W,
        b,
        packed,
        false);
    CHECK(is_product(
        std::get<1>(at::_unpack_dual(y, static_cast<int64_t>(level))),
        tangent,
        W));
    torch::autograd::ForwardADLevel::release_idx(level);
  }
  { // another weight
    const Tensor V = torch::randn({9, 8});
    CHECK(
        equal_bits(frozen_linear(x, V, b, packed, false), at::linear(x, V, b)));
  }
  { // a weight that trains gets its gradient
    const Tensor V = torch::randn({9, 8}).requires_grad_();
    const auto trained = pack(V);
    frozen_linear(x, V, b, trained, false).sum().backward();
    CHECK(is_product(V.grad(), torch::ones({9, 4}), x.t()));
  }
}

TEST_CASE("gradients through the packed product, of first and second order") {
  seed(6);
  for (const bool transposed : {false, true}) {
    for (const bool has_bias : {false, true}) {
      INFO("transposed " << transposed << " bias " << has_bias);
      const Tensor W = torch::randn({17, 23}), same = W.clone();
      const Tensor M = transposed ? W.t() : W;
      const Tensor M_same = transposed ? same.t() : same;
      const auto packed = pack(W);
      const Blank blank({W});
      const Tensor x = torch::randn({2, 3, M.size(1)}).requires_grad_();
      const Tensor b =
          has_bias ? torch::randn({M.size(0)}).requires_grad_() : Tensor();
      const Tensor y = frozen_linear(x, M, b, packed, transposed);
      CHECK(is_product(y, x, M_same, b));

      // dx = dy M, with a dy that is not contiguous.
      const Tensor dy =
          torch::randn({3, 2, M.size(0)}).transpose(0, 1).requires_grad_();
      const auto first = torch::autograd::grad({y}, {x}, {dy}, true);
      CHECK(is_product(first[0], dy, M_same.t()));
      CHECK_FALSE(first[0].requires_grad());
      if (has_bias) {
        const auto db = torch::autograd::grad({y}, {b}, {dy}, true);
        CHECK(close(db[0], wide(dy).flatten(0, 1).sum(0), 0, 1e-5));
        const Tensor z = frozen_linear(x.detach(), M, b, packed, transposed);
        z.sum().backward();
        CHECK(equal_bits(b.grad(), at::full({M.size(0)}, 6.f)));
      }

      // d<dx, v>/d(dy) = v Mᵀ, and once more: d<v Mᵀ, u>/dv = u M.
      const Tensor v = torch::randn_like(x).requires_grad_();
      const auto dx = torch::autograd::grad({y}, {x}, {dy}, true, true);
      CHECK(equal_bits(dx[0], first[0]));
      const auto second = torch::autograd::grad(
          {(dx[0] * v).sum()}, {dy}, {}, true, /*create_graph=*/true);
      CHECK(is_product(second[0], v, M_same));
      const Tensor u = torch::randn_like(y);
      const auto third = torch::autograd::grad({(second[0] * u).sum()}, {v});
      CHECK(is_product(third[0], u, M_same.t()));
    }
  }
}

TEST_CASE("the result of the packed product may be changed in place") {
  seed(7);
  const Tensor W = torch::randn({6, 5});
  const Tensor x = torch::randn({2, 3, 5}).requires_grad_();
  Tensor y = frozen_linear(x, W, {}, pack(W), false);
  const Tensor mask = (y > 0).to(torch::kFloat);
  y.relu_();
  y.sum().backward();
  CHECK(is_product(x.grad(), mask, W.t()));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~ pack_frozen, unpack ~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("pack_frozen packs linear layers and unpack leaves them plain") {
  seed(8);
  auto model = two_layers();
  peft::freeze(*model);
  const auto before = state_of(*model);
  const Tensor x = torch::randn({9, 20});
  const auto run = [&] { return model->forward(x); };
  const Tensor expected = run();
  const auto plain_operators = adapted::operator_names(run);

  const auto report = peft::pack_frozen(*model);
  CHECK(report.weights == 2);
  CHECK(
      report.bytes ==
      packed_bytes(layer(model, 0).weight) +
          packed_bytes(layer(model, 2).weight));
  CHECK(same_state(state_of(*model), before));
  CHECK_FALSE(peft::is_adapted(layer(model, 0).weight));
  CHECK(peft::adapters(*model).empty());
  {
    const Blank blank(packed_weights(*model));
    CHECK(close(run(), expected));
    CHECK(close(model->forward(x.view({3, 3, 20})).view({9, 7}), expected));
  }
  const auto again = peft::pack_frozen(*model);
  CHECK(again.weights == 2);
  CHECK(again.bytes == report.bytes);

  peft::unpack(*model);
  peft::unpack(*model);
  CHECK_FALSE(has_tag(layer(model, 0).weight));
  CHECK_FALSE(has_tag(layer(model, 2).weight));
  CHECK(same_state(state_of(*model), before));
  CHECK(equal_bits(run(), expected));
  CHECK(adapted::operator_names(run) == plain_operators);
}

TEST_CASE("what a packed model holds is what the report says") {
  nn::Linear model(100, 33);
  peft::freeze(*model);
  struct Ledger : c10::MemoryReportingInfoBase {
    int64_t held = 0;
    void reportMemoryUsage(
        void* /*pointer*/,
        int64_t size,
        size_t /*total*/,
        size_t /*reserved*/,
        c10::Device /*device*/) override {
      held += size;
    }
    bool memoryProfilingEnabled() const override {
      return true;
    }
  };
  const auto ledger = std::make_shared<Ledger>();
  c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, ledger);
  const auto report = peft::pack_frozen(*model);
  CHECK(report.bytes == 4 * (48 * 100 + 112 * 33));
  CHECK(ledger->held == report.bytes);
  peft::unpack(*model);
  CHECK(ledger->held == 0);
}

TEST_CASE("gradients reach the input of a packed network") {
  seed(9);
  auto model = two_layers();
  peft::freeze(*model);
  const Tensor x = torch::randn({9, 20}).requires_grad_();
  const auto plain = adapted::gradients(model->forward(x), {x});
  peft::pack_frozen(*model);
  const Blank blank(packed_weights(*model));
  CHECK(adapted::all_close(adapted::gradients(model->forward(x), {x}), plain));
}

TEST_CASE("a model without anything to pack is an error that says why") {
  const auto refusal = [](nn::Module& model) {
    return error_of([&] { peft::pack_frozen(model); });
  };
  nn::Linear trainable(3, 2);
  CHECK(contains(
      refusal(*trainable), "[2, 3] is trainable (attach an adapter or call"));
  nn::Linear wide_one(3, 2);
  wide_one->to(torch::kDouble);
  peft::freeze(*wide_one);
  CHECK(contains(refusal(*wide_one), "[2, 3] is of dtype Double"));
  nn::Linear elsewhere = [] {
    MetaDevice meta;
    return nn::Linear(3, 2);
  }();
  peft::freeze(*elsewhere);
  CHECK(contains(refusal(*elsewhere), "[2, 3] is on meta"));
  nn::Embedding table(4, 5);
  peft::freeze(*table);
  CHECK(contains(refusal(*table), "it has no linear layer"));
  for (const auto& module :
       {trainable.ptr(), wide_one.ptr(), elsewhere.ptr()}) {
    CHECK_FALSE(has_tag(module->as<nn::LinearImpl>()->weight));
  }
  auto mixed = two_layers(); // what trains is left alone
  layer(mixed, 0).weight.set_requires_grad(false);
  CHECK(peft::pack_frozen(*mixed).weights == 1);
  CHECK_FALSE(has_tag(layer(mixed, 2).weight));
}

TEST_CASE("tied weights are packed once") {
  seed(10);
  nn::Sequential model(nn::Linear(6, 6), nn::Linear(6, 6));
  layer(model, 1).weight = layer(model, 0).weight;
  peft::freeze(*model);
  CHECK(peft::pack_frozen(*model).weights == 1);
  peft::unpack(*model);

  // A tensor of its own on the same memory does not see the other's writes.
  nn::Sequential other(nn::Linear(6, 6), nn::Linear(6, 6), nn::Linear(6, 2));
  layer(other, 1).weight.set_data(layer(other, 0).weight.data());
  peft::freeze(*other);
  CHECK(peft::pack_frozen(*other).weights == 1);
}

TEST_CASE("a packed weight that is written to is used as it is") {
  seed(11);
  nn::Linear model(8, 6);
  peft::freeze(*model);
  const Tensor x = torch::randn({4, 8});
  const auto right = [&] {
    return is_product(
        model->forward(x), x, peft::base(model->weight), model->bias);
  };
  peft::pack_frozen(*model);
  {
    torch::NoGradGuard no_grad;
    model->weight.mul_(2);
  }
  CHECK(packed_weights(*model).empty());
  CHECK(right());
  CHECK(peft::pack_frozen(*model).weights == 1);
  CHECK(packed_weights(*model).size() == 1);
  CHECK(right());
  SECTION("in inference mode") {
    c10::InferenceMode mode;
    model->weight.zero_();
    CHECK(right());
  }
  SECTION("other memory") {
    model->weight.set_data(torch::randn({6, 8}));
    CHECK(right());
  }
  SECTION("an archive") {
    TemporaryDirectory folder;
    nn::Linear source(8, 6);
    torch::save(source, folder / "linear.pt");
    torch::load(model, folder / "linear.pt");
    CHECK(equal_bits(peft::base(model->weight), source->weight));
    CHECK(right());
  }
  SECTION("another dtype and back") {
    model->to(torch::kDouble);
    CHECK(model->forward(x.to(torch::kDouble)).scalar_type() == torch::kDouble);
    model->to(torch::kFloat);
    CHECK(right());
  }
  SECTION("training it after all") {
    model->weight.set_requires_grad(true);
    torch::optim::SGD optimizer({model->weight}, 0.1);
    model->forward(x).sum().backward();
    CHECK(is_product(model->weight.grad(), torch::ones({6, 4}), x.t()));
    optimizer.step();
    CHECK(right());
  }
  peft::unpack(*model);
  CHECK_FALSE(has_tag(model->weight));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ with adapters ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("packed before attach or after, an adapter computes the same") {
  for (const bool pack_first : {false, true}) {
    INFO("pack first " << pack_first);
    seed(12);
    auto model = two_layers(), twin = two_layers();
    {
      torch::NoGradGuard no_grad;
      layer(twin, 0).weight.copy_(layer(model, 0).weight);
      layer(twin, 0).bias.copy_(layer(model, 0).bias);
      layer(twin, 2).weight.copy_(layer(model, 2).weight);
      layer(twin, 2).bias.copy_(layer(model, 2).bias);
    }
    const Tensor x = torch::randn({9, 20}).requires_grad_();
    const Tensor base = model->forward(x).detach();
    if (pack_first) {
      peft::freeze(*model);
      peft::pack_frozen(*model);
    }
    auto adapter = peft::attach(*model, adapted::acting("0"));
    auto plain = peft::attach(*twin, adapted::acting("0"));
    randomise(adapter);
    randomise(plain);
    if (!pack_first) {
      CHECK(peft::pack_frozen(*model).weights == 2);
    }
    CHECK(packed_weights(*model).size() == 2);
    CHECK(peft::is_adapted(layer(model, 0).weight));

    const auto gradients = [&](nn::Sequential& m, const peft::Adapter& a) {
      auto leaves = a.parameters();
      leaves.push_back(x);
      return adapted::gradients(m->forward(x), leaves);
    };
    const Tensor expected = twin->forward(x);
    CHECK(close(model->forward(x), expected));
    CHECK(
        adapted::all_close(gradients(model, adapter), gradients(twin, plain)));
    {
      torch::NoGradGuard no_grad;
      CHECK(close(model->forward(x), expected));
    }

    adapter.disable();
    CHECK(close(model->forward(x), base));
    {
      const Blank blank(packed_weights(*model));
      CHECK(close(model->forward(x), base));
    }
    adapter.enable();

    // A merge is a write; what it did not touch stays packed.
    adapter.merge();
    CHECK(packed_weights(*model).size() == 1);
    CHECK(close(model->forward(x), expected));
    CHECK(peft::pack_frozen(*model).weights == 2);
    CHECK(close(model->forward(x), expected));
    adapter.unmerge();
    CHECK(close(model->forward(x), expected));
    CHECK(peft::pack_frozen(*model).weights == 2);

    adapter.detach();
    CHECK(packed_weights(*model).size() == 2);
    CHECK_FALSE(peft::is_adapted(layer(model, 0).weight));
    CHECK(layer(model, 0).weight.requires_grad() == !pack_first);
    CHECK(layer(model, 2).weight.requires_grad() == !pack_first);
    CHECK(close(model->forward(x), base));
    peft::unpack(*model);
    CHECK_FALSE(has_tag(layer(model, 0).weight));
    CHECK(close(model->forward(x), base));
  }
}

TEST_CASE("a permanent merge leaves plain weights where it wrote") {
  seed(13);
  auto model = two_layers();
  auto adapter = peft::attach(*model, adapted::acting("0"));
  randomise(adapter);
  peft::pack_frozen(*model);
  const Tensor x = torch::randn({9, 20});
  const Tensor expected = model->forward(x);
  peft::merge(*model);
  CHECK_FALSE(has_tag(layer(model, 0).weight));
  CHECK(has_tag(layer(model, 2).weight));
  CHECK(close(model->forward(x), expected));
  peft::unpack(*model);
  CHECK_FALSE(has_tag(layer(model, 2).weight));
  CHECK(close(model->forward(x), expected));
}

TEST_CASE("unpack under an adapter keeps the adapter and what it froze") {
  seed(14);
  auto model = two_layers();
  auto adapter = peft::attach(*model, adapted::acting("0"));
  const Tensor x = torch::randn({9, 20});
  const Tensor expected = model->forward(x);
  peft::pack_frozen(*model);
  peft::unpack(*model);
  CHECK(peft::is_adapted(layer(model, 0).weight));
  CHECK_FALSE(has_tag(layer(model, 2).weight));
  CHECK(equal_bits(model->forward(x), expected));
  peft::pack_frozen(*model);
  auto second = peft::attach(*model, adapted::acting("2"), "second");
  adapter.detach();
  second.detach();
  for (const size_t i : {size_t{0}, size_t{2}}) {
    CHECK(layer(model, i).weight.requires_grad());
    CHECK(layer(model, i).bias.requires_grad());
  }
}

TEST_CASE("copies, summaries and files of a packed model") {
  seed(15);
  auto model = two_layers();
  auto adapter = peft::attach(*model, adapted::acting("0"));
  randomise(adapter);
  const Tensor x = torch::randn({9, 20});
  const std::string words = peft::summary(*model);
  peft::pack_frozen(*model);
  const Tensor expected = model->forward(x);
  CHECK(peft::summary(*model) == words);

  auto copy = peft::clone(model);
  CHECK(packed_weights(*copy).empty());
  CHECK(close(copy->forward(x), expected));
  CHECK_FALSE(layer(copy, 2).weight.requires_grad());
  peft::get_adapter(*copy).detach();
  CHECK(layer(copy, 2).weight.requires_grad());
  CHECK_FALSE(has_tag(layer(copy, 2).weight));

  TemporaryDirectory folder;
  peft::save(adapter, folder / "adapter");
  adapter.detach();
  CHECK(packed_weights(*model).size() == 2);
  auto again = peft::load(*model, folder / "adapter");
  CHECK(close(model->forward(x), expected));
  again.detach();

  // A packed model without adapters is LibTorch's to copy and to save.
  const Tensor base = model->forward(x);
  const auto twin =
      std::dynamic_pointer_cast<nn::LinearImpl>(layer(model, 2).clone());
  CHECK_FALSE(has_tag(twin->weight));
  CHECK(equal_bits(twin->weight, peft::base(layer(model, 2).weight)));
  torch::save(model, folder / "model.pt");
  auto fresh = two_layers();
  torch::load(fresh, folder / "model.pt");
  CHECK(close(fresh->forward(x), base));
  CHECK_FALSE(has_tag(layer(fresh, 0).weight));
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ networks ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~

TEST_CASE("an unmodified TransformerEncoder, packed") {
  seed(16);
  nn::TransformerEncoder model(nn::TransformerEncoderOptions(
      nn::TransformerEncoderLayerOptions(16, 4).dim_feedforward(24).dropout(0),
      2));
  peft::freeze(*model);
  const Tensor x = torch::randn({5, 3, 16}).requires_grad_();
  const auto run = [&] { return model->forward(x, {}, {}); };
  const Tensor expected = run();
  const auto gradients = adapted::gradients(expected, {x});
  const auto names = adapted::operator_names(run);
  CHECK(peft::pack_frozen(*model).weights == 8); // in, out, two feed-forward
  {
    const Blank blank(packed_weights(*model));
    CHECK(close(run(), expected));
    CHECK(adapted::all_close(adapted::gradients(run(), {x}), gradients));
  }
  auto adapter = peft::attach(*model, adapted::acting());
  const Tensor before = run();
  peft::unpack(*model);
  CHECK(close(run(), before));
  adapter.detach();
  CHECK(equal_bits(run(), expected));
  CHECK(adapted::operator_names(run) == names);
}

TEST_CASE("the networks of transformers, packed") {
  using peft::LoraOptions;
  const std::vector<std::pair<std::string, LoraOptions>> networks{
      {"bert", adapted::acting({"query", "value"})},
      {"roberta", adapted::acting({"query", "value"})},
      {"gpt2", adapted::acting({"c_attn"}).fan_in_fan_out(true)},
      {"llama", adapted::acting({"q_proj", "v_proj"})},
      {"t5_v1_0", adapted::acting({"q", "v"})},
      {"t5_v1_1", adapted::acting({"q", "v"})}};
  for (const auto& [name, options] : networks) {
    INFO(name);
    auto network = tiny_models::load(name);
    peft::freeze(*network.module);
    tiny_models::Tensors call;
    for (const auto& [key, value] : peft::load_safetensors(
             golden("models/" + name + "/reference.safetensors"))) {
      const std::string prefix = "right.";
      call[key.rfind(prefix, 0) == 0 ? key.substr(prefix.size()) : key] = value;
    }
    const auto run = [&] { return network.run(call); };
    const Tensor expected = run();
    const auto report = peft::pack_frozen(*network.module);
    std::vector<Tensor> packed = packed_weights(*network.module);
    CHECK(decoders::agrees(run(), expected));
    // The vocabulary's table is looked up too, and must stay readable.
    packed.erase(
        std::remove_if(
            packed.begin(),
            packed.end(),
            [](const Tensor& w) { return w.size(0) == 48; }),
        packed.end());
    CHECK(packed.size() >= 8);
    CHECK(report.weights >= static_cast<int64_t>(packed.size()));
    if (peft::functional::cpu::best_isa() != Isa::kPlain) { // else few rows
      const Blank blank(packed);
      CHECK(decoders::agrees(run(), expected));
    }

    auto adapter = peft::attach(*network.module, options);
    adapter.set_scale(0.25);
    const Tensor with = run();
    CHECK_FALSE(decoders::agrees(with, expected));
    peft::unpack(*network.module);
    CHECK(decoders::agrees(run(), with));
    peft::pack_frozen(*network.module);
    adapter.detach();
    CHECK(decoders::agrees(run(), expected));
    peft::unpack(*network.module);
    CHECK(equal_bits(run(), expected));
  }
}

TEST_CASE("several threads run one packed model") {
  seed(17);
  auto model = two_layers();
  auto adapter = peft::attach(*model, adapted::acting("0"));
  peft::pack_frozen(*model);
  const Tensor x = torch::randn({9, 20});
  const Tensor expected = model->forward(x);
  std::vector<Comparison> results(4, {false, "did not run"});
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        const Tensor own = x.detach().requires_grad_();
        const Tensor y = model->forward(own);
        y.sum().backward();
        result = equal_bits(y, expected);
        if (!result) {
          return;
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& result : results) {
    CHECK(result);
  }
}

} // namespace test_pack
