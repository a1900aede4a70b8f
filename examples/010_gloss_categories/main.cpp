// Fine-tunes a sentence encoder to tell what kind of thing a definition
// defines.
//
// all-MiniLM-L6-v2 (22.6 M parameters) learns the 38 WordNet categories by a
// frozen probe, by BitFit and by LoRA. Every adapter is saved; the best LoRA is
// loaded again from its Hugging Face files and merged. Without the real weights
// and data it makes small ones itself. `--help` lists the options; the results
// are in report.html.

#include "merge_check.h"
#include "probe.h"
#include "report.h"
#include "task.h"
#include "train.h"

#include <peft/peft.h>

#include <CLI/CLI.hpp>

#include <functional>

namespace {

using namespace gloss;

struct Arguments {
  std::string model;
  std::string wordnet;
  std::string output = "gloss_categories";
  int64_t epochs = 0;
  uint64_t seed = 1;
  int threads = 2;
  bool quick = false;
  bool full = false;
  bool made_up = false;
};

// ~~~~ the methods: the only lines that say what is trained ~~~~

peft::Adapter bitfit(Network& network) {
  const auto options =
      peft::BitFitOptions().biases({"all"}).modules_to_save({"classifier"});
  return peft::attach(*network, options);
}

peft::Adapter lora(Network& network, const peft::Targets& targets) {
  const auto options =
      peft::LoraOptions(8).alpha(16).targets(targets).modules_to_save(
          {"classifier"});
  return peft::attach(*network, options);
}

peft::Adapter lora_query_value(Network& network) {
  return lora(network, {"query", "value"});
}

peft::Adapter lora_all(Network& network) {
  return lora(
      network, {"query", "key", "value", "intermediate.dense", "output.dense"});
}

struct Method {
  std::string name;
  std::string folder;
  std::string color;
  double learning_rate;
  std::function<peft::Adapter(Network&)> attach; // none: full fine-tuning
};

std::vector<Method> methods(bool full) {
  std::vector<Method> list{
      {"BitFit", "bitfit", "amber", 8e-3, bitfit},
      {"LoRA, query and value", "lora_qv", "blue", 4e-3, lora_query_value},
      {"LoRA, all linear layers", "lora_all", "green", 2e-3, lora_all}};
  if (full) {
    list.push_back({"full fine-tuning", "", "violet", 2e-4, nullptr});
  }
  return list;
}

// ~~~~ the steps ~~~~

Task choose_task(const Arguments& arguments) {
  namespace fs = std::filesystem;
  const bool weights =
      fs::exists(fs::path(arguments.model) / "model.safetensors");
  const bool data = fs::exists(fs::path(arguments.wordnet) / "data.noun");
  if (weights && data && !arguments.made_up) {
    return real_task(arguments.model, arguments.wordnet, arguments.quick);
  }
  if (!arguments.made_up) {
    fmt::print(
        "{} not found (--model DIR, --wordnet DIR).\n",
        !weights && !data ? "The MiniLM weights and WordNet were"
            : !weights    ? "The MiniLM weights were"
                          : "WordNet was");
  }
  fmt::print("This run makes up a small network and its sentences instead.\n");
  return made_up_task(
      fs::path(arguments.output) / "made_up_model", arguments.quick);
}

/// What a run leaves behind for the comparison after saving and loading.
struct Best {
  std::string name;
  std::filesystem::path folder;
  double accuracy = -1;
  torch::Tensor logits;
};

constexpr int kInterrupted = 130; // what a shell reports after Ctrl-C

/// Tunes the probe with one seed. Returns false when Ctrl-C ended it.
bool run_probe(
    const Task& task,
    uint64_t seed,
    bool quick,
    MethodResult& result) {
  auto network = make_network(task, seed);
  auto probe = tuned_probe(network, task.data, task.padding, seed, quick);
  if (interrupted()) {
    fmt::print("\nStopped before any adapter was trained.\n");
    return false;
  }
  if (result.accuracies.empty()) {
    const auto& head = network->classifier;
    result.trainable = head->weight.numel() + head->bias.numel();
    result.training = std::move(probe.training);
  }
  result.accuracies.push_back(
      accuracy(probe.logits, labels_of(task.data.test)));
  return true;
}

/// Trains one method with one seed. Returns false when Ctrl-C ended it.
bool run_method(
    const Method& method,
    const Task& task,
    const TrainOptions& options,
    const std::filesystem::path& adapters,
    MethodResult& result,
    Best& best) {
  if (interrupted()) {
    fmt::print("\nStopped. Finished adapters: {}\n", adapters.string());
    return false;
  }
  auto network = make_network(task, options.seed);
  peft::Adapter adapter;
  auto parameters = network->parameters();
  if (method.attach) {
    adapter = method.attach(network);
    parameters = adapter.parameters();
  }
  auto training = train(
      network, parameters, task.data.train, task.padding, options, method.name);
  const auto folder = adapters / method.folder;
  if (method.attach) {
    peft::save(adapter, folder.string());
  }
  if (training.interrupted) {
    fmt::print(
        "\nStopped after {} steps. {}\n",
        training.losses.size(),
        method.attach ? "The adapter as it was then: " + folder.string() +
                " (peft::load reads it)"
                      : "Full fine-tuning keeps no adapter.");
    return false;
  }
  const auto logits = predict(network, task.data.test, task.padding);
  const auto score = accuracy(logits, labels_of(task.data.test));
  if (result.accuracies.empty()) {
    result.trainable = 0;
    for (const auto& parameter : parameters) {
      result.trainable += parameter.numel();
    }
    result.training = std::move(training);
  }
  result.accuracies.push_back(score);
  // Hugging Face PEFT can read a LoRA; it has no BitFit.
  const bool shared_format = method.attach && adapter.method() == "LORA";
  if (shared_format && score > best.accuracy) {
    best = {method.name, folder, score, logits};
  }
  return true;
}

/// Loads the best adapter into a fresh network, merges it, compares each time.
MergeCheck
check_merge(const Task& task, const Best& best, uint64_t seed, int pairs) {
  MergeCheck check;
  check.adapter = best.name;
  // Another seed, another head: what the file brings is all there is.
  auto network = make_network(task, seed + 1);
  auto base = make_network(task, seed);

  peft::load(*network, best.folder.string());
  const auto loaded = predict(network, task.data.test, task.padding);
  check.reload_difference = (loaded - best.logits).abs().max().item<double>();

  peft::merge(*network);
  const auto merged = predict(network, task.data.test, task.padding);
  check.merge_difference = (merged - loaded).abs().max().item<double>();
  check.changed_predictions =
      merged.argmax(1).ne(loaded.argmax(1)).sum().item<int64_t>();

  torch::NoGradGuard no_grad;
  std::vector<size_t> rows(std::min<size_t>(32, task.data.test.size()));
  std::iota(rows.begin(), rows.end(), size_t{0});
  const auto batch = make_batch(task.data.test, rows, task.padding);
  const auto operators = operators_of(base, batch);
  check.operators = operators.size();
  check.same_operators = operators == operators_of(network, batch);
  check.ratio = paired_ratio(network, base, batch, pairs);
  return check;
}

std::vector<Sample>
samples_of(const Dataset& data, const torch::Tensor& logits, size_t count) {
  std::vector<Sample> samples;
  const auto guesses = logits.argmax(1);
  for (size_t i = 0; i < count; ++i) {
    const auto row = i * data.test.size() / count;
    const auto& example = data.test[row];
    const auto guess = guesses[static_cast<int64_t>(row)].item<int64_t>();
    samples.push_back(
        {example.text,
         data.categories[static_cast<size_t>(example.label)],
         data.categories[static_cast<size_t>(guess)]});
  }
  return samples;
}

/// What the report says before anything was trained.
Report describe(
    const Task& task,
    const std::vector<Method>& list,
    const Arguments& arguments) {
  Report report;
  report.network_name = task.network_name;
  report.data_name = task.data_name;
  report.train_size = task.data.train.size();
  report.test_size = task.data.test.size();
  report.num_categories = task.data.categories.size();
  report.note = !task.real ? "A made-up network and made-up texts: this shows "
                             "the flow, the numbers mean nothing."
      : arguments.quick
      ? "A quick run on a twentieth of the texts: too few to judge a method by."
      : "";
  report.epochs = arguments.epochs;
  report.threads = arguments.threads;
  for (uint64_t i = 0; i < (arguments.full ? 3 : 1); ++i) {
    report.seeds.push_back(arguments.seed + i);
  }
  for (const auto& parameter :
       make_network(task, arguments.seed)->parameters()) {
    report.network_parameters += parameter.numel();
  }
  report.methods.push_back({"frozen probe, tuned", "grey", 0, {}, {}});
  for (const auto& method : list) {
    report.methods.push_back({method.name, method.color, 0, {}, {}});
  }
  return report;
}

int run(const Arguments& arguments) {
  const auto start = Clock::now();
  torch::set_num_threads(arguments.threads);
  catch_interrupts();
  const std::filesystem::path output(arguments.output);
  std::filesystem::create_directories(output);

  const auto task = choose_task(arguments);
  const auto list = methods(arguments.full);
  auto report = describe(task, list, arguments);
  fmt::print(
      "{}: {} parameters\n{}: {} categories, {} texts to train on, {} to "
      "test\n\n",
      task.network_name,
      with_commas(report.network_parameters),
      task.data_name,
      report.num_categories,
      with_commas(static_cast<int64_t>(report.train_size)),
      with_commas(static_cast<int64_t>(report.test_size)));
  if (!report.note.empty()) {
    fmt::print("{}\n\n", report.note);
  }

  Best best;
  for (const auto seed : report.seeds) {
    if (!run_probe(task, seed, arguments.quick, report.methods[0])) {
      return kInterrupted;
    }
    for (size_t i = 0; i < list.size(); ++i) {
      TrainOptions options;
      options.epochs = arguments.epochs;
      options.learning_rate = list[i].learning_rate;
      options.seed = seed;
      const auto adapters = output / fmt::format("adapters_seed_{}", seed);
      auto& result = report.methods[i + 1];
      if (!run_method(list[i], task, options, adapters, result, best)) {
        return kInterrupted;
      }
    }
  }

  const int pairs = arguments.quick ? 20 : 60;
  report.merge = check_merge(task, best, arguments.seed, pairs);
  report.samples = samples_of(task.data, best.logits, 12);
  report.total_seconds = seconds_since(start);
  write_report(report, output / "report.html");
  print_table(report);
  print_merge(report.merge);
  fmt::print(
      "\nadapter  {}\nreport   {}\n{:.0f} s in all\n",
      std::filesystem::absolute(best.folder).string(),
      std::filesystem::absolute(output / "report.html").string(),
      report.total_seconds);
  return 0;
}

} // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IONBF, 0); // in step with the progress bar
  CLI::App app(
      "Fine-tunes a sentence encoder on WordNet's categories with BitFit and "
      "LoRA.");
  Arguments arguments;
  app.add_option(
      "--model",
      arguments.model,
      "folder with MiniLM's model.safetensors, vocab.txt, config.json");
  app.add_option(
      "--wordnet",
      arguments.wordnet,
      "folder with WordNet's data.noun and data.verb");
  app.add_option(
         "--output", arguments.output, "where adapters and report.html go")
      ->capture_default_str();
  app.add_option(
         "--seed",
         arguments.seed,
         "of the heads, the adapters and the order of texts")
      ->capture_default_str();
  app.add_option(
         "--epochs",
         arguments.epochs,
         "passes over the texts (default 2; 3 with --full, 1 with --quick)")
      ->check(CLI::Range(1, 1000));
  app.add_option("--threads", arguments.threads, "of LibTorch")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_flag(
      "--full", arguments.full, "three seeds, and full fine-tuning as well");
  app.add_flag(
      "--quick",
      arguments.quick,
      "a small part of the texts, to see that all of it works");
  app.add_flag(
      "--made-up",
      arguments.made_up,
      "a small network and data made on the spot");
  CLI11_PARSE(app, argc, argv);
  if (arguments.epochs <= 0) {
    arguments.epochs = arguments.full ? 3 : arguments.quick ? 1 : 2;
  }
  try {
    return run(arguments);
  } catch (const c10::Error& error) {
    fmt::print(stderr, "{}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
  }
  return 1;
}
