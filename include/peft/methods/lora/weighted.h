#pragma once

// One LoRA from several, as HF PEFT's add_weighted_adapter makes it. With the
// weights wᵢ and the scalings sᵢ:
//
//   linear, ties, dare_*, magnitude_prune
//          A = f(√|wᵢsᵢ| · sign · Aᵢ),  B = f(√|wᵢsᵢ| · Bᵢ)   equal ranks;
//          rough, as the product of the sums has mixed terms
//   cat    A = [wᵢsᵢ Aᵢ],  B = [Bᵢ]               exact, of rank Σ rᵢ
//   svd, ..._svd   B A ≈ f(wᵢ ΔWᵢ)                the best of the chosen rank
//
// where f combines tensors (functional/merge_utils.h).

#include <peft/functional/lora.h>
#include <peft/functional/merge_utils.h>
#include <peft/methods/lora/factors.h>
#include <peft/methods/lora/placement.h>
#include <peft/methods/weighted/parts.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// Plans the LoRA that the parts give together.
class WeightedLoraPlanner {
 public:
  WeightedLoraPlanner(
      const WeightedAdapters& parts,
      const WeightedAdapterOptions& options,
      const Network& network)
      : parts_(parts),
        options_(options),
        network_(network),
        combination_(combination_of(options)) {}

  Plan run() {
    for (const auto& part : parts_) {
      check_part(part.state());
    }
    LoraOptions lora = new_options();
    Plan result = plan(lora, network_); // draws what PEFT's new adapter draws
    std::vector<PlannedSite> sites;
    std::vector<std::pair<std::string, int64_t>> ranks;
    for (auto& site : result.sites) {
      if (const auto* own = dynamic_cast<const LoraDelta*>(site.delta.get())) {
        const auto delta = combined(site, *own);
        if (!delta) {
          continue; // the half of an attention that none of them adapts
        }
        ranks.emplace_back(target_of(site), delta->lora_A.size(0));
        site.delta = delta;
      } else if (dynamic_cast<const LoraBiasDelta*>(site.delta.get())) {
        site.delta = combined_bias(site);
      } else {
        site.delta = weighted_copy(parts_, site);
      }
      TORCH_CHECK(site.delta, "peft: nothing to combine at '", site.name, "'");
      sites.push_back(std::move(site));
    }
    set_ranks(lora, ranks, lora.r());
    result.sites = std::move(sites);
    result.options = lora;
    return result;
  }

 private:
  static const LoraOptions& options_of(const AdapterState& state) {
    return std::any_cast<const LoraOptions&>(state.options);
  }

  void check_part(const AdapterState& state) const {
    const auto& o = options_of(state);
    TORCH_CHECK(
        o.bias() == "none",
        "peft: adapter '",
        state.name,
        "' trains biases of the base (bias = '",
        o.bias(),
        "'), which cannot be combined (HF PEFT refuses them too)");
    for (const auto& record : state.sites) {
      const Delta* delta = record.delta.get();
      TORCH_CHECK(
          !o.dora() && dynamic_cast<const DoraDelta*>(delta) == nullptr,
          "peft: adapter '",
          state.name,
          "' is a DoRA, and magnitudes cannot be combined (HF PEFT would take "
          "the base's); convert_to_lora() makes a LoRA of it");
      TORCH_CHECK(
          (dynamic_cast<const LoraDelta*>(delta) != nullptr ||
           dynamic_cast<const LoraBiasDelta*>(delta) != nullptr ||
           dynamic_cast<const TrainedCopy*>(delta) != nullptr) &&
              delta->decorations().empty(),
          "peft: adapter '",
          state.name,
          "' has '",
          delta->describe(),
          "' at '",
          record.name,
          "', which cannot be combined; only plain LoRA can");
      const std::string obstacle = delta->merge_obstacle();
      TORCH_CHECK(
          obstacle.empty() || combination_.on != Combination::On::product,
          "peft: an svd combines what the adapters add to a weight, and at '",
          record.name,
          "' adapter '",
          state.name,
          "' adds none: ",
          obstacle);
    }
  }

