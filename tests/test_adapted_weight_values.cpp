// What every access to an adapted weight gives: each row of a table is one way
// to look at the weight, or to write to it, and the expectation is what a plain
// tensor with the value W + 2 B A (or, for writes, with the value W) would do.
// The file is also built as a program of its own with the spare dispatch key.

#include "adapted.h"
#include "gradcheck.h"

#include <torch/csrc/autograd/anomaly_mode.h>

#include <sstream>
#include <thread>

namespace test_adapted_weight_values {

using adapted::Access;
using adapted::Adapted;
using adapted::all_close;
using adapted::for_each_row;
using adapted::gradients;
using torch::Tensor;
using torch::indexing::Slice;

namespace {

/// How the base may lie in memory; files map weights at any offset.
const std::vector<Access> layouts = {
    {"contiguous", [](const Tensor& t) { return t.clone(); }},
    {"column-major", [](const Tensor& t) { return t.t().contiguous().t(); }},
    {"inside a larger buffer",
     [](const Tensor& t) {
       auto buffer = torch::zeros({t.numel() + 9}, t.options());
       return buffer.slice(0, 5, 5 + t.numel()).view(t.sizes()).copy_(t);
     }},
};

/// Views of a [6, 4] weight. They share storage with a contiguous base.
const std::vector<Access> views = {
    {"alias", [](const Tensor& w) { return at::alias(w); }},
    {"view as a vector", [](const Tensor& w) { return w.view({24}); }},
    {"view in 3-D",
     [](const Tensor& w) {
       return w.view({2, 3, 4});
     }},
    {"view_as",
     [](const Tensor& w) {
       return w.view_as(torch::empty({6, 4}));
     }},
    {"reshape",
     [](const Tensor& w) {
       return w.reshape({8, 3});
     }},
    {"flatten", [](const Tensor& w) { return w.flatten(); }},
    {"ravel", [](const Tensor& w) { return w.ravel(); }},
    {"unflatten",
     [](const Tensor& w) {
       return w.unflatten(0, {2, 3});
     }},
    {"t", [](const Tensor& w) { return w.t(); }},
    {"t of t", [](const Tensor& w) { return w.t().t(); }},
    {"numpy_T", [](const Tensor& w) { return w.numpy_T(); }},
    {"mT", [](const Tensor& w) { return w.mT(); }},
    {"transpose", [](const Tensor& w) { return w.transpose(0, 1); }},
    {"permute",
     [](const Tensor& w) {
       return w.permute({1, 0});
     }},
    {"swapaxes", [](const Tensor& w) { return w.swapaxes(0, 1); }},
    {"movedim", [](const Tensor& w) { return w.movedim(0, 1); }},
    {"narrow, rows", [](const Tensor& w) { return w.narrow(0, 1, 3); }},
    {"narrow, columns", [](const Tensor& w) { return w.narrow(1, 1, 2); }},
    {"slice, rows", [](const Tensor& w) { return w.slice(0, 2, 5); }},
    {"slice with a step", [](const Tensor& w) { return w.slice(0, 0, 6, 2); }},
    {"slice of columns with a step",
     [](const Tensor& w) { return w.slice(1, 1, 4, 2); }},
    {"index with a slice",
     [](const Tensor& w) {
       return w.index({Slice(1, 3), Slice()});
     }},
    {"select", [](const Tensor& w) { return w.select(0, 2); }},
    {"select of a column", [](const Tensor& w) { return w.select(1, 2); }},
    {"w[i]", [](const Tensor& w) { return w[3]; }},
    {"w[i][j]", [](const Tensor& w) { return w[3][1]; }},
    {"chunk", [](const Tensor& w) { return w.chunk(3)[1]; }},
    {"chunk of columns", [](const Tensor& w) { return w.chunk(2, 1)[1]; }},
    {"split", [](const Tensor& w) { return w.split(2)[2]; }},
    {"split with sizes",
     [](const Tensor& w) {
       return w.split_with_sizes({1, 2, 3})[1];
     }},
    {"tensor_split", [](const Tensor& w) { return w.tensor_split(4)[1]; }},
    {"vsplit", [](const Tensor& w) { return w.vsplit(2)[1]; }},
    {"hsplit", [](const Tensor& w) { return w.hsplit(2)[1]; }},
    {"unbind", [](const Tensor& w) { return w.unbind()[4]; }},
    {"squeeze", [](const Tensor& w) { return w.squeeze(); }},
    {"unsqueeze", [](const Tensor& w) { return w.unsqueeze(1); }},
    {"expand",
     [](const Tensor& w) {
       return w.expand({1, 6, 4});
     }},
    {"expand_as",
     [](const Tensor& w) {
       return w.expand_as(torch::empty({6, 4}));
     }},
    {"broadcast_to",
     [](const Tensor& w) {
       return w.broadcast_to({1, 6, 4});
     }},
    {"as_strided",
     [](const Tensor& w) {
       return w.as_strided({3, 2}, {4, 1});
     }},
    {"as_strided by its own strides",
     [](const Tensor& w) { return w.as_strided(w.sizes(), w.strides()); }},
    {"as_strided with an offset",
     [](const Tensor& w) {
       return w.as_strided({5}, {2}, w.storage_offset() + 3);
     }},
    {"diagonal", [](const Tensor& w) { return w.diagonal(); }},
    {"unfold", [](const Tensor& w) { return w.unfold(0, 2, 2); }},
    {"real", [](const Tensor& w) { return at::real(w); }},
    {"resolve_conj", [](const Tensor& w) { return w.resolve_conj(); }},
    {"contiguous", [](const Tensor& w) { return w.contiguous(); }},
    {"to its own dtype", [](const Tensor& w) { return w.to(w.dtype()); }},
    {"three views deep",
     [](const Tensor& w) { return w.narrow(0, 1, 4).t()[2].slice(0, 1, 3); }},
    {"rows of rows of the transpose",
     [](const Tensor& w) { return w.t().narrow(1, 1, 4).t().narrow(0, 1, 2); }},
    {"columns of the transpose are rows",
     [](const Tensor& w) { return w.t().chunk(3, 1)[2]; }},
    {"as_strided of rows",
     [](const Tensor& w) {
       const auto rows = w.narrow(0, 2, 2);
       return rows.as_strided(rows.sizes(), rows.strides());
     }},
};

/// What may follow a view.
const std::vector<Access> second_views = {
    {"alias", [](const Tensor& v) { return at::alias(v); }},
    {"reversed",
     [](const Tensor& v) {
       std::vector<int64_t> order;
       for (int64_t d = v.dim() - 1; d >= 0; --d) {
         order.push_back(d);
       }
       return v.permute(order);
     }},
    {"narrow, last",
     [](const Tensor& v) {
       return v.dim() == 0 ? v : v.narrow(-1, v.size(-1) - 1, 1);
     }},
    {"unsqueeze", [](const Tensor& v) { return v.unsqueeze(0); }},
    {"first of unbind",
     [](const Tensor& v) { return v.dim() == 0 ? v : v.unbind()[0]; }},
    {"t", [](const Tensor& v) { return v.dim() == 2 ? v.t() : v; }},
};

/// Operators that read a [6, 4] weight.
const Tensor& input(int64_t rows, int64_t columns) {
  static std::vector<Tensor> made;
  for (const auto& t : made) {
    if (t.size(0) == rows && t.size(1) == columns) {
      return t;
    }
  }
  auto generator = at::make_generator<at::CPUGeneratorImpl>(17);
  made.push_back(torch::randn({rows, columns}, generator, torch::kDouble));
  return made.back();
}

const std::vector<Access> reads = {
    {"clone", [](const Tensor& w) { return w.clone(); }},
    {"w * 2", [](const Tensor& w) { return w * 2; }},
    {"w * w", [](const Tensor& w) { return w * w; }},
    {"w + 0", [](const Tensor& w) { return w + 0; }},
    {"1 - w", [](const Tensor& w) { return 1 - w; }},
    {"sum", [](const Tensor& w) { return w.sum(); }},
    {"norm", [](const Tensor& w) { return w.norm(); }},
    {"softmax", [](const Tensor& w) { return w.softmax(-1); }},
    {"flip", [](const Tensor& w) { return w.flip(0); }},
    {"tril", [](const Tensor& w) { return w.tril(); }},
    {"cumsum", [](const Tensor& w) { return w.cumsum(1); }},
    {"roll", [](const Tensor& w) { return w.roll(1, 0); }},
    {"where", [](const Tensor& w) { return at::where(w > 0, w, w * 3); }},
    {"reshape that copies",
     [](const Tensor& w) { return w.t().reshape({24}); }},
    {"contiguous that copies",
     [](const Tensor& w) { return w.t().contiguous(); }},
    {"index_select",
     [](const Tensor& w) {
       return w.index_select(0, torch::tensor({4, 1}));
     }},
    {"index by a tensor",
     [](const Tensor& w) {
       return w.index({torch::tensor({0, 5, 5})});
     }},
    {"gather",
     [](const Tensor& w) {
       return w.gather(1, torch::zeros({6, 2}, torch::kLong));
     }},
    {"masked_select",
     [](const Tensor& w) { return w.masked_select(input(6, 4).gt(0)); }},
    {"take",
     [](const Tensor& w) {
       return w.take(torch::tensor({23, 0}));
     }},
    {"cat",
     [](const Tensor& w) {
       return at::cat({input(6, 4), w, w});
     }},
    {"stack",
     [](const Tensor& w) {
       return at::stack({input(6, 4), w});
     }},
    {"cat of split", [](const Tensor& w) { return at::cat(w.split(4)); }},
    {"copy_ into a plain tensor",
     [](const Tensor& w) {
       return torch::zeros({6, 4}, torch::kDouble).copy_(w);
     }},
    {"linear, 2-D", [](const Tensor& w) { return at::linear(input(3, 4), w); }},
    {"linear, 3-D",
     [](const Tensor& w) {
       return at::linear(input(6, 4).view({2, 3, 4}), w);
     }},
    {"linear, 4-D",
     [](const Tensor& w) {
       return at::linear(input(6, 4).view({2, 1, 3, 4}), w);
     }},
    {"linear, 1-D",
     [](const Tensor& w) { return at::linear(input(3, 4)[1], w); }},
    {"linear with a bias",
     [](const Tensor& w) {
       return at::linear(input(3, 4), w, input(1, 6)[0]);
     }},
    {"linear, no rows",
     [](const Tensor& w) { return at::linear(input(3, 4).slice(0, 0, 0), w); }},
    {"linear of a strided x",
     [](const Tensor& w) { return at::linear(input(4, 5).t(), w); }},
    {"linear, the weight is x too",
     [](const Tensor& w) { return at::linear(w, w); }},
    {"linear, only x is the weight",
     [](const Tensor& w) { return at::linear(w, input(5, 4)); }},
    {"linear, the bias is a row of a weight",
     [](const Tensor& w) {
       return at::linear(input(3, 2), input(4, 2), w[1]);
     }},
    {"linear with rows of the weight",
     [](const Tensor& w) {
       return at::linear(input(3, 4), w.narrow(0, 1, 4));
     }},
    {"linear with columns of the weight",
     [](const Tensor& w) {
       return at::linear(input(3, 2), w.narrow(1, 1, 2));
     }},
    {"linear with every second row",
     [](const Tensor& w) {
       return at::linear(input(3, 4), w.slice(0, 1, 6, 2));
     }},
    {"linear with the transposed weight",
     [](const Tensor& w) { return at::linear(input(3, 6), w.t()); }},
    {"linear with rows of the transposed weight",
     [](const Tensor& w) {
       return at::linear(input(3, 6), w.t().narrow(0, 1, 2));
     }},
    {"linear with columns of the transposed weight",
     [](const Tensor& w) {
       return at::linear(input(3, 4), w.t().narrow(1, 1, 4));
     }},
    {"mm", [](const Tensor& w) { return at::mm(input(3, 6), w); }},
    {"mm with t", [](const Tensor& w) { return at::mm(input(3, 4), w.t()); }},
    {"mm from the left",
     [](const Tensor& w) { return at::mm(w, input(4, 3)); }},
    {"mm with itself", [](const Tensor& w) { return at::mm(w, w.t()); }},
    {"matmul", [](const Tensor& w) { return at::matmul(input(3, 4), w.t()); }},
    {"matmul, 3-D",
     [](const Tensor& w) {
       return at::matmul(input(6, 4).view({2, 3, 4}), w.t());
     }},
    {"matmul, 1-D",
     [](const Tensor& w) { return at::matmul(input(3, 6)[0], w); }},
    {"matmul of w and a vector",
     [](const Tensor& w) { return at::matmul(w, input(3, 4)[0]); }},
    {"matmul of w and 3-D",
     [](const Tensor& w) {
       return at::matmul(w, input(8, 3).view({2, 4, 3}));
     }},
    {"matmul with rows of t",
     [](const Tensor& w) {
       return at::matmul(input(3, 4), w.narrow(0, 2, 2).t());
     }},
    {"mv", [](const Tensor& w) { return w.mv(input(3, 4)[0]); }},
    {"addmm",
     [](const Tensor& w) {
       return at::addmm(input(1, 6)[0], input(3, 4), w.t());
     }},
    {"addmm with a matrix",
     [](const Tensor& w) {
       return at::addmm(input(3, 6), input(3, 4), w.t());
     }},
    {"addmm with beta and alpha",
     [](const Tensor& w) {
       return at::addmm(input(1, 6)[0], input(3, 4), w.t(), 0.5, 3);
     }},
    {"addmm, the weight is added",
     [](const Tensor& w) { return at::addmm(w, input(6, 3), input(3, 4)); }},
    {"addmm_ on a plain tensor",
     [](const Tensor& w) {
       return input(3, 6).clone().addmm_(input(3, 4), w.t());
     }},
    {"einsum",
     [](const Tensor& w) {
       return at::einsum("ij,kj->ik", {input(3, 4), w});
     }},
    {"tensordot",
     [](const Tensor& w) { return at::tensordot(input(3, 4), w, {1}, {1}); }},
    {"bmm of an expanded transpose",
     [](const Tensor& w) {
       return at::bmm(
           input(6, 4).view({2, 3, 4}), w.t().unsqueeze(0).expand({2, 4, 6}));
     }},
    {"embedding",
     [](const Tensor& w) {
       return at::embedding(w, torch::tensor({{0, 5}, {5, 2}}));
     }},
    {"embedding of rows",
     [](const Tensor& w) {
       return at::embedding(w.narrow(0, 2, 3), torch::tensor({0, 2}));
     }},
    {"embedding of the transpose",
     [](const Tensor& w) { return at::embedding(w.t(), torch::tensor({3})); }},
    {"embedding_bag",
     [](const Tensor& w) {
       return std::get<0>(at::embedding_bag(
           w, torch::tensor({0, 5, 2}), torch::tensor({0, 1})));
     }},
    {"conv1d with a view of the weight",
     [](const Tensor& w) {
       return at::conv1d(input(4, 5).view({2, 2, 5}), w.view({6, 2, 2}));
     }},
    {"bilinear with a view of the weight",
     [](const Tensor& w) {
       return at::bilinear(
           input(5, 3), input(5, 4), w.view({2, 3, 4}), std::nullopt);
     }},
    {"cdist", [](const Tensor& w) { return at::cdist(w, input(3, 4)); }},
    {"layer_norm with a row of the weight",
     [](const Tensor& w) { return at::layer_norm(input(3, 4), {4}, w[0]); }},
    {"dropout in evaluation",
     [](const Tensor& w) { return at::dropout(w, 0.5, false); }},
    {"lerp", [](const Tensor& w) { return input(6, 4).lerp(w, 0.3); }},
    {"foreach_mul",
     [](const Tensor& w) {
       return at::_foreach_mul({input(6, 4), w}, 3.0)[1];
     }},
    {"in place on a plain tensor",
     [](const Tensor& w) { return input(6, 4).clone().mul_(w); }},
    {"add_ on a plain tensor",
     [](const Tensor& w) { return input(6, 4).clone().add_(w, 2); }},
    {"index_put_ into a plain tensor",
     [](const Tensor& w) {
       return torch::zeros({6, 4}, torch::kDouble)
           .index_put_({torch::tensor({2})}, w[1]);
     }},
};

/// Writes to a [6, 4] weight. They act on the base.
struct Write {
  std::string name;
  std::function<void(Tensor)> to;
};

const std::vector<Write> writes = {
    {"zero_", [](Tensor w) { w.zero_(); }},
    {"fill_", [](Tensor w) { w.fill_(3); }},
    {"copy_", [](Tensor w) { w.copy_(input(6, 4)); }},
    {"mul_ by a number", [](Tensor w) { w.mul_(0.5); }},
    {"+=", [](Tensor w) { w += input(6, 4); }},
    {"w[i].fill_", [](Tensor w) { w[0].fill_(1); }},
    {"w[i][j] = ", [](Tensor w) { w[2][3] = 9; }},
    {"narrow.zero_", [](Tensor w) { w.narrow(0, 0, 2).zero_(); }},
    {"view(-1).copy_", [](Tensor w) { w.view(-1).copy_(input(1, 24)[0]); }},
    {"t().copy_", [](Tensor w) { w.t().copy_(input(4, 6)); }},
    {"t()[0].zero_", [](Tensor w) { w.t()[0].zero_(); }},
    {"as_strided.zero_", [](Tensor w) { w.as_strided({2}, {1}).zero_(); }},
    {"data().copy_", [](Tensor w) { w.data().copy_(input(6, 4)); }},
    {"detach().mul_", [](Tensor w) { w.detach().mul_(2); }},
    {"variable_data().mul_", [](Tensor w) { w.variable_data().mul_(2); }},
    {"tensor_data().mul_", [](Tensor w) { w.tensor_data().mul_(2); }},
    {"index_put_",
     [](Tensor w) {
       w.index_put_({torch::tensor({1, 3})}, input(1, 4)[0]);
     }},
    {"index_put_ that accumulates",
     [](Tensor w) {
       w.index_put_({torch::tensor({1, 1})}, input(1, 4)[0], true);
     }},
    {"index_fill_",
     [](Tensor w) {
       w.index_fill_(0, torch::tensor({0, 5}), -1);
     }},
    {"index_add_",
     [](Tensor w) {
       w.index_add_(0, torch::tensor({0, 5}), input(2, 4));
     }},
    {"masked_fill_", [](Tensor w) { w.masked_fill_(input(6, 4).gt(0), 4); }},
    {"scatter_",
     [](Tensor w) {
       w.scatter_(0, torch::zeros({1, 4}, torch::kLong), 2);
     }},
    {"fill_diagonal_", [](Tensor w) { w.fill_diagonal_(8); }},
    {"clamp_", [](Tensor w) { w.clamp_(-0.1, 0.1); }},
    {"lerp_", [](Tensor w) { w.lerp_(input(6, 4), 0.25); }},
    {"addcmul_", [](Tensor w) { w.addcmul_(input(6, 4), input(6, 4), 2); }},
    {"addmm_", [](Tensor w) { w.addmm_(input(6, 3), input(3, 4), 0.5, 2); }},
    {"normal_", [](Tensor w) { w.normal_(); }},
    {"orthogonal_", [](Tensor w) { torch::nn::init::orthogonal_(w); }},
    {"kaiming_uniform_",
     [](Tensor w) { torch::nn::init::kaiming_uniform_(w); }},
    {"xavier_normal_ of rows",
     [](Tensor w) { torch::nn::init::xavier_normal_(w.chunk(2)[1]); }},
    {"mul_ by itself", [](Tensor w) { w.mul_(w); }},
    {"add_ of itself", [](Tensor w) { w.add_(w, 2); }},
    {"div_ by a view of itself",
     [](Tensor w) {
       w.div_(w.view({24}).view({6, 4}));
     }},
    {"copy_ of its own rows",
     [](Tensor w) { w.narrow(0, 0, 2).copy_(w.narrow(0, 4, 2)); }},
    {"lerp_ with itself", [](Tensor w) { w.lerp_(w, 0.5); }},
    {"addcmul_ with itself", [](Tensor w) { w.addcmul_(w, w); }},
    {"add_out(w, w, 1)",
     [](Tensor w) { at::add_out(w, w, at::ones({1}, torch::kDouble)); }},
    {"mul_out(w, w, w)", [](Tensor w) { at::mul_out(w, w, w); }},
    {"mm_out(w, x, y)",
     [](Tensor w) { at::mm_out(w, input(6, 3), input(3, 4)); }},
    {"cat_out(w, ...)",
     [](Tensor w) {
       at::cat_out(w, {input(2, 4), input(4, 4)});
     }},
    {"relu_", [](Tensor w) { w.relu_(); }},
    {"_foreach_add_", [](Tensor w) { at::_foreach_add_({w}, 1.0); }},
    {"_foreach_mul_ beside a plain one",
     [](Tensor w) {
       at::_foreach_mul_({torch::ones({2}, torch::kDouble), w}, 3.0);
     }},
    {"_foreach_copy_",
     [](Tensor w) { at::_foreach_copy_({w}, {input(6, 4)}); }},
    {"_foreach_zero_", [](Tensor w) { at::_foreach_zero_({w}); }},
    {"_foreach_add_ of itself",
     [](Tensor w) {
       at::_foreach_add_(std::vector<Tensor>{w}, std::vector<Tensor>{w}, 2.0);
     }},
    {"_foreach_lerp_ towards a copy",
     [](Tensor w) { at::_foreach_lerp_({w}, {input(6, 4)}, 0.1); }},
    {"_fused_sgd_",
     [](Tensor w) {
       at::_fused_sgd_(
           {w}, {input(6, 4)}, {}, 0.0, 0.0, 0.1, 0.0, false, false, true);
     }},
    {"vector_to_parameters",
     [](Tensor w) {
       torch::nn::utils::vector_to_parameters(input(1, 24)[0], {w});
     }},
};

} // namespace

TEST_CASE("a view of an adapted weight is a view of its base") {
  for (const auto& layout : layouts) {
    seed(1);
    Adapted a(torch::kDouble, layout.of);
    const Tensor E = Adapted::same_layout(a.W).copy_(a.value().detach());
    Tensor reference = Adapted::same_layout(a.W);
    for_each_row(views, [&](const Access& view) {
      INFO("base " << layout.name);
      Tensor expected;
      if (error_of([&] { expected = view.of(a.W); }) != "") {
        return; // a view that this layout does not have
      }
      const bool shares = expected.is_alias_of(a.W);
      expected = view.of(E);
      const Tensor v = view.of(a.w());
      CHECK(v.sizes() == expected.sizes());
      CHECK(v.is_alias_of(a.w()) == shares);
      CHECK(close(v + 0, expected));
      CHECK(all_close(
          gradients(v, a.factors()),
          gradients(view.of(a.value()), a.factors())));
      if (shares) {
        torch::NoGradGuard no_grad;
        view.of(a.w()).mul_(-3);
        view.of(reference).mul_(-3);
        CHECK(equal_bits(peft::base(a.w()), reference));
        CHECK(close(v + 0, view.of(reference + (E - a.W))));
        peft::base(a.w()).copy_(a.W);
        reference.copy_(a.W);
      }
      CHECK(peft::is_adapted(a.w()));
    });
  }
}

TEST_CASE("views of views of an adapted weight") {
  for (const auto& layout : layouts) {
    seed(2);
    Adapted a(torch::kDouble, layout.of);
    const Tensor E = Adapted::same_layout(a.W).copy_(a.value().detach());
    Tensor reference = Adapted::same_layout(a.W);
    for_each_row(views, [&](const Access& first) {
      for_each_row(second_views, [&](const Access& second) {
        INFO("base " << layout.name);
        auto both = [&](const Tensor& w) { return second.of(first.of(w)); };
        Tensor there;
        if (error_of([&] { there = both(a.W); }) != "") {
          return;
        }
        const Tensor v = both(a.w());
        CHECK(close(v + 0, both(E)));
        CHECK(v.is_alias_of(a.w()) == there.is_alias_of(a.W));
        if (there.is_alias_of(a.W)) {
          torch::NoGradGuard no_grad;
          both(a.w()).fill_(7);
          both(reference).fill_(7);
          CHECK(equal_bits(peft::base(a.w()), reference));
          peft::base(a.w()).copy_(a.W);
          reference.copy_(a.W);
        }
      });
    });
  }
}

TEST_CASE("a read of an adapted weight gives W + s B A, with gradients") {
  for (const auto& layout : layouts) {
    seed(3);
    Adapted a(torch::kDouble, layout.of);
    for_each_row(reads, [&](const Access& read) {
      INFO("base " << layout.name);
      const Tensor y = read.of(a.w());
      const Tensor expected = read.of(a.value());
      CHECK(close(y, expected));
      CHECK((!peft::is_adapted(y) || y.is_alias_of(a.w())));
      CHECK(all_close(
          gradients(y, a.factors()), gradients(expected, a.factors())));
      {
        torch::NoGradGuard no_grad;
        CHECK(close(read.of(a.w()), expected));
      }
      {
        c10::InferenceMode inference;
        CHECK(close(read.of(a.w()), expected));
      }
    });
  }
}

TEST_CASE("a disabled adapter leaves the bits of the base") {
  seed(4);
  Adapted a;
  a.adapter.disable();
  for_each_row(views, [&](const Access& view) {
    CHECK(equal_bits(view.of(a.w()).clone(), view.of(a.W).clone()));
  });
  for_each_row(reads, [&](const Access& read) {
    CHECK(equal_bits(read.of(a.w()), read.of(a.W)));
    CHECK(!read.of(a.w()).requires_grad());
  });
  const peft::ActiveAdapters chosen({"default"});
  CHECK(close(a.w() + 0, a.value()));
}

TEST_CASE("reads of a merged weight give the merged base, once") {
  seed(5);
  Adapted a;
  const Tensor E = a.value().detach();
  std::vector<Tensor> held;
  for (const auto& view : views) {
    held.push_back(view.of(a.w()));
  }
  a.adapter.merge();
  CHECK(close(peft::base(a.w()), E));
  auto check_all = [&] {
    torch::NoGradGuard no_grad;
    for_each_row(reads, [&](const Access& read) {
      CHECK(close(read.of(a.w()), read.of(E)));
    });
    for (size_t i = 0; i < views.size(); ++i) {
      INFO("held since before: " << views[i].name);
      const auto error =
          error_of([&] { CHECK(close(held[i] + 0, views[i].of(E))); });
      CHECK(error == "");
    }
  };
  check_all();
  a.adapter.unmerge();
  CHECK(equal_bits(peft::base(a.w()), a.W));
  check_all();
  peft::merge(*a.linear);
  check_all();
  for (size_t i = 0; i < views.size(); ++i) {
    INFO("held since before, written to: " << views[i].name);
    torch::NoGradGuard no_grad;
    Tensor expected = a.w().clone();
    views[i].of(expected).mul_(2);
    held[i].mul_(2);
    CHECK(equal_bits(a.w(), expected));
  }
}

TEST_CASE("a write to an adapted weight lands on the base") {
  torch::NoGradGuard no_grad;
  for_each_row(writes, [&](const Write& write) {
    seed(6);
    Adapted a;
    const Tensor A = a.A.clone(), B = a.B.clone();
    const Tensor change = a.value() - a.W;
    Tensor expected = a.W.clone();
    const auto version = a.w()._version(), plain_version = expected._version();
    seed(7);
    write.to(expected);
    seed(7);
    write.to(a.w());
    CHECK(equal_bits(peft::base(a.w()), expected));
    CHECK(peft::is_adapted(a.w()));
    CHECK(close(a.w() + 0, expected + change));
    CHECK(close(
        a.linear(input(3, 4)),
        at::linear(input(3, 4), expected + change, a.b)));
    CHECK(equal_bits(a.A, A));
    CHECK(equal_bits(a.B, B));
    // A change that autograd would notice on a plain tensor is noticed here.
    CHECK(
        (a.w()._version() > version) == (expected._version() > plain_version));
  });
}

TEST_CASE("writes between adapted weights") {
  torch::NoGradGuard no_grad;
  seed(8);
  Adapted a, other;
  SECTION("copy_ of another adapted weight takes its value") {
    a.w().copy_(other.w());
    CHECK(close(peft::base(a.w()), other.value()));
    CHECK(equal_bits(peft::base(other.w()), other.W));
    CHECK(close(a.w() + 0, other.value() + (a.value() - a.W)));
  }
  SECTION("add_ of another adapted weight adds its value") {
    a.w().add_(other.w(), 2);
    CHECK(close(peft::base(a.w()), a.W + 2 * other.value()));
  }
  SECTION("out= is another adapted weight") {
    const Tensor out = other.w();
    at::mul_out(
        const_cast<Tensor&>(out), a.w(), at::full({1}, 2., torch::kDouble));
    CHECK(close(peft::base(other.w()), 2 * a.value()));
    CHECK(equal_bits(peft::base(a.w()), a.W));
    CHECK(peft::is_adapted(other.w()));
  }
  SECTION(
      "a list in which both stand: a read that is also written is the base") {
    at::_foreach_copy_({a.w(), other.w()}, {other.w(), input(6, 4)});
    CHECK(equal_bits(peft::base(a.w()), other.W));
    CHECK(equal_bits(peft::base(other.w()), input(6, 4)));
  }
  SECTION("a plain out= gets the value and no tag") {
    Tensor out = torch::empty({3, 6}, torch::kDouble);
    at::mm_out(out, input(3, 4), a.w().t());
    CHECK(close(out, at::mm(input(3, 4), a.value().t())));
    CHECK(!peft::is_adapted(out));
  }
}

TEST_CASE(
    "data, variable_data and tensor_data show the value and reach the base") {
  seed(9);
  Adapted a;
  const std::vector<Access> aliases = {
      {"data", [](const Tensor& w) { return w.data(); }},
      {"variable_data", [](const Tensor& w) { return w.variable_data(); }},
      {"tensor_data", [](const Tensor& w) { return w.tensor_data(); }},
  };
  for_each_row(aliases, [&](const Access& alias) {
    const Tensor d = alias.of(a.w());
    CHECK(d.is_alias_of(a.w()));
    CHECK(!d.requires_grad());
    CHECK(close(d + 0, a.value()));
    CHECK(
        close(at::linear(input(3, 4), d), at::linear(input(3, 4), a.value())));
  });
}

TEST_CASE("detach() shows the value and sends no gradient") {
  seed(10);
  Adapted a;
  const Tensor d = a.w().detach();
  CHECK(d.is_alias_of(a.w()));
  for_each_row(reads, [&](const Access& read) {
    const Tensor y = read.of(d);
    CHECK(!y.requires_grad());
    CHECK(close(y, read.of(a.value())));
  });
  for_each_row(views, [&](const Access& view) {
    CHECK(!(view.of(d) + 0).requires_grad());
    CHECK(!(view.of(a.w()).detach() + 0).requires_grad());
    CHECK(close(view.of(d) + 0, view.of(a.value())));
  });
  CHECK((a.w() + 0).requires_grad());
  CHECK(!a.w().requires_grad());
}

TEST_CASE("a to() that changes nothing returns the same tensor") {
  Adapted a;
  const Tensor& w = a.w();
  CHECK(w.to(torch::kDouble).is_same(w));
  CHECK(w.to(torch::kCPU).is_same(w));
  CHECK(w.to(torch::kCPU, torch::kDouble).is_same(w));
  CHECK(w.to(torch::zeros({1}, torch::kDouble)).is_same(w));
  CHECK(w.cpu().is_same(w));
  CHECK(w.contiguous().is_same(w));
}

TEST_CASE("a type_as() that changes nothing still reaches the base") {
  torch::NoGradGuard no_grad;
  Adapted a;
  const Tensor same = a.w().type_as(torch::zeros({1}, torch::kDouble));
  CHECK(close(same + 0, a.value()));
  same.zero_();
  CHECK(equal_bits(peft::base(a.w()), torch::zeros({6, 4}, torch::kDouble)));
}

TEST_CASE("to() another dtype keeps the adapter") {
  seed(11);
  Adapted a(torch::kFloat);
  // The change is made in the wider of the two types and rounded once.
  auto value = [&](torch::ScalarType dtype) {
    const auto wide = c10::promoteTypes(dtype, torch::kFloat);
    return a.W.to(dtype).to(wide) + 2 * at::mm(a.B.to(wide), a.A.to(wide));
  };
  for (const auto dtype : {torch::kDouble, torch::kBFloat16, torch::kHalf}) {
    const Tensor moved = a.w().to(dtype);
    CHECK(moved.scalar_type() == dtype);
    CHECK(close(moved + 0, value(dtype).to(dtype)));
    const auto x = input(3, 4).to(dtype);
    const Tensor y = at::linear(x, moved);
    CHECK(y.scalar_type() == dtype);
    CHECK(y.requires_grad());
    // Fast paths compute their term in the adapter's float32.
    const Tensor exact =
        at::linear(x.to(torch::kDouble), value(dtype).to(torch::kDouble));
    CHECK(close(
        y.to(torch::kFloat),
        exact.to(dtype).to(torch::kFloat),
        tolerance(dtype == torch::kDouble ? torch::kFloat : dtype).rtol,
        tolerance(dtype == torch::kDouble ? torch::kFloat : dtype).atol));
  }
  SECTION("Module::to there and back") {
    a.linear->to(torch::kDouble);
    CHECK(a.w().scalar_type() == torch::kDouble);
    CHECK(close(
        a.linear(input(3, 4)),
        at::linear(
            input(3, 4), a.value().to(torch::kDouble), a.b.to(torch::kDouble)),
        1e-6,
        1e-6));
    a.linear->to(torch::kFloat);
    CHECK(equal_bits(peft::base(a.w()), a.W));
    const auto x = input(3, 4).to(torch::kFloat);
    CHECK(close(a.linear(x), at::linear(x, a.value(), a.b)));
    CHECK(a.A.scalar_type() == torch::kFloat);
  }
  SECTION("a moved copy of a weight stays right over a merge") {
    const Tensor copy = a.w().to(torch::kDouble);
    a.adapter.merge();
    CHECK(close(copy + 0, a.value().to(torch::kDouble), 1e-6, 1e-6));
    CHECK(close(a.w() + 0, a.value()));
  }
}

TEST_CASE("to() of a weight with a merged and an acting adapter") {
  seed(12);
  Adapted a(torch::kFloat);
  auto second = peft::attach(*a.linear, adapted::acting(), "second");
  a.adapter.merge();
  const auto& other = adapted::lora(second);
  const auto both = [&] {
    return (a.value() + 2 * at::mm(other.lora_B, other.lora_A)).detach();
  };
  const Tensor x = input(3, 4);
  const auto expected = [&] {
    return at::linear(x, both().to(torch::kDouble));
  };
  CHECK(close(at::linear(x.to(torch::kFloat), a.w()), expected(), 1e-5, 1e-5));

  const Tensor copy = a.w().to(torch::kDouble);
  const Tensor turned = a.w().t().to(torch::kDouble);
  const auto check_copies = [&] {
    torch::NoGradGuard no_grad;
    CHECK(close(copy + 0, both().to(torch::kDouble), 1e-6, 1e-6));
    CHECK(close(turned + 0, both().t().to(torch::kDouble), 1e-6, 1e-6));
    CHECK(close(at::linear(x, copy), expected(), 1e-6, 1e-6));
    CHECK(close(at::matmul(x, turned), expected(), 1e-6, 1e-6));
  };
  check_copies();

  SECTION("the copy stays right over an unmerge") {
    a.adapter.unmerge();
    check_copies();
    CHECK(equal_bits(peft::base(a.w()), a.W));
  }
  SECTION("Module::to there and back") {
    const Tensor merged = peft::base(a.w()).clone();
    a.linear->to(torch::kDouble);
    CHECK(equal_bits(peft::base(a.w()), merged.to(torch::kDouble)));
    {
      torch::NoGradGuard no_grad;
      CHECK(
          close(a.linear(x), expected() + a.b.to(torch::kDouble), 1e-6, 1e-6));
    }
    a.linear->to(torch::kFloat);
    CHECK(equal_bits(peft::base(a.w()), merged));
    a.adapter.unmerge();
    CHECK(equal_bits(peft::base(a.w()), a.W));
  }
}

TEST_CASE("a bit view reads the value too") {
  seed(12);
  Adapted a;
  CHECK(equal_bits(
      a.w().view(torch::kLong).clone(),
      peft::effective(a.w()).detach().view(torch::kLong)));
}

TEST_CASE("shapes and types need no value") {
  Adapted a;
  const Tensor& w = a.w();
  CHECK(w.sizes() == at::IntArrayRef({6, 4}));
  CHECK(w.numel() == 24);
  CHECK(w.nbytes() == 192);
  CHECK(w.is_contiguous());
  CHECK(!w.requires_grad());
  for (const Tensor& like :
       {at::zeros_like(w),
        at::ones_like(w),
        at::empty_like(w),
        at::randn_like(w),
        w.new_zeros({2}),
        w.new_ones({2}),
        torch::zeros({2}, w.options())}) {
    CHECK(!peft::is_adapted(like));
    CHECK(like.scalar_type() == torch::kDouble);
  }
  const auto calls = adapted::watch(a.adapter);
  (void)at::zeros_like(w);
  (void)w.view({24});
  (void)w.narrow(0, 1, 3).t();
  (void)w.to(torch::kFloat);
  CHECK(calls->effective == 0);
}

TEST_CASE("printing reads raw storage: print effective() for the value") {
  seed(13);
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    Adapted a(dtype);
    auto text = [](const Tensor& t) {
      std::ostringstream stream;
      stream << t;
      return stream.str();
    };
    CHECK(text(a.w()) == text(a.W));
    CHECK(text(peft::effective(a.w()).detach()) == text((a.w() + 0).detach()));
  }
}

