#pragma once

#include <peft/core/adapted_weight.h>
#include <peft/detail/platform.h>
#include <peft/io/json.h>

#include <fmt/ranges.h>
#include <torch/ordered_dict.h>
#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

/// The safetensors format: eight bytes of little-endian header length, a JSON
/// header, then the tensors' bytes. What is valid follows the official
/// `safetensors` package; refused beyond that are keys given twice, and two
/// spellings of an entry that the package happens to let through (a list
/// instead of an object, a dtype that is not a string).

namespace peft {

namespace detail {

struct SafetensorsDtype {
  std::string_view name;
  size_t bits;
  /// Empty where LibTorch has no such type; such a tensor can be listed only.
  std::optional<torch::ScalarType> scalar_type;
};

/// Every dtype of the format, in the order in which the official writer lays
/// tensors out.
inline const std::array<SafetensorsDtype, 22>& safetensors_dtypes() {
  static const std::array<SafetensorsDtype, 22> dtypes{{
      {"U64", 64, torch::kUInt64},
      {"I64", 64, torch::kInt64},
      {"F64", 64, torch::kFloat64},
      {"C64", 64, torch::kComplexFloat},
      {"F32", 32, torch::kFloat32},
      {"U32", 32, torch::kUInt32},
      {"I32", 32, torch::kInt32},
      {"BF16", 16, torch::kBFloat16},
      {"F16", 16, torch::kFloat16},
      {"U16", 16, torch::kUInt16},
      {"I16", 16, torch::kInt16},
      {"F8_E5M2FNUZ", 8, torch::kFloat8_e5m2fnuz},
      {"F8_E4M3FNUZ", 8, torch::kFloat8_e4m3fnuz},
      {"F8_E8M0", 8, torch::kFloat8_e8m0fnu},
      {"F8_E4M3", 8, torch::kFloat8_e4m3fn},
      {"F8_E5M2", 8, torch::kFloat8_e5m2},
      {"I8", 8, torch::kInt8},
      {"U8", 8, torch::kUInt8},
      {"F6_E3M2", 6, std::nullopt},
      {"F6_E2M3", 6, std::nullopt},
      {"F4", 4, std::nullopt},
      {"BOOL", 8, torch::kBool},
  }};
  return dtypes;
}

/// One tensor of a file: what it is and where its bytes lie.
struct SafetensorsEntry {
  const SafetensorsDtype* dtype;
  std::vector<int64_t> shape;
  /// Offsets from the end of the header.
  uint64_t begin;
  uint64_t end;
};

constexpr uint64_t kSafetensorsMaxHeader = 100'000'000;

inline void check_little_endian() {
  const uint16_t one = 1;
  unsigned char first = 0;
  std::memcpy(&first, &one, 1);
  TORCH_CHECK(
      first == 1,
      "peft: safetensors files are little-endian, which this machine is not");
}

/// a * b, or nothing where 64 bits do not hold it.
inline std::optional<uint64_t> checked_multiply(uint64_t a, uint64_t b) {
  if (b != 0 && a > std::numeric_limits<uint64_t>::max() / b) {
    return std::nullopt;
  }
  return a * b;
}

/// A list of non-negative integers; `what()` names it in errors.
template <class What>
std::vector<uint64_t> read_sizes(
    const nlohmann::json& value,
    const What& what) {
  TORCH_CHECK(
      value.is_array(),
      what(),
      " must be a list of sizes, found ",
      value.type_name());
  std::vector<uint64_t> sizes;
  sizes.reserve(value.size());
  for (const auto& item : value) {
    TORCH_CHECK(
        item.is_number_unsigned(),
        what(),
        " must hold non-negative integers, found ",
        item.dump());
    sizes.push_back(item.get<uint64_t>());
  }
  return sizes;
}

/// Checks one member of the header on its own; `what()` names it in errors.
template <class What>
SafetensorsEntry read_entry(const nlohmann::json& value, const What& what) {
  TORCH_CHECK(
      value.is_object(),
      what(),
      " must be an object, found ",
      value.type_name());
  for (const char* field : {"dtype", "shape", "data_offsets"}) {
    TORCH_CHECK(value.contains(field), what(), " has no \"", field, '"');
  }

  const auto& dtype_name = value["dtype"];
  TORCH_CHECK(
      dtype_name.is_string(),
      what(),
      ": the dtype must be a string, found ",
      dtype_name.type_name());
  const auto& dtypes = safetensors_dtypes();
  const auto dtype = std::find_if(
      dtypes.begin(), dtypes.end(), [&](const SafetensorsDtype& known) {
        return known.name == dtype_name.get_ref<const std::string&>();
      });
  TORCH_CHECK(
      dtype != dtypes.end(),
      what(),
      " has the unknown dtype ",
      StrictJsonBuilder::quoted(dtype_name.get<std::string>()));

  const auto offsets = read_sizes(
      value["data_offsets"], [&] { return what() + ": data_offsets"; });
  TORCH_CHECK(
      offsets.size() == 2 && offsets[0] <= offsets[1],
      what(),
      ": data_offsets must be [begin, end], found ",
      value["data_offsets"].dump());

  SafetensorsEntry entry{&*dtype, {}, offsets[0], offsets[1]};
  std::optional<uint64_t> bits = 1;
  const auto shape =
      read_sizes(value["shape"], [&] { return what() + ": shape"; });
  for (const uint64_t size : shape) {
    TORCH_CHECK(
        size <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
        what(),
        ": the size ",
        size,
        " is more than a tensor can have");
    entry.shape.push_back(static_cast<int64_t>(size));
    bits = bits ? checked_multiply(*bits, size) : bits;
  }
  bits = bits ? checked_multiply(*bits, dtype->bits) : bits;
  TORCH_CHECK(
      bits,
      what(),
      ": the shape ",
      value["shape"].dump(),
      " overflows 64 bits");
  TORCH_CHECK(
      *bits % 8 == 0, what(), ": ", *bits, " bits do not fill whole bytes");
  TORCH_CHECK(
      *bits / 8 == entry.end - entry.begin,
      what(),
      ": dtype ",
      dtype->name,
      " and shape ",
      value["shape"].dump(),
      " take ",
      *bits / 8,
      " bytes, but data_offsets span ",
      entry.end - entry.begin);
  return entry;
}

} // namespace detail

/// A safetensors file, mapped into memory: opening reads the header only.
///
///     auto file = peft::SafetensorsFile::open("model.safetensors");
///     for (const auto& name : file.names()) {
///       std::cout << name << ' ' << file.shape(name) << '\n';
///     }
///     torch::Tensor weight = file.at("encoder.weight");
class SafetensorsFile {
 public:
  /// Maps and checks the file. Throws on everything that the format forbids and
  /// names the file, the tensor and what was found.
  static SafetensorsFile open(const std::string& path) {
    detail::check_little_endian();
    SafetensorsFile file;
    file.path_ = path;
    file.mapping_ = std::make_shared<detail::MappedFile>(path);
    file.read_header();
    return file;
  }

