#pragma once

// Any adapter that can be merged, as a LoRA: ΔW = W' - W by the method's own
// formula, and B A its best approximation of the chosen rank (HF PEFT's
// convert_to_lora, Eckart and Young 1936). What serves LoRA only (a server, a
// file format) can then serve LoKr, OFT, (IA)³, DoRA or full fine-tuning.

#include <peft/core/merge.h>
#include <peft/methods/lora/factors.h>
#include <peft/methods/lora/placement.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for convert_to_lora.
///
///   peft::ConvertToLoraOptions(16)                rank 16 everywhere
///   peft::ConvertToLoraOptions().energy(0.99)     as much as 99 % needs
struct ConvertToLoraOptions {
  ConvertToLoraOptions(int64_t rank = 8) : rank_(rank) {}

  /// The rank, or all that a smaller weight has. A convolution with groups
  /// rounds it up to a multiple of their number.
  TORCH_ARG(int64_t, rank);
  /// Instead of the rank: the least one, weight by weight, whose singular
  /// values have this share of the sum of squares, in (0, 1].
  TORCH_ARG(std::optional<double>, energy);
  /// Of the new adapter. Default: the old one's with "_lora" behind it.
  TORCH_ARG(std::string, name);
};

/// What convert_to_lora made. Energy is Σ σ² of the singular values that were
/// kept, over that of all.
struct LoraConversion {
  struct Site {
    std::string name;
    int64_t rank = 0;
    double energy = 1.0;
  };

  Adapter adapter;
  std::vector<Site> sites;
  double energy = 1.0; // of all sites together

  /// One line for each site and one for all.
  std::string report() const {
    size_t width = 5;
    for (const auto& site : sites) {
      width = std::max(width, site.name.size());
    }
    std::string text;
    for (const auto& site : sites) {
      text += fmt::format(
          "{:<{}}  r = {:<5} {:8.4f} % of the change\n",
          site.name,
          width,
          site.rank,
          100.0 * site.energy);
    }
    return text +
        fmt::format("{:<{}}  {:18.4f} %\n", "total", width, 100.0 * energy);
  }
};

namespace detail {

class LoraConverter {
 public:
  LoraConverter(
      const AdapterState& from,
      const ConvertToLoraOptions& options,
      const Network& network)
      : from_(from), options_(options), network_(network) {}

  Plan run(LoraConversion& result) {
    check();
    for (const auto& record : from_.sites) {
      changed_.insert(lock_site(record).get());
    }
    LoraOptions lora = placement();
    Plan plan =
        detail::plan(lora.init("empty"), network_, /*is_from_file=*/true);
    drop_tied(plan.sites);
    std::vector<PlannedSite> sites;
    std::vector<std::pair<std::string, int64_t>> ranks;
    double kept = 0.0, all = 0.0;
    for (auto& place : plan.sites) {
      const auto* meta = tag_of(place.tensor);
      const bool moves =
          meta != nullptr && changed_.erase(meta->site.get()) > 0;
      const auto* own = dynamic_cast<const LoraDelta*>(place.delta.get());
      if (own == nullptr) {
        if (moves) {
          take_value(dynamic_cast<TrainedCopy&>(*place.delta), *meta->site);
        }
      } else if (moves) {
        LoraConversion::Site site;
        place.delta = approximated(place, *meta->site, *own, site, kept, all);
        ranks.emplace_back(target_of(place), site.rank);
        result.sites.push_back(std::move(site));
      } else {
        continue; // the half of an attention that does not change
      }
      sites.push_back(std::move(place));
    }
    check_all_met();
    result.energy = all > 0.0 ? kept / all : 1.0;
    plan.sites = std::move(sites);
    join_attentions(plan.sites, ranks);
    int64_t r = 1;
    for (const auto& item : ranks) {
      r = std::max(r, item.second);
    }
    set_ranks(lora, ranks, options_.energy() ? r : options_.rank());
    plan.options = lora.init("kaiming");
    return plan;
  }

 private:
  void check() const {
    TORCH_CHECK_VALUE(
        options_.rank() > 0,
        "peft: the rank must be positive, got ",
        options_.rank());
    TORCH_CHECK_VALUE(
        !options_.energy() ||
            (*options_.energy() > 0.0 && *options_.energy() <= 1.0),
        "peft: energy is a share in (0, 1], got ",
        options_.energy().value_or(0));
    TORCH_CHECK(
        !from_.merged,
        "peft: adapter '",
        from_.name,
        "' is merged; unmerge() it before converting");
    for (const auto& record : from_.sites) {
      std::string obstacle = record.delta->decorated_merge_obstacle();
      if (obstacle.empty() && record.delta->transforms_output()) {
        obstacle = "it acts on the layer's output, not on its weight";
      }
      TORCH_CHECK(
          obstacle.empty() && !record.is_call_site,
          "peft: adapter '",
          from_.name,
          "' cannot be converted to LoRA at '",
          record.name,
          "': ",
          obstacle);
    }
  }

