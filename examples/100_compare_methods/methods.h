#pragma once

// The methods: a row says how one is put on the network and how fast it learns.
// These are the only lines that know them by name.

#include "measure.h"

#include "../010_gloss_categories/task.h"

#include <peft/peft.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace compare {

/// What an attach that looks at the task may use.
struct Setting {
  const Task& task; ///< its texts are those that are trained on
  uint64_t seed = 1;
  int64_t budget = 0; ///< trainable parameters beside the head
  int64_t samples = 64; ///< texts to choose entries by
  int64_t trials = 4; ///< configurations that a search tries
  int64_t steps = 24; ///< of a search by gradients
  int64_t training_steps = 0; ///< of every method
  /// Trains an adapter on these texts, as long as every method trains, for
  /// methods that do so before they begin.
  std::function<
      void(Network&, const peft::Adapter&, double rate, const Examples&)>
      train = nullptr;
};

struct Method {
  std::string key; ///< of the results, --only and the adapter's folder
  std::string name;
  std::string family;
  double learning_rate; ///< of all but the head
  std::function<peft::Adapter(Network&, const Setting&)> attach;
  /// What it does at every step beside the optimizer, if anything.
  std::function<StepHooks(const peft::Adapter&)> hooks = nullptr;
};

/// The head, which starts as the frozen probe's, trains beside every adapter.
constexpr double kHeadLearningRate = 1e-3;
/// Where all weights move, and where a few of their entries do.
constexpr double kFullRate = 2e-4;
constexpr double kSparseRate = 4e-3;

namespace detail {

template <class Options>
peft::Adapter attach_with_head(Network& network, Options options) {
  return peft::attach(*network, options.modules_to_save({"classifier"}));
}

/// Options that need nothing but the network.
template <class Options>
std::function<peft::Adapter(Network&, const Setting&)> with(
    const Options& options) {
  return [options](Network& network, const Setting&) {
    return attach_with_head(network, options);
  };
}

template <class Options>
int64_t trainable_of(Network& network, const Options& options) {
  auto adapter = peft::attach(*network, options);
  const auto count = adapter.num_parameters();
  adapter.detach();
  return count;
}

inline std::vector<int64_t> up_to(int64_t most) {
  std::vector<int64_t> widths(static_cast<size_t>(most));
  std::iota(widths.begin(), widths.end(), 1);
  return widths;
}

inline std::vector<int64_t> divisors(int64_t n) {
  std::vector<int64_t> result;
  for (int64_t i = 1; i <= n; ++i) {
    if (n % i == 0) {
      result.push_back(i);
    }
  }
  return result;
}

/// The one of `widths`, ascending in what `make(width)` trains, that trains
/// what is nearest to `budget`; the wider of two equally near.
template <class Make>
int64_t nearest_width(
    Network& network,
    int64_t budget,
    const std::vector<int64_t>& widths,
    Make&& make) {
  size_t low = 0; // the first that trains as much as the budget, or the last
  size_t high = widths.size() - 1;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (trainable_of(network, make(widths[middle])) < budget) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low > 0) {
    const auto over = trainable_of(network, make(widths[low])) - budget;
    const auto under = budget - trainable_of(network, make(widths[low - 1]));
    low -= under < over ? 1 : 0;
  }
  return widths[low];
}

/// The side network's widths are the network's divided by these; a head keeps
/// at least one number.
inline std::vector<int64_t> ladder_reductions(const Network& network) {
  const auto& o = network->bert->options;
  const auto head = o.hidden_size() / o.num_attention_heads();
  std::vector<int64_t> reductions;
  for (int64_t r = head; r > 1; --r) {
    if (head % r == 0 && o.intermediate_size() % r == 0) {
      reductions.push_back(r);
    }
  }
  return reductions;
}