  /// Names in the order of their bytes in the file.
  const std::vector<std::string>& names() const {
    return names_;
  }

  bool contains(const std::string& name) const {
    return entries_.count(name) != 0;
  }

  /// The file's own notes, such as {"format": "pt"}.
  const std::map<std::string, std::string>& metadata() const {
    return metadata_;
  }

  /// The dtype as the format spells it, "BF16" say.
  std::string dtype_name(const std::string& name) const {
    return std::string(entry(name).dtype->name);
  }

  /// The dtype; an error for the few that LibTorch has no type for.
  torch::ScalarType dtype(const std::string& name) const {
    const auto& dtype = *entry(name).dtype;
    TORCH_CHECK(
        dtype.scalar_type,
        "peft: \"",
        path_,
        "\": tensor ",
        detail::StrictJsonBuilder::quoted(name),
        " has the dtype ",
        dtype.name,
        ", which LibTorch cannot hold");
    return *dtype.scalar_type;
  }

  torch::IntArrayRef shape(const std::string& name) const {
    return entry(name).shape;
  }

  /// The tensor, on the CPU. It shares the mapped bytes, and keeps them mapped,
  /// where they are aligned for its dtype; otherwise it is a copy. Writing to
  /// it never changes the file.
  torch::Tensor at(const std::string& name) const {
    const auto& found = entry(name);
    const auto options = torch::TensorOptions(dtype(name));
    if (found.begin == found.end) {
      return torch::empty(found.shape, options);
    }
    auto* bytes = data_ + found.begin;
    if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(dtype(name)) !=
        0) {
      auto copy = torch::empty(found.shape, options);
      std::memcpy(copy.data_ptr(), bytes, found.end - found.begin);
      return copy;
    }
    return torch::from_blob(
        bytes, found.shape, [mapping = mapping_](void*) {}, options);
  }

