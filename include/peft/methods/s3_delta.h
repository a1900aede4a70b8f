#pragma once

// S3Delta, or S3PET (Hu et al. 2022, arXiv:2206.07382): search, by gradients,
// for where to put which small module under a budget of parameters.
//
// Every place of every candidate method is a module, and what module i adds is
// multiplied by z_i, a sample of how likely it is to be there
// (functional/budget.h). Weights and structure train in turns
// (train/structure_search.h). What is attached in the end are the modules of
// the highest p that fit the budget, as new.
//
//   auto options = peft::S3DeltaOptions(20000).candidates(
//       {peft::LoraOptions(1).targets(Targets::all_linear()),
//        peft::BitFitOptions(), peft::LayerNormOptions()});
//   auto adapter = peft::attach(*model, options);
//   peft::StructureSearch search(adapter);
//   while (...) search.step(train_loss, validation_loss);
//   const auto structure = search.structure();
//   adapter.detach();
//   adapter = peft::attach(*model, structure); // an ordinary adapter

#include <peft/functional/budget.h>
#include <peft/methods/any_options.h>
#include <peft/methods/union.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace peft {

/// Options for the network of all candidates, which is searched.
struct S3DeltaOptions {
  S3DeltaOptions(int64_t budget) : budget_(budget) {}

  /// The most trained parameters of the final structure.
  TORCH_ARG(int64_t, budget);
  /// The methods to choose among. (Where two train one parameter of the
  /// network whole, the first has it.)
  TORCH_ARG(std::vector<AnyOptions>, candidates);
  /// β: how sharply p turns from 0 to 1.
  TORCH_ARG(double, beta) = 1;
  /// l and r, between which a sample is stretched.
  TORCH_ARG(double, stretch_low) = 0;
  TORCH_ARG(double, stretch_high) = 1;
  TORCH_ARG(functional::ShiftGradient, shift_gradient) =
      functional::ShiftGradient::detached;
};

/// A final structure: attachable options. `modules` are names that candidates()
/// lists, all of them of these candidates.
struct S3DeltaStructure {
  TORCH_ARG(std::vector<AnyOptions>, candidates);
  TORCH_ARG(std::vector<std::string>, modules);
};

/// One module that a search can choose.
struct CandidateModule {
  std::string name; // "lora: encoder.layer.0.query.lora_A.weight"
  std::string what; // "lora r=1"
  int64_t num_parameters = 0;
};

/// Multiplies what a delta adds by z.
class StructureDecoration final : public Decoration {
 public:
  StructureDecoration()
      : value_(register_buffer("z", at::ones({}, at::kDouble))) {}

  Factor factor_kind() const override {
    return Factor::number;
  }
  Tensor factor(const Tensor& /*x*/, int64_t /*part*/) const override {
    return sample_.defined() ? sample_ : value_;
  }

  /// z of the calls to come, which may carry the graph of a sample; an
  /// undefined tensor goes back to set_value's.
  void set_sample(Tensor z) {
    sample_ = std::move(z);
  }
  void set_value(double z) {
    torch::NoGradGuard no_grad;
    value_.fill_(z);
    sample_ = Tensor();
  }
  double value() const {
    return value_.item<double>();
  }

  std::string key() const override {
    return "structure";
  }
  std::shared_ptr<Decoration> copy() const override {
    auto result = std::make_shared<StructureDecoration>();
    result->set_value(value());
    return result;
  }
  std::string describe() const override {
    return "searched";
  }

 private:
  Tensor value_; // float64, a scalar
  Tensor sample_;
};

