#pragma once

// An optimizer's state beside the adapter that it trains:
//
//   peft::save(adapter, "step-500");
//   peft::save_optimizer(optimizer, adapter, "step-500");
//   ...
//   auto adapter = peft::load(*model, "step-500");
//   torch::optim::AdamW optimizer(adapter.parameters(), 2e-3);
//   peft::load_optimizer(optimizer, adapter, "step-500");
//
// and the next step is, to the bit, the one that would have followed. torch's
// own archives number the parameters; here they go by the names they have in
// the adapter's file, so that a model with other parameters, or with adapters
// beside it, can go on. Options (the learning rate, betas) are the caller's.

#include <peft/core/adapter.h>
#include <peft/io/pretrained/fill.h>
#include <peft/io/safetensors.h>

#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

/// A number is kept as int64 [1]; an optional tensor is there for some options.
enum class StateField { number, tensor, optional };

/// What a parameter's state holds, by LibTorch's names, as a file has it.
using StateVisitor =
    c10::function_ref<void(const char* name, Tensor& value, StateField field)>;

inline void visit_number(StateVisitor f, const char* name, int64_t& number) {
  Tensor value = torch::tensor({number}, at::kLong);
  f(name, value, StateField::number);
  number = value.item<int64_t>();
}

inline void visit(torch::optim::SGDParamState& state, StateVisitor f) {
  f("momentum_buffer", state.momentum_buffer(), StateField::tensor);
}
template <class AdamState>
void visit_adam(AdamState& state, StateVisitor f) {
  visit_number(f, "step", state.step());
  f("exp_avg", state.exp_avg(), StateField::tensor);
  f("exp_avg_sq", state.exp_avg_sq(), StateField::tensor);
  f("max_exp_avg_sq", state.max_exp_avg_sq(), StateField::optional);
}
inline void visit(torch::optim::AdamParamState& state, StateVisitor f) {
  visit_adam(state, f);
}
inline void visit(torch::optim::AdamWParamState& state, StateVisitor f) {
  visit_adam(state, f);
}
inline void visit(torch::optim::RMSpropParamState& state, StateVisitor f) {
  visit_number(f, "step", state.step());
  f("square_avg", state.square_avg(), StateField::tensor);
  f("momentum_buffer", state.momentum_buffer(), StateField::optional);
  f("grad_avg", state.grad_avg(), StateField::optional);
}
inline void visit(torch::optim::AdagradParamState& state, StateVisitor f) {
  visit_number(f, "step", state.step());
  f("sum", state.sum(), StateField::tensor);
}

/// Those of the optional fields that a step with these options reads.
inline std::vector<std::string> read_fields(const torch::optim::SGDOptions&) {
  return {};
}
inline std::vector<std::string> read_fields(
    const torch::optim::AdagradOptions&) {
  return {};
}
inline std::vector<std::string> read_fields(
    const torch::optim::AdamOptions& options) {
  return options.amsgrad() ? std::vector<std::string>{"max_exp_avg_sq"}
                           : std::vector<std::string>{};
}
inline std::vector<std::string> read_fields(
    const torch::optim::AdamWOptions& options) {
  return options.amsgrad() ? std::vector<std::string>{"max_exp_avg_sq"}
                           : std::vector<std::string>{};
}
inline std::vector<std::string> read_fields(
    const torch::optim::RMSpropOptions& options) {
  std::vector<std::string> result;
  if (options.momentum() > 0) {
    result.emplace_back("momentum_buffer");
  }
  if (options.centered()) {
    result.emplace_back("grad_avg");
  }
  return result;
}

/// An optimizer of LibTorch's: its name, an empty state of its kind, what a
/// state holds, and what options read of it.
struct OptimizerKind {
  std::string name;
  std::unique_ptr<torch::optim::OptimizerParamState> (*make)();
  void (*visit)(torch::optim::OptimizerParamState&, StateVisitor);
  std::vector<std::string> (*read)(const torch::optim::OptimizerOptions&);
};

template <class State, class Options>
OptimizerKind kind_with(const std::string& name) {
  return {
      name,
      []() -> std::unique_ptr<torch::optim::OptimizerParamState> {
        return std::make_unique<State>();
      },
      [](torch::optim::OptimizerParamState& state, StateVisitor f) {
        visit(static_cast<State&>(state), f);
      },
      [](const torch::optim::OptimizerOptions& options) {
        return read_fields(static_cast<const Options&>(options));
      }};
}

inline OptimizerKind kind_of(const torch::optim::Optimizer& optimizer) {
  using namespace torch::optim;
  if (dynamic_cast<const SGD*>(&optimizer) != nullptr) {
    return kind_with<SGDParamState, SGDOptions>("SGD");
  }
  if (dynamic_cast<const Adam*>(&optimizer) != nullptr) {
    return kind_with<AdamParamState, AdamOptions>("Adam");
  }
  if (dynamic_cast<const AdamW*>(&optimizer) != nullptr) {
    return kind_with<AdamWParamState, AdamWOptions>("AdamW");
  }
  if (dynamic_cast<const RMSprop*>(&optimizer) != nullptr) {
    return kind_with<RMSpropParamState, RMSpropOptions>("RMSprop");
  }
  TORCH_CHECK(
      dynamic_cast<const Adagrad*>(&optimizer) != nullptr,
      "peft: the state of this optimizer cannot be kept by parameter; SGD, "
      "Adam, AdamW, RMSprop and Adagrad can, others with torch::save");
  return kind_with<AdagradParamState, AdagradOptions>("Adagrad");
}

/// A parameter that an optimizer has, and how it steps there.
struct OptimizedParameter {
  Tensor tensor;
  const torch::optim::OptimizerOptions& options;
};

