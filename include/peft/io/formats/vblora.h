#pragma once

// VB-LoRA as HF PEFT's config and file have it: the logits by layer and the
// bank once, below "base_model." alone. With save_only_topk_weights the indices
// of the k largest logits and all but the last of their weights stand in the
// place of the logits.

#include <peft/io/formats/tuner.h>
#include <peft/methods/vblora.h>

#include <algorithm>
#include <any>
#include <memory>
#include <string>
#include <utility>

namespace peft {

namespace detail {

class VbLoraFormat final : public TunerFormat<VbLoraOptions, VbLoraDelta> {
 public:
  std::string type() const override {
    return "VBLORA";
  }

  /// Which of the two forms it is, the file tells: PEFT reads logits in both.
  void complete(
      Plan& plan,
      const Network& /*network*/,
      const NamedTensorMap& file) const override {
    const auto& o = std::any_cast<const VbLoraOptions&>(plan.options);
    const bool is_cut =
        std::any_of(file.begin(), file.end(), [](const auto& item) {
          return item.first.find("_topk_indices") != std::string::npos;
        });
    if (!o.save_only_topk_weights() || !is_cut) {
      return;
    }
    std::shared_ptr<const VbLoraDelta> first;
    for (auto& site : plan.sites) {
      if (const auto* d = dynamic_cast<const VbLoraDelta*>(site.delta.get())) {
        auto cut = d->topk_only(first);
        first = first ? first : cut;
        site.delta = std::move(cut);
      }
    }
  }

  NamedTensorMap unpack(const NamedTensorMap& file, const Plan& plan)
      const override {
    NamedTensorMap bare; // of the bank's prefix, which the layers do not have
    for (const auto& [key, value] : file) {
      const bool is_shared =
          key.rfind(kBankPrefix, 0) == 0 && key.rfind(kKeyPrefix, 0) != 0;
      const auto name = is_shared ? key.substr(kBankPrefix.size()) : key;
      bare.emplace(file.count(name) == 0 ? name : key, value);
    }
    return AdapterFormat::unpack(bare, plan);
  }

  NamedTensorList pack(const AdapterState& adapter) const override {
    const torch::NoGradGuard no_grad;
    const auto& o = std::any_cast<const VbLoraOptions&>(adapter.options);
    NamedTensorList result;
    for (const auto& [key, tensor] : AdapterFormat::pack(adapter)) {
      if (key == kKeyPrefix + kVectorBank) {
        result.emplace_back(kBankPrefix + kVectorBank, tensor);
      } else if (o.save_only_topk_weights() && is_logits(key)) {
        const auto [weights, places] = topk_weights(tensor, o.topk());
        result.emplace_back(
            key + "_topk_indices", places.to(index_dtype(o.num_vectors())));
        result.emplace_back(
            key + "_topk_weights", weights.slice(-1, 0, -1).contiguous());
      } else {
        result.emplace_back(key, tensor);
      }
    }
    return result;
  }

 protected:
  void read_own(const AdapterConfig& config, VbLoraOptions& o) const override {
    o.r(config.get<int64_t>("r", 4));
    o.num_vectors(config.get<int64_t>("num_vectors", 256));
    o.vector_length(config.get<int64_t>("vector_length", 256));
    o.topk(config.get<int64_t>("topk", 2));
    o.dropout(config.get<double>("vblora_dropout", 0));
    o.init_vector_bank_bound(config.get<double>("init_vector_bank_bound", .02));
    o.init_logits_std(config.get<double>("init_logits_std", 0.1));
    o.save_only_topk_weights(config.get<bool>("save_only_topk_weights", false));
    o.bias(config.get<std::string>("bias", "none"));
  }
  void write_own(const VbLoraOptions& o, AdapterConfig& config) const override {
    config.set("r", o.r());
    config.set("num_vectors", o.num_vectors());
    config.set("vector_length", o.vector_length());
    config.set("topk", o.topk());
    config.set("vblora_dropout", o.dropout());
    config.set("init_vector_bank_bound", o.init_vector_bank_bound());
    config.set("init_logits_std", o.init_logits_std());
    config.set("save_only_topk_weights", o.save_only_topk_weights());
    config.set("bias", o.bias());
  }

 private:
  inline static const std::string kBankPrefix = "base_model.";

  static bool is_logits(const std::string& key) {
    const auto at = key.rfind("vblora_logits_"); // and A or B
    return at != std::string::npos && key.size() - at == 15;
  }
};

} // namespace detail

} // namespace peft
