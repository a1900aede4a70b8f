/// Cartridges: they hold what a cache holds, their first tokens stay, and they
/// are put together.

#include "gradcheck.h"
#include "model_state.h"
#include "own_decoder.h"
#include "test.h"

#include <peft/io/optimizer_state.h>
#include <peft/io/pretrained.h>
#include <peft/methods/cartridge.h>
#include <peft/models/t5.h>

#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace test_cartridge {

namespace {

using peft::CartridgeOptions;
using peft::KeyValues;
using torch::Tensor;

/// Columns of a table for own::Decoder.
constexpr int64_t kColumns = own::kLayers * 2 * own::kKeyHeads * own::kHeadDim;

own::Decoder decoder(torch::ScalarType dtype = torch::kDouble) {
  seed(1);
  own::Decoder model;
  model->to(dtype);
  model->eval();
  return model;
}

const peft::detail::CartridgeDelta& delta_of(const peft::Adapter& adapter) {
  return dynamic_cast<const peft::detail::CartridgeDelta&>(
      *adapter.shared_state()->sites.front().delta);
}

/// The table, frozen rows first.
Tensor table_of(const peft::Adapter& adapter) {
  return delta_of(adapter).table().detach().clone();
}

} // namespace

TEST_CASE("a cartridge is a prefix, of which the first tokens are frozen") {
  auto model = decoder();
  const Tensor ids = own::ids(3, 5);
  const Tensor before = model->forward(ids);
  const auto plain = state_of(*model);

  seed(3);
  auto adapter = peft::attach(*model, CartridgeOptions(4).num_frozen_tokens(2));
  CHECK(adapter.method() == "CARTRIDGE");
  CHECK(adapter.num_parameters() == 2 * kColumns);
  CHECK(
      adapter.named_parameters().keys() ==
      std::vector<std::string>{"prompt_embeddings"});
  CHECK(adapter.sites().front().what == "cartridge l=4");
  // The draws are PyTorch's: the frozen rows', then the others'.
  seed(3);
  const Tensor frozen = torch::randn({2, kColumns}).to(torch::kDouble);
  const Tensor trained = torch::randn({2, kColumns}).to(torch::kDouble);
  const Tensor table = table_of(adapter);
  CHECK(equal_bits(table, at::cat({frozen, trained})));
  const Tensor with = model->forward(ids);
  CHECK_FALSE(close(with, before));
  adapter.set_scale(0.5);
  const Tensor halved = model->forward(ids);
  adapter.detach();

  auto prefix = peft::attach(*model, peft::PrefixOptions(4));
  {
    torch::NoGradGuard no_grad;
    prefix.parameters()[0].copy_(table);
  }
  CHECK(close(model->forward(ids), with));
  prefix.set_scale(0.5);
  CHECK(close(model->forward(ids), halved));
  prefix.detach();
  CHECK(equal_bits(model->forward(ids), before));
  CHECK(same_state(state_of(*model), plain));

  // One token is frozen unless the options say otherwise; all or none may be.
  for (const int64_t count : {1, 0, 4}) {
    auto other = peft::attach(
        *model,
        count == 1 ? CartridgeOptions(4)
                   : CartridgeOptions(4).num_frozen_tokens(count));
    CHECK(other.num_parameters() == (4 - count) * kColumns);
    CHECK(delta_of(other).num_frozen_tokens() == count);
    model->forward(ids);
    other.detach();
  }
}

TEST_CASE("a cartridge of a whole text is that text") {
  auto model = decoder();
  const Tensor ids = own::ids(1, 9);
  const Tensor text = ids.slice(1, 0, 6), question = ids.slice(1, 6);
  const Tensor whole = model->forward(ids).slice(1, 6);
  KeyValues cache;
  model->forward(text, {}, {}, &cache);
  const Tensor first_key = cache.keys[0].clone();

  auto adapter = peft::attach(*model, CartridgeOptions(6).init_cache(cache));
  CHECK(close(model->forward(question), whole));
  const Tensor mask = torch::ones({1, 3}, torch::kLong);
  CHECK(close(model->forward(question, mask), whole));
  // And so for every row of a batch, and into a cache of one's own.
  KeyValues own_cache;
  CHECK(close(
      model->forward(question.expand({2, -1}), {}, {}, &own_cache),
      whole.expand({2, -1, -1})));
  CHECK(own_cache.length() == 9);
  randomise(adapter);
  CHECK_FALSE(close(model->forward(question), whole));
  CHECK(equal_bits(cache.keys[0], first_key)); // it was copied
  adapter.detach();

  // Of a longer text the first tokens are taken, as PEFT does.
  KeyValues cut;
  model->forward(ids.slice(1, 0, 4), {}, {}, &cut);
  auto shorter = peft::attach(*model, CartridgeOptions(4).init_cache(cache));
  CHECK(close(delta_of(shorter).key_values(1).keys[1], cut.keys[1][0]));
  CHECK(close(delta_of(shorter).key_values(1).values[0], cut.values[0][0]));
}

