// libpeft for the comparison with HF PEFT: the Python that runs HF hands over
// its tensors, and what is timed loops in C++ over the public API. Every
// function lets go of Python's lock.

#include <peft/models/bert.h>
#include <peft/peft.h>

#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/extension.h>

#include <algorithm>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;
using peft::models::BertEncoder;
using peft::models::BertModel;
using peft::models::BertOptions;
using torch::Tensor;
using Tensors = std::map<std::string, Tensor>;

/// Processor time of this thread in seconds, as Python's time.thread_time.
double thread_time() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
#endif
}

/// Whether what runs now is timed; the profile leaves out what is not.
bool timed = true;

/// Adds the time until its end to `seconds`.
class Timed {
 public:
  explicit Timed(double& seconds) : seconds_(seconds) {
    timed = true;
  }
  ~Timed() {
    seconds_ += thread_time() - start_;
    timed = false;
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  double& seconds_;
  double start_ = thread_time();
};

// ~~~~~~~~~~~~~~~~~~~~~ Networks on the caller's tensors ~~~~~~~~~~~~~~~~~~~~

const Tensor& tensor_named(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  TORCH_CHECK(
      found != tensors.end(),
      "HF has no tensor '",
      name,
      "' among those given");
  return found->second;
}

/// The module's parameters become the caller's tensors, frozen.
void share(torch::nn::Module& module, const Tensors& tensors) {
  for (auto& item : module.named_parameters()) {
    item.value().set_requires_grad(false);
    item.value().set_data(tensor_named(tensors, item.key()));
  }
}

/// The adapter's parameters become the caller's tensors.
void share(const peft::Adapter& adapter, const Tensors& tensors) {
  for (auto& item : adapter.named_parameters()) {
    item.value().set_data(tensor_named(tensors, item.key()));
  }
}

torch::nn::Linear make_linear(const Tensor& weight, const Tensor& bias) {
  torch::nn::Linear layer(torch::nn::LinearOptions(1, 1).bias(bias.defined()));
  layer->options.in_features(weight.size(1)).out_features(weight.size(0));
  Tensors tensors{{"weight", weight}};
  if (bias.defined()) {
    tensors.emplace("bias", bias);
  }
  share(*layer, tensors);
  return layer;
}

BertOptions bert_options(int64_t hidden, int64_t heads, int64_t layers) {
  return BertOptions()
      .vocab_size(100)
      .hidden_size(hidden)
      .num_hidden_layers(layers)
      .num_attention_heads(heads)
      .intermediate_size(4 * hidden)
      .hidden_dropout_prob(0.0)
      .attention_probs_dropout_prob(0.0)
      .add_pooling_layer(false);
}

struct Settings {
  int64_t r = 8;
  double alpha = 16;
  double dropout = 0;
  bool dora = false;

  peft::LoraOptions options(const peft::Targets& targets) const {
    return peft::LoraOptions(r)
        .alpha(alpha)
        .dropout(dropout)
        .dora(dora)
        .targets(targets);
  }
};

/// Every linear map of an encoder layer.
peft::Targets all_linear() {
  return peft::Targets({"query", "key", "value", "dense"});
}

// ~~~~~~~~~~~~~~~~~~~~~~~~~~ What is run and timed ~~~~~~~~~~~~~~~~~~~~~~~~~~

/// One way from x to y, and the named tensors whose gradients a step makes.
class Run {
 public:
  using Forward = std::function<Tensor(const Tensor&)>;

  Run(Forward forward, Tensor x, Tensor dy = {}, Tensors leaves = {})
      : forward_(std::move(forward)),
        x_(std::move(x)),
        dy_(std::move(dy)),
        leaves_(std::move(leaves)) {}