TEST_CASE("raw storage shows the base; effective() serves its readers") {
  seed(14);
  Adapted a;
  CHECK(a.w().accessor<double, 2>()[1][2] == a.W[1][2].item<double>());
  CHECK(a.w().data_ptr<double>()[6] == a.W[1][2].item<double>());
  CHECK(a.w()[1][2].item<double>() == (a.w() + 0)[1][2].item<double>());
  const Tensor value = peft::effective(a.w());
  CHECK(!peft::is_adapted(value));
  CHECK(close(value, a.value()));
  CHECK(value.requires_grad());
  CHECK(value.data_ptr<double>()[6] == a.w()[1][2].item<double>());
  CHECK(equal_bits(peft::base(a.w()), a.W));
  CHECK(peft::base(a.w()).data_ptr() == a.w().data_ptr());
  CHECK(!peft::is_adapted(peft::base(a.w())));
  const Tensor plain = torch::ones({2});
  CHECK(peft::effective(plain).is_same(plain));
  CHECK(peft::base(plain).is_same(plain));
}

TEST_CASE("saving a tensor writes the base, saving effective() the value") {
  seed(15);
  Adapted a;
  auto there_and_back = [](const Tensor& t) {
    std::stringstream stream;
    torch::save(t, stream);
    Tensor result;
    torch::load(result, stream);
    return result;
  };
  CHECK(equal_bits(there_and_back(a.w()), a.W));
  CHECK(close(there_and_back(peft::effective(a.w()).detach()), a.value()));
  CHECK(equal_bits(
      torch::pickle_load(torch::pickle_save(a.w())).toTensor(), a.W));
}

