// Every method of the library on the task of examples/010, with one budget of
// trainable parameters: accuracy over seeds, and what training and inference
// cost beside full fine-tuning and the bare network.
//
// `--help` lists the options. Results are kept in results.jsonl as they come,
// so a run that was stopped goes on where it was; report.html and results.md
// are made of them.

#include "measure.h"
#include "methods.h"
#include "report.h"
#include "results.h"

#include "../010_gloss_categories/probe.h"
#include "../010_gloss_categories/task.h"

#include <peft/peft.h>

#include <CLI/CLI.hpp>

#include <map>
#include <optional>

namespace {

using namespace compare;

struct Arguments {
  std::string model;
  std::string wordnet;
  std::string output = "compare_methods";
  std::vector<std::string> only;
  int64_t seeds = 0;
  int64_t epochs = 0;
  double minutes = 20;
  int threads = 2;
  bool quick = false;
  bool full = false;
  bool tune = false;
  bool fresh = false;
  std::string command; ///< as it was typed, without folders
};

constexpr int kInterrupted = 130; // what a shell reports after Ctrl-C
const char* const kProbe = "probe";

// ~~~~ the task ~~~~

Task choose_task(const Arguments& arguments) {
  namespace fs = std::filesystem;
  const bool is_there =
      fs::exists(fs::path(arguments.model) / "model.safetensors") &&
      fs::exists(fs::path(arguments.wordnet) / "data.noun");
  if (!is_there && !arguments.quick) {
    fmt::print(
        "No MiniLM weights or no WordNet (--model DIR, --wordnet DIR): a small "
        "network and its sentences are made up, and the numbers mean "
        "nothing.\n");
  }
  auto task = is_there && !arguments.quick
      ? real_task(arguments.model, arguments.wordnet, false)
      : made_up_task(
            std::filesystem::path(arguments.output) / "made_up_model",
            arguments.quick);
  // Texts are in random order.
  auto& train = task.data.train;
  auto& test = task.data.test;
  if (arguments.quick) {
    train.resize(std::min<size_t>(train.size(), 32));
    test.resize(std::min<size_t>(test.size(), 32));
  } else if (!arguments.full) {
    train.resize(std::min<size_t>(train.size(), 640));
    test.resize(std::min<size_t>(test.size(), 500));
  }
  return task;
}

// ~~~~ the run ~~~~

class Run {
 public:
  explicit Run(const Arguments& arguments)
      : arguments_(arguments),
        task_(choose_task(arguments)),
        yardstick_(
            start(1),
            start(1),
            batch_of(task_.data.train, kTimedBatch, false, task_.padding),
            batch_of(task_.data.train, kMemoryBatch, true, task_.padding),
            arguments.quick      ? 1
                : arguments.full ? 20
                                 : 3) {
    auto scratch = make_network(task_, 1);
    budget_ = budget_of(scratch);
    head_ = count(scratch->classifier->parameters());
    all_ = methods(scratch, budget_, task_.real ? 10 : 8);
    for (const auto& key : arguments.only) {
      const bool known = key == kProbe ||
          std::any_of(all_.begin(), all_.end(), [&](const Method& method) {
                           return method.key == key;
                         });
      TORCH_CHECK(
          known,
          "peft: --only names no method '",
          key,
          "'; there are ",
          kProbe,
          names_of(all_));
    }
  }

  static std::string names_of(const std::vector<Method>& methods) {
    std::string names;
    for (const auto& method : methods) {
      names += ", " + method.key;
    }
    return names;
  }

