// The op that merges attention states.
#pragma once

#include <tuple>
#include <vector>

#include "api/tensor.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor> merge_attention_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses);

}  // namespace flash_mla::api