TEST_CASE("the frozen tokens of a cartridge stay to the bit") {
  auto model = decoder(torch::kFloat);
  auto adapter = peft::attach(*model, CartridgeOptions(5).num_frozen_tokens(2));
  const Tensor start = table_of(adapter);
  const Tensor ids = own::ids(4, 6);
  torch::optim::AdamW optimizer(
      model->parameters(), torch::optim::AdamWOptions(0.05).weight_decay(0.1));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    model->forward(ids).square().mean().backward();
    optimizer.step();
  }
  const Tensor after = table_of(adapter);
  CHECK(equal_bits(after.slice(0, 0, 2), start.slice(0, 0, 2)));
  CHECK(after.slice(0, 2).ne(start.slice(0, 2)).all().item<bool>());

  // They follow the model's dtype, and a clone has its own.
  const Tensor y = model->forward(ids);
  auto copy = peft::clone(model);
  CHECK(equal_bits(copy->forward(ids), y));
  {
    torch::NoGradGuard no_grad;
    delta_of(peft::get_adapter(*copy)).frozen_embedding.zero_();
  }
  CHECK_FALSE(close(copy->forward(ids), y));
  CHECK(equal_bits(model->forward(ids), y));
  model->to(torch::kDouble);
  CHECK(delta_of(adapter).frozen_embedding.scalar_type() == torch::kDouble);
  CHECK(model->forward(ids).scalar_type() == torch::kDouble);
}

TEST_CASE("gradients of cartridges agree with finite differences") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 3);
  auto adapter = peft::attach(*model, CartridgeOptions(3).num_frozen_tokens(1));
  seed(6);
  const Tensor direction =
      torch::randn({2, 3, own::kVocabulary}, torch::kDouble);
  CHECK(gradcheck::first_order(
      [&](const gradcheck::Tensors&) { return model->forward(ids); },
      adapter.parameters(),
      direction));
}

TEST_CASE("a cartridge goes on from its files to the bit") {
  const Tensor ids = own::ids(2, 5);
  const auto step = [&](own::Decoder& model, torch::optim::Optimizer& o) {
    o.zero_grad();
    model->forward(ids).square().mean().backward();
    o.step();
  };
  auto model = decoder(torch::kFloat);
  auto adapter = peft::attach(*model, CartridgeOptions(4).num_frozen_tokens(2));
  torch::optim::AdamW optimizer(adapter.parameters(), 0.05);
  step(model, optimizer);
  const TemporaryDirectory directory;
  const auto folder = directory / "adapter";
  peft::save(adapter, folder);
  peft::save_optimizer(optimizer, adapter, folder);
  const auto file =
      peft::load_safetensors(folder + "/adapter_model.safetensors");
  REQUIRE(file.size() == 1);
  CHECK(equal_bits(file.at("prompt_embeddings"), table_of(adapter)));

  auto again = decoder(torch::kFloat);
  auto loaded = peft::load(*again, folder);
  CHECK(loaded.num_parameters() == 2 * kColumns);
  CHECK(equal_bits(again->forward(ids), model->forward(ids)));
  torch::optim::AdamW other(loaded.parameters(), 0.05);
  peft::load_optimizer(other, loaded, folder);
  step(model, optimizer);
  step(again, other);
  CHECK(equal_bits(table_of(loaded), table_of(adapter)));
  CHECK(equal_bits(again->forward(ids), model->forward(ids)));
}

