/// Sparse gradients for LoRA on an embedding.

#include "adapted.h"
#include "accounting.h"
#include "test.h"

#include <memory>
#include <string>
#include <vector>

namespace test_sparse_embedding {

namespace {

using adapted::lora;
using torch::Tensor;
namespace nn = torch::nn;

constexpr int64_t kRows = 11, kFeatures = 5, kRank = 3;

/// An embedding with an adapter whose two factors count.
struct Table {
  explicit Table(nn::EmbeddingOptions options) : module(options) {
    module->to(torch::kDouble);
    adapter = peft::attach(
        *module, peft::LoraOptions(kRank).alpha(2).init("random").targets(""));
    A = lora(adapter).lora_A;
    B = lora(adapter).lora_B;
  }

  nn::Embedding module;
  peft::Adapter adapter;
  Tensor A, B;
};

nn::EmbeddingOptions table() {
  return nn::EmbeddingOptions(kRows, kFeatures);
}

/// The same numbers behind a sparse and a dense gradient.
struct Pair {
  explicit Pair(const nn::EmbeddingOptions& options)
      : sparse((seed(1), nn::EmbeddingOptions(options).sparse(true))),
        dense((seed(1), nn::EmbeddingOptions(options).sparse(false))) {}
  Table sparse, dense;
};

struct Row {
  std::string name;
  nn::EmbeddingOptions options;
  Tensor indices;
};

std::vector<Row> rows() {
  const Tensor ids = torch::tensor({{4, 1, 4, 0}, {10, 4, 2, 1}});
  const auto none = torch::empty({2, 0}, torch::kLong);
  return {
      {"repeated indices", table(), ids},
      {"32 bits", table(), ids.to(torch::kInt)},
      {"one index", table(), torch::tensor(7)},
      {"no index", table(), none},
      {"padding", table().padding_idx(4), ids},
      {"padding counted from the end", table().padding_idx(-1), ids},
      {"only padding", table().padding_idx(3), torch::tensor({3, 3})},
      {"scaled by frequency", table().scale_grad_by_freq(true), ids},
      {"padding and scaled",
       table().padding_idx(1).scale_grad_by_freq(true),
       ids}};
}

} // namespace

TEST_CASE("an embedding with sparse gradients gives the dense ones' numbers") {
  adapted::for_each_row(rows(), [](const Row& row) {
    Pair pair(row.options);
    const Tensor y = pair.sparse.module->forward(row.indices);
    const Tensor expected = pair.dense.module->forward(row.indices);
    CHECK(equal_bits(y, expected));
    const Tensor dy = torch::randn_like(y);
    for (int pass = 0; pass < 2; ++pass) { // the second one accumulates
      pair.sparse.module->forward(row.indices).backward(dy);
      pair.dense.module->forward(row.indices).backward(dy);
      const Tensor dA = pair.sparse.A.grad();
      REQUIRE(dA.layout() == torch::kSparse);
      CHECK(dA.sizes() == pair.sparse.A.sizes());
      CHECK(dA.sparse_dim() == 2);
      CHECK(dA.dense_dim() == 0);
      CHECK(close(dA.to_dense(), pair.dense.A.grad()));
      CHECK(close(pair.sparse.B.grad(), pair.dense.B.grad()));
    }
    CHECK_FALSE(pair.sparse.module->weight.grad().defined());
    CHECK(pair.dense.A.grad().layout() == torch::kStrided);
  });
}

TEST_CASE("a sparse gradient holds each touched column once, in order") {
  adapted::for_each_row(rows(), [](const Row& row) {
    Pair pair(row.options);
    const Tensor y = pair.sparse.module->forward(row.indices);
    const Tensor dA = torch::autograd::grad({y.sum()}, {pair.sparse.A})[0];
    REQUIRE(dA.is_coalesced()); // claimed; made again to see if it is true
    const Tensor again =
        at::sparse_coo_tensor(
            dA.indices(), dA.values(), dA.sizes(), dA.options())
            .coalesce();
    CHECK(equal_bits(dA.indices(), again.indices()));
    CHECK(equal_bits(dA.values(), again.values()));
    Tensor touched = std::get<0>(at::_unique2(row.indices));
    if (row.options.padding_idx()) {
      const auto padding = (*row.options.padding_idx() + kRows) % kRows;
      touched = touched.masked_select(touched.ne(padding));
    }
    CHECK(dA._nnz() == kRank * touched.numel());
  });
}

TEST_CASE("sparse gradients may be differentiated again") {
  for (const auto& options : {table(), table().padding_idx(4)}) {
    Pair pair(options);
    const Tensor ids = torch::tensor({4, 1, 4, 0});
    const auto second = [&](Table& t) {
      const Tensor y = t.module->forward(ids);
      const auto first = torch::autograd::grad(
          {y.pow(3).sum()}, {t.A, t.B}, {}, true, /*create_graph=*/true);
      return torch::autograd::grad(
          {first[0].pow(2).sum() + first[1].pow(2).sum()}, {t.A, t.B});
    };
    const auto a = second(pair.sparse), b = second(pair.dense);
    CHECK(close(a[0].to_dense(), b[0]));
    CHECK(close(a[1], b[1]));
    CHECK(b[0].abs().max().item<double>() > 0);
  }
}

TEST_CASE("nothing of the table's length is made for a sparse gradient") {
  constexpr int64_t num = 1 << 18;
  nn::Embedding module(nn::EmbeddingOptions(num, 4)
                           .sparse(true)
                           .padding_idx(2)
                           .scale_grad_by_freq(true));
  auto adapter = peft::attach(*module, adapted::acting(""));
  const Tensor ids = torch::randint(num, {32}, torch::kLong);
  Tensor y;
  const auto forward =
      accounting::sizes_of([&] { y = module->forward(ids).sum(); });
  const auto backward = accounting::sizes_of([&] { y.backward(); });
  CHECK(forward.size() + backward.size() > 5);
  CHECK(accounting::at_least(forward, num) == 0);
  CHECK(accounting::at_least(backward, num) == 0);
  torch::optim::SGD optimizer({lora(adapter).lora_A}, 0.1);
  const auto step = accounting::sizes_of([&] { optimizer.step(); });
  CHECK(accounting::at_least(step, num) == 0);
}

TEST_CASE("a dense gradient's forward reads rows of the table only") {
  constexpr int64_t num = 1 << 18;
  nn::Embedding module(num, 4);
  auto adapter = peft::attach(*module, adapted::acting(""));
  const Tensor ids = torch::randint(num, {32}, torch::kLong);
  const auto forward = accounting::sizes_of([&] { module->forward(ids); });
  CHECK_FALSE(forward.empty());
  CHECK(accounting::at_least(forward, num) == 0);
}

TEST_CASE("optimizers that take sparse gradients step as with dense ones") {
  const Tensor ids = torch::tensor({{4, 1, 4, 0}, {10, 4, 2, 1}});
  const auto train = [&](Table& t, torch::optim::Optimizer& optimizer) {
    for (int i = 0; i < 3; ++i) {
      optimizer.zero_grad();
      t.module->forward(ids).pow(2).sum().backward();
      optimizer.step();
    }
  };
  SECTION("SGD") {
    Pair pair(table());
    const Tensor start = pair.sparse.A.detach().clone();
    torch::optim::SGD a(pair.sparse.adapter.parameters(), 0.01);
    torch::optim::SGD b(pair.dense.adapter.parameters(), 0.01);
    train(pair.sparse, a);
    train(pair.dense, b);
    CHECK(close(pair.sparse.A, pair.dense.A));
    CHECK(close(pair.sparse.B, pair.dense.B));
    CHECK_FALSE(equal_bits(pair.sparse.A, start));
    for (const int64_t untouched : {3, 5, 9}) {
      CHECK(equal_bits(
          pair.sparse.A.select(1, untouched), start.select(1, untouched)));
    }
  }
  SECTION("Adagrad") {
    Pair pair(table());
    torch::optim::Adagrad a(
        pair.sparse.adapter.parameters(), torch::optim::AdagradOptions(0.01));
    torch::optim::Adagrad b(
        pair.dense.adapter.parameters(), torch::optim::AdagradOptions(0.01));
    train(pair.sparse, a);
    train(pair.dense, b);
    CHECK(close(pair.sparse.A, pair.dense.A));
    CHECK(close(pair.sparse.B, pair.dense.B));
  }
  SECTION("AdamW has no way for them, and says so") {
    Pair pair(table());
    torch::optim::AdamW a(pair.sparse.adapter.parameters());
    CHECK(
        contains(error_of([&] { train(pair.sparse, a); }), "sparse gradients"));
  }
}

} // namespace test_sparse_embedding
