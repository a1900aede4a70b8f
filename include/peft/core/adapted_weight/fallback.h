#pragma once

// Every other operator: views of a tagged tensor stay views of the base, writes
// reach the base, and whatever reads gets the value, built differentiably.

#include <peft/core/adapted_weight/keep.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace peft {

namespace detail {

template <class F>
void for_each_tensor(const c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    f(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& element : value.toListRef()) {
      if (element.isTensor()) {
        f(element.toTensor());
      }
    }
  }
}

template <class F>
c10::IValue map_tensors(const c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    return f(value.toTensor());
  }
  if (value.isList()) {
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& element : value.toListRef()) {
      list.push_back(
          element.isTensor() ? c10::IValue(f(element.toTensor())) : element);
    }
    return list;
  }
  return value;
}

inline bool holds_tag(const c10::IValue& value) {
  bool found = false;
  for_each_tensor(
      value, [&](const Tensor& t) { found = found || tag_of(t) != nullptr; });
  return found;
}

inline bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

/// Decides from the strides whether `view` of `parent` (both plain) is again
/// rows of the matrix or its transpose, and notes it in `tag`.
inline void
classify_view(const Tensor& parent, const Tensor& view, AdaptedMeta& tag) {
  const bool typed = view.scalar_type() == parent.scalar_type() &&
      view.layout() == parent.layout();
  if (!tag.matrix || !typed) {
    tag.matrix = false;
    return;
  }
  const auto offset = view.storage_offset() - parent.storage_offset();
  if (view.sizes() == parent.sizes() && view.strides() == parent.strides() &&
      offset == 0) {
    return; // an alias
  }
  tag.matrix = false;
  if (parent.dim() != 2 || view.dim() != 2) {
    return;
  }
  if (offset == 0 && view.size(0) == parent.size(1) &&
      view.size(1) == parent.size(0) && view.stride(0) == parent.stride(1) &&
      view.stride(1) == parent.stride(0)) {
    tag.matrix = true;
    tag.transposed = !tag.transposed;
    return;
  }
  // Rows of the matrix are columns of its transpose.
  const int64_t along = tag.transposed ? 1 : 0;
  const auto step = parent.stride(along);
  if (view.size(1 - along) != parent.size(1 - along) ||
      view.stride(1 - along) != parent.stride(1 - along) ||
      view.stride(along) != step || step <= 0 || offset < 0 ||
      offset % step != 0) {
    return;
  }
  const auto begin = offset / step;
  if (begin + view.size(along) <= parent.size(along)) {
    tag.matrix = true;
    tag.rows = {
        tag.rows.begin + begin, tag.rows.begin + begin + view.size(along)};
  }
}

/// The elements that as_strided(sizes, strides, offset) of `parent` picks, as
/// positions in parent.flatten(): strides are those of the base's memory, which
/// the value does not share.
inline Tensor strided_elements(
    const Tensor& parent,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t offset) {
  int64_t reach = 1;
  for (int64_t i = 0; i < parent.dim(); ++i) {
    reach += std::max<int64_t>(parent.size(i) - 1, 0) * parent.stride(i);
  }
  Tensor places = at::full({reach}, -1, at::kLong);
  places.as_strided(parent.sizes(), parent.strides(), 0)
      .copy_(at::arange(parent.numel()).view(parent.sizes()));
  int64_t last = offset - parent.storage_offset();
  const int64_t first = last;
  for (size_t i = 0; i < sizes.size(); ++i) {
    last += std::max<int64_t>(sizes[i] - 1, 0) * strides[i];
  }
  TORCH_CHECK(
      first >= 0 && last < reach,
      "peft: as_strided reaches beyond an adapted weight");
  Tensor picked = places.as_strided(sizes, strides, first).contiguous();
  TORCH_CHECK(
      picked.numel() == 0 || picked.min().item<int64_t>() >= 0,
      "peft: as_strided reaches beyond an adapted weight");
  return picked.to(parent.device());
}

/// Which matrix of the stack `parent` this `view` of it is, if it is one.
inline std::optional<int64_t> matrix_in_stack(
    const Tensor& parent,
    const Tensor& view) {
  if (parent.dim() != 3 || view.dim() != 2 || parent.numel() == 0 ||
      view.scalar_type() != parent.scalar_type()) {
    return std::nullopt;
  }
  const int64_t offset = view.storage_offset() - parent.storage_offset();
  const int64_t step = parent.stride(0);
  const int64_t index = step > 0 ? offset / step : 0;
  const bool is_one = offset >= 0 && index < parent.size(0) &&
      offset == index * step && view.sizes() == parent.sizes().slice(1) &&
      view.strides() == parent.strides().slice(1);
  return is_one ? std::make_optional(index) : std::nullopt;
}