  /// As a file has them: PEFT's r, or the blocks of a packed projection side by
  /// side.
  static int64_t rank_of(const AdapterState& state) {
    double r = static_cast<double>(options_of(state).r());
    for (const auto& item : options_of(state).rank_pattern()) {
      r = std::max(r, item.second);
    }
    auto result = static_cast<int64_t>(r);
    for (const auto& record : state.sites) {
      if (const auto* delta =
              dynamic_cast<const LoraDelta*>(record.delta.get())) {
        result =
            std::max(result, delta->lora_A.size(0) * (delta->offset() ? 2 : 1));
      }
    }
    return result;
  }

  /// The first adapter's options with the new rank at scaling 1 and everybody's
  /// targets.
  LoraOptions new_options() const {
    LoraOptions result = options_of(parts_.front().state());
    std::vector<Targets> targets;
    std::vector<std::string> modules, names;
    int64_t sum = 0, largest = 0;
    bool lora_bias = false;
    for (const auto& part : parts_) {
      const auto& o = options_of(part.state());
      targets.push_back(o.targets());
      unite(modules, o.modules_to_save());
      lora_bias = lora_bias || o.lora_bias();
      sum += rank_of(part.state());
      largest = std::max(largest, rank_of(part.state()));
      for (const auto& record : part.state().sites) {
        if (dynamic_cast<const LoraDelta*>(record.delta.get()) != nullptr) {
          unite(names, {target_of(record)});
        }
      }
    }
    const auto& init = result.init();
    result.modules_to_save(modules).lora_bias(lora_bias).enable_lora({});
    if (init != "gaussian" && init != "random") { // others read the base
      result.init("kaiming");
    }
    set_ranks(
        result,
        {},
        combination_.on == Combination::On::ranks ? sum
            : combination_.on == Combination::On::product
            ? options_.svd_rank().value_or(largest)
            : largest);
    if (const auto all = united(targets)) {
      result.targets(*all);
      if (covers(result)) {
        return result;
      }
    }
    result.targets(exact_targets(names, network_));
    result.exclude(Targets()).layers({}).layers_pattern({});
    TORCH_CHECK(
        covers(result),
        "peft: one name or pattern would have to fit what all the adapters "
        "adapt, and none does");
    return result;
  }

  /// Whether a plan by these options meets the sites of all parts and no other.
  bool covers(LoraOptions lora) const {
    Plan trial = plan(lora.init("empty"), network_, /*is_from_file=*/true);
    drop_tied(trial.sites);
    size_t met = 0, sites = 0;
    for (const auto& part : parts_) {
      for (const auto& record : part.state().sites) {
        sites += dynamic_cast<const LoraDelta*>(record.delta.get()) ? 1 : 0;
      }
    }
    for (const auto& place : trial.sites) {
      if (dynamic_cast<const LoraDelta*>(place.delta.get()) == nullptr) {
        continue;
      }
      const size_t before = met;
      for (const auto& part : parts_) {
        met += part.delta_at<LoraDelta>(place) != nullptr ? 1 : 0;
      }
      const bool is_half = !attention_of(place).empty() ||
          place.parameter == "out_proj.weight" ||
          place.parameter.find("in_proj_weight") != std::string::npos;
      if (met == before && !is_half) {
        return false;
      }
    }
    return met == sites;
  }

  /// f of the option's name.
  Tensor combine(
      const std::vector<Tensor>& tensors,
      const std::vector<double>& weights,
      const std::string& f) const {
    using functional::MajoritySign;
    const double density = options_.density().value_or(1.0);
    const auto sign = options_.majority_sign_method() == "total"
        ? MajoritySign::total
        : MajoritySign::frequency;
    return f == "ties" ? functional::ties(tensors, weights, density, sign)
        : f == "dare_linear"
        ? functional::dare_linear(tensors, weights, density)
        : f == "dare_ties"
        ? functional::dare_ties(tensors, weights, density, sign)
        : f == "magnitude_prune"
        ? functional::magnitude_prune(tensors, weights, density)
        : functional::task_arithmetic(tensors, weights);
  }