TEST_CASE("parameters_to_vector reads values, base() reads the base") {
  seed(16);
  Adapted a;
  const auto all = torch::nn::utils::parameters_to_vector({a.w()});
  CHECK(close(all, a.value().flatten()));
  CHECK(all.requires_grad());
  CHECK(equal_bits(
      torch::nn::utils::parameters_to_vector({peft::base(a.w())}),
      a.W.flatten()));
}

// ~~~~ Autograd ~~~~

TEST_CASE("first and second derivatives through an adapted linear layer") {
  seed(20);
  Adapted a;
  const bool with_x = GENERATE(false, true);
  const int dims = GENERATE(2, 3);
  auto x =
      (dims == 2 ? input(3, 4).clone() : input(6, 4).clone().view({2, 3, 4}))
          .set_requires_grad(with_x);
  std::vector<Tensor> leaves = a.factors();
  if (with_x) {
    leaves.push_back(x);
  }
  auto second = [&](const std::function<Tensor()>& run) {
    const auto first = gradients(run().tanh(), leaves, /*create_graph=*/true);
    Tensor sum = torch::zeros({}, torch::kDouble);
    for (const auto& g : first) {
      sum = sum + g.pow(2).sum();
    }
    auto result = torch::autograd::grad({sum}, leaves, {}, {}, false, true);
    result.insert(result.end(), first.begin(), first.end());
    return result;
  };
  CHECK(all_close(second([&] { return a.linear(x); }), second([&] {
                    return at::linear(x, a.value(), a.b);
                  })));
}

