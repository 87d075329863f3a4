// The one vocabulary of tensor checks, and torch's tensors as the plain values that kernels take. Stable-ABI headers
// only.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "core/error.h"

namespace flash_mla::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's function asks for every dtype that it knows in turn, each time by a call.
inline ScalarType scalar_type(const Tensor& tensor) {
  static const std::pair<int32_t, ScalarType> kUsual[] = {
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_int32(), ScalarType::Int},
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_float8_e4m3fn(), ScalarType::Float8_e4m3fn},
  };
  int32_t code = 0;
  check(aoti_torch_get_dtype(tensor.get(), &code) == 0, ErrorKind::kCuda, "torch could not tell a tensor's dtype");
  for (const auto& [usual, dtype] : kUsual) {
    if (usual == code) {
      return dtype;
    }
  }
  return tensor.scalar_type();
}

// A tensor's facts, read once, through the C interface: the methods of torch::stable::Tensor ask for some of them
// twice.
struct View {
  const char* name;
  void* data;
  int dim;
  const int64_t* sizes;
  const int64_t* strides;
  ScalarType dtype;
  int device;  // index, -1: not a CUDA tensor

  View(const char* name_, const Tensor& tensor) : name(name_), dtype(scalar_type(tensor)) {
    static const int32_t cuda = aoti_torch_device_type_cuda();
    const AtenTensorHandle handle = tensor.get();
    int64_t dims = 0, *sizes_ = nullptr, *strides_ = nullptr;
    int32_t device_type = 0, index = 0;
    check(aoti_torch_get_data_ptr(handle, &data) == 0 && aoti_torch_get_dim(handle, &dims) == 0 &&
              aoti_torch_get_sizes(handle, &sizes_) == 0 && aoti_torch_get_strides(handle, &strides_) == 0 &&
              aoti_torch_get_device_type(handle, &device_type) == 0 && aoti_torch_get_device_index(handle, &index) == 0,
          ErrorKind::kValue, name, " must be a tensor with memory and strides");
    dim = static_cast<int>(dims), sizes = sizes_, strides = strides_;
    device = device_type == cuda ? index : -1;
  }

  int64_t size(int d) const { return sizes[d]; }
  int64_t stride(int d) const { return strides[d]; }
};

// Arguments of `check` are evaluated whether it fails or not, so texts that have to be put together are put together by
// operator<<, which only a failing check calls.
struct ShapeText {
  const View& view;
};

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << "[";
  for (int d = 0; d < shape.view.dim; ++d) {
    out << (d ? ", " : "") << shape.view.sizes[d];
  }
  return out << "]";
}

struct DeviceText {
  int device;
};

inline std::ostream& operator<<(std::ostream& out, const DeviceText& text) {
  return text.device < 0 ? out << "a tensor that is not on CUDA" : out << "cuda:" << text.device;
}

inline const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline void check_device(const View& view, int device) {
  check(view.device == device, ErrorKind::kValue, view.name, " must be on the device of q (cuda:", device, "), got ",
        DeviceText{view.device});
}

inline void check_dtype(const View& view, ScalarType dtype) {
  check(view.dtype == dtype, ErrorKind::kType, view.name, " must have dtype ", dtype_text(dtype), ", got ",
        dtype_text(view.dtype));
}

inline void check_dim(const View& view, int dim, const char* what) {
  check(view.dim == dim, ErrorKind::kValue, view.name, " must have shape ", what, ", got ", ShapeText{view});
}

inline void check_size(const View& view, int d, int64_t size, const char* what) {
  check(view.sizes[d] == size, ErrorKind::kValue, view.name, " must have shape ", what, ", so size ", size,
        " in dimension ", d, ", got ", ShapeText{view});
}

inline void check_contiguous_last(const View& view) {
  const int last = view.dim - 1;
  check(view.strides[last] == 1 || view.sizes[last] <= 1, ErrorKind::kValue, view.name,
        " must be contiguous in its last dimension, got stride ", view.strides[last]);
}

// Kernels move 16 bytes at a time.
inline void check_aligned(const View& view, int element_bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int d = 0; d + 1 < view.dim; ++d) {
    aligned &= view.sizes[d] <= 1 || view.strides[d] * element_bytes % 16 == 0;
  }
  check(aligned, ErrorKind::kUnsupported, view.name,
        " must have an address and strides that are multiples of 16 bytes");
}

// The stream on which torch queues work for this device. Its getter lives in libtorch_cuda.so, which a CPU build of
// torch lacks: it is looked up in the process when the first CUDA op runs.
inline void* current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    check(symbol != nullptr, ErrorKind::kCuda, "this torch has no CUDA support");
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  check(getter(device, &stream) == 0, ErrorKind::kCuda, "torch has no current stream for cuda:", device);
  return stream;
}

// A new contiguous CUDA tensor. Straight through the C interface: torch::stable::new_empty goes through the boxed
// dispatcher, at several times the cost.
template <size_t kDim>
Tensor empty(int device, ScalarType dtype, const int64_t (&sizes)[kDim]) {
  int64_t strides[kDim];
  int64_t stride = 1;
  for (size_t d = kDim; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  static const int32_t cuda = aoti_torch_device_type_cuda();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16(), half = aoti_torch_dtype_float16(),
                       single = aoti_torch_dtype_float32(), int32 = aoti_torch_dtype_int32();
  const int32_t code = dtype == ScalarType::BFloat16 ? bfloat16
                       : dtype == ScalarType::Half   ? half
                       : dtype == ScalarType::Float  ? single
                                                     : int32;
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(kDim, sizes, strides, code, cuda, device, &handle) == 0, ErrorKind::kCuda,
        "torch could not allocate a tensor of ", stride, " elements");
  return Tensor(handle);
}

}  // namespace flash_mla::api
