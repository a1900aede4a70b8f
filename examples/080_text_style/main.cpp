// Teaches a small decoder one text and lets adapters write in the style of
// another.
//
// A LLaMA of 0.8 million parameters learns the King James Bible character by
// character; prefix tuning and LoRA then turn it to the Jargon File, and
// switching them off gives the Bible back. Both texts are Debian packages
// (bible-kjv-text, dict-jargon); any others will do. `--help` lists the
// options; the results are in report.html.

#include "report.h"
#include "sample.h"
#include "text.h"
#include "train.h"

#include <peft/methods/prefix.h>
#include <peft/peft.h>

#include <CLI/CLI.hpp>

#include <filesystem>
#include <functional>

namespace {

using namespace style;
namespace fs = std::filesystem;

constexpr int kInterrupted = 130; // what a shell reports after Ctrl-C
constexpr int kSkipped = 77;

struct Arguments {
  std::string text;
  std::string style;
  std::string base;
  std::string output = "text_style";
  int64_t base_steps = 0;
  int64_t adapter_steps = 0;
  uint64_t seed = 1;
  int threads = 2;
  bool quick = false;
  bool full = false;
  bool tune = false;
};

/// What --quick, the default and --full differ in.
struct Sizes {
  peft::models::LlamaOptions network;
  int64_t length = 256; ///< of a window
  int64_t batch_size = 4; ///< windows a step
  int64_t base_steps = 1200;
  int64_t adapter_steps = 600;
  int64_t windows = 128; ///< to judge by
  int64_t sample = 240; ///< characters
};

Sizes sizes_of(const Arguments& arguments) {
  Sizes sizes;
  sizes.network.vocab_size(kSymbols)
      .hidden_size(arguments.quick ? 32 : 128)
      .intermediate_size(arguments.quick ? 64 : 352)
      .num_hidden_layers(arguments.quick ? 2 : 4)
      .num_attention_heads(4)
      .initializer_range(0.06);
  if (arguments.quick) {
    sizes.length = 64;
    sizes.batch_size = 16;
    sizes.base_steps = 200;
    sizes.adapter_steps = 100;
    sizes.windows = 32;
    sizes.sample = 60;
  } else if (arguments.full) {
    sizes.base_steps *= 5;
    sizes.adapter_steps *= 5;
  }
  if (arguments.base_steps > 0) {
    sizes.base_steps = arguments.base_steps;
  }
  if (arguments.adapter_steps > 0) {
    sizes.adapter_steps = arguments.adapter_steps;
  }
  return sizes;
}

// ~~~~ the methods: the only lines that say what is trained ~~~~

/// Keys and values of 32 virtual characters in front of each layer's.
peft::Adapter prefix(Network& network) {
  return peft::attach(*network, peft::PrefixOptions(32));
}

/// On every projection of the layers.
peft::Adapter lora(Network& network) {
  const auto targets = peft::Targets::regex(".*_proj");
  return peft::attach(*network, peft::LoraOptions(4).alpha(8).targets(targets));
}

struct Method {
  std::string name;
  std::string folder;
  std::string color;
  double learning_rate; ///< --tune tries it, a third of it and three times it
  std::function<peft::Adapter(Network&)> attach; // none: full fine-tuning
};

std::vector<Method> methods(bool full) {
  std::vector<Method> list{
      {"prefix tuning", "prefix", "amber", 0.3, prefix},
      {"LoRA", "lora", "blue", 6e-3, lora}};
  if (full) {
    list.push_back({"full fine-tuning", "", "violet", 3e-3, nullptr});
  }
  return list;
}

// ~~~~ the steps ~~~~

struct Data {
  Text text; ///< what the base learns
  Text style; ///< what the adapters learn
};

int64_t count(const std::vector<torch::Tensor>& parameters) {
  int64_t sum = 0;
  for (const auto& parameter : parameters) {
    sum += parameter.numel();
  }
  return sum;
}

Network load_network(const Sizes& sizes, const fs::path& file) {
  Network network(sizes.network);
  peft::load_base(*network, file.string());
  network->eval();
  return network;
}

/// Learns the first text from nothing and writes `file`.
TrainResult train_base(
    const Sizes& sizes,
    const Text& text,
    uint64_t seed,
    const fs::path& file) {
  torch::manual_seed(seed);
  Network network(sizes.network);
  TrainOptions options;
  options.steps = sizes.base_steps;
  options.length = sizes.length;
  options.batch_size = sizes.batch_size;
  options.learning_rate = 2e-3;
  options.weight_decay = 0.1;
  options.seed = seed;
  auto result = train(
      network, network->parameters(), text.train, options, "the base learns");
  std::vector<std::pair<std::string, torch::Tensor>> weights;
  for (const auto& item : network->named_parameters()) {
    weights.emplace_back(item.key(), item.value().detach());
  }
  peft::save_safetensors(weights, file.string());
  return result;
}

/// A network that a method has turned to the new text.
struct Adapted {
  Network network{nullptr};
  peft::Adapter adapter; ///< empty for full fine-tuning
  int64_t trainable = 0;
  TrainResult training;
};

Adapted train_method(
    const Method& method,
    const Sizes& sizes,
    const Data& data,
    const fs::path& base,
    double learning_rate,
    uint64_t seed) {
  torch::manual_seed(seed);
  Adapted adapted;
  adapted.network = load_network(sizes, base);
  auto parameters = adapted.network->parameters();
  if (method.attach) {
    adapted.adapter = method.attach(adapted.network);
    parameters = adapted.adapter.parameters();
  }
  adapted.trainable = count(parameters);
  TrainOptions options;
  options.steps = sizes.adapter_steps;
  options.length = sizes.length;
  options.batch_size = sizes.batch_size;
  options.learning_rate = learning_rate;
  options.seed = seed;
  adapted.training = train(
      adapted.network, parameters, data.style.train, options, method.name);
  return adapted;
}

/// Prints how three learning rates of each method do on the validation part.
int tune(
    const std::vector<Method>& list,
    const Sizes& sizes,
    const Data& data,
    const fs::path& base,
    uint64_t seed) {
  for (const auto& method : list) {
    for (const double factor : {1.0 / 3, 1.0, 3.0}) {
      const auto rate = factor * method.learning_rate;
      auto adapted = train_method(method, sizes, data, base, rate, seed);
      if (adapted.training.interrupted) {
        return kInterrupted;
      }
      const auto result = score(
          adapted.network, data.style.validation, sizes.length, sizes.windows);
      fmt::print(
          "{:<18} learning rate {:<8.2g} {:.3f} ± {:.3f} bits per character of "
          "the validation part\n",
          method.name,
          rate,
          result.bits,
          result.error);
    }
  }
  return 0;
}

/// Scores and samples of a network as it is.
void judge(
    Network& network,
    const Sizes& sizes,
    const Data& data,
    const Report& report,
    Result& result) {
  result.on_style =
      score(network, data.style.test, sizes.length, sizes.windows);
  result.on_text = score(network, data.text.test, sizes.length, sizes.windows);
  result.samples =
      write_all(network, report.prompts, sizes.sample, report.seed);
}

/// Throws where an adapter does not do what it should: learn, change the text,
/// give the base's text back, write the same once saved and loaded.
void check(
    const Result& base,
    const Result& result,
    Adapted& adapted,
    const Sizes& sizes,
    const Report& report,
    const fs::path& base_file,
    const fs::path& folder) {
  TORCH_CHECK(
      result.training.mean_loss(true) < result.training.mean_loss(false),
      "peft: the training loss of ",
      result.name,
      " did not fall");
  TORCH_CHECK(
      result.on_style.bits < base.on_style.bits,
      "peft: ",
      result.name,
      " knows the new text no better than the base");
  TORCH_CHECK(
      result.samples != base.samples,
      "peft: ",
      result.name,
      " writes what the base writes");
  if (folder.empty()) {
    return;
  }
  const auto samples = [&](Network& network) {
    return write_all(network, report.prompts, sizes.sample, report.seed);
  };
  adapted.adapter.disable();
  TORCH_CHECK(
      samples(adapted.network) == base.samples,
      "peft: without its adapter the network writes another text than the "
      "base");
  adapted.adapter.enable();
  auto again = load_network(sizes, base_file);
  peft::load(*again, folder.string());
  TORCH_CHECK(
      samples(again) == result.samples,
      "peft: ",
      result.name,
      " writes another text once saved and loaded");
}

/// What the report says before anything was trained.
Report
describe(const Arguments& arguments, const Sizes& sizes, const Data& data) {
  Report report;
  report.text_name = data.text.name;
  report.style_name = data.style.name;
  report.network_parameters = count(Network(sizes.network)->parameters());
  report.text_size = data.text.train.numel();
  report.style_size = data.style.train.numel();
  report.windows = sizes.windows;
  report.length = sizes.length;
  report.seed = arguments.seed;
  report.threads = arguments.threads;
  report.note = arguments.quick
      ? "A quick run of a tiny network: this shows the flow, the numbers mean "
        "nothing."
      : "";
  report.prompts = {"The ", "And he ", "A man who "};
  return report;
}

int run(const Arguments& arguments) {
  if (!fs::exists(arguments.text) || !fs::exists(arguments.style)) {
    fmt::print(
        "Skipped: there are no texts. Name two with --text FILE --style FILE, "
        "plain or as Debian's bible-kjv-text has it.\n");
    return kSkipped;
  }
  const auto start = gloss::Clock::now();
  torch::set_num_threads(arguments.threads);
  gloss::catch_interrupts();
  const fs::path output(arguments.output);
  fs::create_directories(output);

  const auto sizes = sizes_of(arguments);
  const Data data{read_text(arguments.text), read_text(arguments.style)};
  const auto list = methods(arguments.full);
  auto report = describe(arguments, sizes, data);
  fmt::print(
      "{}: {} characters for the base to learn\n{}: {} for the methods\n"
      "a LLaMA of {} parameters\n\n{}{}",
      data.text.name,
      gloss::with_commas(report.text_size),
      data.style.name,
      gloss::with_commas(report.style_size),
      gloss::with_commas(report.network_parameters),
      report.note,
      report.note.empty() ? "" : "\n\n");

  // The base.
  report.results.emplace_back();
  report.results[0].name = "the base";
  report.results[0].color = "grey";
  report.results[0].trainable = report.network_parameters;
  fs::path base_file = arguments.base;
  if (base_file.empty()) {
    base_file = output / "base.safetensors";
    report.results[0].training =
        train_base(sizes, data.text, arguments.seed, base_file);
    if (report.results[0].training.interrupted) {
      fmt::print(
          "\nStopped. The base as it is now: --base {}\n",
          fs::absolute(base_file).string());
      return kInterrupted;
    }
  }
  if (arguments.tune) {
    return tune(list, sizes, data, base_file, arguments.seed);
  }
  auto base = load_network(sizes, base_file);
  judge(base, sizes, data, report, report.results[0]);

  // The methods.
  bool stopped = false;
  for (const auto& method : list) {
    auto adapted = train_method(
        method, sizes, data, base_file, method.learning_rate, arguments.seed);
    fs::path folder;
    if (method.attach) {
      folder = output / method.folder;
      peft::save(adapted.adapter, folder.string());
    }
    stopped = adapted.training.interrupted;
    if (stopped) {
      fmt::print(
          "\nStopped in {}.{}\n",
          method.name,
          method.attach
              ? " The adapter as it is now: " + fs::absolute(folder).string()
              : "");
      break;
    }
    Result result;
    result.name = method.name;
    result.color = method.color;
    result.trainable = adapted.trainable;
    result.training = adapted.training;
    judge(adapted.network, sizes, data, report, result);
    check(report.results[0], result, adapted, sizes, report, base_file, folder);
    if (method.folder == "prefix") {
      result.has_speed = true;
      result.speed =
          measure_speed(adapted.network, report.prompts[0], sizes.sample);
    }
    report.results.push_back(std::move(result));
  }

  report.total_seconds = gloss::seconds_since(start);
  write_report(report, output / "report.html");
  print_samples(report);
  print_table(report);
  print_speed(report);
  if (report.results.size() > 1) {
    fmt::print(
        "\nSaved and loaded, every adapter wrote the same text; switched off, "
        "the base's.\n");
  }
  fmt::print(
      "\nadapters {}\nreport   {}\n{:.0f} s in all\n",
      fs::absolute(output).string(),
      fs::absolute(output / "report.html").string(),
      report.total_seconds);
  return stopped ? kInterrupted : 0;
}

} // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IONBF, 0); // in step with the progress bar
  CLI::App app(
      "Teaches a small decoder one text and lets adapters write in the style "
      "of another.");
  Arguments arguments;
  app.add_option(
      "--text",
      arguments.text,
      "what the base learns: a plain text, or Debian's bible.data");
  app.add_option("--style", arguments.style, "what the adapters learn");
  app.add_option(
      "--base",
      arguments.base,
      "base.safetensors of an earlier run, to train adapters only");
  app.add_option(
         "--output", arguments.output, "where adapters and report.html go")
      ->capture_default_str();
  app.add_option(
         "--seed",
         arguments.seed,
         "of the weights, the windows and the samples")
      ->capture_default_str();
  app.add_option(
         "--base-steps", arguments.base_steps, "training steps of the base")
      ->check(CLI::Range(20, 1000000));
  app.add_option(
         "--adapter-steps", arguments.adapter_steps, "training steps a method")
      ->check(CLI::Range(20, 1000000));
  app.add_option("--threads", arguments.threads, "of LibTorch")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_flag(
      "--full", arguments.full, "five times the steps, and full fine-tuning");
  app.add_flag(
      "--quick",
      arguments.quick,
      "a tiny network, to see that all of it works");
  app.add_flag(
      "--tune",
      arguments.tune,
      "only compare learning rates, on a part kept for that");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(arguments);
  } catch (const c10::Error& error) {
    fmt::print(stderr, "{}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
  }
  return 1;
}