TEST_CASE("backward twice over one graph") {
  seed(21);
  Adapted a;
  const Tensor y = a.linear(input(3, 4)).sum();
  y.backward({}, /*retain_graph=*/true);
  const Tensor once = a.A.grad().clone();
  y.backward();
  CHECK(close(a.A.grad(), 2 * once));
  CHECK(error_of([&] { y.backward(); }) != ""); // freed
}

TEST_CASE("backward on another thread") {
  seed(22);
  Adapted a;
  const Tensor y = a.linear(input(3, 4));
  std::thread([&] { y.sum().backward(); }).join();
  CHECK(close(
      a.A.grad(),
      torch::autograd::grad(
          {at::linear(input(3, 4), a.value(), a.b).sum()}, {a.A})[0]));
}

TEST_CASE("anomaly mode") {
  Adapted a;
  torch::autograd::AnomalyMode::set_enabled(true);
  const auto error = error_of([&] { a.linear(input(3, 4)).sum().backward(); });
  torch::autograd::AnomalyMode::set_enabled(false);
  CHECK(error == "");
  CHECK(a.B.grad().defined());
}

namespace {

/// A checkpoint as users write it: runs without a graph, and again in backward.
struct Checkpoint : torch::autograd::Function<Checkpoint> {
  static inline std::function<Tensor(Tensor)> segment;

