#pragma once

/// libpeft: fine-tune any LibTorch network by training a small part of it.
///
/// The include list is in reading order: say what to tune, put it on a model,
/// what then runs, train, keep, ship.

#include <peft/version.h>

#include <peft/core/targets.h>
#include <peft/core/delta.h>
#include <peft/core/adapted_weight.h>
#include <peft/core/attach.h>
#include <peft/core/extra_tokens.h>
#include <peft/core/layer_loop.h>
#include <peft/core/adapter.h>
#include <peft/core/active.h>
#include <peft/core/adapters.h>
#include <peft/core/merge.h>
#include <peft/core/pack.h>
#include <peft/core/clone.h>
#include <peft/core/freeze.h>
#include <peft/core/summary.h>

#include <peft/functional/lora.h>
#include <peft/functional/layers.h>
#include <peft/functional/soft_topk.h>

#include <peft/methods/lora.h>
#include <peft/methods/full_tuning.h>
#include <peft/methods/bitfit.h>
#include <peft/methods/layer_norm_tuning.h>
#include <peft/methods/sparse_mask.h>
#include <peft/methods/sparse_tuning.h>
#include <peft/methods/shira.h>
#include <peft/methods/lt_sft.h>
#include <peft/methods/fish.h>
#include <peft/methods/child_tuning.h>
#include <peft/methods/ia3.h>
#include <peft/methods/krona.h>
#include <peft/methods/intrinsic.h>
#include <peft/methods/vera.h>
#include <peft/methods/vblora.h>
#include <peft/methods/loha.h>
#include <peft/methods/lokr.h>
#include <peft/methods/hra.h>
#include <peft/methods/oft.h>
#include <peft/methods/boft.h>
#include <peft/methods/fourier_ft.h>
#include <peft/methods/ada_lora.h>
#include <peft/methods/trainable_tokens.h>
#include <peft/methods/beft.h>
#include <peft/methods/houlsby.h>
#include <peft/methods/pfeiffer.h>
#include <peft/methods/parallel_adapter.h>
#include <peft/methods/masked.h>
#include <peft/methods/sparse_adapter.h>
#include <peft/methods/adapter_drop.h>
#include <peft/methods/widen.h>
#include <peft/methods/prompt.h>
#include <peft/methods/p_tuning.h>
#include <peft/methods/multitask_prompt.h>
#include <peft/methods/cpt.h>
#include <peft/methods/prefix.h>
#include <peft/methods/cartridge.h>
#include <peft/methods/union.h>
#include <peft/methods/decorated.h>
#include <peft/methods/mam.h>
#include <peft/methods/unipelt.h>
#include <peft/methods/auto_peft.h>
#include <peft/methods/llm_adapters.h>
#include <peft/methods/coda.h>
#include <peft/methods/ladder.h>
#include <peft/methods/s3_delta.h>
#include <peft/methods/weighted.h>
#include <peft/methods/lora/convert.h>

#include <peft/train/parameter_groups.h>
#include <peft/train/lora_fa.h>
#include <peft/train/fisher.h>
#include <peft/train/masked_step.h>
#include <peft/train/rank_allocator.h>
#include <peft/train/check_optimizer.h>
#include <peft/train/search.h>
#include <peft/train/search/auto_peft.h>
#include <peft/train/structure_search.h>

#include <peft/io/safetensors.h>
#include <peft/io/base_weights.h>
#include <peft/io/adapter_config.h>
#include <peft/io/pretrained.h>
#include <peft/io/hotswap.h>
#include <peft/io/optimizer_state.h>
#include <peft/io/save_as_lora.h>
#include <peft/io/gguf.h>