namespace detail {

inline const std::string kS3DeltaMethod = "S3DELTA";

/// AdapterState::options of the network of all candidates.
struct S3DeltaSearched {
  S3DeltaOptions options;
};

/// A module's sites, by their places in the plan.
struct ModuleSites {
  CandidateModule module;
  std::vector<size_t> sites;
};

/// The modules of a plan or of an adapter. A site that trains nothing (where a
/// parallel adapter adds what it computed) belongs to the one before it.
template <class Sites>
std::vector<ModuleSites> modules_of(const Sites& sites) {
  std::vector<ModuleSites> result;
  for (size_t i = 0; i < sites.size(); ++i) {
    const auto& site = sites[i];
    if (site.delta->parameters().empty() && !result.empty()) {
      result.back().sites.push_back(i);
      continue;
    }
    ModuleSites each;
    const auto tensors = site.delta->file_tensors();
    each.module.name = site.part + ": " + site.file_prefix +
        (site.file_prefix.empty() || tensors.empty() ? "" : ".") +
        (tensors.empty() ? "" : tensors.front().first);
    each.module.what = site.delta->describe();
    each.module.num_parameters = site.delta->num_trained();
    each.sites.push_back(i);
    result.push_back(std::move(each));
  }
  return result;
}

inline Plan plan_candidates(
    const std::vector<AnyOptions>& candidates,
    const Network& network) {
  TORCH_CHECK_VALUE(
      !candidates.empty(),
      "peft: S3Delta needs methods to choose among; name them by "
      "candidates({...})");
  Plan whole;
  whole.method = kS3DeltaMethod;
  for (const auto& candidate : candidates) {
    join(whole, candidate.plan(network));
  }
  return whole;
}

inline void check_budget(
    int64_t budget,
    const std::vector<ModuleSites>& modules) {
  const auto& smallest =
      std::min_element(
          modules.begin(),
          modules.end(),
          [](const auto& a, const auto& b) {
            return a.module.num_parameters < b.module.num_parameters;
          })
          ->module;
  TORCH_CHECK_VALUE(
      budget >= smallest.num_parameters,
      "peft: a budget of ",
      budget,
      " parameters is smaller than the smallest module, '",
      smallest.name,
      "' of ",
      smallest.num_parameters,
      "; give a larger budget or smaller candidates");
}

inline Plan plan(const S3DeltaOptions& options, const Network& network) {
  TORCH_CHECK_VALUE(
      options.beta() > 0 && std::isfinite(options.beta()),
      "peft: beta must be positive, got ",
      options.beta());
  TORCH_CHECK_VALUE(
      options.stretch_low() <= 0 && options.stretch_high() >= 1 &&
          std::isfinite(options.stretch_low()) &&
          std::isfinite(options.stretch_high()),
      "peft: a sample is stretched to an interval around [0, 1], got [",
      options.stretch_low(),
      ", ",
      options.stretch_high(),
      "]");
  Plan result = plan_candidates(options.candidates(), network);
  check_budget(options.budget(), modules_of(result.sites));
  for (auto& site : result.sites) {
    if (!site.delta->parameters().empty()) {
      site.delta->decorate(std::make_shared<StructureDecoration>());
    }
  }
  result.options = S3DeltaSearched{options};
  return result;
}

/// Leaves the modules of these names in a union's plan, and the parts that they
/// are of.
inline Plan keep_modules(Plan whole, const std::vector<std::string>& names) {
  TORCH_CHECK_VALUE(
      !names.empty(), "peft: a structure without modules trains nothing");
  std::vector<PlannedSite> kept;
  std::set<std::string> found;
  for (const auto& each : modules_of(whole.sites)) {
    if (std::find(names.begin(), names.end(), each.module.name) !=
        names.end()) {
      found.insert(each.module.name);
      for (const size_t i : each.sites) {
        kept.push_back(std::move(whole.sites[i]));
      }
    }
  }
  for (const auto& name : names) {
    TORCH_CHECK_VALUE(
        found.count(name) != 0,
        "peft: the structure names a module '",
        name,
        "', which its candidates do not have on this network");
  }
  for (const auto& site : kept) { // what it shares must be there
    site.delta->relink([&](const Delta* other) {
      const auto owner =
          std::find_if(kept.begin(), kept.end(), [&](const auto& each) {
            return each.delta.get() == other;
          });
      TORCH_CHECK_VALUE(
          owner != kept.end(),
          "peft: the structure leaves out the module that has what '",
          site.name,
          "' (",
          site.delta->describe(),
          ") shares with its whole method; keep the first of them too");
      return owner->delta;
    });
  }
  whole.sites = std::move(kept);
  auto& parts = std::any_cast<UnionParts&>(whole.options).parts;
  parts.erase(
      std::remove_if(
          parts.begin(),
          parts.end(),
          [&](const UnionPart& part) {
            return std::none_of(
                whole.sites.begin(), whole.sites.end(), [&](const auto& site) {
                  return site.part == part.key ||
                      site.part.compare(
                          0, part.key.size() + 1, part.key + ".") == 0;
                });
          }),
      parts.end());
  return whole;
}

inline Plan plan(const S3DeltaStructure& options, const Network& network) {
  return keep_modules(
      plan_candidates(options.candidates(), network), options.modules());
}

} // namespace detail

/// The modules that these options would search on `model`, which stays as it
/// is; nothing is trained or attached.
inline std::vector<CandidateModule> candidates(
    torch::nn::Module& model,
    const S3DeltaOptions& options) {
  std::vector<CandidateModule> result;
  const auto plan =
      detail::plan_candidates(options.candidates(), describe_network(model));
  for (auto& each : detail::modules_of(plan.sites)) {
    result.push_back(std::move(each.module));
  }
  return result;
}

/// Puts all candidates on `model`, for a StructureSearch, and freezes
/// everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const S3DeltaOptions& options,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(options, describe_network(model)));
}

/// Puts the modules of a structure on `model`, untrained, and freezes
/// everything else.
inline Adapter attach(
    torch::nn::Module& model,
    const S3DeltaStructure& structure,
    const std::string& name = "default") {
  return detail::commit(
      model, name, detail::plan(structure, describe_network(model)));
}

} // namespace peft