  Tensor forward() {
    return forward_(x_);
  }
  /// n steps: gradients dropped, forward, backward from dy.
  void train(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      step();
    }
  }
  void infer(int64_t n) {
    torch::NoGradGuard no_grad;
    for (int64_t i = 0; i < n; ++i) {
      forward_(x_);
    }
  }
  void drop_gradients() {
    for (auto& item : leaves_) {
      item.second.mutable_grad() = Tensor();
    }
  }
  /// y and every gradient of one step.
  Tensors results() {
    Tensors all{{"y", step().detach()}};
    for (const auto& [name, leaf] : leaves_) {
      all.emplace(name, leaf.grad());
    }
    return all;
  }

 private:
  Tensor step() {
    drop_gradients();
    Tensor y = forward_(x_);
    torch::autograd::backward({y}, {dy_});
    return y;
  }

  Forward forward_;
  Tensor x_, dy_;
  Tensors leaves_;
};

/// x and the adapter's parameters by their names in a file.
Tensors leaves_of(const Tensor& x, const peft::Adapter& adapter) {
  Tensors leaves{{"x", x}};
  for (const auto& item : adapter.named_parameters()) {
    leaves.emplace(item.key(), item.value());
  }
  return leaves;
}

/// The base: at::linear with a frozen weight.
Run frozen_linear(
    const Tensor& x,
    const std::optional<Tensor>& dy,
    const Tensor& weight,
    const Tensor& bias) {
  return Run(
      [weight, bias](const Tensor& in) { return at::linear(in, weight, bias); },
      x,
      dy.value_or(Tensor()),
      {{"x", x}});
}

/// LoRA as a function of tensors.
Run functional_linear(
    const Tensor& x,
    const Tensor& dy,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& A,
    const Tensor& B,
    double scale,
    double dropout) {
  return Run(
      [=](const Tensor& in) {
        return peft::functional::lora_linear(
            in, weight, bias, A, B, scale, dropout);
      },
      x,
      dy,
      {{"x", x}, {"lora_A.weight", A}, {"lora_B.weight", B}});
}

/// torch::nn::Linear with an adapter attached; its weight packed if asked for.
Run attached_linear(
    const Tensor& x,
    const Tensor& dy,
    const Tensor& weight,
    const Tensor& bias,
    const Settings& settings,
    const Tensors& adapter_tensors,
    bool packed) {
  auto layer = make_linear(weight, bias);
  auto adapter = peft::attach(*layer, settings.options({""}));
  share(adapter, adapter_tensors);
  if (packed) {
    peft::pack_frozen(*layer);
  }
  return Run(
      [layer](const Tensor& in) mutable { return layer->forward(in); },
      x,
      dy,
      leaves_of(x, adapter));
}

/// torch::nn::Linear after peft::merge, and before any adapter.
Run merged_linear(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Settings& settings,
    const Tensors& adapter_tensors) {
  auto layer = make_linear(weight.clone(), bias);
  auto adapter = peft::attach(*layer, settings.options({""}));
  share(adapter, adapter_tensors);
  peft::merge(*layer);
  return Run(
      [layer](const Tensor& in) mutable { return layer->forward(in); }, x);
}
Run plain_linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  auto layer = make_linear(weight, bias);
  return Run(
      [layer](const Tensor& in) mutable { return layer->forward(in); }, x);
}

/// Several adapters on one torch::nn::Linear; rows[i] names the adapter of row
/// i of x.
Run mixed_linear(
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Settings& settings,
    const std::map<std::string, Tensors>& adapters,
    const std::vector<std::string>& rows) {
  auto layer = make_linear(weight, bias);
  for (const auto& [name, tensors] : adapters) {
    share(peft::attach(*layer, settings.options({""}), name), tensors);
  }
  layer->eval();
  return Run(
      [layer, rows](const Tensor& in) mutable {
        peft::BatchAdapters scope(rows);
        return layer->forward(in);
      },
      x);
}