  /// The layer of a parameter, and its key there.
  std::pair<const Layer*, std::string> find(const std::string& path) const {
    for (const auto& layer : network_) {
      for (const auto& p : layer.parameters) {
        if (layer.path(p.first) == path) {
          return {&layer, p.first};
        }
      }
    }
    TORCH_CHECK(
        false, "peft: the model has no parameter '", path, "' any more");
    return {};
  }

  /// Modules that the adapter trains whole beside what it is made of: heads.
  std::vector<std::string> heads() const {
    std::map<const Layer*, size_t> copies;
    bool only_copies = true;
    for (const auto& record : from_.sites) {
      const auto* copy = dynamic_cast<const TrainedCopy*>(record.delta.get());
      only_copies = only_copies && copy != nullptr;
      if (copy != nullptr && !copy->rows()) {
        ++copies[find(record.parameters.front()).first];
      }
    }
    std::vector<std::string> result;
    for (const auto& [layer, count] : copies) {
      if (!only_copies && !layer->name.empty() &&
          count == layer->parameters.size()) {
        result.push_back(layer->name);
      }
    }
    std::sort(result.begin(), result.end());
    return result;
  }

  /// LoRA for the matrices, and what carries the rest: trained biases, and
  /// modules_to_save for norms.
  LoraOptions placement() const {
    std::vector<std::string> names, whole = heads();
    std::vector<const Layer*> layers;
    LoraOptions::Pattern groups;
    const auto each = [&](bool matrices, auto&& f) {
      for (const auto& record : from_.sites) {
        const auto [layer, key] = find(record.parameters.front());
        if (!is_inside(layer->name, whole) &&
            (lock_site(record)->sizes.size() >= 2) == matrices) {
          f(*layer, key);
        }
      }
    };
    each(true, [&](const Layer& layer, const std::string& key) {
      const bool main = key == "weight" || key == "in_proj_weight";
      const std::string name = !layer.parent_attention.empty()
          ? layer.parent_attention
          : main ? layer.name
                 : layer.path(key);
      if (std::find(names.begin(), names.end(), name) == names.end()) {
        names.push_back(name);
      }
      if (layer.groups > 1) {
        groups.emplace_back(
            "^" + exact_pattern(name), static_cast<double>(layer.groups));
      }
      layers.push_back(&layer);
    });
    TORCH_CHECK(
        !names.empty(),
        "peft: adapter '",
        from_.name,
        "', a ",
        from_.method,
        ", changes no matrix; a LoRA could hold none of it");
    std::string bias = "none";
    each(false, [&](const Layer& layer, const std::string& key) {
      const bool beside =
          std::find(layers.begin(), layers.end(), &layer) != layers.end();
      if (key != "bias") {
        TORCH_CHECK(
            !beside && !layer.name.empty(),
            "peft: adapter '",
            from_.name,
            "' changes '",
            layer.path(key),
            "', which a LoRA has no place for");
        if (!is_inside(layer.name, whole)) {
          whole.push_back(layer.name);
        }
      } else if (!beside) {
        bias = "all";
      } else if (bias == "none") {
        bias = "lora_only";
      }
    });
    return LoraOptions(1)
        .targets(exact_targets(names, network_))
        .rank_pattern(groups)
        .bias(bias)
        .modules_to_save(whole);
  }

  /// W' in float64, and W in `base`.
  Tensor changed_value(const Site& site, Tensor& base) const {
    base = base_of(tensor_of(site)).detach().to(at::kDouble);
    return folded(
        entries_of(
            site,
            [&](const AdapterState& adapter) { return &adapter == &from_; }),
        base);
  }

  void take_value(TrainedCopy& copy, const Site& site) const {
    const torch::NoGradGuard no_grad;
    Tensor base;
    copy.value.copy_(changed_value(site, base));
  }