/// A view operator on one tagged tensor: the result is a real view of the base
/// that carries the tag, so writes reach the base and nothing is built until
/// the value is needed. Returns false where the operator copied.
inline bool lazy_view(
    const c10::OperatorHandle& op,
    torch::jit::Stack* stack,
    size_t argument) {
  const size_t count = op.schema().arguments().size();
  std::vector<c10::IValue> inputs(stack->end() - count, stack->end());
  const Tensor self = inputs[argument].toTensor();
  const AdaptedMeta& meta = *tag_of(self);
  const Tensor parent = base_of(self);

  torch::jit::Stack outputs(inputs.begin(), inputs.end());
  outputs[argument] = parent;
  op.callBoxed(&outputs);
  bool aliases = true;
  for (const auto& output : outputs) {
    bool any = false;
    for_each_tensor(output, [&](const Tensor& o) {
      any = true;
      aliases = aliases && o.is_alias_of(parent);
    });
    aliases = aliases && any;
  }
  if (!aliases) {
    return false;
  }

  inputs[argument] = c10::IValue(); // the replay must not keep the tensor
  auto replay = [op, inputs, argument](const Tensor& e) {
    torch::jit::Stack s(inputs.begin(), inputs.end());
    s[argument] = e;
    op.callBoxed(&s);
    return s;
  };
  Tensor picked; // for as_strided: which elements, instead of a replay
  if (op.schema().name() == "aten::as_strided") {
    const Tensor& view = outputs[0].toTensor();
    picked = strided_elements(
        parent, view.sizes(), view.strides(), view.storage_offset());
  }
  const bool stored_transposed = !meta.view && meta.transposed;
  const Tensor root = meta.view ? meta.root
      : stored_transposed       ? parent.t()
                                : parent;
  const auto chain = meta.view;
  auto wrap = [&](const Tensor& output, size_t index, int64_t element) {
    if (output.is_same(parent)) {
      return self;
    }
    auto tag = same_tag(meta);
    classify_view(parent, output, *tag);
    tag->root = root;
    if (!chain) {
      tag->stack_index = matrix_in_stack(parent, output);
      if (tag->stack_index) { // which is made alone, and viewed from there
        tag->view = [](const Tensor& e) { return e; };
        remove_tag(output);
        set_tag(output, std::move(tag));
        return output;
      }
    }
    tag->view = [replay, chain, stored_transposed, picked, index, element](
                    const Tensor& e) {
      const Tensor before = chain ? chain(e) : stored_transposed ? e.t() : e;
      if (picked.defined()) {
        return before.reshape(-1)
            .index_select(0, picked.reshape(-1))
            .view(picked.sizes());
      }
      const c10::IValue result = replay(before)[index];
      return element < 0 ? result.toTensor()
                         : result.toListRef()[element].toTensor();
    };
    remove_tag(output);
    set_tag(output, std::move(tag));
    return output;
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    int64_t element = outputs[i].isTensor() ? -1 : 0;
    outputs[i] = map_tensors(outputs[i], [&](const Tensor& o) {
      return wrap(o, i, element < 0 ? element : element++);
    });
  }
  torch::jit::drop(*stack, count);
  for (auto& output : outputs) {
    stack->push_back(std::move(output));
  }
  return true;
}

/// Operators that only ask for the shape or the type.
inline bool reads_metadata(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::size",         "aten::sym_size",      "aten::stride",
      "aten::sym_stride",   "aten::numel",         "aten::sym_numel",
      "aten::dim",          "aten::is_complex",    "aten::is_floating_point",
      "aten::is_signed",    "aten::is_same_size",  "aten::is_contiguous",
      "aten::empty_like",   "aten::zeros_like",    "aten::ones_like",
      "aten::full_like",    "aten::rand_like",     "aten::randn_like",
      "aten::new_empty",    "aten::new_zeros",     "aten::new_ones",
      "aten::new_full",     "aten::result_type",   "aten::can_cast",
      "aten::_version",     "aten::is_leaf",       "aten::output_nr",
      "aten::is_inference", "aten::requires_grad_"};
  return names.count(name) != 0;
}

/// In-place changes of shape, under which an adapter would no longer fit. set_,
/// by which archives are loaded, is one when the sizes differ.
inline bool changes_shape(
    const c10::FunctionSchema& schema,
    c10::ArrayRef<c10::IValue> values) {
  const std::string& name = schema.name();
  if (name == "aten::set_") {
    std::vector<int64_t> sizes;
    for (size_t i = 1; i < values.size(); ++i) {
      const auto& argument = schema.arguments()[i].name();
      if (argument == "source" && values[i].isTensor()) {
        sizes = values[i].toTensor().sizes().vec();
      } else if (argument == "size") {
        sizes = values[i].toIntVector();
      }
    }
    return values[0].toTensor().sizes() != at::IntArrayRef(sizes);
  }
  static const std::unordered_set<std::string> names{
      "aten::t_",
      "aten::transpose_",
      "aten::swapaxes_",
      "aten::swapdims_",
      "aten::squeeze_",
      "aten::unsqueeze_",
      "aten::as_strided_",
      "aten::resize_",
      "aten::resize_as_",
      "aten::swap_"};
  return names.count(name) != 0;
}

