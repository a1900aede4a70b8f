// Fine-tunes a sentence encoder to tell what kind of thing a definition defines.
//
// all-MiniLM-L6-v2 (22.6 M parameters) learns the 38 WordNet categories by a frozen probe, by BitFit and by
// LoRA. The best adapter is saved as Hugging Face files, loaded again, and merged. Without the real weights
// and data it makes small ones itself. `--help` lists the options; the results are in report.html.

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

struct Method {
  std::string name;
  std::string folder;
  std::string color;
  double learning_rate;
  std::function<peft::Adapter(Network&)> attach; // none: full fine-tuning
};

std::vector<Method> methods(bool full) {
  std::vector<Method> list{
      {"BitFit", "bitfit", "amber", 4e-3,
       [](Network& network) {
         return peft::attach(
             *network, peft::BitFitOptions().biases({"all"}).modules_to_save({"classifier"}));
       }},
      {"LoRA, query and value", "lora_query_value", "blue", 2e-3,
       [](Network& network) {
         return peft::attach(
             *network,
             peft::LoraOptions(8).alpha(16).targets({"query", "value"}).modules_to_save(
                 {"classifier"}));
       }},
      {"LoRA, all linear layers", "lora_all", "green", 2e-3,
       [](Network& network) {
         return peft::attach(
             *network,
             peft::LoraOptions(8)
                 .alpha(16)
                 .targets({"query", "key", "value", "dense"})
                 .modules_to_save({"classifier"}));
       }},
  };
  if (full) {
    list.push_back({"full fine-tuning", "", "violet", 2e-4, nullptr});
  }
  return list;
}

// ~~~~ the steps ~~~~

Task choose_task(const Arguments& arguments) {
  namespace fs = std::filesystem;
  const bool weights = fs::exists(fs::path(arguments.model) / "model.safetensors");
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
  fmt::print("This run uses a small network and sentences that it makes up itself: it shows the "
             "flow, its numbers mean nothing.\n");
  return made_up_task(fs::path(arguments.output) / "made_up_model", arguments.quick);
}

/// What a run leaves behind for the comparison after saving and loading.
struct Best {
  std::string name;
  std::filesystem::path folder;
  double accuracy = -1;
  torch::Tensor logits;
};