  std::shared_ptr<LoraDelta> approximated(
      const PlannedSite& place,
      const Site& site,
      const LoraDelta& planned,
      LoraConversion::Site& report,
      double& kept,
      double& all) const {
    const torch::NoGradGuard no_grad;
    Tensor base;
    const Tensor change = changed_value(site, base) - base;
    TORCH_CHECK(
        at::isfinite(change).all().item<bool>(),
        "peft: adapter '",
        from_.name,
        "' gives '",
        place.name,
        "' values that are not finite");
    const int64_t groups = planned.config().groups;
    const auto parts =
        decompose(as_matrices(change, planned.config().layout, groups));
    const Tensor energy = parts.S.square().cumsum(1); // [groups, n]
    const Tensor total = energy.select(1, -1);
    int64_t rank = (options_.rank() + groups - 1) / groups;
    if (options_.energy()) {
      rank = 1 +
          (energy < (total * *options_.energy()).unsqueeze(1))
              .sum(1)
              .max()
              .item<int64_t>();
    }
    rank = std::min(rank, energy.size(1));
    const double own = total.sum().item<double>();
    const double own_kept = energy.select(1, rank - 1).sum().item<double>();
    kept += own_kept;
    all += own;
    report.name = place.name;
    report.rank = rank * groups;
    report.energy = own > 0.0 ? own_kept / own : 1.0;
    return lora_with_factors(planned, leading_factors(parts, rank));
  }

  /// A file has one rank for the two halves of an attention: the smaller is
  /// filled up with zeros.
  static void join_attentions(
      std::vector<PlannedSite>& sites,
      std::vector<std::pair<std::string, int64_t>>& ranks) {
    for (auto& place : sites) {
      auto delta = std::dynamic_pointer_cast<LoraDelta>(place.delta);
      if (!delta) {
        continue;
      }
      int64_t rank = 0;
      for (const auto& item : ranks) {
        rank =
            item.first == target_of(place) ? std::max(rank, item.second) : rank;
      }
      const int64_t missing = rank - delta->lora_A.size(0);
      if (missing > 0) {
        place.delta = lora_with_factors(
            *delta,
            at::constant_pad_nd(delta->lora_A.detach(), {0, 0, 0, missing}),
            at::constant_pad_nd(delta->lora_B.detach(), {0, missing}));
      }
    }
    for (auto& item : ranks) {
      for (const auto& other : ranks) {
        if (other.first == item.first) {
          item.second = std::max(item.second, other.second);
        }
      }
    }
  }

  void check_all_met() const {
    for (const auto& record : from_.sites) {
      TORCH_CHECK(
          changed_.count(lock_site(record).get()) == 0,
          "peft: adapter '",
          from_.name,
          "' changes '",
          record.parameters.front(),
          "', which a LoRA has no place for");
    }
  }

  const AdapterState& from_;
  const ConvertToLoraOptions& options_;
  const Network& network_;
  std::set<const Site*> changed_; // not met by the plan yet
};

} // namespace detail

/// Makes a LoRA that changes the weights as `adapter` does, as nearly as the
/// rank allows: exactly, up to rounding, where the rank suffices. For every
/// method that can be merged, on every layer that LoRA adapts; others are
/// refused with the method's own reason. Biases and heads that the adapter
/// trains are taken along (bias, modules_to_save); set_scale() counts.
///
///   auto lora = peft::convert_to_lora(adapter,
///   peft::ConvertToLoraOptions(16)); fmt::print("{}", lora.report());
///   peft::save(lora.adapter, "as_lora/");
///
/// The new adapter comes disabled and frozen beside the old one, with scaling
/// 1: detach() or disable() that and enable() this to use it. Decomposes in
/// float64.
inline LoraConversion convert_to_lora(
    const Adapter& adapter,
    const ConvertToLoraOptions& options = {}) {
  const std::string name =
      options.name().empty() ? adapter.name() + "_lora" : options.name();
  detail::check_adapter_name(name);
  const detail::AdapterState& from = *adapter.shared_state();
  const auto registry =
      std::dynamic_pointer_cast<detail::Registry>(from.registry.lock());
  TORCH_CHECK(
      registry,
      "peft: an adapter of a TorchScript module cannot be converted; load it "
      "onto a torch::nn module");
  for (const auto& other : registry->adapters) {
    TORCH_CHECK(
        other->name != name,
        "peft: the model already has an adapter named '",
        name,
        "'; set another name(...)");
  }
  LoraConversion result;
  const Network network = describe_network(*registry->host);
  result.adapter = detail::commit(
      *registry->host,
      name,
      detail::LoraConverter(from, options, network).run(result));
  result.adapter.set_trainable(false);
  result.adapter.disable();
  return result;
}

} // namespace peft
