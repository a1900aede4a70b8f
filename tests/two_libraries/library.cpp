// One of the two libraries (both are made from this file).
#include "interface.h"

#include <peft/core/adapted_weight.h>
#include <peft/core/attach.h>
#include <peft/methods/lora.h>

#include <memory>

void attach_to(const at::Tensor* weight, const char* name) {
  struct Host : torch::nn::Module {
    explicit Host(const at::Tensor& w) {
      register_parameter("weight", w, /*requires_grad=*/false);
    }
  };
  // The module goes; what was attached stays with the tensor.
  Host host(*weight);
  auto adapter = peft::attach(
      host, peft::LoraOptions(2).alpha(4).targets({"weight"}), name);
  torch::NoGradGuard no_grad;
  for (auto p : adapter.parameters()) {
    p.fill_(1);
  }
}

bool sees_tag(const at::Tensor* weight) {
  return peft::is_adapted(*weight);
}

void base_of(const at::Tensor* weight, at::Tensor* result) {
  *result = peft::base(*weight);
}