  int compare() {
    const std::filesystem::path output(arguments_.output);
    if (arguments_.fresh) {
      std::filesystem::remove(output / "results.jsonl");
    }
    log_.emplace(output / "results.jsonl", settings());
    check_log();
    introduce();
    const auto start = Clock::now();
    auto seed_start = start;
    int64_t done = 0;
    const auto total = remaining();
    for (int64_t seed = 1; seed <= arguments_.seeds; ++seed) {
      if (seed > 1 && !has_time_for_another(start, seed_start)) {
        fmt::print(
            "Seeds from {} on would not end within {} minutes; the same "
            "command goes on with them.\n",
            seed,
            arguments_.minutes);
        break;
      }
      seed_start = Clock::now();
      run_or_skip(kProbe, seed, done, total, start, [&](uint64_t s) {
        return run_probe(s);
      });
      for (const auto& method : all_) {
        run_or_skip(method.key, seed, done, total, start, [&](uint64_t s) {
          return run_method(method, s);
        });
      }
    }
    if (log_->outcomes().empty()) {
      fmt::print("\nThere is no result.\n");
      return interrupted() ? kInterrupted : 1;
    }
    const auto page = make_page();
    write_file(output / "report.html", html_of(page));
    write_file(output / "results.md", markdown_of(page));
    fmt::print("\n{}\n", markdown_of(page));
    fmt::print(
        "{:.0f} s; {}\n",
        seconds_since(start),
        std::filesystem::absolute(output / "report.html").string());
    if (interrupted()) {
      fmt::print("Stopped. The same command goes on where it was.\n");
      return kInterrupted;
    }
    for (const auto& outcome : log_->outcomes()) {
      for (const auto& failure : outcome.failures) {
        failures_.push_back(outcome.method + ": " + failure);
      }
    }
    for (const auto& failure : failures_) {
      fmt::print("FAILED: {}\n", failure);
    }
    return failures_.empty() ? 0 : 1;
  }

  /// Validation accuracies of learning rates around each method's, on a fifth
  /// of the training set.
  int tune() {
    const auto all = task_.data.train;
    const auto held_out = static_cast<std::ptrdiff_t>(all.size() / 5);
    const Examples validation(all.begin(), all.begin() + held_out);
    task_.data.train.assign(all.begin() + held_out, all.end());
    probes_.clear(); // they know the validation texts
    for (const auto& method : all_) {
      if (!is_chosen(method.key)) {
        continue;
      }
      fmt::print("{:24}", method.key);
      for (const double factor : {1.0 / 3, 1.0, 3.0}) {
        auto tried = method;
        tried.learning_rate *= factor;
        auto network = start(1);
        const auto adapter = tried.attach(network, setting(1));
        train_adapter(
            network,
            training_of(tried, adapter),
            tried.learning_rate,
            1,
            task_.data.train);
        if (interrupted()) {
          return kInterrupted;
        }
        fmt::print(
            "  {:.1e}: {:.3f}",
            tried.learning_rate,
            accuracy(
                predict(network, validation, task_.padding),
                labels_of(validation)));
      }
      fmt::print("\n");
    }
    return 0;
  }

 private:
  static constexpr size_t kTimedBatch = 16; // and of training
  static constexpr size_t kMemoryBatch = 32;

  bool is_chosen(const std::string& key) const {
    const auto& only = arguments_.only;
    return only.empty() ||
        std::find(only.begin(), only.end(), key) != only.end();
  }

  /// Whether a seed that takes as long as the last one ends in time.
  bool has_time_for_another(
      Clock::time_point start,
      Clock::time_point last_seed) const {
    return arguments_.minutes <= 0 ||
        seconds_since(start) + seconds_since(last_seed) <=
        60 * arguments_.minutes;
  }

  /// Results are of these, or are not mixed.
  Json settings() const {
    return {
        {"network", task_.network_name},
        {"data", task_.data_name},
        {"texts", task_.data.train.size()},
        {"tests", task_.data.test.size()},
        {"epochs", arguments_.epochs},
        {"batch", kTimedBatch},
        {"budget", budget_},
        {"threads", arguments_.threads}};
  }

  /// A result of another learning rate is of another method.
  void check_log() const {
    for (const auto& outcome : log_->outcomes()) {
      for (const auto& method : all_) {
        TORCH_CHECK(
            method.key != outcome.method ||
                method.learning_rate == outcome.learning_rate,
            "peft: results.jsonl has '",
            method.key,
            "' at a learning rate of ",
            outcome.learning_rate,
            ", and it is ",
            method.learning_rate,
            " now; choose another --output, or remove these lines");
      }
    }
  }

  int64_t remaining() const {
    int64_t count = 0;
    for (int64_t seed = 1; seed <= arguments_.seeds; ++seed) {
      const auto is_open = [&](const std::string& key) {
        return is_chosen(key) &&
            log_->find(key, static_cast<uint64_t>(seed)) == nullptr;
      };
      count += is_open(kProbe) ? 1 : 0;
      for (const auto& method : all_) {
        count += is_open(method.key) ? 1 : 0;
      }
    }
    return count;
  }