/// BERT's encoder over hidden states x [batch, length, hidden]: frozen, or with
/// LoRA on every linear map.
Run encoder(
    const Tensor& x,
    const Tensor& dy,
    int64_t heads,
    int64_t layers,
    const Tensors& weights,
    const std::optional<Settings>& settings,
    const Tensors& adapter_tensors,
    bool training) {
  BertEncoder model(bert_options(x.size(2), heads, layers));
  share(*model, weights);
  Tensors leaves{{"x", x}};
  if (settings) {
    auto adapter = peft::attach(*model, settings->options(all_linear()));
    share(adapter, adapter_tensors);
    leaves = leaves_of(x, adapter);
  }
  model->train(training);
  return Run(
      [model](const Tensor& in) mutable {
        return model->forward(in, {}).hidden;
      },
      x,
      dy,
      std::move(leaves));
}

/// Seconds of n merges into one layer, and the merged weight; making it whole
/// again is not timed. `in_place` folds for good, the other way keeps the old
/// base.
std::pair<double, Tensor> merge_linear(
    const Tensor& weight,
    const Settings& settings,
    const Tensors& adapter_tensors,
    bool in_place,
    int64_t n) {
  torch::NoGradGuard no_grad;
  auto layer = make_linear(weight.clone(), {});
  Tensor merged;
  double seconds = 0;
  for (int64_t i = 0; i < n; ++i) {
    auto adapter = peft::attach(*layer, settings.options({""}));
    share(adapter, adapter_tensors);
    {
      Timed watch(seconds);
      if (in_place) {
        peft::merge(*layer);
      } else {
        adapter.merge();
      }
    }
    if (i + 1 == n) {
      merged = layer->weight.clone();
    }
    if (in_place) {
      layer->weight.copy_(weight);
    } else {
      adapter.unmerge();
      adapter.detach();
    }
  }
  return {seconds, merged};
}

/// A whole BERT for files: what an application has when it saves and loads.
class Files {
 public:
  Files(int64_t hidden, int64_t heads, int64_t layers)
      : model_(bert_options(hidden, heads, layers)) {
    for (auto& p : model_->parameters()) {
      p.set_requires_grad(false);
    }
  }
  double save(const std::string& from, const std::string& to, int64_t n) {
    auto adapter = peft::load(*model_, from);
    double seconds = 0;
    for (int64_t i = 0; i < n; ++i) {
      Timed watch(seconds);
      peft::save(adapter, to);
    }
    adapter.detach();
    return seconds;
  }
  double load(const std::string& from, int64_t n) {
    double seconds = 0;
    for (int64_t i = 0; i < n; ++i) {
      peft::Adapter adapter;
      {
        Timed watch(seconds);
        adapter = peft::load(*model_, from);
      }
      adapter.detach();
    }
    return seconds;
  }

 private:
  BertModel model_;
};

// ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ Exact accounting ~~~~~~~~~~~~~~~~~~~~~~~~~~~~

/// Bytes and operators of this thread, whichever side calls them.
class Account {
 public:
  Account() : bytes_(std::make_shared<Bytes>()) {
    c10::ThreadLocalDebugInfo::_push(
        c10::DebugInfoKind::PROFILER_STATE, bytes_);
    auto& operators = operators_;
    current() = &operators;
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(
            [](const at::RecordFunction& f)
                -> std::unique_ptr<at::ObserverContext> {
              current()->push_back(f.name());
              return nullptr;
            })
            .scopes({at::RecordScope::FUNCTION}));
  }
  void stop() {
    if (!stopped_) {
      stopped_ = true;
      at::removeCallback(handle_);
      c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE);
    }
  }
  ~Account() {
    stop();
  }
  Account(const Account&) = delete;
  Account& operator=(const Account&) = delete;

  int64_t held() const {
    return bytes_->held;
  }
  int64_t peak() const {
    return bytes_->peak;
  }
  int64_t allocated() const {
    return bytes_->allocated;
  }
  std::vector<std::string> operators() const {
    return operators_;
  }

 private:
  struct Bytes : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device)
        override {
      held += size;
      peak = std::max(peak, held);
      allocated += std::max<int64_t>(size, 0);
    }
    bool memoryProfilingEnabled() const override {
      return true;
    }
    int64_t held = 0, peak = 0, allocated = 0;
  };
  static std::vector<std::string>*& current() {
    static std::vector<std::string>* list = nullptr;
    return list;
  }

  std::shared_ptr<Bytes> bytes_;
  std::vector<std::string> operators_;
  at::CallbackHandle handle_{};
  bool stopped_ = false;
};