  static Tensor
  forward(torch::autograd::AutogradContext* ctx, Tensor x, Tensor /*anchor*/) {
    ctx->save_for_backward({x});
    return segment(x);
  }
  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx,
      torch::autograd::variable_list grads) {
    auto x = ctx->get_saved_variables()[0].detach().set_requires_grad(true);
    torch::AutoGradMode on(true);
    torch::autograd::backward({segment(x)}, {grads[0]});
    return {x.grad(), Tensor()};
  }
};

} // namespace

TEST_CASE("activation checkpointing") {
  seed(23);
  Adapted a;
  auto x = input(3, 4).clone().set_requires_grad(true);
  Checkpoint::segment = [&](Tensor t) { return a.linear(t).tanh(); };
  Checkpoint::apply(x, torch::ones({1}, torch::requires_grad()))
      .sum()
      .backward();
  const auto expected = torch::autograd::grad(
      {at::linear(x, a.value(), a.b).tanh().sum()}, {a.A, a.B, x});
  CHECK(all_close({a.A.grad(), a.B.grad(), x.grad()}, expected));
  Checkpoint::segment = nullptr;
}

TEST_CASE("in place on the outputs of an adapted layer") {
  seed(24);
  Adapted a;
  const int dims = GENERATE(2, 3);
  auto x =
      (dims == 2 ? input(3, 4).clone() : input(6, 4).clone().view({2, 3, 4}))
          .set_requires_grad(true);
  struct Change {
    std::string name;
    std::function<void(Tensor)> to;
  };
  const std::vector<Change> changes = {
      {"+=", [](Tensor y) { y += 1; }},
      {"relu_", [](Tensor y) { y.relu_(); }},
      {"y[0].zero_", [](Tensor y) { y[0].zero_(); }},
      {"view then in place", [](Tensor y) { y.view({-1}).mul_(2); }},
  };
  std::vector<Tensor> leaves = {a.A, a.B, x};
  for_each_row(changes, [&](const Change& change) {
    const Tensor y = a.linear(x);
    const Tensor expected = at::linear(x, a.value(), a.b);
    CHECK(!y.is_view());
    change.to(y);
    change.to(expected);
    CHECK(close(y, expected));
    CHECK(all_close(gradients(y, leaves), gradients(expected, leaves)));
  });
}