/// The mean loss of a few texts.
inline torch::Tensor
loss_of(Network& network, const Examples& texts, int64_t padding) {
  std::vector<size_t> rows(texts.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  const auto batch = make_batch(texts, rows, padding);
  return torch::nn::functional::cross_entropy(
      network->forward(batch.ids, batch.mask), batch.labels);
}

/// The Fisher information on `samples` texts of the task, with a progress bar.
inline peft::Scores fisher_of(
    Network& network,
    const Setting& setting,
    int64_t samples,
    peft::FisherOptions options) {
  const auto& texts = setting.task.data.train;
  samples = std::min(samples, static_cast<int64_t>(texts.size()));
  Progress bar("Fisher information", samples);
  options.num_samples(samples).progress([&](int64_t done, int64_t) {
    bar.update(done, "");
    return !interrupted();
  });
  const std::function<torch::Tensor(int64_t, int64_t)> loss = [&](int64_t begin,
                                                                  int64_t end) {
    const Examples some(texts.begin() + begin, texts.begin() + end);
    return loss_of(network, some, setting.task.padding);
  };
  return peft::estimate_fisher(*network, loss, options).scores;
}

/// FISH mask with a head, within the budget.
inline peft::Adapter attach_fish(Network& network, const Setting& setting) {
  const auto scores =
      fisher_of(network, setting, setting.samples, peft::FisherOptions());
  const auto wanted = setting.budget + count(network->classifier->parameters());
  const auto ratio = (static_cast<double>(wanted) + 0.5) /
      static_cast<double>(count(network->parameters()));
  return attach_with_head(network, peft::FishOptions(ratio).fisher(scores));
}

/// Child-tuning D, with the published estimate over fewer texts.
inline peft::Adapter attach_child_d(Network& network, const Setting& setting) {
  const auto scores = fisher_of(
      network,
      setting,
      4 * setting.samples,
      peft::FisherOptions().per_batch(true).batch_size(16).max_norm(1));
  return attach_with_head(
      network, peft::ChildTuningOptions(0.3).mode("D").fisher(scores));
}

/// LT-SFT: all of the network trains, then as many entries as the budget
/// allows, those that moved most, train again from the start.
inline peft::Adapter attach_lottery_ticket(
    Network& network,
    const Setting& setting) {
  auto full = attach_with_head(
      network, peft::FullTuningOptions().exclude({"LayerNorm"}));
  setting.train(network, full, kFullRate, setting.task.data.train);
  const auto mask = peft::lottery_ticket(full, setting.budget);
  full.detach();
  return attach_with_head(network, peft::SparseTuningOptions(mask));
}

/// SparseAdapter, large-sparse: an adapter of four times the width, of whose
/// weights a quarter stays.
inline peft::SparseAdapterOptions sparse_adapter(
    int64_t width,
    const std::string& score,
    const std::vector<std::string>& heads) {
  return peft::SparseAdapterOptions(
             peft::PfeifferOptions(4 * width).modules_to_save(heads))
      .prune(peft::PruneOptions(score, 0.25));
}

/// The quarter by SNIP, on one batch.
inline peft::Adapter
attach_sparse_adapter(Network& network, const Setting& setting, int64_t width) {
  const auto options = sparse_adapter(width, "snip", {"classifier"});
  auto adapter = peft::attach(*network, options);
  const auto& texts = setting.task.data.train;
  const Examples some(
      texts.begin(),
      texts.begin() +
          std::min<int64_t>(32, static_cast<int64_t>(texts.size())));
  peft::prune(adapter, options.prune(), {[&] {
                return loss_of(network, some, setting.task.padding);
              }});
  return adapter;
}

/// AdaLoRA, whose ranks fall by a third between a tenth and three quarters of
/// the training.
inline peft::AdaLoraOptions ada_lora(int64_t r, int64_t training_steps) {
  return peft::AdaLoraOptions(training_steps)
      .tinit(training_steps / 10)
      .tfinal(training_steps / 4)
      .init_r(r)
      .target_r(std::max<int64_t>(1, 2 * r / 3))
      .alpha(2.0 * static_cast<double>(r));
}

/// Its penalty, whose gradient joins the loss's, and its allocation of ranks.
inline StepHooks ada_lora_hooks(const peft::Adapter& adapter) {
  const auto allocator = std::make_shared<peft::RankAllocator>(adapter);
  const auto step = std::make_shared<int64_t>(0);
  return {
      [adapter] { peft::orthogonal_regularization(adapter).backward(); },
      [allocator, step] { allocator->update_and_allocate((*step)++); }};
}

/// KaSA's penalty and MonteCLoRA's divergence, whose gradients join the loss's.
inline StepHooks kasa_hooks(const peft::Adapter& adapter) {
  return {[adapter] { peft::kasa_regularization(adapter).backward(); }, {}};
}
inline StepHooks monteclora_hooks(const peft::Adapter& adapter) {
  const auto add_gradient = [adapter] {
    const auto divergence = peft::monteclora_regularization(adapter);
    if (divergence.defined()) { // not where a step runs in evaluation mode
      divergence.backward();
    }
  };
  return {add_gradient, {}};
}

/// The embeddings of the tokens that the texts have most, within the budget.
inline peft::Adapter attach_tokens(Network& network, const Setting& setting) {
  const auto& o = network->bert->options;
  std::vector<int64_t> uses(static_cast<size_t>(o.vocab_size()));
  for (const auto& text : setting.task.data.train) {
    for (const auto id : text.ids) {
      ++uses[static_cast<size_t>(id)];
    }
  }
  std::vector<int64_t> tokens(uses.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  std::stable_sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) {
    return uses[static_cast<size_t>(a)] > uses[static_cast<size_t>(b)];
  });
  const auto rows = std::max<int64_t>(1, setting.budget / o.hidden_size());
  tokens.resize(std::min(tokens.size(), static_cast<size_t>(rows)));
  return attach_with_head(network, peft::TrainableTokensOptions(tokens));
}