/// The adapter's parameters that the optimizer has, by name.
inline std::map<std::string, OptimizedParameter> optimized_parameters(
    const torch::optim::Optimizer& optimizer,
    const Adapter& adapter) {
  const auto named = adapter.named_parameters();
  TORCH_CHECK(
      named.size() == adapter.parameters().size(),
      "peft: adapter '",
      adapter.name(),
      "' has ",
      adapter.parameters().size(),
      " parameters, and names for ",
      named.size(),
      "; its optimizer's state cannot be kept by name");
  std::map<std::string, OptimizedParameter> result;
  for (const auto& item : named) {
    for (const auto& group : optimizer.param_groups()) {
      for (const auto& p : group.params()) {
        if (p.is_same(item.value())) {
          result.emplace(item.key(), OptimizedParameter{p, group.options()});
        }
      }
    }
  }
  TORCH_CHECK(
      !result.empty(),
      "peft: the optimizer has no parameter of adapter '",
      adapter.name(),
      "'; it must be made from adapter.parameters() or the model's");
  return result;
}

} // namespace detail

/// Writes what the optimizer keeps of the adapter's parameters into
/// libpeft_optimizer.safetensors in `folder`, where the adapter has just been
/// saved (saving it again removes the file, which would no longer fit). PEFT
/// passes over it. Parameters of others in the same optimizer are left out.
inline void save_optimizer(
    torch::optim::Optimizer& optimizer,
    const Adapter& adapter,
    const std::string& folder) {
  namespace fs = std::filesystem;
  const auto kind = detail::kind_of(optimizer);
  const auto parameters = detail::optimized_parameters(optimizer, adapter);
  TORCH_CHECK(
      fs::exists(fs::path(folder) / detail::kConfigFile),
      "peft: '",
      folder,
      "' holds no adapter; save the adapter there first");
  detail::NamedTensorList tensors;
  for (const auto& [name, p] : parameters) {
    const auto found = optimizer.state().find(p.tensor.unsafeGetTensorImpl());
    if (found == optimizer.state().end()) {
      continue; // it has not made a step
    }
    const std::string start = name + ".";
    kind.visit(
        *found->second,
        [&](const char* item, Tensor& value, detail::StateField) {
          if (value.defined()) {
            tensors.emplace_back(start + item, value.detach());
          }
        });
  }
  save_safetensors(
      tensors,
      (fs::path(folder) / detail::kOptimizerFile).string(),
      {{"format", "pt"}, {"optimizer", kind.name}});
}

/// Gives the optimizer what save_optimizer kept in `folder`. The optimizer must
/// be of the same kind and have the adapter's parameters. All or nothing: names
/// and shapes that do not fit are one error.
inline void load_optimizer(
    torch::optim::Optimizer& optimizer,
    const Adapter& adapter,
    const std::string& folder) {
  namespace fs = std::filesystem;
  const auto kind = detail::kind_of(optimizer);
  const auto parameters = detail::optimized_parameters(optimizer, adapter);
  const auto path = (fs::path(folder) / detail::kOptimizerFile).string();
  TORCH_CHECK(
      fs::exists(path),
      "peft: '",
      folder,
      "' holds no ",
      detail::kOptimizerFile,
      "; save_optimizer writes it");
  const auto file = SafetensorsFile::open(path);
  const auto written = file.metadata().find("optimizer");
  TORCH_CHECK(
      written != file.metadata().end() && written->second == kind.name,
      "peft: '",
      path,
      "' holds the state of ",
      written == file.metadata().end() ? "no optimizer" : written->second,
      ", and this is ",
      kind.name);
  auto tensors = load_safetensors(file);

  std::vector<
      std::pair<void*, std::unique_ptr<torch::optim::OptimizerParamState>>>
      states;
  std::vector<std::string> problems, known;
  for (const auto& [name, parameter] : parameters) {
    const std::string start = name + ".";
    const Tensor p = parameter.tensor;
    const auto read = kind.read(parameter.options);
    auto state = kind.make();
    bool any = false;
    std::vector<std::string> missing;
    kind.visit(
        *state, [&](const char* item, Tensor& value, detail::StateField field) {
          const std::string key = start + item;
          const bool is_number = field == detail::StateField::number;
          known.push_back(key);
          const auto found = tensors.find(key);
          if (found == tensors.end()) {
            if (field != detail::StateField::optional ||
                std::find(read.begin(), read.end(), item) != read.end()) {
              missing.push_back(key + ": missing from the file");
            }
            return;
          }
          any = true;
          const Tensor kept = found->second;
          tensors.erase(found);
          const bool fits = is_number
              ? kept.numel() == 1 && kept.scalar_type() == at::kLong
              : kept.sizes() == p.sizes() && kept.is_floating_point();
          if (!fits) {
            problems.push_back(c10::str(
                key,
                ": ",
                kept.toString(),
                kept.sizes(),
                " beside a parameter of shape ",
                p.sizes()));
            return;
          }
          value = is_number ? kept : kept.to(p.device()).clone();
        });
    if (any) {
      problems.insert(problems.end(), missing.begin(), missing.end());
    }
    if (any) {
      states.emplace_back(p.unsafeGetTensorImpl(), std::move(state));
    }
  }
  for (const auto& item : tensors) {
    problems.push_back(
        item.first + ": the optimizer has no such parameter of the adapter" +
        detail::meant_by(item.first, known, "it has"));
  }
  TORCH_CHECK(
      problems.empty(),
      "peft: '",
      path,
      "' does not fit adapter '",
      adapter.name(),
      "' and its optimizer; nothing was loaded.",
      detail::listed(problems));
  for (auto& [key, state] : states) {
    optimizer.state()[key] = std::move(state);
  }
}

} // namespace peft
