// A stand-in for NVIDIA's libcudart, by the driver in libcuda.c: what torch's CUDA build calls.
//
// torch's own kernels are recorded by name and not run. cuda_build.py makes stubs that do nothing for the rest of
// CUDA's libraries.
#define _GNU_SOURCE
#include "cuda.h"
#include "cuda_runtime_api.h"
#include <dlfcn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int standin_place(const void *pointer);
CUgraph standin_graph_of(CUstream stream);
int standin_graph_length(CUgraph graph);
CUresult standin_launch(const char *kernel, unsigned grid[3], CUstream stream);

// The runtime's codes are the driver's.
static _Thread_local cudaError_t last;
static cudaError_t status(CUresult code) {
  if (code && code != CUDA_ERROR_NOT_READY) last = (cudaError_t)code;
  return (cudaError_t)code;
}

// ---- devices

cudaError_t cudaSetDevice(int device) {
  CUcontext context;
  CUresult code = cuDevicePrimaryCtxRetain(&context, device);
  return status(code ? code : cuCtxSetCurrent(context));
}

cudaError_t cudaGetDevice(int *device) {
  CUcontext context;
  cuCtxGetCurrent(&context);
  if (!context) cudaSetDevice(0);
  return status(cuCtxGetDevice(device));
}

// The runtime makes the first device's context the current one where there is none.
static void ensure_context(void) {
  int device;
  cudaGetDevice(&device);
}

cudaError_t cudaGetDeviceCount(int *count) { return status(cuDeviceGetCount(count)); }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  return status(cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device));
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H200");
  found->totalGlobalMem = 139ull << 30;
  found->unifiedAddressing = 1;
  found->textureAlignment = 512;
  found->l2CacheSize = 60 << 20;
  found->maxBlocksPerMultiProcessor = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  const struct {
    CUdevice_attribute attribute;
    int *value;
  } numbers[] = {
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &found->major},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &found->minor},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &found->multiProcessorCount},
      {CU_DEVICE_ATTRIBUTE_WARP_SIZE, &found->warpSize},
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, &found->maxThreadsPerBlock},
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, &found->maxThreadsPerMultiProcessor},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, &found->maxGridSize[0]},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, &found->maxGridSize[1]},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, &found->maxGridSize[2]},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, &found->maxThreadsDim[0]},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, &found->maxThreadsDim[1]},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, &found->maxThreadsDim[2]},
  };
  for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++)
    cuDeviceGetAttribute(numbers[i].value, numbers[i].attribute, device);
  int bytes;
  cuDeviceGetAttribute(&bytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, device);
  found->sharedMemPerBlock = bytes;
  cuDeviceGetAttribute(&bytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
  found->sharedMemPerBlockOptin = bytes;
  cuDeviceGetAttribute(&bytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, device);
  found->sharedMemPerMultiprocessor = bytes;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { return status(cuDriverGetVersion(version)); }

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = 139ull << 30;
  *unused = 130ull << 30;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return status(cuCtxSynchronize()); }

// ---- errors

cudaError_t cudaPeekAtLastError(void) { return last; }

cudaError_t cudaGetLastError(void) {
  cudaError_t found = last;
  last = cudaSuccess;
  return found;
}

const char *cudaGetErrorString(cudaError_t error) {
  const char *text;
  cuGetErrorString((CUresult)error, &text);
  return text;
}

const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }

// ---- memory

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  ensure_context();
  return status(cuMemAlloc((CUdeviceptr *)pointer, bytes));
}

cudaError_t cudaFree(void *pointer) { return status(cuMemFree((CUdeviceptr)pointer)); }

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  return status(cuMemAllocHost(pointer, bytes));
}

cudaError_t cudaFreeHost(void *pointer) { return status(cuMemFreeHost(pointer)); }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  ensure_context();
  return status(cuMemcpyAsync((CUdeviceptr)to, (CUdeviceptr)from, bytes, stream));
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  cudaError_t code = cudaMemcpyAsync(to, from, bytes, kind, NULL);
  return code ? code : cudaDeviceSynchronize();
}

cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t bytes,
                                cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  ensure_context();
  return status(cuMemsetD8Async((CUdeviceptr)to, value, bytes, stream));
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  cudaError_t code = cudaMemsetAsync(to, value, bytes, NULL);
  return code ? code : cudaDeviceSynchronize();
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  int place = standin_place(pointer);
  memset(found, 0, sizeof *found);
  found->type = place == -2   ? cudaMemoryTypeUnregistered
                : place == -1 ? cudaMemoryTypeHost
                              : cudaMemoryTypeDevice;
  found->device = place < 0 ? 0 : place;
  if (place != -2) found->devicePointer = found->hostPointer = (void *)pointer;
  return cudaSuccess;
}

// ---- streams, events, graphs

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  ensure_context();
  return status(cuStreamCreate(stream, flags));
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }

cudaError_t cudaStreamQuery(cudaStream_t stream) { return status(cuStreamQuery(stream)); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return status(cuStreamSynchronize(stream)); }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return status(cuStreamWaitEvent(stream, event, flags));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *found) {
  ensure_context();
  return status(cuStreamIsCapturing(stream, (CUstreamCaptureStatus *)found));
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *found,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  cudaStreamIsCapturing(stream, found);
  cudaGraph_t captured = standin_graph_of(stream);
  if (id) *id = (size_t)captured;
  if (graph) *graph = captured;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  return status(cuThreadExchangeStreamCaptureMode((CUstreamCaptureMode *)mode));
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  return status(cuStreamBeginCapture(stream, (CUstreamCaptureMode)mode));
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  return status(cuStreamEndCapture(stream, graph));
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = standin_graph_length(graph);
  return cudaSuccess;
}

// A graph is what is launched; it is never freed.
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return status(cuGraphLaunch((CUgraphExec)executable, stream));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  return status(cuEventCreate(event, flags));
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return status(cuEventRecord(event, stream));
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return status(cuEventRecord(event, stream)); }

cudaError_t cudaEventQuery(cudaEvent_t event) { return status(cuEventQuery(event)); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return status(cuEventSynchronize(event)); }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- kernels compiled into torch

struct host_function {
  const void *address;
  const char *name;
  struct host_function *next;
};
static struct host_function *host_functions[4096];

static struct host_function **bucket(const void *address) {
  return &host_functions[((size_t)address >> 4) % (sizeof host_functions / sizeof *host_functions)];
}

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) {}

void __cudaUnregisterFatBinary(void **handle) {}

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *tid,
                            void *bid, void *block, void *grid, int *size) {
  struct host_function *made = malloc(sizeof *made);
  *made = (struct host_function){host, name, *bucket(host)};
  *bucket(host) = made;
}

void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                       int constant, int global) {}

static cudaError_t launch(const void *address, dim3 grid, cudaStream_t stream) {
  struct host_function *found = *bucket(address);
  while (found && found->address != address) found = found->next;
  ensure_context();
  return status(standin_launch(found ? found->name : "unknown", (unsigned[]){grid.x, grid.y, grid.z}, stream));
}

static _Thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(cudaStream_t *)stream = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **params, size_t shared,
                               cudaStream_t stream) {
  return launch((const void *)kernel, grid, stream);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **params, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **params, size_t shared,
                                        cudaStream_t stream) {
  return launch(function, grid, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **params) {
  return launch(function, config->gridDim, config->stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function, int threads,
                                                          size_t shared) {
  *count = 4;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, function, threads, shared);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **address, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *address = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- cuBLASLt: torch takes it for a refusal if no algorithm is found

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *algorithms, int *found) {
  *found = 1;
  return 0;
}