TEST_CASE("a weight changed in place before backward is noticed") {
  seed(25);
  Adapted a;
  struct Change {
    std::string name;
    Tensor tensor;
  };
  const std::vector<Change> changes = {
      {"the base", a.w()}, {"A", a.A}, {"B", a.B}};
  for_each_row(changes, [&](const Change& change) {
    auto x = input(3, 4).clone().set_requires_grad(true);
    const Tensor y = a.linear(x).sum();
    {
      torch::NoGradGuard no_grad;
      Tensor(change.tensor).mul_(1);
    }
    CHECK(contains(error_of([&] { y.backward(); }), "modified by an inplace"));
  });
}

TEST_CASE("the gradient of x alone, and of frozen adapters") {
  seed(26);
  Adapted a;
  a.adapter.set_trainable(false);
  auto x = input(3, 4).clone().set_requires_grad(true);
  const Tensor y = a.linear(x);
  CHECK(close(
      gradients(y, {x})[0],
      gradients(at::linear(x, a.value().detach(), a.b), {x})[0]));
  CHECK(!a.linear(input(3, 4)).requires_grad());
}

// ~~~~ Autocast and inference ~~~~

TEST_CASE("autocast: dtype and value of every product") {
  seed(30);
  Adapted a(torch::kFloat);
  const std::vector<Access> products = {
      {"linear, 2-D",
       [](const Tensor& w) {
         return at::linear(input(3, 4).to(torch::kFloat), w);
       }},
      {"linear, 3-D",
       [](const Tensor& w) {
         return at::linear(input(6, 4).to(torch::kFloat).view({2, 3, 4}), w);
       }},
      {"mm",
       [](const Tensor& w) {
         return at::mm(input(3, 4).to(torch::kFloat), w.t());
       }},
      {"matmul",
       [](const Tensor& w) {
         return at::matmul(input(3, 4).to(torch::kFloat), w.t());
       }},
      {"addmm",
       [](const Tensor& w) {
         return at::addmm(
             torch::ones({6}), input(3, 4).to(torch::kFloat), w.t());
       }},
      {"einsum",
       [](const Tensor& w) {
         return at::einsum("ij,kj->ik", {input(3, 4).to(torch::kFloat), w});
       }},
      {"rows",
       [](const Tensor& w) {
         return at::linear(input(3, 4).to(torch::kFloat), w.narrow(0, 1, 2));
       }},
  };
  for_each_row(products, [&](const Access& product) {
    Tensor y, expected_type;
    {
      adapted::Autocast autocast;
      y = product.of(a.w());
      expected_type = product.of(a.W);
    }
    CHECK(y.scalar_type() == expected_type.scalar_type());
    const Tensor exact = product.of(a.value());
    CHECK(close(y.to(torch::kBFloat16), exact.to(torch::kBFloat16)));
    const auto found = gradients(y.to(torch::kFloat), a.factors());
    const auto wanted = gradients(exact, a.factors());
    for (size_t i = 0; i < 2; ++i) {
      REQUIRE(found[i].defined());
      CHECK(found[i].scalar_type() == torch::kFloat);
      const double error =
          ((found[i] - wanted[i]).norm() / wanted[i].norm()).item<double>();
      CHECK(error < 0.015); // four roundings to 8 bits
    }
  });
}

