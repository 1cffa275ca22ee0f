// What the launchers of csrc/cuda call of CUDA and of PyTorch's CUDA library, without a device: a launch goes to a
// callback, everything else is checked and remembered. tests/cuda/launchers.py links it in libcudart's place, so that
// a function which isn't here is an error of the linker.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define OFFERED extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  std::string name;
  int64_t allowed = -1;  // bytes of dynamic shared memory, once it was asked for
  bool large_clusters = false;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

// As tests/cuda/launchers.py has them.
struct Launch {
  const char* kernel;
  uint32_t grid[3], block[3], cluster[3];
  uint64_t shared;
  int64_t allowed;
  void* stream;
  void** arguments;
  int32_t guards;  // how many device guards there are
  int32_t large_clusters;
};
struct Device {
  int32_t major, minor, sms, shared_optin, driver;
  void* stream;
};
using Launcher = int (*)(const Launch*);
// A tensor map that is asked for; the encoder writes its 128 bytes, or gives CUDA's error code.
struct MapAsked {
  void* map;
  uint64_t address;
  uint64_t sizes[5], strides[4];
  uint32_t box[5], element_strides[5];
  uint32_t rank, type, interleave, swizzle, fill;
};
using Encoder = int (*)(const MapAsked*);

// By their functions. Kernels register themselves before any variable of this file need be there.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> of;
  return of;
}

std::map<std::string, cudaError_t> failures;  // what a function gives from now on
std::vector<Configuration> configurations;
Device device = {};
Launcher launcher = nullptr;
Encoder encoder = nullptr;
cudaError_t last_error = cudaSuccess;
int guards = 0, last_guarded = 0;
const dim3 kNoCluster(0, 0, 0);  // what a launch has that says none

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What a test wants a function to give.
cudaError_t wanted(const char* function) {
  const auto found = failures.find(function);
  return found == failures.end() ? cudaSuccess : found->second;
}

cudaError_t launch(
    const char* function_name, const void* function, dim3 grid, dim3 block, dim3 cluster, void** arguments,
    size_t shared, cudaStream_t stream) {
  if (const cudaError_t error = wanted(function_name)) return done(error);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return done(cudaErrorInvalidDeviceFunction);
  if (launcher == nullptr) return done(cudaErrorInitializationError);
  const Launch asked = {
      found->second.name.c_str(),
      {grid.x, grid.y, grid.z},
      {block.x, block.y, block.z},
      {cluster.x, cluster.y, cluster.z},
      shared,
      found->second.allowed,
      stream,
      arguments,
      guards,
      found->second.large_clusters};
  return done(static_cast<cudaError_t>(launcher(&asked)));
}

cuuint64_t bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

CUresult encode(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill fill) {
  if (const cudaError_t error = wanted("cuTensorMapEncodeTiled")) return static_cast<CUresult>(error);
  if (encoder == nullptr) return CUDA_ERROR_NOT_INITIALIZED;
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  // globalStrides[0] = globalDim[0] · size + padding: rows don't overlap.
  if (rank > 1 && strides[0] < sizes[0] * bytes_of(type)) return CUDA_ERROR_INVALID_VALUE;
  MapAsked asked = {};
  asked.map = map;
  asked.address = reinterpret_cast<uint64_t>(address);
  asked.rank = rank, asked.type = type, asked.interleave = interleave, asked.swizzle = swizzle, asked.fill = fill;
  for (cuuint32_t i = 0; i < rank; ++i) {
    asked.sizes[i] = sizes[i], asked.box[i] = box[i], asked.element_strides[i] = element_strides[i];
    if (i > 0) asked.strides[i - 1] = strides[i - 1];
  }
  return static_cast<CUresult>(encoder(&asked));
}

}  // namespace

// For tests

OFFERED void fake_device(const Device* of) { device = *of; }
OFFERED void fake_launcher(Launcher to) { launcher = to; }
OFFERED void fake_encoder(Encoder to) { encoder = to; }
OFFERED void fake_failure(const char* function, int error) {
  failures[function] = static_cast<cudaError_t>(error);
}
OFFERED int fake_guarded() { return last_guarded; }
OFFERED int fake_guards() { return guards; }
OFFERED int fake_last_error() { return last_error; }
OFFERED int fake_runtime_version() { return CUDART_VERSION; }

// The driver's answer to a matrix of bfloat16, in boxes of 64 columns.
OFFERED int fake_tensor_map(void* address, uint64_t rows, uint64_t columns, uint64_t row_bytes) {
  alignas(64) CUtensorMap map;
  const cuuint64_t sizes[] = {columns, rows}, strides[] = {row_bytes};
  const cuuint32_t box[] = {64, 1}, steps[] = {1, 1};
  return encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, address, sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// What leaves no trace in the next test.
OFFERED void fake_reset() {
  failures.clear();
  configurations.clear();
  launcher = nullptr;
  last_error = cudaSuccess;
}

extern "C" {

// PyTorch's

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  if (wanted("aoti_torch_get_current_cuda_stream") != cudaSuccess) return 1;
  *stream = device.stream;
  return 0;
}

int32_t aoti_torch_create_device_guard(int32_t index, void** guard) {
  if (wanted("aoti_torch_create_device_guard") != cudaSuccess) return 1;
  ++guards;
  last_guarded = index;
  *guard = &guards;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) {
  --guards;
  return 0;
}

// What nvcc's host code calls

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration& last = configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return launch("cudaLaunchKernel", kernel, grid, block, kNoCluster, arguments, shared, stream);
}

// The runtime

cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return launch("cudaLaunchKernel", function, grid, block, kNoCluster, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  dim3 cluster = kNoCluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    switch (attribute.id) {
      case cudaLaunchAttributeClusterDimension:
        cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
        break;
      // Launches run one after the other here.
      case cudaLaunchAttributeProgrammaticStreamSerialization: break;
      default: return done(cudaErrorNotSupported);
    }
  }
  return launch(
      "cudaLaunchKernelExC", function, config->gridDim, config->blockDim, cluster, arguments,
      config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t error = wanted("cudaFuncSetAttribute")) return done(error);
  const auto found = kernels().find(function);
  if (found == kernels().end()) return done(cudaErrorInvalidDeviceFunction);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > device.shared_optin) return done(cudaErrorInvalidValue);
      found->second.allowed = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      found->second.large_clusters = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;
    default: return done(cudaErrorInvalidValue);
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (const cudaError_t error = wanted("cudaFuncGetAttributes")) return done(error);
  if (kernels().count(function) == 0) return done(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (const cudaError_t error = wanted("cudaDeviceGetAttribute")) return done(error);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = device.sms; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_optin; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    default: return done(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
#else
cudaError_t cudaGetDriverEntryPoint(
    const char* symbol, void** function, unsigned long long, cudaDriverEntryPointQueryResult* result) {
#endif
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && wanted("cudaGetDriverEntryPoint") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  if (const cudaError_t error = wanted("cudaDriverGetVersion")) return done(error);
  *version = device.driver;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return done(wanted("cudaSetDevice")); }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInitializationError: return "initialization error";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "unrecognized error code";
  }
}

}  // extern "C"
