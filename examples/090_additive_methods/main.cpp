// Every additive method on the task of examples/010: adapters, (IA)³, prompts,
// prefixes, CoDA and ladder side tuning, with LoRA and a frozen probe beside
// them.
//
// Each is trained, saved, loaded, disabled and taken off again; what must hold
// then is checked. `--help` lists the options; the table is in results.md, and
// in it a row as soon as its method is done.

#include "measure.h"
#include "results.h"

#include "../010_gloss_categories/probe.h"
#include "../010_gloss_categories/task.h"

#include <peft/peft.h>

#include <CLI/CLI.hpp>

#include <array>
#include <functional>
#include <optional>

namespace {

using namespace additive;
using namespace gloss;

struct Arguments {
  std::string model;
  std::string wordnet;
  std::string output = "additive_methods";
  std::vector<std::string> only;
  int64_t epochs = 0;
  uint64_t seed = 1;
  int threads = 2;
  bool quick = false;
  bool full = false;
  bool tune = false;
  bool made_up = false;
};

// ~~~~ the methods: the only lines that say what is trained ~~~~

struct Method {
  std::string name;
  std::string folder;
  double learning_rate; // of the adapter, the best that --tune tried
  std::function<peft::Adapter(Network&)> attach;
  bool caches = false; // what the frozen layers make, from epoch to epoch
};

/// The head trains beside every adapter, at the same rate.
constexpr double kHeadLearningRate = 4e-3;

template <class Options>
std::function<peft::Adapter(Network&)> with(const Options& options) {
  return [options](Network& network) {
    return peft::attach(
        *network, Options(options).modules_to_save({"classifier"}));
  };
}

const auto kLora =
    with(peft::LoraOptions(8).alpha(16).targets({"query", "value"}));

/// Widths are chosen to train about what LoRA trains, where that is a choice.
std::vector<Method> methods(int64_t tokens) {
  using namespace peft;
  return {
      {"LoRA, query and value", "lora", 4e-3, kLora},
      {"Houlsby", "houlsby", 4e-3, with(HoulsbyOptions(8))},
      {"Pfeiffer", "pfeiffer", 4e-3, with(PfeifferOptions(16))},
      {"parallel adapter", "parallel", 4e-3, with(ParallelAdapterOptions(16))},
      {"(IA)³", "ia3", 6e-2, with(Ia3Options())},
      {"prompt tuning",
       "prompt",
       3e-2,
       with(PromptOptions(tokens).init("vocab"))},
      {"P-tuning, MLP",
       "p_tuning",
       1.2e-2,
       with(PTuningOptions(tokens).encoder_hidden_size(64))},
      {"prefix tuning, MLP",
       "prefix",
       4e-3,
       with(PrefixOptions(tokens).prefix_projection(true).encoder_hidden_size(
           64))},
      {"P-tuning v2", "p_tuning_v2", 3e-2, with(PTuningV2Options(tokens))},
      {"CoDA, half the tokens",
       "coda",
       4e-3,
       with(CodaOptions().ratio(0.5).bottleneck(16))},
      {"ladder side tuning", "ladder", 1.2e-2, with(LadderOptions(8)), true}};
}

// ~~~~ the steps ~~~~

Task choose_task(const Arguments& arguments) {
  namespace fs = std::filesystem;
  const bool is_there = !arguments.made_up &&
      fs::exists(fs::path(arguments.model) / "model.safetensors") &&
      fs::exists(fs::path(arguments.wordnet) / "data.noun");
  if (!is_there) {
    fmt::print(
        "{}a small network and its sentences are made up, and the numbers mean "
        "nothing.\n",
        arguments.made_up
            ? ""
            : "No MiniLM weights or no WordNet (--model DIR, --wordnet DIR): ");
  }
  auto task = is_there
      ? real_task(arguments.model, arguments.wordnet, arguments.quick)
      : made_up_task(
            fs::path(arguments.output) / "made_up_model", arguments.quick);
  auto& train = task.data.train; // in random order
  if (arguments.quick) {
    train.resize(std::min<size_t>(train.size(), 64));
  } else if (!arguments.full) {
    train.resize(train.size() / 2);
  }
  return task;
}

/// The adapter's tensors and the head's.
std::array<std::vector<torch::Tensor>, 2> parts_of(
    const peft::Adapter& adapter) {
  std::array<std::vector<torch::Tensor>, 2> parts;
  for (const auto& item : adapter.named_parameters()) {
    const bool is_head = item.key().rfind("classifier.", 0) == 0;
    parts[is_head ? 1 : 0].push_back(item.value());
  }
  return parts;
}

int64_t count(const std::vector<torch::Tensor>& tensors) {
  int64_t sum = 0;
  for (const auto& t : tensors) {
    sum += t.numel();
  }
  return sum;
}

double mean(const std::vector<double>& values, size_t begin, size_t end) {
  return std::accumulate(
             values.begin() + static_cast<std::ptrdiff_t>(begin),
             values.begin() + static_cast<std::ptrdiff_t>(end),
             0.0) /
      static_cast<double>(end - begin);
}

TrainResult train_adapter(
    Network& network,
    const peft::Adapter& adapter,
    const Examples& examples,
    const Task& task,
    const TrainOptions& options,
    const std::string& title) {
  const auto [own, head] = parts_of(adapter);
  // There is no dropout here, and what ladder side tuning caches must be of
  // layers in this mode.
  network->eval();
  return train(
      network,
      std::vector<ParameterGroup>{
          {own, options.learning_rate}, {head, kHeadLearningRate}},
      examples,
      task.padding,
      options,
      title);
}

/// The rows of the batch that is measured: 32 texts of middling length.
std::vector<size_t> middle_rows(const Examples& examples) {
  std::vector<size_t> rows(examples.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  const auto batches = batches_by_length(examples, rows, 32);
  return batches[batches.size() / 2];
}

torch::Tensor logits_of(Network& network, const Batch& batch) {
  torch::NoGradGuard no_grad;
  return network->forward(batch.ids, batch.mask);
}

class Run {
 public:
  explicit Run(const Arguments& arguments)
      : arguments_(arguments),
        task_(choose_task(arguments)),
        base_(make_network(task_, arguments.seed)),
        rows_(middle_rows(task_.data.train)),
        batch_(make_batch(task_.data.train, rows_, task_.padding)) {
    for (auto& method : methods(task_.real ? 20 : 8)) {
      const auto& only = arguments.only;
      if (only.empty() ||
          std::find(only.begin(), only.end(), method.folder) != only.end()) {
        methods_.push_back(std::move(method));
      }
    }
    TORCH_CHECK(!methods_.empty(), "peft: --only names no method");
  }

  int compare() {
    const auto path = std::filesystem::path(arguments_.output) / "results.md";
    results_.emplace(path, task_.data.test.size());
    auto lora = make_network(task_, arguments_.seed);
    auto adapter = kLora(lora);
    Step lora_step(lora, adapter.parameters(), batch_);
    introduce();
    const auto start = Clock::now();
    probe();
    for (size_t i = 0; i < methods_.size() && !interrupted(); ++i) {
      run(methods_[i],
          fmt::format("{}/{} {}", i + 1, methods_.size(), methods_[i].folder),
          lora_step);
      const auto passed = seconds_since(start);
      const auto left = passed / static_cast<double>(i + 1) *
          static_cast<double>(methods_.size() - i - 1);
      if (!interrupted()) {
        fmt::print(stderr, "{:.0f} s, about {:.0f} s left\n", passed, left);
      }
    }
    conclude();
    fmt::print("\n{}\n", results_->text());
    fmt::print(
        "{:.0f} s in all; {}\n",
        seconds_since(start),
        std::filesystem::absolute(path).string());
    for (const auto& failure : failures_) {
      fmt::print("FAILED: {}\n", failure);
    }
    return interrupted() ? 130 : failures_.empty() ? 0 : 1;
  }

  /// Validation accuracies of learning rates around each method's, on a fifth
  /// of the training set.
  int tune() {
    const auto& all = task_.data.train;
    const auto held_out = static_cast<std::ptrdiff_t>(all.size() / 5);
    const Examples validation(all.begin(), all.begin() + held_out);
    const Examples rest(all.begin() + held_out, all.end());
    for (const auto& method : methods_) {
      fmt::print("{:22}", method.name);
      for (const double factor : {1.0 / 3, 1.0, 3.0}) {
        const double rate = factor * method.learning_rate;
        auto network = make_network(task_, arguments_.seed);
        const auto adapter = method.attach(network);
        auto options = train_options();
        options.learning_rate = rate;
        train_adapter(network, adapter, rest, task_, options, method.folder);
        if (interrupted()) {
          return 130;
        }
        const auto logits = predict(network, validation, task_.padding);
        fmt::print(
            "  {:.1e}: {:.3f}", rate, accuracy(logits, labels_of(validation)));
      }
      fmt::print("\n");
    }
    return 0;
  }

 private:
  TrainOptions train_options() const {
    TrainOptions options;
    options.epochs = arguments_.epochs;
    options.seed = arguments_.seed;
    return options;
  }

  void introduce() const {
    fmt::print(
        "{}, {}: {} categories, {} texts to train on ({} epochs), {} to test\n",
        task_.network_name,
        task_.data_name,
        task_.data.categories.size(),
        with_commas(static_cast<int64_t>(task_.data.train.size())),
        arguments_.epochs,
        with_commas(static_cast<int64_t>(task_.data.test.size())));
  }

  void probe() {
    auto network = make_network(task_, arguments_.seed);
    const auto fit = tuned_probe(
        network, task_.data, task_.padding, arguments_.seed, arguments_.quick);
    if (interrupted()) {
      return;
    }
    Row row;
    row.name = "frozen probe, tuned";
    row.head = count(network->classifier->parameters());
    row.accuracy = accuracy(fit.logits, labels_of(task_.data.test));
    results_->add(row);
  }

  void run(const Method& method, const std::string& title, Step& lora_step) {
    auto network = make_network(task_, arguments_.seed);
    auto adapter = method.attach(network);
    const auto [own, head] = parts_of(adapter);
    Row row;
    row.name = method.name;
    row.adapter = count(own);
    row.head = count(head);

    auto options = train_options();
    options.learning_rate = method.learning_rate;
    // Half precision is enough for what is only read.
    const peft::ActivationCache cache(
        peft::ActivationCacheOptions().dtype(torch::kHalf));
    if (method.caches) {
      options.forward = [&](const Batch& batch,
                            const std::vector<size_t>& rows) {
        const auto scope = cache.use({rows.begin(), rows.end()});
        return network->forward(batch.ids, batch.mask);
      };
    }
    const auto training = train_adapter(
        network, adapter, task_.data.train, task_, options, title);
    const auto folder =
        (std::filesystem::path(arguments_.output) / method.folder).string();
    peft::save(adapter, folder);
    if (training.interrupted) {
      fmt::print("\nStopped. The adapter as it was: {}\n", folder);
      return;
    }
    const auto& losses = training.losses;
    const auto part = std::max<size_t>(1, losses.size() / 4);
    check(
        mean(losses, losses.size() - part, losses.size()) <
            mean(losses, 0, part),
        method,
        "the loss did not fall");

    row.accuracy = accuracy(
        predict(network, task_.data.test, task_.padding),
        labels_of(task_.data.test));
    row.files = reload(network, folder) ? "same logits" : "OTHER LOGITS";
    check(row.files == "same logits", method, "its files do not bring it back");

    const int pairs = arguments_.quick ? 1 : arguments_.full ? 40 : 10;
    Step step(network, adapter.parameters(), batch_);
    row.step = step_ratio(step, lora_step, pairs);
    row.memory = step.peak_mib();
    if (method.caches) {
      const auto scope = cache.use({rows_.begin(), rows_.end()});
      ladder_note_ = fmt::format(
          "Ladder side tuning kept what the frozen layers make ({:.0f} MiB, as "
          "float16): from the second epoch on its step took {:.2f} of LoRA's.",
          static_cast<double>(cache.bytes()) / (1024 * 1024),
          step_ratio(step, lora_step, pairs));
    }
    {
      torch::NoGradGuard no_grad;
      row.forward = paired_ratio(network, base_, batch_, 2 * pairs)[1];
    }

    adapter.disable();
    check(
        torch::equal(logits_of(network, batch_), logits_of(base_, batch_)),
        method,
        "disabled, it does not leave the base's logits");
    adapter.detach();
    const auto now = network->named_parameters();
    for (const auto& item : base_->named_parameters()) {
      check(
          torch::equal(now[item.key()], item.value()),
          method,
          "training changed " + item.key());
    }
    results_->add(row);
  }

  bool reload(Network& network, const std::string& folder) {
    // Another seed, another head: what the files bring is all there is.
    auto other = make_network(task_, arguments_.seed + 1);
    peft::load(*other, folder);
    return torch::equal(logits_of(other, batch_), logits_of(network, batch_));
  }

  void check(bool holds, const Method& method, const std::string& otherwise) {
    if (!holds) {
      failures_.push_back(method.name + ": " + otherwise);
    }
  }

  void conclude() {
    results_->note(fmt::format(
        "Seed {}, {} texts, {} epochs{}. One seed, a small grid of learning "
        "rates, and differences below two\nstandard errors (±): this is no "
        "ranking. Prompts and prefixes are known to want far more steps, and\n"
        "CoDA a backbone trained with its routers.",
        arguments_.seed,
        task_.data.train.size(),
        arguments_.epochs,
        task_.real ? "" : ", all made up"));
    results_->note(fmt::format(
        "Step and forward: median of pairs, run in turn, on {} texts of up to "
        "{} tokens, {} threads. Memory: the most that\nforward and backward of "
        "that batch hold at once beyond the parameters. LoRA and (IA)³ can be "
        "merged: then a\nforward is the base's.",
        batch_.ids.size(0),
        batch_.ids.size(1),
        arguments_.threads));
    if (!ladder_note_.empty()) {
      results_->note(ladder_note_);
    }
  }

  Arguments arguments_;
  Task task_;
  Network base_;
  std::vector<size_t> rows_;
  Batch batch_; // of these rows
  std::optional<Results> results_;
  std::vector<Method> methods_;
  std::vector<std::string> failures_;
  std::string ladder_note_;
};

} // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IONBF, 0); // in step with the progress bar
  CLI::App app(
      "Compares the additive methods on WordNet's categories: half of the "
      "texts and 2 epochs, unless told otherwise.");
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
         "--output", arguments.output, "where adapters and results.md go")
      ->capture_default_str();
  app.add_option(
         "--only",
         arguments.only,
         "some of lora,houlsby,pfeiffer,parallel,ia3,prompt,p_tuning,prefix,"
         "p_tuning_v2,coda,ladder")
      ->delimiter(',');
  app.add_option(
         "--seed",
         arguments.seed,
         "of the heads, the adapters and the order of texts")
      ->capture_default_str();
  app.add_option("--epochs", arguments.epochs, "passes over the texts")
      ->check(CLI::Range(1, 1000));
  app.add_option("--threads", arguments.threads, "of LibTorch")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_flag("--full", arguments.full, "all texts, 5 epochs");
  app.add_flag(
      "--quick",
      arguments.quick,
      "64 texts, 5 epochs, to see that all of it works");
  app.add_flag(
      "--tune",
      arguments.tune,
      "tries three learning rates a method, on a fifth of the training set");
  app.add_flag(
      "--made-up",
      arguments.made_up,
      "a small network and data made on the spot");
  CLI11_PARSE(app, argc, argv);
  if (arguments.epochs <= 0) {
    arguments.epochs = arguments.full ? 5 : arguments.quick ? 5 : 2;
  }
  try {
    torch::set_num_threads(arguments.threads);
    catch_interrupts();
    std::filesystem::create_directories(arguments.output);
    Run run(arguments);
    return arguments.tune ? run.tune() : run.compare();
  } catch (const c10::Error& error) {
    fmt::print(stderr, "{}\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
  }
  return 1;
}