  void introduce() const {
    fmt::print(
        "{}, {}: {} categories, {} texts to train on, {} to test\n"
        "budget {} + head {}; {} methods, {} seeds, {} epochs\n",
        task_.network_name,
        task_.data_name,
        task_.data.categories.size(),
        with_commas(static_cast<int64_t>(task_.data.train.size())),
        with_commas(static_cast<int64_t>(task_.data.test.size())),
        with_commas(budget_),
        with_commas(head_),
        all_.size(),
        arguments_.seeds,
        arguments_.epochs);
    if (!log_->outcomes().empty()) {
      fmt::print("{} results are there already\n", log_->outcomes().size());
    }
  }

  template <class Outcomes>
  void run_or_skip(
      const std::string& key,
      int64_t seed,
      int64_t& done,
      int64_t total,
      Clock::time_point start,
      Outcomes&& run) {
    const auto number = static_cast<uint64_t>(seed);
    if (interrupted() || !is_chosen(key) || log_->find(key, number)) {
      return;
    }
    title_ = fmt::format("{}/{} {} {}", done + 1, total, key, seed);
    const auto began = Clock::now();
    std::optional<Outcome> outcome;
    try {
      outcome = run(number);
    } catch (const c10::Error& error) { // the others go on
      failures_.push_back(
          fmt::format("{}: {}", title_, error.what_without_backtrace()));
      fmt::print(stderr, "{}\n", failures_.back());
    }
    if (!outcome || interrupted()) {
      return;
    }
    outcome->method = key;
    outcome->seed = number;
    outcome->seconds = seconds_since(began);
    log_->add(*outcome);
    ++done;
    const auto passed = seconds_since(start);
    fmt::print(
        stderr,
        "{:<34} accuracy {:.3f}   {:.0f} s, about {:.0f} s left\n",
        title_,
        outcome->accuracy,
        passed,
        passed / static_cast<double>(done) * static_cast<double>(total - done));
  }

  Setting setting(uint64_t seed) {
    Setting setting{task_, seed, budget_};
    if (arguments_.quick || arguments_.full) {
      setting.samples = arguments_.quick ? 8 : 1024;
      setting.trials = arguments_.quick ? 2 : 20;
      setting.steps = arguments_.quick ? 2 : 200;
    }
    setting.training_steps = training_steps();
    setting.train = [this, seed](
                        Network& network,
                        const peft::Adapter& adapter,
                        double rate,
                        const Examples& texts) {
      train_adapter(network, Training(adapter), rate, seed, texts);
    };
    return setting;
  }

  /// Of a method on all of the texts.
  int64_t training_steps() const {
    const auto batches =
        (task_.data.train.size() + kTimedBatch - 1) / kTimedBatch;
    return arguments_.epochs * static_cast<int64_t>(batches);
  }

  static Training training_of(
      const Method& method,
      const peft::Adapter& adapter) {
    return Training(
        adapter, method.hooks ? method.hooks(adapter) : StepHooks());
  }

  /// The frozen probe of a seed, fitted when it is first asked for.
  const ProbeResult& probe(uint64_t seed) {
    auto& fit = probes_[seed];
    if (!fit.head) {
      auto network = make_network(task_, seed);
      fit = tuned_probe(
          network, task_.data, task_.padding, seed, arguments_.quick);
    }
    return fit;
  }

  /// The network that every method starts from: pretrained, with the probe's
  /// head.
  Network start(uint64_t seed) {
    auto network = make_network(task_, seed);
    const auto& head = probe(seed).head;
    torch::NoGradGuard no_grad;
    network->classifier->weight.copy_(head->weight);
    network->classifier->bias.copy_(head->bias);
    return network;
  }

  std::optional<Outcome> run_probe(uint64_t seed) {
    Outcome outcome;
    outcome.head = head_;
    outcome.accuracy = accuracy(probe(seed).logits, labels_of(task_.data.test));
    outcome.has_cost = seed == 1;
    if (outcome.has_cost) {
      auto network = start(seed);
      outcome.cost = yardstick_.cost_of_head(network);
    }
    return outcome;
  }

  TrainResult train_adapter(
      Network& network,
      const Training& training,
      double learning_rate,
      uint64_t seed,
      const Examples& texts) {
    TrainOptions options;
    options.epochs = arguments_.epochs;
    options.batch_size = static_cast<int64_t>(kTimedBatch);
    options.seed = seed;
    options.step = training.step();
    network->eval(); // there is no dropout here
    return train(
        network,
        std::vector<ParameterGroup>{
            {training.own(), learning_rate},
            {training.head(), kHeadLearningRate}},
        texts,
        task_.padding,
        options,
        title_);
  }

