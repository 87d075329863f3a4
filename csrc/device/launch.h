// Host side of a launch: dependent launches, dynamic shared memory, errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "core/error.h"

namespace flash_mla::inline device {

// Lets a kernel have so much dynamic shared memory. The permission is one device's, so each is asked for it once.
template <auto kKernel, int kBytes>
void allow_shared_memory(const char* name) {
  constexpr int kMaxDevices = 64;  // as many as api/device.cpp lets through
  static std::array<std::atomic<bool>, kMaxDevices> allowed{};
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess && !allowed[device].load(std::memory_order_relaxed)) {
    status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    allowed[device].store(status == cudaSuccess, std::memory_order_relaxed);
  }
  check(status == cudaSuccess, ErrorKind::kCuda, name, ": ", cudaGetErrorString(status));
}

// In clusters of so many CTAs. The kernel may start while the one before it in the stream still runs: it has to execute
// griddepcontrol.wait before it touches global memory.
template <class... Parameters, class... Arguments>
void launch_dependent_clusters(const char* name, void (*kernel)(Parameters...), unsigned cluster, unsigned grid,
                               unsigned threads, size_t shared_bytes, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  check(status == cudaSuccess, ErrorKind::kCuda, name, ": ", cudaGetErrorString(status), " (grid ", grid, ", ", threads,
        " threads, ", shared_bytes, " bytes of shared memory)");
}

template <class... Parameters, class... Arguments>
void launch_dependent(const char* name, void (*kernel)(Parameters...), unsigned grid, unsigned threads,
                      size_t shared_bytes, void* stream, const Arguments&... arguments) {
  launch_dependent_clusters(name, kernel, 1, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace flash_mla::inline device