TEST_CASE("autocast: the layer itself, and reads that autocast leaves alone") {
  seed(31);
  Adapted a(torch::kFloat);
  const auto x = input(3, 4).to(torch::kFloat);
  adapted::Autocast autocast;
  CHECK(a.linear(x).scalar_type() == torch::kBFloat16);
  CHECK(
      a.linear(x.view({1, 3, 4})).scalar_type() ==
      torch::nn::functional::linear(x.view({1, 3, 4}), a.W, a.b).scalar_type());
  CHECK(close(a.w() + 0, a.value().detach(), 1e-2, 1e-2));
  CHECK((a.w() + 0).scalar_type() == torch::kFloat);
  torch::NoGradGuard no_grad;
  CHECK(a.linear(x).scalar_type() == torch::kBFloat16);
}

TEST_CASE("autocast: an adapter without gradients changes inside the region") {
  seed(32);
  Adapted a(torch::kFloat);
  const auto x = input(3, 4).to(torch::kFloat);
  a.adapter.set_trainable(false); // autocast caches what trains, as it does
  torch::NoGradGuard no_grad; // for any parameter
  adapted::Autocast autocast;
  const Tensor before = a.linear(x);
  a.B.mul_(4);
  CHECK(!equal_bits(a.linear(x), before));
}

