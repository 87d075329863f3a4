// Host side of a launch: dependent launches, dynamic shared memory, errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include "core/error.h"

namespace flash_mla::inline device {

// The kernel may start while the one before it in the stream still runs: it has to execute griddepcontrol.wait before
// it touches global memory.
template <class... Parameters, class... Arguments>
void launch_dependent(const char* name, void (*kernel)(Parameters...), unsigned grid, unsigned threads,
                      size_t shared_bytes, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  check(status == cudaSuccess, ErrorKind::kCuda, name, ": ", cudaGetErrorString(status), " (grid ", grid, ", ", threads,
        " threads, ", shared_bytes, " bytes of shared memory)");
}

}  // namespace flash_mla::inline device