TEST_CASE("cartridges are composed by their tokens") {
  auto model = decoder();
  const Tensor ids = own::ids(2, 4);
  seed(8);
  auto law = peft::attach(*model, CartridgeOptions(3), "law");
  auto one_case =
      peft::attach(*model, CartridgeOptions(2).num_frozen_tokens(2), "case");
  const Tensor both = model->forward(ids);
  auto composed = peft::compose_cartridges(*model, {"law", "case"}, "both");
  CHECK_FALSE(composed.is_enabled());
  CHECK(equal_bits(model->forward(ids), both));
  CHECK(equal_bits(
      table_of(composed), at::cat({table_of(law), table_of(one_case)})));
  CHECK(delta_of(composed).num_frozen_tokens() == 1); // the first one's
  CHECK(composed.num_parameters() == 4 * kColumns);
  {
    // Attention has no order among what it attends to.
    const peft::ActiveAdapters scope({"both"});
    CHECK(close(model->forward(ids), both));
  }
  // It holds copies.
  randomise(law);
  {
    const peft::ActiveAdapters scope({"both"});
    CHECK(close(model->forward(ids), both));
  }

  const TemporaryDirectory directory;
  peft::save(composed, directory / "both");
  auto other = decoder();
  peft::load(*other, directory / "both");
  CHECK(close(other->forward(ids), both, 1e-4, 1e-5)); // a file is float32

  peft::attach(*model, peft::PrefixOptions(2), "prefix");
  peft::attach(
      *model, CartridgeOptions(2).modules_to_save({"head"}), "with head");
  const auto before = state_of(*model);
  const auto error = [&](const std::vector<std::string>& names,
                         const std::string& name = "new") {
    return error_of([&] { peft::compose_cartridges(*model, names, name); });
  };
  CHECK(contains(error({"law"}), "two cartridges or more, got 1"));
  CHECK(contains(error({"law", "german"}), "no adapter 'german'"));
  CHECK(contains(error({"law", "prefix"}), "of method PREFIX_TUNING"));
  CHECK(contains(error({"law", "with head"}), "trains a head"));
  CHECK(contains(error({"law", "case"}, "law"), "already has an adapter"));
  CHECK(same_state(state_of(*model), before));
}

TEST_CASE("cartridges of other stacks, or in another order, do not compose") {
  seed(3);
  peft::models::T5Model model(peft::models::T5Options()
                                  .vocab_size(20)
                                  .d_model(8)
                                  .d_kv(4)
                                  .d_ff(16)
                                  .num_layers(2)
                                  .num_heads(2)
                                  .dropout_rate(0));
  model->eval();
  const auto in = [](const std::string& stack) {
    return CartridgeOptions(2).stacks({stack});
  };
  peft::attach(*model, in("decoder"), "a");
  peft::attach(*model, in("encoder"), "b");
  peft::attach(*model, in("decoder").hf_layer_order(true), "c");
  peft::attach(*model, in("decoder"), "d");
  for (const std::string other : {"b", "c"}) {
    CHECK(contains(
        error_of([&] {
          peft::compose_cartridges(*model, {"a", other}, "x");
        }),
        "stand in different stacks"));
  }
  CHECK(
      peft::compose_cartridges(*model, {"a", "d"}, "x").num_parameters() ==
      3 * 2 * 2 * 8);
}

TEST_CASE("threads run one cartridge at once") {
  auto model = decoder();
  peft::attach(*model, CartridgeOptions(3));
  const Tensor ids = own::ids(2, 4);
  torch::NoGradGuard no_grad;
  const Tensor expected = model->forward(ids);
  std::vector<Tensor> results(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < results.size(); ++i) {
    threads.emplace_back([&, i] {
      torch::NoGradGuard none;
      for (int repeat = 0; repeat < 10; ++repeat) {
        results[i] = model->forward(ids);
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& result : results) {
    CHECK(equal_bits(result, expected));
  }
}

TEST_CASE("a cartridge says what does not fit") {
  auto model = decoder();
  KeyValues cache;
  model->forward(own::ids(1, 4), {}, {}, &cache);
  KeyValues two_rows;
  model->forward(own::ids(2, 4), {}, {}, &two_rows);
  const auto before = state_of(*model);
  const auto error = [&](const CartridgeOptions& options) {
    return error_of([&] { peft::attach(*model, options); });
  };
  CHECK(contains(
      error(CartridgeOptions(3).num_frozen_tokens(4)),
      "between 0 and num_virtual_tokens, 3, got 4"));
  CHECK(contains(error(CartridgeOptions(3).num_frozen_tokens(-1)), "got -1"));
  CHECK(contains(
      error(CartridgeOptions(0).num_frozen_tokens(0)),
      "num_virtual_tokens must be positive"));
  CHECK(contains(error(CartridgeOptions(5).init_cache(cache)), "5 or more"));
  CHECK(contains(
      error(CartridgeOptions(3).init_cache(two_rows)), "init_cache must hold"));
  CHECK(contains(
      error(CartridgeOptions(3).stacks({"cross"})), "no stack 'cross'"));
  torch::nn::Sequential bare(torch::nn::Linear(3, 3));
  CHECK(contains(
      error_of([&] { peft::attach(*bare, CartridgeOptions(3)); }),
      "a cartridge puts tokens in front"));
  CHECK(same_state(state_of(*model), before));

  auto adapter = peft::attach(*model, CartridgeOptions(3));
  CHECK(contains(
      error_of([&] { adapter.merge(); }),
      "cannot be merged at 'extra_tokens'"));
}

} // namespace test_cartridge