/// Processor time that each operator spends in itself, without what it calls.
class Profile {
 public:
  Profile() {
    current() = this;
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(
        [](const at::RecordFunction& f)
            -> std::unique_ptr<at::ObserverContext> {
          if (!timed) {
            return nullptr;
          }
          current()->open_.push_back({f.name(), thread_time(), 0.0});
          return std::make_unique<Context>();
        },
        [](const at::RecordFunction&, at::ObserverContext* context) {
          if (context != nullptr) {
            current()->close();
          }
        }));
  }
  void stop() {
    if (!stopped_) {
      stopped_ = true;
      at::removeCallback(handle_);
    }
  }
  ~Profile() {
    stop();
  }
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  /// Name -> calls and seconds.
  std::map<std::string, std::pair<int64_t, double>> operators() const {
    return closed_;
  }

 private:
  struct Context : at::ObserverContext {};
  struct Open {
    std::string name;
    double start, inside;
  };
  static Profile*& current() {
    static Profile* profile = nullptr;
    return profile;
  }
  void close() {
    const Open last = open_.back();
    open_.pop_back();
    const double whole = thread_time() - last.start;
    if (!open_.empty()) {
      open_.back().inside += whole;
    }
    auto& sum = closed_[last.name];
    sum.first += 1;
    sum.second += whole - last.inside;
  }

  std::vector<Open> open_;
  std::map<std::string, std::pair<int64_t, double>> closed_;
  at::CallbackHandle handle_{};
  bool stopped_ = false;
};

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.attr("version") = PEFT_VERSION;
  m.def("set_timed", [](bool now) { timed = now; });
  py::class_<Settings>(m, "Settings")
      .def(
          py::init<int64_t, double, double, bool>(),
          py::arg("r"),
          py::arg("alpha"),
          py::arg("dropout") = 0.0,
          py::arg("dora") = false);
  py::class_<Run>(m, "Run")
      .def("forward", &Run::forward, Unlocked())
      .def("train", &Run::train, Unlocked())
      .def("infer", &Run::infer, Unlocked())
      .def("drop_gradients", &Run::drop_gradients)
      .def("results", &Run::results, Unlocked());
  py::class_<Files>(m, "Files")
      .def(py::init<int64_t, int64_t, int64_t>())
      .def("save", &Files::save, Unlocked())
      .def("load", &Files::load, Unlocked());
  py::class_<Account>(m, "Account")
      .def(py::init<>())
      .def("stop", &Account::stop)
      .def_property_readonly("held", &Account::held)
      .def_property_readonly("peak", &Account::peak)
      .def_property_readonly("allocated", &Account::allocated)
      .def_property_readonly("operators", &Account::operators);
  py::class_<Profile>(m, "Profile")
      .def(py::init<>())
      .def("stop", &Profile::stop)
      .def_property_readonly("operators", &Profile::operators);
  m.def("frozen_linear", &frozen_linear, Unlocked());
  m.def("functional_linear", &functional_linear, Unlocked());
  m.def("attached_linear", &attached_linear, Unlocked());
  m.def("merged_linear", &merged_linear, Unlocked());
  m.def("plain_linear", &plain_linear, Unlocked());
  m.def("mixed_linear", &mixed_linear, Unlocked());
  m.def("encoder", &encoder, Unlocked());
  m.def("merge_linear", &merge_linear, Unlocked());
}