 private:
  SafetensorsFile() = default;

  const detail::SafetensorsEntry& entry(const std::string& name) const {
    const auto found = entries_.find(name);
    TORCH_CHECK(
        found != entries_.end(),
        "peft: \"",
        path_,
        "\" has no tensor ",
        detail::StrictJsonBuilder::quoted(name));
    return found->second;
  }

  void read_header() {
    const std::string where = '"' + path_ + '"';
    const std::string cannot = "peft: cannot read " + where + ": ";
    auto* bytes = mapping_->data();
    const uint64_t size = mapping_->size();
    TORCH_CHECK(
        size >= 8, cannot, size, " bytes are too few for a safetensors file");
    uint64_t length = 0;
    std::memcpy(&length, bytes, 8);
    TORCH_CHECK(
        length <= detail::kSafetensorsMaxHeader,
        cannot,
        "the header claims ",
        length,
        " bytes, more than the allowed ",
        detail::kSafetensorsMaxHeader,
        " (is this a safetensors file?)");
    TORCH_CHECK(
        length <= size - 8,
        cannot,
        "the header claims ",
        length,
        " bytes, but only ",
        size - 8,
        " follow (is the file cut off?)");
    data_ = bytes + 8 + length;

    const auto header = detail::parse_json(
        {reinterpret_cast<const char*>(bytes) + 8, length},
        where,
        /*exact_integers=*/false);
    TORCH_CHECK(
        header.is_object(),
        cannot,
        "the header must be an object, found ",
        header.type_name());
    for (const auto& item : header.items()) {
      if (item.key() == "__metadata__") {
        read_metadata(item.value(), cannot);
      } else {
        entries_.emplace(item.key(), detail::read_entry(item.value(), [&] {
                           return cannot + "tensor " +
                               detail::StrictJsonBuilder::quoted(item.key());
                         }));
      }
    }
    check_layout(cannot, size - 8 - length);
  }

  void read_metadata(const nlohmann::json& value, const std::string& cannot) {
    if (value.is_null()) {
      return;
    }
    TORCH_CHECK(
        value.is_object(),
        cannot,
        "__metadata__ must be an object, found ",
        value.type_name());
    for (const auto& item : value.items()) {
      TORCH_CHECK(
          item.value().is_string(),
          cannot,
          "__metadata__ must map strings to "
          "strings; ",
          detail::StrictJsonBuilder::quoted(item.key()),
          " is of type ",
          item.value().type_name());
      metadata_[item.key()] = item.value().get<std::string>();
    }
  }