  std::optional<Outcome> run_method(const Method& method, uint64_t seed) {
    auto network = start(seed);
    auto adapter = method.attach(network, setting(seed));
    if (interrupted()) {
      return {};
    }
    const auto training = training_of(method, adapter);
    if (train_adapter(
            network, training, method.learning_rate, seed, task_.data.train)
            .interrupted) {
      return {};
    }
    Outcome outcome;
    outcome.learning_rate = method.learning_rate;
    outcome.head = count(training.head());
    outcome.adapter = adapter.num_parameters() - outcome.head;
    outcome.accuracy = accuracy(
        predict(network, task_.data.test, task_.padding),
        labels_of(task_.data.test));
    if (seed == 1) {
      check_files(network, adapter, method, outcome);
      outcome.has_cost = true;
      outcome.cost = yardstick_.cost_of(network, adapter, training);
      check_base(network, adapter, outcome);
    }
    return outcome;
  }

  /// What the files bring onto a fresh network is what was trained.
  void check_files(
      const Network& network,
      const peft::Adapter& adapter,
      const Method& method,
      Outcome& outcome) {
    const auto folder =
        (std::filesystem::path(arguments_.output) / "adapters" / method.key)
            .string();
    auto other = make_network(task_, 2); // another head
    try {
      peft::save(adapter, folder);
      peft::load(*other, folder);
    } catch (const c10::Error& error) {
      outcome.failures.push_back(error.what_without_backtrace());
      return;
    }
    if (!torch::equal(
            logits_of(other, yardstick_.batch()),
            logits_of(network, yardstick_.batch()))) {
      outcome.failures.push_back("its files bring other logits back");
    }
  }

  /// Off, it leaves the base's logits; gone, the base's parameters.
  void
  check_base(const Network& network, peft::Adapter& adapter, Outcome& outcome) {
    adapter.disable();
    if (!torch::equal(
            logits_of(network, yardstick_.batch()),
            logits_of(yardstick_.base(), yardstick_.batch()))) {
      outcome.failures.push_back("disabled, it does not leave the base");
    }
    adapter.detach();
    const auto now = network->named_parameters();
    for (const auto& item : yardstick_.base()->named_parameters()) {
      if (!torch::equal(now[item.key()], item.value())) {
        outcome.failures.push_back("training changed " + item.key());
      }
    }
  }

  // ~~~~ the page ~~~~

  Page make_page() {
    Page page;
    page.budget = budget_ + head_;
    page.command = arguments_.command;
    page.introduction = fmt::format(
        "{} learns to tell {} categories of {}: {} texts to train on, {} to "
        "test, {} epoch{} of batches of {}, {} seed{}. Every method starts "
        "from "
        "the frozen probe's head, and is as wide as comes nearest to LoRA of "
        "rank 8 on query and value: {} parameters beside a head of {}.",
        task_.network_name,
        task_.data.categories.size(),
        task_.data_name,
        with_commas(static_cast<int64_t>(task_.data.train.size())),
        with_commas(static_cast<int64_t>(task_.data.test.size())),
        arguments_.epochs,
        arguments_.epochs == 1 ? "" : "s",
        kTimedBatch,
        seeds_done(),
        seeds_done() == 1 ? "" : "s",
        with_commas(budget_),
        with_commas(head_));
    add_entry(page, kProbe, "frozen probe", "reference", 0);
    for (const auto& method : all_) {
      add_entry(
          page, method.key, method.name, method.family, method.learning_rate);
    }
    std::stable_sort(
        page.entries.begin(),
        page.entries.end(),
        [](const Entry& a, const Entry& b) {
          return a.summary.accuracy > b.summary.accuracy;
        });
    for (size_t i = 0; i < page.entries.size(); ++i) {
      page.entries[i].rank = static_cast<int>(i) + 1;
    }
    add_notes(page);
    return page;
  }

  /// Of the method that has most.
  int64_t seeds_done() const {
    int64_t most = 0;
    for (const auto& outcome : log_->outcomes()) {
      most = std::max(most, static_cast<int64_t>(outcome.seed));
    }
    return most;
  }

  void add_entry(
      Page& page,
      const std::string& key,
      const std::string& name,
      const std::string& family,
      double learning_rate) {
    const auto summary = summary_of(*log_, key);
    if (summary.seeds > 0) {
      page.entries.push_back({key, name, family, learning_rate, summary, 0});
    }
  }

