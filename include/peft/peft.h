#pragma once

/// libpeft: fine-tune any LibTorch network by training a small part of it.
///
/// The include list is in reading order: say what to tune, put it on a model,
/// train, keep, ship.

#include <peft/version.h>
