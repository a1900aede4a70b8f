#include "test.h"

#include <peft/io/safetensors.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <utility>
#include <vector>

#if PEFT_POSIX
#include <sys/resource.h>
#endif

namespace test_safetensors {

namespace {

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  REQUIRE(file);
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

/// A file with the given header and `size` zero bytes of data.
std::string with_header(const std::string& header, size_t size) {
  const uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(size, '\0');
}

/// 0, 1, 2, ... as make_safetensors.py writes them.
torch::Tensor pattern(torch::ScalarType dtype, std::vector<int64_t> shape) {
  auto values = torch::arange(c10::multiply_integers(shape), torch::kFloat);
  if (dtype == torch::kBool) {
    values = values.remainder(2);
  }
  return values.to(dtype).reshape(shape);
}

size_t files_in(const TemporaryDirectory& folder) {
  std::filesystem::directory_iterator entries(folder.path());
  return static_cast<size_t>(std::distance(begin(entries), end(entries)));
}

using Named = std::vector<std::pair<std::string, torch::Tensor>>;

const Named& every_dtype() {
  static const Named tensors{
      {"bool", pattern(torch::kBool, {3})},
      {"u8", pattern(torch::kUInt8, {3})},
      {"i8", pattern(torch::kInt8, {3})},
      {"i16", pattern(torch::kInt16, {3})},
      {"u16", pattern(torch::kUInt16, {3})},
      {"i32", pattern(torch::kInt32, {3})},
      {"u32", pattern(torch::kUInt32, {3})},
      {"i64", pattern(torch::kInt64, {3})},
      {"u64", pattern(torch::kUInt64, {3})},
      {"f16", pattern(torch::kFloat16, {3})},
      {"bf16", pattern(torch::kBFloat16, {3})},
      {"f32", pattern(torch::kFloat32, {3})},
      {"f64", pattern(torch::kFloat64, {3})},
      {"c64", pattern(torch::kComplexFloat, {3})},
      {"f8_e4m3", pattern(torch::kFloat8_e4m3fn, {3})},
      {"f8_e5m2", pattern(torch::kFloat8_e5m2, {3})},
      {"f8_e4m3fnuz", pattern(torch::kFloat8_e4m3fnuz, {3})},
      {"f8_e5m2fnuz", pattern(torch::kFloat8_e5m2fnuz, {3})},
  };
  return tensors;
}

const Named& every_shape() {
  static const Named tensors{
      {"scalar", torch::tensor(2.5f)},
      {"empty", torch::empty({0, 4})},
      {"z", pattern(torch::kFloat, {2, 3})},
      {"a.weight", pattern(torch::kFloat, {2, 2})},
      {"quote \" slash \\ tab \t bell \a del \x7f ü 字 😀",
       pattern(torch::kLong, {2})},
      {"byte", pattern(torch::kByte, {3})},
  };
  return tensors;
}

} // namespace

TEST_CASE("safetensors files from Python are read", "[safetensors]") {
  for (const auto& [path, expected] :
       {std::make_pair("safetensors/dtypes.safetensors", every_dtype()),
        std::make_pair("safetensors/shapes.safetensors", every_shape())}) {
    const auto file = peft::SafetensorsFile::open(golden(path));
    REQUIRE(file.names().size() == expected.size());
    for (const auto& [name, tensor] : expected) {
      INFO(name);
      REQUIRE(file.contains(name));
      REQUIRE(file.dtype(name) == tensor.scalar_type());
      REQUIRE(file.shape(name) == tensor.sizes());
      REQUIRE(equal_bits(file.at(name), tensor));
    }
  }
  const auto shapes =
      peft::SafetensorsFile::open(golden("safetensors/shapes.safetensors"));
  REQUIRE(
      shapes.metadata() ==
      peft::SafetensorsMetadata{{"note", "line\nbreak \"ü\""}});
  REQUIRE(shapes.dtype_name("byte") == "U8");
  // In the order of the bytes: eight-byte types first, then by name.
  REQUIRE(shapes.names().front() == every_shape()[4].first);
  REQUIRE(shapes.names().back() == "byte");
  REQUIRE(contains(
      error_of([&] { shapes.at("a.bias"); }), "has no tensor \"a.bias\""));
}

TEST_CASE("safetensors files equal Python's byte for byte", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "written.safetensors";
  const auto same = [&](const std::string& name) {
    return read_bytes(path) == read_bytes(golden("safetensors/" + name));
  };
  peft::save_safetensors(every_dtype(), path);
  REQUIRE(same("dtypes.safetensors"));
  peft::save_safetensors(every_shape(), path, {{"note", "line\nbreak \"ü\""}});
  REQUIRE(same("shapes.safetensors"));
  peft::save_safetensors({{"one", torch::ones(1)}}, path, {});
  REQUIRE(same("no_metadata.safetensors"));
  peft::save_safetensors(Named{}, path, {});
  REQUIRE(same("nothing.safetensors"));
  // What was loaded is written again as it was.
  const auto dtypes = golden("safetensors/dtypes.safetensors");
  peft::save_safetensors(peft::load_safetensors(dtypes), path);
  REQUIRE(same("dtypes.safetensors"));
}

TEST_CASE(
    "the safetensors reader agrees with the Python package",
    "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "case.safetensors";
  const auto cases =
      nlohmann::json::parse(read_bytes(golden("safetensors/cases.json")));
  REQUIRE(cases.size() > 100);
  for (const auto& row : cases) {
    const auto name = row["name"].get<std::string>();
    INFO(name);
    write_bytes(path, from_hex(row["hex"]));

    const auto open_error =
        error_of([&] { peft::SafetensorsFile::open(path); });
    INFO(open_error);
    const bool should_open = row["opens"] && !row["libpeft_refuses"];
    REQUIRE(open_error.empty() == should_open);
    if (!should_open) {
      REQUIRE(contains(open_error, "case.safetensors"));
    }

    const auto load_error = error_of([&] { peft::load_safetensors(path); });
    INFO(load_error);
    if (name == "dtype F4") { // two elements a byte in LibTorch: not offered
      REQUIRE(contains(load_error, "F4, which LibTorch cannot hold"));
    } else {
      REQUIRE(load_error.empty() == (should_open && row["loads"]));
    }
    if (name == "misaligned" && load_error.empty()) {
      REQUIRE(peft::load_safetensors(path).at("b").item<float>() == 1.0f);
    }
  }
}

TEST_CASE("safetensors errors say what was found", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "bad.safetensors";
  const auto error_for = [&](const std::string& header, size_t size) {
    write_bytes(path, with_header(header, size));
    return error_of([&] { peft::load_safetensors(path); });
  };
  const auto entry = [](const std::string& fields) {
    return "{\"layer.weight\":{" + fields + "}}";
  };
  const std::vector<std::pair<std::string, std::string>> expected{
      {entry(R"("dtype":"F31","shape":[1],"data_offsets":[0,4])"),
       "tensor \"layer.weight\" has the unknown dtype \"F31\""},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"),
       "tensor \"layer.weight\": dtype F32 and shape [2] take 8 bytes, but "
       "data_offsets span 4"},
      {entry(R"("dtype":"F32","shape":[1.5],"data_offsets":[0,4])"),
       "tensor \"layer.weight\": shape must hold non-negative integers, found "
       "1.5"},
      {entry(R"("dtype":"F32","shape":[1])"),
       "tensor \"layer.weight\" has no \"data_offsets\""},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[4,8])"),
       "tensor \"layer.weight\" begins at byte 4, but the one before it ends "
       "at 0 (there is a hole)"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"),
       "the tensors take 8 bytes, but 4 follow the header (is the file cut "
       "off?)"},
      {R"({"a":1,"a":2})", "the key \"a\" is given twice"},
      {R"({"__metadata__":{"k":1}})", "\"k\" is of type number"},
      {R"({"a":)", "not valid JSON"},
      {"[]", "the header must be an object, found array"},
  };
  for (const auto& [header, text] : expected) {
    const auto error = error_for(header, 4);
    INFO(error);
    REQUIRE(contains(error, text));
    REQUIRE(contains(error, path));
  }
  REQUIRE(contains(
      error_of([&] { peft::load_safetensors(folder / "absent"); }),
      folder / "absent"));
  REQUIRE(contains(
      error_of([&] { peft::load_safetensors(folder.path().string()); }),
      folder.path().string()));
}

