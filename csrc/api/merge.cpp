#include "api/merge.h"

#include "any/kernels.h"
#include "api/device.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor> merge_attention_states(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  check(!outs.empty() && outs.size() == lses.size() && outs.size() <= kMaxMergeParts, ErrorKind::kValue,
        "outs and lses must be of one length, 1 to ", kMaxMergeParts, ", got ", outs.size(), " and ", lses.size());
  const View first("outs[0]", outs[0]);
  check(first.device >= 0, ErrorKind::kValue, "outs must be on CUDA");
  check(first.dim == 4 || first.dim == 3, ErrorKind::kValue,
        "outs[0] must have shape [b, s_q, h_q, d] or [tokens, h_q, d], got ", ShapeText{first});
  // Four dimensions: lse is [b, h_q, s_q]. Three: lse is [tokens, h_q].
  const bool batched = first.dim == 4;
  const int64_t b = batched ? first.size(0) : 1, tokens = first.size(batched ? 1 : 0),
                heads = first.size(batched ? 2 : 1), d = first.size(batched ? 3 : 2);
  MergeParams params{};
  params.num_parts = static_cast<int>(outs.size());
  for (int part = 0; part < params.num_parts; ++part) {
    const View out("outs", outs[part]), lse("lses", lses[part]);
    check_dtype(out, first.dtype);
    check_dtype(lse, ScalarType::Float);
    check_device(out, first.device);
    check_device(lse, first.device);
    check_dim(out, first.dim, batched ? "[b, s_q, h_q, d]" : "[tokens, h_q, d]");
    check_dim(lse, first.dim - 1, batched ? "[b, h_q, s_q]" : "[tokens, h_q]");
    for (int i = 0; i < first.dim; ++i) {
      check_size(out, i, first.size(i), "that of outs[0]");
    }
    check_contiguous_last(out);
    params.outs[part] = out.data;
    params.lses[part] = static_cast<const float*>(lse.data);
    auto& stride = params.stride_out[part];
    auto& lse_stride = params.stride_lse[part];
    if (batched) {
      check_size(lse, 0, b, "[b, h_q, s_q]");
      check_size(lse, 1, heads, "[b, h_q, s_q]");
      check_size(lse, 2, tokens, "[b, h_q, s_q]");
      stride[0] = out.stride(0), stride[1] = out.stride(1), stride[2] = out.stride(2);
      lse_stride[0] = lse.stride(0), lse_stride[1] = lse.stride(2), lse_stride[2] = lse.stride(1);
    } else {
      check_size(lse, 0, tokens, "[tokens, h_q]");
      check_size(lse, 1, heads, "[tokens, h_q]");
      stride[0] = 0, stride[1] = out.stride(0), stride[2] = out.stride(1);
      lse_stride[0] = 0, lse_stride[1] = lse.stride(0), lse_stride[2] = lse.stride(1);
    }
  }
  params.element = first.dtype == ScalarType::BFloat16 ? 0
                   : first.dtype == ScalarType::Half   ? 1
                   : first.dtype == ScalarType::Float  ? 2
                                                       : -1;
  check(params.element >= 0, ErrorKind::kType, "outs must have dtype BFloat16, Half or Float, got ",
        dtype_text(first.dtype));
  check_built_for("merge_attention_states", first.device);
  const OnDevice on_device(first.device);
  Tensor out = batched ? empty(first.device, first.dtype, {b, tokens, heads, d})
                       : empty(first.device, first.dtype, {tokens, heads, d});
  Tensor lse = batched ? empty(first.device, ScalarType::Float, {b, heads, tokens})
                       : empty(first.device, ScalarType::Float, {tokens, heads});
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  params.stride_merged_lse[0] = heads * tokens;
  params.stride_merged_lse[1] = batched ? 1 : heads;
  params.stride_merged_lse[2] = batched ? tokens : 1;
  params.num_rows = b * tokens * heads;
  params.tokens = static_cast<int>(tokens);
  params.heads = static_cast<int>(heads);
  params.d = static_cast<int>(d);
  launch_merge(params, current_stream(first.device));
  return {out, lse};
}

}  // namespace flash_mla::api