TEST_CASE("views made in inference mode serve outside of it") {
  seed(33);
  Adapted a;
  Tensor transposed, rows;
  {
    c10::InferenceMode inference;
    transposed = a.w().t();
    rows = a.w().narrow(0, 1, 3);
  }
  const Tensor y = at::matmul(input(3, 4), transposed);
  CHECK(close(y, at::matmul(input(3, 4), a.value().t())));
  CHECK(all_close(
      gradients(y, a.factors()),
      gradients(at::matmul(input(3, 4), a.value().t()), a.factors())));
  CHECK(close(
      at::linear(input(3, 4), rows),
      at::linear(input(3, 4), a.value().narrow(0, 1, 3))));
}

TEST_CASE("no value is built where a fast path serves") {
  seed(34);
  Adapted a;
  const auto calls = adapted::watch(a.adapter);
  const std::vector<Access> fast = {
      {"layer, 2-D", [&](const Tensor&) { return a.linear(input(3, 4)); }},
      {"layer, 3-D",
       [&](const Tensor&) {
         return a.linear(input(10, 4).view({2, 5, 4}));
       }},
      {"linear", [](const Tensor& w) { return at::linear(input(3, 4), w); }},
      {"mm", [](const Tensor& w) { return at::mm(input(3, 4), w.t()); }},
      {"mm without t", [](const Tensor& w) { return at::mm(input(3, 6), w); }},
      {"matmul",
       [](const Tensor& w) { return at::matmul(input(3, 4), w.mT()); }},
      {"addmm",
       [](const Tensor& w) {
         return at::addmm(input(1, 6)[0], input(3, 4), w.numpy_T());
       }},
      {"rows",
       [](const Tensor& w) {
         return at::linear(input(3, 4), w.narrow(0, 1, 4));
       }},
      {"chunk",
       [](const Tensor& w) { return at::linear(input(3, 4), w.chunk(3)[1]); }},
      {"columns of t",
       [](const Tensor& w) {
         return at::mm(input(3, 4), w.t().narrow(1, 2, 3));
       }},
  };
  for_each_row(fast, [&](const Access& product) {
    const int before = calls->linear;
    gradients(product.of(a.w()), a.factors());
    torch::NoGradGuard no_grad;
    (void)product.of(a.w());
    CHECK(calls->effective == 0);
    CHECK(calls->linear == before + 2);
  });
  (void)(a.w() + 0);
  CHECK(calls->effective == 1);
}

// ~~~~ Trained copies ~~~~

TEST_CASE("a vector with a trained copy reads as the copy") {
  seed(40);
  torch::nn::Linear linear(4, 6);
  linear->to(torch::kDouble);
  const Tensor b = linear->bias.detach().clone();
  auto adapter = peft::attach(*linear, adapted::acting().bias("lora_only"));
  Tensor copy;
  for (const auto& record : adapter.shared_state()->sites) {
    if (record.delta->replaces_base()) {
      copy = record.delta->parameters().front();
    }
  }
  REQUIRE(copy.defined());
  CHECK(equal_bits(copy.detach(), b));
  {
    torch::NoGradGuard no_grad;
    copy.add_(1);
  }
  const std::vector<Access> vector_reads = {
      {"clone", [](const Tensor& v) { return v.clone(); }},
      {"view",
       [](const Tensor& v) {
         return v.view({2, 3});
       }},
      {"slice", [](const Tensor& v) { return v.slice(0, 1, 4); }},
      {"x + bias", [](const Tensor& v) { return input(3, 6) + v; }},
      {"x += bias", [](const Tensor& v) { return input(3, 6).clone() += v; }},
      {"linear",
       [](const Tensor& v) { return at::linear(input(3, 4), input(6, 4), v); }},
      {"addmm",
       [](const Tensor& v) { return at::addmm(v, input(3, 4), input(4, 6)); }},
      {"layer_norm",
       [](const Tensor& v) { return at::layer_norm(input(3, 6), {6}, v, v); }},
      {"batch_norm",
       [](const Tensor& v) {
         return at::batch_norm(
             input(3, 6), v, v, {}, {}, true, 0.1, 1e-5, false);
       }},
      {"conv1d",
       [](const Tensor& v) {
         return at::conv1d(
             input(4, 5).view({2, 2, 5}), input(6, 4).view({6, 2, 2}), v);
       }},
  };
  for_each_row(vector_reads, [&](const Access& read) {
    const Tensor y = read.of(linear->bias);
    CHECK(close(y + 0, read.of(copy)));
    CHECK(close(gradients(y, {copy})[0], gradients(read.of(copy), {copy})[0]));
  });
  adapter.disable();
  for_each_row(vector_reads, [&](const Access& read) {
    CHECK(equal_bits(read.of(linear->bias).clone(), read.of(b).clone()));
  });
}

// ~~~~ The free function against finite differences ~~~~

TEST_CASE(
    "lora_linear agrees with finite differences, first and second order") {
  const int shape = GENERATE(0, 1, 2, 3);
  const bool has_bias = GENERATE(true, false);
  seed(50);
  const auto f64 = torch::kDouble;
  Tensor x;
  if (shape == 0) {
    x = torch::randn({2, 3}, f64);
  } else if (shape == 1) {
    x = torch::randn({2, 2, 3}, f64);
  } else if (shape == 2) { // not contiguous
    x = torch::randn({3, 2}, f64).t();
  } else {
    x = torch::randn({0, 3}, f64);
  }
  const Tensor W = torch::randn({4, 3}, f64), A = torch::randn({2, 3}, f64),
               B = torch::randn({4, 2}, f64), b = torch::randn({4}, f64);
  auto sizes = x.sizes().vec();
  sizes.back() = 4;
  const Tensor expanded = torch::randn({4}, f64).expand(sizes); // as of sum()
  const auto f = [&](const gradcheck::Tensors& in) {
    return peft::functional::lora_linear(
        in[0],
        in[1],
        has_bias ? std::optional<Tensor>(in[2]) : std::nullopt,
        in[3],
        in[4],
        0.7);
  };
  for (int subset = 1; subset < 32; ++subset) {
    if (!has_bias && (subset & 4)) {
      continue;
    }
    gradcheck::Tensors inputs = {x, W, b, A, B};
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Tensor& t = inputs[i];
      inputs[i] = at::empty_strided(t.sizes(), t.strides(), t.options())
                      .copy_(t)
                      .set_requires_grad((subset >> i) & 1);
    }
    INFO("inputs that require grad: " << subset);
    CHECK(close(
        f(inputs),
        at::linear(
            x,
            W + 0.7 * at::mm(B, A),
            has_bias ? std::optional<Tensor>(b) : std::nullopt)));
    CHECK(gradcheck::first_order(f, inputs, expanded));
    CHECK(gradcheck::first_order(f, inputs, torch::randn(sizes, f64)));
    CHECK(gradcheck::second_order(f, inputs, expanded));
  }
}

} // namespace test_adapted_weight_values