TEST_CASE("damaged safetensors files never crash", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "damaged.safetensors";
  size_t accepted = 0;
  size_t refused = 0;
  // Reads every byte of what still opens.
  const auto attempt = [&](const std::string& bytes) {
    write_bytes(path, bytes);
    try {
      for (const auto& [name, tensor] : peft::load_safetensors(path)) {
        const auto copy = tensor.clone();
        REQUIRE(copy.sizes() == tensor.sizes());
      }
      ++accepted;
    } catch (const c10::Error&) {
      ++refused;
    }
  };

  std::mt19937 random(7); // the same numbers on every machine
  const auto below = [&](size_t limit) { return random() % limit; };
  const std::string digits = "0123456789-.eE[]{},:\"\\ u\x80\xff\0nt";
  for (const char* name : {"dtypes", "shapes"}) {
    const auto good =
        read_bytes(golden(std::string("safetensors/") + name + ".safetensors"));
    for (size_t length = 0; length < good.size(); length += 3) {
      attempt(good.substr(0, length));
    }
    for (int i = 0; i < 1500; ++i) {
      auto bytes = good;
      // Mostly in the header; sometimes in its length.
      const size_t start = i % 20 == 0 ? 0 : 8;
      const size_t end = i % 20 == 0 ? 8 : good.size() - 60;
      for (size_t change = 0; change <= below(3); ++change) {
        const size_t at = start + below(end - start);
        switch (below(4)) {
          case 0:
            bytes[at] = static_cast<char>(below(256));
            break;
          case 1:
            bytes[at] = digits[below(digits.size())];
            break;
          case 2: // the header keeps its length, the rest moves
            bytes.erase(at, 1);
            bytes.insert(8, " ");
            break;
          default: // one digit for another
            while (bytes[at] < '0' || bytes[at] > '9') {
              bytes[at] = static_cast<char>('0' + below(10));
            }
        }
      }
      attempt(bytes);
    }
  }
  REQUIRE(refused > 2000);
  REQUIRE(accepted > 0);
}