  /// What the parts have at a place.
  struct Sources {
    std::vector<const LoraDelta*> deltas;
    std::vector<Tensor> A, B; // as a file has them
    std::vector<double> weights, scalings;
  };

  Sources sources_at(const PlannedSite& place, const LoraDelta& planned) const {
    Sources result;
    for (const auto& part : parts_) {
      const auto* delta = part.delta_at<LoraDelta>(place);
      if (delta == nullptr) {
        continue;
      }
      const auto layout = delta->config().layout;
      TORCH_CHECK(
          layout == planned.config().layout || layout == LoraLayout::blocks,
          "peft: at '",
          place.name,
          "' the adapters take the weight's numbers in different orders "
          "(fan_in_fan_out); they cannot be combined");
      const auto names = delta->file_tensors();
      Tensor A = delta->to_file(names[0].first, delta->lora_A.detach());
      Tensor B = delta->to_file(names[1].first, delta->lora_B.detach());
      if (delta->offset()) {
        std::tie(A, B) = delta->offset().under(A, B);
      }
      result.deltas.push_back(delta);
      result.A.push_back(std::move(A));
      result.B.push_back(std::move(B));
      result.weights.push_back(part.weight);
      result.scalings.push_back(part.state().scale * delta->config().scaling);
    }
    return result;
  }

  std::shared_ptr<LoraDelta> combined(
      const PlannedSite& place,
      const LoraDelta& planned) const {
    const torch::NoGradGuard no_grad;
    const Sources from = sources_at(place, planned);
    if (from.deltas.empty()) {
      return nullptr;
    }
    switch (combination_.on) {
      case Combination::On::ranks:
        return concatenated(from, planned);
      case Combination::On::product:
        return decomposed(from, planned, place.tensor.sizes());
      default:
        return summed(from, planned, place.name);
    }
  }

  std::shared_ptr<LoraDelta> summed(
      const Sources& from,
      const LoraDelta& planned,
      const std::string& name) const {
    std::vector<double> for_A, for_B;
    for (size_t i = 0; i < from.A.size(); ++i) {
      TORCH_CHECK(
          from.A.size() == 1 || !from.deltas[i]->offset(),
          "peft: '",
          options_.combination_type(),
          "' adds up factors, and at '",
          name,
          "' those of an adapter started as a part of the weight (PiSSA, "
          "OLoRA); combine by 'cat' or 'svd'");
      TORCH_CHECK(
          from.A[i].sizes() == from.A[0].sizes(),
          "peft: '",
          options_.combination_type(),
          "' adds up factors of one rank, and at '",
          name,
          "' the ranks are ",
          from.A[0].size(0),
          " and ",
          from.A[i].size(0),
          "; combine by 'cat' or 'svd'");
      const double scaled = from.weights[i] * from.scalings[i];
      for_B.push_back(std::sqrt(std::abs(scaled)));
      for_A.push_back(scaled < 0.0 ? -for_B.back() : for_B.back());
    }
    const Tensor A = combine(from.A, for_A, combination_.f);
    return lora_with_factors(
        planned, A, combine(from.B, for_B, combination_.f));
  }

  /// The parts' ranks side by side, in each group of a convolution; zeros up to
  /// the rank of the plan.
  static std::shared_ptr<LoraDelta> concatenated(
      const Sources& from,
      const LoraDelta& planned) {
    const int64_t groups = planned.config().groups;
    std::vector<Tensor> A, B;
    int64_t missing = planned.lora_A.size(0);
    for (size_t i = 0; i < from.A.size(); ++i) {
      const Tensor scaled = from.A[i] * from.weights[i] * from.scalings[i];
      A.push_back(scaled.unflatten(0, {groups, -1}));
      B.push_back(from.B[i]);
      missing -= scaled.size(0);
    }
    auto sizes = A[0].sizes().vec();
    sizes[1] = missing / groups;
    A.push_back(at::zeros(sizes, A[0].options()));
    sizes = B[0].sizes().vec();
    sizes[1] = missing / groups;
    B.push_back(at::zeros(sizes, B[0].options()));
    return lora_with_factors(
        planned, at::cat(A, 1).flatten(0, 1), at::cat(B, 1));
  }