/// Where a tensor carries an output transform: operators whose result is the
/// layer's output (a sum, where the tensor is a bias), and operators that
/// merely read it.
inline bool gives_output(const std::string& name, const Tensor& t) {
  static const std::unordered_set<std::string> names{
      "aten::convolution",
      "aten::conv_transpose1d",
      "aten::conv_transpose2d",
      "aten::conv_transpose3d",
      "aten::layer_norm"};
  const bool is_bias = tag_of(t)->site->sizes.size() == 1;
  return names.count(name) != 0 || (name == "aten::add" && is_bias);
}
inline bool only_reads(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::clone",
      "aten::copy_",
      "aten::equal",
      "aten::allclose",
      "aten::norm",
      "aten::isfinite",
      "aten::_to_copy"};
  return names.count(name) != 0 || reads_metadata(name);
}

inline void fallback(
    const c10::OperatorHandle& op,
    c10::DispatchKeySet,
    torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto& arguments = schema.arguments();
  const size_t count = arguments.size();
  const size_t first = stack->size() - count;

  size_t tagged = 0;
  bool writes_tagged = false;
  std::optional<size_t> viewed;
  std::vector<Tensor> written;
  Tensor output_at;
  for (size_t i = 0; i < count; ++i) {
    const c10::IValue& value = (*stack)[first + i];
    const bool writes = is_written(arguments[i]);
    if (writes) {
      for_each_tensor(value, [&](const Tensor& t) { written.push_back(t); });
    }
    if (!holds_tag(value)) {
      continue;
    }
    ++tagged;
    writes_tagged = writes_tagged || writes;
    if (!writes && arguments[i].alias_info() != nullptr && value.isTensor()) {
      viewed = i;
    }
    for_each_tensor(value, [&](const Tensor& t) {
      auto* meta = tag_of(t);
      if (meta != nullptr && meta->site->has_output() &&
          !participants(*meta->site, root_of(t, *meta), /*outputs=*/true)
               .empty()) {
        output_at = t;
      }
    });
  }
  TORCH_CHECK(
      !(writes_tagged &&
        changes_shape(schema, c10::ArrayRef<c10::IValue>(*stack).slice(first))),
      "peft: ",
      name,
      " would change the shape of an adapted weight in place; merge or detach "
      "the adapter first");

  if (writes_tagged && !reads_metadata(name)) {
    for (const Tensor& t : written) {
      refuse_write_while_merged(t);
    }
  }

  NoTagGuard guard(kAdaptedKey);

  bool returns_view = false;
  for (const auto& result : schema.returns()) {
    returns_view = returns_view ||
        (result.alias_info() != nullptr && !result.alias_info()->isWrite());
  }
  if (tagged == 1 && !writes_tagged && viewed && returns_view &&
      lazy_view(op, stack, *viewed)) {
    return;
  }

  const bool is_output =
      output_at.defined() && !writes_tagged && gives_output(name, output_at);
  TORCH_CHECK(
      !output_at.defined() || writes_tagged || is_output || only_reads(name),
      "peft: an adapter acts on this layer's output, and ",
      name,
      " does not say where that is; attach it to a layer that uses its weight "
      "and bias by linear, conv, layer_norm or +");

  std::vector<std::pair<Tensor, std::shared_ptr<Site>>> values;
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!holds_tag(value)) {
      continue;
    }
    if (is_written(arguments[i])) {
      if (!value.isTensor()) { // a list: its elements are written in place
        value = map_tensors(value, [](const Tensor& t) {
          return tag_of(t) == nullptr ? t : base_of(t);
        });
      }
      continue; // a tensor: writes land on the base, and it is returned as is
    }
    value = map_tensors(value, [&](const Tensor& t) -> Tensor {
      if (tag_of(t) == nullptr) {
        return t;
      }
      for (const Tensor& w : written) {
        if (w.defined() && w.is_alias_of(t)) {
          return base_of(t); // w.mul_(w) must not write the delta into w
        }
      }
      if (i < 2 && (name == "aten::mul" || name == "aten::add") &&
          differs_by_row(t)) {
        const c10::IValue& other = (*stack)[first + 1 - i];
        if (other.isTensor() && other.toTensor().dim() > 1) {
          const Tensor& y = other.toTensor();
          return values_by_row(t, y, y.dim() - 1);
        }
      }
      if (reads_metadata(name)) {
        return base_of(t);
      }
      const AdaptedMeta& meta = *tag_of(t);
      values.emplace_back(value_of(t, meta, {/*may_keep=*/true}), meta.site);
      return values.back().first;
    });
  }
  op.callBoxed(stack);
  for (const auto& result : c10::ArrayRef<c10::IValue>(*stack).slice(first)) {
    for_each_tensor(result, [&](const Tensor& t) {
      for (const auto& [value, site] : values) {
        if (t.defined() && t.is_alias_of(value)) {
          site->kept.drop(); // the caller may write to it
        }
      }
    });
  }
  if (is_output) {
    Tensor y = stack->back().toTensor();
    stack->back() = apply_outputs(output_at, std::move(y));
  }
}

} // namespace detail

} // namespace peft