TEST_CASE("a header of many tensors is read", "[safetensors]") {
  constexpr int64_t count = 20'000;
  TemporaryDirectory folder;
  const auto path = folder / "many.safetensors";
  const auto values = torch::arange(count, torch::kFloat);
  Named tensors;
  for (int64_t i = 0; i < count; ++i) {
    tensors.emplace_back("layer." + std::to_string(i), values[i]);
  }
  peft::save_safetensors(tensors, path);
  const auto file = peft::SafetensorsFile::open(path);
  REQUIRE(file.names().size() == count);
  REQUIRE(file.at("layer.12345").item<float>() == 12345.0f);
}

TEST_CASE("tensors keep their mapping and not their file", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  peft::save_safetensors({{"w", torch::ones({64, 64})}}, path);
  const auto before = read_bytes(path);

  auto loaded = peft::load_safetensors(path).at("w");
  loaded.add_(1);
  REQUIRE(read_bytes(path) == before);

  // The tensor lives on when its file is replaced, and can be what replaces it.
  peft::save_safetensors({{"w", loaded}}, path);
  REQUIRE(equal_bits(
      peft::load_safetensors(path).at("w"), torch::full({64, 64}, 2.0f)));
  std::filesystem::remove(path);
  REQUIRE(equal_bits(loaded, torch::full({64, 64}, 2.0f)));
}