  /// ΔW by the operators that PEFT takes: the order of its numbers in memory is
  /// the one in which DARE draws.
  static Tensor change(
      const LoraDelta& delta,
      const Tensor& A,
      const Tensor& B,
      double scaling,
      at::IntArrayRef sizes) {
    const auto& config = delta.config();
    if (config.layout != LoraLayout::convolution) {
      const Tensor product = at::matmul(B, A.flatten(1));
      const bool turned = config.layout == LoraLayout::transposed ||
          config.layout == LoraLayout::embedding;
      return (turned ? product.t() : product.reshape(sizes)) * scaling;
    }
    if (config.groups > 1) {
      return functional::lora_convolution_delta(
          delta.lora_A.detach(), B, scaling, config.groups, sizes);
    }
    if (sizes.size() == 4 && sizes[2] == 1 && sizes[3] == 1) {
      return at::matmul(B.flatten(1), A.flatten(1)).view(sizes) * scaling;
    }
    const std::vector<int64_t> zeros(sizes.size() - 2), ones(zeros.size(), 1);
    return at::convolution(
               A.transpose(0, 1), B, {}, ones, zeros, ones, false, zeros, 1)
               .transpose(0, 1) *
        scaling;
  }

  std::shared_ptr<LoraDelta> decomposed(
      const Sources& from,
      const LoraDelta& planned,
      at::IntArrayRef sizes) const {
    std::vector<Tensor> changes;
    for (size_t i = 0; i < from.deltas.size(); ++i) {
      changes.push_back(change(
          *from.deltas[i], from.A[i], from.B[i], from.scalings[i], sizes));
    }
    const int64_t groups = planned.config().groups;
    const Tensor sum = combine(changes, from.weights, combination_.f);
    auto [A, B] = leading_factors(
        decompose(
            as_matrices(sum, planned.config().layout, groups),
            options_.svd_full_matrices(),
            options_.svd_driver()),
        planned.lora_A.size(0) / groups);
    if (options_.svd_clamp()) {
      const Tensor high =
          at::cat({B.flatten(), A.flatten()}).quantile(*options_.svd_clamp());
      A = at::minimum(at::maximum(A, -high), high);
      B = at::minimum(at::maximum(B, -high), high);
    }
    return lora_with_factors(planned, {A, B});
  }

  /// What the parts add to a bias is one tensor, not two factors.
  std::shared_ptr<Delta> combined_bias(const PlannedSite& place) const {
    const torch::NoGradGuard no_grad;
    std::vector<Tensor> changes;
    std::vector<double> weights;
    for (const auto& part : parts_) {
      if (const auto* delta = part.delta_at<LoraBiasDelta>(place)) {
        changes.push_back(
            delta->effective(at::zeros_like(delta->bias), part.state().scale));
        weights.push_back(part.weight);
      }
    }
    const auto& planned = dynamic_cast<const LoraBiasDelta&>(*place.delta);
    Tensor sum = changes.empty()
        ? at::zeros_like(planned.bias)
        : combine(
              changes,
              weights,
              combination_.f.empty() ? "linear" : combination_.f);
    return std::make_shared<LoraBiasDelta>(
        sum.to(planned.bias.options()).set_requires_grad(true), 1.0);
  }

  const WeightedAdapters& parts_;
  const WeightedAdapterOptions& options_;
  const Network& network_;
  Combination combination_;
};

} // namespace detail

} // namespace peft