  /// Names the tensors in order. They must cover the bytes after the header,
  /// each byte once.
  void check_layout(const std::string& cannot, uint64_t available) {
    using Named = std::pair<const std::string, detail::SafetensorsEntry>;
    std::vector<const Named*> ordered;
    for (const auto& named : entries_) {
      ordered.push_back(&named);
    }
    std::stable_sort(
        ordered.begin(), ordered.end(), [](const Named* l, const Named* r) {
          return std::tie(l->second.begin, l->second.end) <
              std::tie(r->second.begin, r->second.end);
        });
    uint64_t covered = 0;
    for (const Named* named : ordered) {
      const auto& [name, entry] = *named;
      const uint64_t begin = entry.begin;
      TORCH_CHECK(
          begin == covered,
          cannot,
          "tensor ",
          detail::StrictJsonBuilder::quoted(name),
          " begins at byte ",
          begin,
          ", but the one before it ends at ",
          covered,
          begin < covered ? " (they overlap)" : " (there is a hole)");
      covered = entry.end;
      names_.push_back(name);
    }
    TORCH_CHECK(
        covered == available,
        cannot,
        "the tensors take ",
        covered,
        " bytes, but ",
        available,
        " follow the header",
        covered > available ? " (is the file cut off?)" : "");
  }

  std::string path_;
  std::shared_ptr<detail::MappedFile> mapping_;
  std::byte* data_ = nullptr;
  std::map<std::string, detail::SafetensorsEntry> entries_;
  std::vector<std::string> names_;
  std::map<std::string, std::string> metadata_;
};

/// Every tensor of a file by name, on the CPU; see `SafetensorsFile::at`.
inline std::map<std::string, torch::Tensor> load_safetensors(
    const SafetensorsFile& file) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& name : file.names()) {
    tensors.emplace(name, file.at(name));
  }
  return tensors;
}
inline std::map<std::string, torch::Tensor> load_safetensors(
    const std::string& path) {
  return load_safetensors(SafetensorsFile::open(path));
}

using SafetensorsMetadata = std::map<std::string, std::string>;

namespace detail {

/// Writes all of save_safetensors(tensors, path, metadata) into `file`, which
/// the caller commits.
inline void write_safetensors(
    const std::vector<std::pair<std::string, torch::Tensor>>& tensors,
    const std::string& path,
    const SafetensorsMetadata& metadata,
    AtomicFile& file) {
  check_little_endian();

  struct Item {
    const std::string* name;
    const torch::Tensor* tensor;
    const SafetensorsDtype* dtype;

    uint64_t bytes() const {
      return static_cast<uint64_t>(tensor->numel()) * dtype->bits / 8;
    }
  };
  const auto& dtypes = safetensors_dtypes();
  std::vector<Item> items;
  std::set<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    const auto what = [&, &named = name] {
      return "peft: cannot save tensor " + StrictJsonBuilder::quoted(named) +
          " to \"" + path + "\": ";
    };
    TORCH_CHECK(
        name != "__metadata__", what(), "the format reserves that name");
    TORCH_CHECK(names.insert(name).second, what(), "the name is given twice");
    TORCH_CHECK(tensor.defined(), what(), "it is undefined");
    TORCH_CHECK(
        tensor.layout() == torch::kStrided,
        what(),
        "its layout is ",
        tensor.layout(),
        "; make it dense first");
    TORCH_CHECK(
        !tensor.is_meta(), what(), "it is on the meta device, without data");
    const auto dtype = std::find_if(
        dtypes.begin(),
        dtypes.end(),
        [type = tensor.scalar_type()](const SafetensorsDtype& known) {
          return known.scalar_type == type;
        });
    TORCH_CHECK(
        dtype != dtypes.end(),
        what(),
        "the format has no dtype for ",
        tensor.scalar_type());
    items.push_back({&name, &tensor, &*dtype});
  }
  std::sort(
      items.begin(), items.end(), [](const Item& left, const Item& right) {
        return std::tie(left.dtype, *left.name) <
            std::tie(right.dtype, *right.name);
      });