/// The methods that S3Delta chooses among; the first has the heads.
inline std::vector<peft::AnyOptions> candidates(
    const std::vector<std::string>& heads) {
  using namespace peft;
  const std::vector<std::string> layers{
      "query", "key", "value", "intermediate.dense", "output.dense"};
  return {
      LoraOptions(4).alpha(8).targets(layers).modules_to_save(heads),
      BitFitOptions(
          {"query",
           "key",
           "value",
           "attention_output",
           "intermediate",
           "output"}),
      LayerNormOptions()};
}

/// S3Delta: the structure is searched on a copy of the network, whose head
/// stays, and put on the network as new.
inline peft::Adapter attach_s3_delta(Network& network, const Setting& setting) {
  const auto& texts = setting.task.data.train;
  const auto half = static_cast<std::ptrdiff_t>(texts.size() / 2);
  const Examples first(texts.begin(), texts.begin() + half);
  const Examples second(texts.begin() + half, texts.end());
  auto copy = peft::clone(network);
  const auto searched = peft::attach(
      *copy, peft::S3DeltaOptions(setting.budget).candidates(candidates({})));
  peft::StructureSearch search(
      searched,
      peft::StructureSearchOptions().order(1).lr(4e-3).seed(setting.seed));
  Progress bar("structure search", setting.steps);
  for (int64_t step = 0; step < setting.steps && !interrupted(); ++step) {
    const auto loss = [&](const Examples& part) {
      constexpr size_t kBatch = 16;
      Examples batch;
      for (size_t i = 0; i < kBatch; ++i) {
        const auto row = static_cast<size_t>(step) * kBatch + i;
        batch.push_back(part[row % part.size()]);
      }
      return loss_of(copy, batch, setting.task.padding);
    };
    const auto progress =
        search.step([&] { return loss(first); }, [&] { return loss(second); });
    bar.update(step + 1, fmt::format("loss {:.3f}", progress.train_loss));
  }

  const auto with_head = candidates({"classifier"});
  auto modules = search.structure().modules();
  for (const auto& module : peft::candidates(
           *network,
           peft::S3DeltaOptions(setting.budget).candidates(with_head))) {
    if (module.name.find("classifier") != std::string::npos) {
      modules.push_back(module.name);
    }
  }
  return peft::attach(
      *network,
      peft::S3DeltaStructure().candidates(with_head).modules(modules));
}

/// AutoPEFT: random configurations that use most of the budget, each trained on
/// a quarter of the texts; the one that is best on other texts.
inline peft::Adapter
attach_auto_peft(Network& network, const Setting& setting, double rate) {
  const peft::AutoPeftSpace choices(
      peft::describe_network(*network),
      peft::AutoPeftOptions().modules_to_save({"classifier"}));
  const auto limit = setting.budget + count(network->classifier->parameters());
  const auto& texts = setting.task.data.train;
  const auto quarter = static_cast<std::ptrdiff_t>(texts.size() / 4);
  const Examples some(texts.begin(), texts.begin() + quarter);
  const Examples others(texts.end() - quarter, texts.end());
  const auto parameters = [&](const peft::Configuration& configuration) {
    return choices.num_parameters(configuration);
  };
  auto space = choices.space();
  space.where([&](const peft::Configuration& configuration) {
    return parameters(configuration) > limit - setting.budget / 4;
  });
  const auto result = peft::search(
      space,
      [&](const peft::Configuration& configuration, int64_t) {
        auto copy = peft::clone(network);
        const auto adapter = peft::attach(*copy, choices.decode(configuration));
        setting.train(copy, adapter, rate, some);
        if (interrupted()) {
          throw peft::StopSearch();
        }
        return peft::Outcome(
            accuracy(
                predict(copy, others, setting.task.padding), labels_of(others)),
            parameters(configuration));
      },
      peft::SearchBudget(setting.trials)
          .seed(setting.seed)
          .count_parameters(parameters)
          .max_parameters(limit)
          .keep_going(false));
  if (result.trials.empty()) { // stopped: what is attached will not be trained
    return peft::attach(
        *network, peft::AutoPeftOptions().serial(peft::PfeifferOptions(1)));
  }
  return peft::attach(*network, choices.decode(result.best().configuration));
}

} // namespace detail