TEST_CASE(
    "tensors of any strides are written as their values",
    "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "strided.safetensors";
  const auto base = pattern(torch::kFloat, {4, 6});
  const auto complex = torch::complex(base, base + 1);
  const Named tensors{
      {"transposed", base.t()},
      {"slice", base.slice(1, 1, 5, 2)},
      {"expanded", base[0].expand({3, 6})},
      {"shared", base},
      {"conjugate", complex.conj()},
      {"negative", torch::imag(complex.conj())},
      {"leaf", torch::ones({2, 2}, torch::requires_grad())},
  };
  peft::save_safetensors(tensors, path);
  const auto loaded = peft::load_safetensors(path);
  REQUIRE(loaded.size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    INFO(name);
    REQUIRE(loaded.at(name).is_contiguous());
    REQUIRE(torch::equal(loaded.at(name), tensor.detach()));
    REQUIRE_FALSE(loaded.at(name).requires_grad());
  }
}

TEST_CASE("a module's parameters are written by name", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "linear.safetensors";
  torch::nn::Linear linear(3, 2);
  peft::save_safetensors(linear->named_parameters(), path);
  const auto loaded = peft::load_safetensors(path);
  REQUIRE(loaded.size() == 2);
  REQUIRE(equal_bits(loaded.at("weight"), linear->weight.detach()));
  REQUIRE(equal_bits(loaded.at("bias"), linear->bias.detach()));
}

TEST_CASE("what cannot be saved leaves the old file", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  peft::save_safetensors({{"w", torch::ones(2)}}, path);
  const auto before = read_bytes(path);

  const auto ones = torch::ones(2);
  const std::vector<std::pair<Named, std::string>> refused{
      {{{"layer.w", torch::Tensor()}}, "\"layer.w\" to "},
      {{{"layer.w", torch::Tensor()}}, "it is undefined"},
      {{{"w", ones}, {"w", torch::ones(2, torch::kLong)}},
       "the name is given twice"},
      {{{"w", torch::eye(2).to_sparse()}}, "its layout is Sparse"},
      {{{"w", torch::empty({2}, torch::kMeta)}}, "the meta device"},
      {{{"w", torch::ones(2, torch::kComplexDouble)}},
       "no dtype for ComplexDouble"},
      {{{"w", torch::quantize_per_tensor(ones, 0.1, 0, torch::kQInt8)}},
       "no dtype for QInt8"},
      {{{"__metadata__", ones}}, "the format reserves that name"},
      {{{"w\xff", ones}}, "is not UTF-8"},
  };
  for (const auto& [tensors, text] : refused) {
    const auto error =
        error_of([&, &bad = tensors] { peft::save_safetensors(bad, path); });
    INFO(error);
    REQUIRE(contains(error, text));
    REQUIRE(contains(error, path));
    REQUIRE(read_bytes(path) == before);
    REQUIRE(files_in(folder) == 1);
  }
  REQUIRE(contains(
      error_of([&] {
        peft::save_safetensors({{"w", ones}}, folder / "no/such/folder");
      }),
      "no/such/folder"));
}

#if PEFT_POSIX
TEST_CASE("a write that fails half way leaves the old file", "[safetensors]") {
  TemporaryDirectory folder;
  const auto path = folder / "model.safetensors";
  peft::save_safetensors({{"w", torch::ones(2)}}, path);
  const auto before = read_bytes(path);

  // No file may grow beyond 64 KiB, as on a full disk.
  rlimit old_limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &old_limit) == 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit = old_limit;
  limit.rlim_cur = 64 * 1024;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  const auto error = error_of([&] {
    peft::save_safetensors({{"w", torch::ones({1024, 1024})}}, path);
  });
  ::setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, old_handler);

  INFO(error);
  REQUIRE(contains(error, path));
  REQUIRE(read_bytes(path) == before);
  REQUIRE(files_in(folder) == 1);
}
#endif

} // namespace test_safetensors