/// Trains one method with one seed. Returns false when Ctrl-C ended it.
bool run_method(
    const Method& method,
    const Task& task,
    const TrainOptions& options,
    const std::filesystem::path& adapters,
    MethodResult& result,
    Best& best) {
  auto network = make_network(task, options.seed);
  peft::Adapter adapter;
  auto parameters = network->parameters();
  if (method.attach) {
    adapter = method.attach(network);
    parameters = adapter.parameters();
  }
  auto training =
      train(network, parameters, task.data.train, task.padding, options, method.name);
  const auto folder = adapters / method.folder;
  if (method.attach) {
    peft::save(adapter, folder.string());
  }
  if (training.interrupted) {
    fmt::print(
        "\nStopped after {} steps. {}\n", training.losses.size(),
        method.attach ? "The adapter as it was then: " + folder.string() + " (peft::load reads it)"
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
  if (method.attach && score > best.accuracy) {
    best = {method.name, folder, score, logits};
  }
  return true;
}

/// Loads the best adapter into a fresh network, merges it, and compares at each step.
MergeCheck check_merge(const Task& task, const Best& best, uint64_t seed, int pairs) {
  MergeCheck check;
  check.adapter = best.name;
  auto network = make_network(task, seed + 1); // its own head is another one: the file brings the trained
  auto base = make_network(task, seed);

  peft::load(*network, best.folder.string());
  const auto loaded = predict(network, task.data.test, task.padding);
  check.reload_difference = (loaded - best.logits).abs().max().item<double>();

  peft::merge(*network);
  const auto merged = predict(network, task.data.test, task.padding);
  check.merge_difference = (merged - loaded).abs().max().item<double>();
  check.changed_predictions = merged.argmax(1).ne(loaded.argmax(1)).sum().item<int64_t>();

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

std::vector<Sample> samples_of(const Dataset& data, const torch::Tensor& logits, size_t count) {
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

int run(const Arguments& arguments) {
  const auto start = Clock::now();
  torch::set_num_threads(arguments.threads);
  catch_interrupts();
  const std::filesystem::path output(arguments.output);
  std::filesystem::create_directories(output);
  const auto task = choose_task(arguments);

  Report report;
  report.network_name = task.network_name;
  report.data_name = task.data_name;
  report.train_size = task.data.train.size();
  report.test_size = task.data.test.size();
  report.num_categories = task.data.categories.size();
  report.epochs = arguments.epochs;
  report.threads = arguments.threads;
  report.seeds = {arguments.seed};
  if (arguments.full) {
    report.seeds = {arguments.seed, arguments.seed + 1, arguments.seed + 2};
  }
  {
    auto network = make_network(task, arguments.seed);
    for (const auto& parameter : network->parameters()) {
      report.network_parameters += parameter.numel();
    }
  }
  fmt::print(
      "{}: {} parameters; {}: {} categories, {} texts to train on, {} to test\n\n",
      task.network_name, with_commas(report.network_parameters), task.data_name,
      report.num_categories, report.train_size, report.test_size);

  const auto test_labels = labels_of(task.data.test);
  const auto list = methods(arguments.full);
  report.methods.push_back({"frozen probe, tuned", "grey", 0, {}, {}});
  for (const auto& method : list) {
    report.methods.push_back({method.name, method.color, 0, {}, {}});
  }
  Best best;
  for (const auto seed : report.seeds) {
    auto& probe_result = report.methods[0];
    {
      auto network = make_network(task, seed);
      auto probe = tuned_probe(network, task.data, task.padding, seed, arguments.quick);
      if (interrupted()) {
        fmt::print("\nStopped before any adapter was trained.\n");
        return 130;
      }
      if (probe_result.accuracies.empty()) {
        probe_result.trainable = network->classifier->weight.numel() + network->classifier->bias.numel();
        probe_result.training = std::move(probe.training);
      }
      probe_result.accuracies.push_back(accuracy(probe.logits, test_labels));
    }
    TrainOptions options;
    options.epochs = arguments.epochs;
    options.seed = seed;
    for (size_t i = 0; i < list.size(); ++i) {
      options.learning_rate = list[i].learning_rate;
      const auto adapters =
          output / (seed == arguments.seed ? "adapters" : fmt::format("adapters_seed_{}", seed));
      if (!run_method(list[i], task, options, adapters, report.methods[i + 1], best)) {
        return 130;
      }
    }
  }

  report.merge = check_merge(task, best, arguments.seed, arguments.quick ? 20 : 60);
  report.samples = samples_of(task.data, best.logits, 12);
  report.total_seconds = seconds_since(start);
  write_report(report, output / "report.html");
  print_table(report);
  print_merge(report.merge);
  fmt::print(
      "\nadapter  {}\nreport   {}\n{:.0f} s in all\n",
      std::filesystem::absolute(best.folder).string(),
      std::filesystem::absolute(output / "report.html").string(), report.total_seconds);
  return 0;
}

} // namespace

int main(int argc, char** argv) {
  CLI::App app("Fine-tunes a sentence encoder on WordNet's categories with BitFit and LoRA.");
  Arguments arguments;
  app.add_option("--model", arguments.model, "folder with MiniLM's model.safetensors, vocab.txt, config.json");
  app.add_option("--wordnet", arguments.wordnet, "folder with WordNet's data.noun and data.verb");
  app.add_option("--output", arguments.output, "where adapters and report.html go")->capture_default_str();
  app.add_option("--seed", arguments.seed, "of the heads, the adapters and the order of texts")->capture_default_str();
  app.add_option("--epochs", arguments.epochs, "passes over the training texts (default 2, 3 with --full, 1 with --quick)");
  app.add_option("--threads", arguments.threads, "")->capture_default_str();
  app.add_flag("--full", arguments.full, "three seeds, and full fine-tuning as well");
  app.add_flag("--quick", arguments.quick, "a small part of the texts, to see that all of it works");
  app.add_flag("--made-up", arguments.made_up, "a small network and data made on the spot");
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