  void add_notes(Page& page) {
    if (!task_.real) {
      page.notes.push_back(
          "The network and its texts are made up: the numbers mean nothing.");
    }
    page.notes.push_back(fmt::format(
        "± is one standard error of the mean over the seeds, sd / sqrt(n), n = "
        "{}: it says how a seed moves the accuracy, not how another test set "
        "would. Short training favours what learns fast; prompts and prefixes "
        "are known to want many more steps, and CoDA a backbone that was "
        "trained with its routers. Differences within two standard errors are "
        "no ranking.",
        seeds_done()));
    page.notes.push_back(
        "Methods without a width that reaches the budget train what they "
        "train: (IA)³, BitFit, LayerNorm tuning and prompts less, full "
        "fine-tuning and Child-tuning more. Trainable counts have the head in "
        "them.");
    page.notes.push_back(fmt::format(
        "Step: time of a training step (AdamW) / the same of full fine-tuning "
        "in place. Forward and merged: time of a forward / that of the network "
        "without an adapter; merged networks run the same operators. Medians "
        "of pairs run in turn on {} texts of {} tokens, {} threads.",
        yardstick_.batch().ids.size(0),
        yardstick_.batch().ids.size(1),
        arguments_.threads));
    page.notes.push_back(
        "Memory: the most that two training steps on the 32 longest texts hold "
        "at once beyond the network's own weights: the adapter, activations, "
        "gradients and AdamW's state, counted at the allocator.");
    page.notes.push_back(
        "Learning rates (table): those of examples/010 and 090 where these "
        "have the method, found on validation texts; for the others that of "
        "the nearest relative, untuned. The head learns at 0.001 everywhere. "
        "The probe's settings are tuned on a fifth of the training texts.");
  }

  Arguments arguments_;
  Task task_;
  std::map<uint64_t, ProbeResult> probes_;
  Yardstick yardstick_;
  int64_t budget_ = 0;
  int64_t head_ = 0;
  std::vector<Method> all_;
  std::optional<Log> log_;
  std::string title_;
  std::vector<std::string> failures_;
};

} // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IONBF, 0); // in step with the progress bar
  CLI::App app(
      "Compares every method of the library on WordNet's categories: a part "
      "of the texts, 1 epoch and 3 seeds, unless told otherwise.");
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
         "--output",
         arguments.output,
         "where results.jsonl, report.html, results.md and adapters go")
      ->capture_default_str();
  app.add_option(
         "--only", arguments.only, "some of the methods: lora,houlsby,...")
      ->delimiter(',');
  app.add_option("--seeds", arguments.seeds, "how many, from 1")
      ->check(CLI::Range(1, 1000));
  app.add_option(
         "--minutes",
         arguments.minutes,
         "no seed begins that would end later; 0 for no limit, as --full")
      ->capture_default_str();
  app.add_option("--epochs", arguments.epochs, "passes over the texts")
      ->check(CLI::Range(1, 1000));
  app.add_option("--threads", arguments.threads, "of LibTorch")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_flag("--full", arguments.full, "all texts, 3 epochs and 5 seeds");
  app.add_flag(
      "--quick",
      arguments.quick,
      "a small network and texts made on the spot, two steps a method, to see "
      "that all of it works");
  app.add_flag(
      "--fresh", arguments.fresh, "forgets the results that are there already");
  app.add_flag(
      "--tune",
      arguments.tune,
      "tries three learning rates a method, on a fifth of the training set");
  CLI11_PARSE(app, argc, argv);
  if (arguments.quick) {
    arguments.threads = 1;
  }
  if (arguments.full) {
    arguments.minutes = 0;
  }
  if (arguments.epochs <= 0) {
    arguments.epochs = arguments.full ? 3 : 1;
  }
  if (arguments.seeds <= 0) {
    arguments.seeds = arguments.full ? 5 : arguments.quick ? 1 : 3;
  }
  arguments.command = "100_compare_methods --model ... --wordnet ...";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const std::string before = i > 1 ? argv[i - 1] : "";
    const bool is_folder = word == "--model" || word == "--wordnet" ||
        word == "--output" || before == "--model" || before == "--wordnet" ||
        before == "--output";
    if (!is_folder) {
      arguments.command += " " + word;
    }
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