/// What LoRA of rank 8 on query and value trains: the budget of all.
inline int64_t budget_of(Network& network) {
  return detail::trainable_of(
      network, peft::LoraOptions(8).targets({"query", "value"}));
}

/// Every method of the library, each as wide as comes nearest to the budget,
/// where it has a width. `network` is tried on and comes back as it was.
///
/// Learning rates: those of the additive methods, of LoRA and of BitFit are
/// what examples/010 and 090 found on validation texts; the others are a
/// relative's, and those of sparse masks a guess between BitFit's and that of
/// full fine-tuning. `--tune` tries the neighbours of each.
inline std::vector<Method>
methods(Network& network, int64_t budget, int64_t tokens) {
  using namespace peft;
  using detail::with;
  const auto near = [&](const std::vector<int64_t>& widths, auto&& make) {
    return with(make(detail::nearest_width(network, budget, widths, make)));
  };
  const auto& sizes = network->bert->options;
  const auto widths = detail::up_to(sizes.hidden_size());
  const auto lengths = detail::up_to(
      std::min(sizes.hidden_size(), sizes.max_position_embeddings() / 2));
  std::vector<Method> all;

  // ~~~~ additive ~~~~

  all.push_back(
      {"houlsby",
       "Houlsby adapter",
       "additive",
       4e-3,
       near(widths, [](int64_t r) { return HoulsbyOptions(r); })});
  all.push_back(
      {"pfeiffer",
       "Pfeiffer adapter",
       "additive",
       4e-3,
       near(widths, [](int64_t r) { return PfeifferOptions(r); })});
  std::vector<int64_t> lower(
      static_cast<size_t>(sizes.num_hidden_layers() / 2));
  std::iota(lower.begin(), lower.end(), 0);
  all.push_back(
      {"adapter_drop",
       "AdapterDrop, lower half",
       "additive",
       4e-3,
       near(widths, [&](int64_t r) {
         return PfeifferOptions(r).leave_out(lower);
       })});
  all.push_back(
      {"parallel",
       "parallel adapter",
       "additive",
       4e-3,
       near(widths, [](int64_t r) { return ParallelAdapterOptions(r); })});
  all.push_back({"ia3", "(IA)³", "additive", 6e-2, with(Ia3Options())});
  all.push_back(
      {"prompt",
       "prompt tuning",
       "additive",
       3e-2,
       with(PromptOptions(tokens).init("vocab"))});
  all.push_back(
      {"multitask_prompt",
       "multitask prompt, one task",
       "additive",
       3e-2,
       with(MultitaskPromptOptions(tokens).init("vocab"))});
  all.push_back(
      {"p_tuning", "P-tuning", "additive", 1.2e-2, near(widths, [&](int64_t h) {
         return PTuningOptions(tokens).encoder_hidden_size(h);
       })});
  all.push_back(
      {"prefix",
       "prefix tuning",
       "additive",
       4e-3,
       near(widths, [&](int64_t h) {
         return PrefixOptions(tokens)
             .prefix_projection(true)
             .encoder_hidden_size(h);
       })});
  all.push_back(
      {"cartridge", "cartridge", "additive", 3e-2, near(lengths, [](int64_t n) {
         return CartridgeOptions(n);
       })});
  all.push_back(
      {"p_tuning_v2",
       "P-tuning v2",
       "additive",
       3e-2,
       near(lengths, [](int64_t n) { return PTuningV2Options(n); })});
  all.push_back(
      {"coda",
       "CoDA, half the tokens",
       "additive",
       4e-3,
       near(widths, [](int64_t r) {
         return CodaOptions().ratio(0.5).bottleneck(r);
       })});
  all.push_back(
      {"ladder",
       "ladder side tuning",
       "additive",
       1.2e-2,
       near(detail::ladder_reductions(network), [](int64_t r) {
         return LadderOptions(r);
       })});

  // ~~~~ partial ~~~~

  all.push_back({"bitfit", "BitFit", "partial", 8e-3, with(BitFitOptions())});
  all.push_back(
      {"bitfit_subset",
       "BitFit, query and FFN",
       "partial",
       8e-3,
       with(BitFitOptions({"query_intermediate"}))});
  all.push_back(
      {"layer_norm",
       "LayerNorm tuning",
       "partial",
       8e-3,
       with(LayerNormOptions())});

  all.push_back({"beft", "BEFT, value", "partial", 8e-3, with(BeftOptions())});
  all.push_back(
      {"trainable_tokens",
       "trainable tokens",
       "partial",
       kSparseRate,
       detail::attach_tokens});
  all.push_back(
      {"random_mask",
       "random mask",
       "partial",
       kSparseRate,
       [](gloss::Network& host, const Setting& setting) {
         return detail::attach_with_head(
             host, RandomMaskOptions().k(setting.budget).seed(setting.seed));
       }});
  all.push_back(
      {"shira",
       "SHiRA, magnitude",
       "partial",
       kSparseRate,
       with(ShiraOptions(8).mask_type("magnitude"))});
  all.push_back(
      {"fish", "FISH mask", "partial", kSparseRate, detail::attach_fish});
  all.push_back(
      {"child_f",
       "Child-tuning F",
       "partial",
       kFullRate,
       with(ChildTuningOptions(0.3))});
  all.push_back(
      {"child_d",
       "Child-tuning D",
       "partial",
       kFullRate,
       detail::attach_child_d});
  all.push_back(
      {"lt_sft",
       "LT-SFT",
       "partial",
       kSparseRate,
       detail::attach_lottery_ticket});

  // ~~~~ reparameterised ~~~~

  all.push_back(
      {"lora",
       "LoRA",
       "reparameterised",
       4e-3,
       with(LoraOptions(8).alpha(16).targets({"query", "value"}))});
  all.push_back(
      {"dora", "DoRA", "reparameterised", 4e-3, near(widths, [](int64_t r) {
         return LoraOptions(r)
             .alpha(2.0 * static_cast<double>(r))
             .dora(true)
             .targets({"query", "value"});
       })});
  all.push_back(
      {"kasa",
       "KaSA",
       "reparameterised",
       4e-3,
       near(
           widths,
           [](int64_t r) {
             return LoraOptions(r)
                 .alpha(2.0 * static_cast<double>(r))
                 .kasa(KasaOptions())
                 .targets({"query", "value"});
           }),
       detail::kasa_hooks});
  std::vector<int64_t> quarters;
  for (int64_t r = 4; r <= sizes.hidden_size(); r += 4) {
    quarters.push_back(r);
  }
  all.push_back(
      {"bd_lora",
       "BD-LoRA, 4 blocks",
       "reparameterised",
       4e-3,
       near(quarters, [](int64_t r) {
         return LoraOptions(r)
             .alpha(2.0 * static_cast<double>(r))
             .bd_lora(BdLoraOptions()
                          .target_modules_bd_b({"query", "value"})
                          .nblocks(4))
             .targets({"query", "value"});
       })});
  all.push_back(
      {"monteclora",
       "MonteCLoRA",
       "reparameterised",
       4e-3,
       near(
           widths,
           [](int64_t r) {
             return LoraOptions(r)
                 .alpha(2.0 * static_cast<double>(r))
                 .monteclora(MonteCloraOptions().buffer_size(16))
                 .targets({"query", "value"});
           }),
       detail::monteclora_hooks});
  const auto ranks =
      detail::nearest_width(network, budget, widths, [](int64_t r) {
        return detail::ada_lora(r, 1);
      });
  all.push_back(
      {"ada_lora",
       "AdaLoRA",
       "reparameterised",
       1.2e-2,
       [ranks](gloss::Network& host, const Setting& setting) {
         return detail::attach_with_head(
             host, detail::ada_lora(ranks, setting.training_steps));
       },
       detail::ada_lora_hooks});
  all.push_back(
      {"vera", "VeRA", "reparameterised", 1.2e-2, with(VeraOptions())});
  const int64_t quarter = std::max<int64_t>(1, sizes.hidden_size() / 4);
  all.push_back(
      {"vblora",
       "VB-LoRA",
       "reparameterised",
       1.2e-2,
       near(detail::up_to(256), [&](int64_t n) {
         return VbLoraOptions(4).vector_length(quarter).num_vectors(n).topk(
             std::min<int64_t>(2, n));
       })});
  all.push_back(
      {"loha", "LoHa", "reparameterised", 4e-3, near(widths, [](int64_t r) {
         return LoHaOptions(r).alpha(2.0 * static_cast<double>(r));
       })});
  all.push_back(
      {"lokr",
       "LoKr, factor 4",
       "reparameterised",
       4e-3,
       near(detail::up_to(sizes.hidden_size() / 8 - 1), [](int64_t r) {
         return LoKrOptions(r)
             .alpha(2.0 * static_cast<double>(r))
             .decompose_factor(4);
       })});
  std::vector<int64_t> even, blocks;
  for (int64_t n = 2; n <= sizes.hidden_size(); n += 2) {
    even.push_back(n);
  }
  for (const auto b : detail::divisors(sizes.hidden_size() / 2)) {
    if (b > 1 && b % 2 == 0) {
      blocks.push_back(b);
    }
  }
  all.push_back(
      {"hra", "HRA", "reparameterised", 4e-3, near(even, [](int64_t r) {
         return HraOptions(r);
       })});
  all.push_back(
      {"oft", "OFT", "reparameterised", 4e-3, near(blocks, [](int64_t b) {
         return OftOptions().oft_block_size(b);
       })});
  all.push_back(
      {"boft",
       "BOFT, two factors",
       "reparameterised",
       4e-3,
       near(blocks, [](int64_t b) {
         return BoftOptions().boft_block_size(b).boft_n_butterfly_factor(2);
       })});
  all.push_back(
      {"fourier_ft",
       "FourierFT",
       "reparameterised",
       1.2e-2,
       near(detail::up_to(budget / 4), [](int64_t n) {
         return FourierFtOptions(n).init_weights(true);
       })});
  all.push_back(
      {"intrinsic",
       "intrinsic dimension",
       "reparameterised",
       kFullRate,
       with(IntrinsicOptions(budget).said(true))});
  all.push_back(
      {"krona",
       "KronA",
       "reparameterised",
       4e-3,
       near(detail::up_to(budget / 4), [](int64_t each) {
         return KronaOptions().budget(each);
       })});

  // ~~~~ hybrid ~~~~

  const int64_t few = tokens / 4; // virtual tokens beside other parts
  all.push_back(
      {"mam", "MAM adapter", "hybrid", 4e-3, near(widths, [&](int64_t r) {
         return MamOptions()
             .prefix(PrefixOptions(few))
             .adapter(ParallelAdapterOptions(r));
       })});
  all.push_back(
      {"unipelt", "UniPELT", "hybrid", 4e-3, near(widths, [&](int64_t r) {
         return UniPeltOptions()
             .lora(LoraOptions(2).alpha(2))
             .prefix(PrefixOptions(few))
             .adapter(PfeifferOptions(r));
       })});

  all.push_back(
      {"llm_adapters",
       "LLM-Adapters, parallel",
       "hybrid",
       4e-3,
       near(widths, [](int64_t r) {
         return LlmAdaptersOptions().bottleneck(
             LinearBottleneckOptions(r).use_parallel_adapter(true).targets(
                 {"query", "key", "value"}));
       })});

  // ~~~~ unified ~~~~

  const auto sparse = detail::nearest_width(
      network, budget, detail::up_to(sizes.hidden_size() / 4), [](int64_t r) {
        return detail::sparse_adapter(r, "rand", {});
      });
  all.push_back(
      {"sparse_adapter",
       "SparseAdapter",
       "unified",
       4e-3,
       [sparse](gloss::Network& host, const Setting& setting) {
         return detail::attach_sparse_adapter(host, setting, sparse);
       }});
  all.push_back(
      {"s3_delta", "S3Delta", "unified", 4e-3, detail::attach_s3_delta});
  all.push_back(
      {"auto_peft",
       "AutoPEFT",
       "unified",
       4e-3,
       [](gloss::Network& host, const Setting& setting) {
         return detail::attach_auto_peft(host, setting, 4e-3);
       }});

  // ~~~~ all of the network ~~~~

  all.push_back(
      {"full",
       "full fine-tuning",
       "reference",
       kFullRate,
       with(FullTuningOptions())});
  return all;
}

} // namespace compare