  // Throws for text that is not UTF-8.
  const auto quoted = [&](const std::string& text) {
    try {
      return nlohmann::json(text).dump();
    } catch (const nlohmann::json::exception&) {
      TORCH_CHECK(
          false,
          "peft: cannot save \"",
          path,
          "\": the text ",
          StrictJsonBuilder::quoted(text),
          " is not UTF-8");
    }
  };
  std::vector<std::string> members;
  if (!metadata.empty()) {
    std::vector<std::string> notes;
    for (const auto& [key, value] : metadata) {
      notes.push_back(quoted(key) + ':' + quoted(value));
    }
    members.push_back(
        fmt::format("\"__metadata__\":{{{}}}", fmt::join(notes, ",")));
  }
  uint64_t offset = 0;
  for (const auto& item : items) {
    const uint64_t end = offset + item.bytes();
    members.push_back(fmt::format(
        "{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
        quoted(*item.name),
        item.dtype->name,
        fmt::join(item.tensor->sizes(), ","),
        offset,
        end));
    offset = end;
  }
  auto header = fmt::format("{{{}}}", fmt::join(members, ","));
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  TORCH_CHECK(
      length <= kSafetensorsMaxHeader,
      "peft: cannot save \"",
      path,
      "\": the header takes ",
      length,
      " bytes, more than the allowed ",
      kSafetensorsMaxHeader);

  // Small tensors are gathered: a call to the system for each costs more.
  constexpr size_t kGathered = size_t{1} << 18;
  file.write(&length, 8);
  std::string gathered = std::move(header);
  for (const auto& item : items) {
    auto tensor = base(*item.tensor);
    if (!tensor.is_cpu() || !tensor.is_contiguous() || tensor.is_conj() ||
        tensor.is_neg()) {
      tensor = tensor.detach()
                   .to(torch::kCPU)
                   .resolve_conj()
                   .resolve_neg()
                   .contiguous();
    }
    const size_t bytes = item.bytes();
    if (gathered.size() + bytes > kGathered) {
      file.write(gathered);
      gathered.clear();
    }
    const auto* data = static_cast<const char*>(tensor.const_data_ptr());
    if (bytes > kGathered) {
      file.write(data, bytes);
    } else if (bytes > 0) {
      gathered.append(data, bytes);
    }
  }
  file.write(gathered);
}

} // namespace detail

/// Writes a safetensors file, byte for byte as Python's
/// `safetensors.torch.save_file` does. The file appears, or replaces an older
/// one, only when it is complete; on an error an older file is untouched.
///
/// Tensors may be on any device and of any strides. Each is written whole:
/// tensors that share memory are written once for every name, and a weight
/// with an adapter is written as its base (`peft::effective` gives the other).
/// Undefined, sparse, quantised and meta tensors, dtypes that the format lacks,
/// and repeated names are errors.
inline void save_safetensors(
    const std::vector<std::pair<std::string, torch::Tensor>>& tensors,
    const std::string& path,
    const SafetensorsMetadata& metadata = {{"format", "pt"}}) {
  detail::AtomicFile file(path);
  detail::write_safetensors(tensors, path, metadata, file);
  file.commit();
}

/// The same for `module.named_parameters()`, `named_buffers()`, or what
/// `load_safetensors` returned.
template <typename Tensor>
void save_safetensors(
    const torch::OrderedDict<std::string, Tensor>& tensors,
    const std::string& path,
    const SafetensorsMetadata& metadata = {{"format", "pt"}}) {
  save_safetensors(tensors.pairs(), path, metadata);
}
template <typename Order>
void save_safetensors(
    const std::map<std::string, torch::Tensor, Order>& tensors,
    const std::string& path,
    const SafetensorsMetadata& metadata = {{"format", "pt"}}) {
  save_safetensors(
      std::vector<std::pair<std::string, torch::Tensor>>(
          tensors.begin(), tensors.end()),
      path,
      metadata);
}

} // namespace peft
