#pragma once

// Sparse fine-tuning in the two files: for each parameter the places of its
// entries, ascending, in the row-major tensor ("encoder.query.weight.indices",
// int64 [k]), and what stands there ("encoder.query.weight.values", [k]).
// Full fine-tuning: the parameters by their own names.

#include <peft/io/formats/format.h>
#include <peft/methods/full_tuning.h>
#include <peft/methods/sparse_tuning.h>

#include <any>
#include <string>
#include <vector>

namespace peft {

namespace detail {

class SparseFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "SPARSE";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    SparseTuningOptions o;
    o.additive(config.get<bool>("additive", false));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    Plan result;
    result.method = type();
    result.options = o;
    plan_modules_to_save(network, o.modules_to_save(), result.sites);
    return result;
  }

  /// The entries are known from the tensors alone.
  void complete(Plan& plan, const Network& network, const NamedTensorMap& file)
      const override {
    const auto& o = std::any_cast<const SparseTuningOptions&>(plan.options);
    const std::string end = ".indices";
    SparseMask mask;
    for (const auto& layer : network) { // the sites in the network's order
      for (const auto& p : layer.parameters) {
        const auto path = layer.path(p.first);
        const auto found = find_in_file(file, path + end);
        if (found != file.end()) {
          check_indices(found->first, found->second);
          mask.set(path, found->second, p.second.sizes());
        }
      }
    }
    if (!mask.empty()) {
      auto sites = plan_sparse(mask, network, o.additive(), {});
      sites.insert(sites.end(), plan.sites.begin(), plan.sites.end());
      plan.sites = std::move(sites);
    }
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const SparseTuningOptions&>(adapter.options);
    config.set("additive", o.additive());
    config.set("modules_to_save", o.modules_to_save());
  }

 private:
  static void check_indices(const std::string& key, const Tensor& indices) {
    TORCH_CHECK(
        indices.scalar_type() == at::kLong && indices.dim() == 1 &&
            indices.numel() > 0,
        "peft: '",
        key,
        "' must hold int64 indices [k], got ",
        indices.toString(),
        indices.sizes());
    TORCH_CHECK(
        indices.slice(0, 1).gt(indices.slice(0, 0, -1)).all().item<bool>(),
        "peft: the indices in '",
        key,
        "' must ascend, each once; the file is damaged or not libpeft's");
  }
};

class FullTuningFormat final : public AdapterFormat {
 public:
  std::string type() const override {
    return "FULL";
  }

  Plan plan(const AdapterConfig& config, const Network& network)
      const override {
    FullTuningOptions o;
    o.targets(config.get<std::vector<std::string>>("target_modules", {}));
    o.exclude(config.get<std::vector<std::string>>("exclude_modules", {}));
    o.modules_to_save(
        config.get<std::vector<std::string>>("modules_to_save", {}));
    return detail::plan(o, network);
  }

  void write(const AdapterState& adapter, AdapterConfig& config)
      const override {
    const auto& o = std::any_cast<const FullTuningOptions&>(adapter.options);
    config.set("target_modules", o.targets());
    config.set("exclude_modules", o.exclude());
    config.set("modules_to_save", o.modules_to_save());
  }
};

} // namespace detail

} // namespace peft
