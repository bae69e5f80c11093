// A stand-in for NVIDIA's libcuda.so.1: devices of compute capability 9.0 on which no kernel runs.
//
// It serves Triton's own launcher, and libcudart.c, which serves torch's CUDA build. Every launch is recorded
// with the values of its parameters, whose sizes are read from the cubin as the driver reads them, and what a
// driver refuses is refused. Device memory is host memory. Work waits in its stream until something
// synchronises: what is written too late, or overwritten too early, stays so.
//
// GRADKERNELS_CUDA_LOG names the file that receives one line for each event; GRADKERNELS_CUDA_DEVICES is the
// number of devices, 2 by default. A launch of the kernel that GRADKERNELS_CUDA_FAULT names spoils the context:
// whatever follows is refused, as after an illegal access. Over 500 lines, since a driver is one library with one state.
#define _GNU_SOURCE
#include "cuda.h"
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_DEVICES 8
#define MAX_PARAMS 128
#define SHARED_DEFAULT 49152
#define SHARED_OPTIN 232448

struct CUctx_st {
  int device;
};
struct CUmod_st {
  CUcontext context;
  const char *cubin;
};
struct CUfunc_st {
  CUmodule module;
  CUcontext context;
  struct CUfunc_st *next;
  char *name;
  int params, sizes[MAX_PARAMS];
  unsigned threads;  // that the kernel was compiled for, 0 for any number
  unsigned shared;   // bytes of dynamic shared memory that a launch may ask for
};
struct CUevent_st {
  CUstream stream;
  CUgraph graph;  // in which it was recorded
  bool pending;   // since it was recorded outside of a graph
};
// A piece of work in a stream or a graph.
struct work {
  enum { LAUNCH, COPY, SET, RECORD, WAIT } kind;
  void *to;
  const void *from;
  size_t bytes;
  int value;
  CUevent event;
  struct work *next;
};
struct CUgraph_st {
  struct work *first, **last;
  int length;
  CUstream origin;  // of the capture
  CUstreamCaptureMode mode;
  pthread_t thread;
  bool invalid;  // after a call that the capture prohibits
};
struct CUstream_st {
  CUcontext context;
  struct CUstream_st *next;
  struct work *first, **last;
  CUgraph graph;  // that it is captured into, or NULL
};
struct range {
  size_t start, bytes;
  int device;  // -1 for pinned memory of the host
  struct range *next;
};

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static struct CUctx_st contexts[MAX_DEVICES];
static CUfunction functions;
static CUstream streams;
static struct range *ranges;
static _Thread_local CUcontext current;
static const unsigned char *watched;
static size_t watched_bytes;
static _Thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static _Thread_local char reason[512];
static bool spoilt;

// ---- the record

// The file of the record, or NULL if none is kept.
static FILE *log_file(void) {
  static FILE *file;
  const char *path = getenv("GRADKERNELS_CUDA_LOG");
  if (!file && path && *path) file = fopen(path, "a");
  return file;
}

static void record(const char *format, ...) {
  FILE *file = log_file();
  if (!file) return;
  va_list arguments;
  va_start(arguments, format);
  flockfile(file);
  vfprintf(file, format, arguments);
  fputc('\n', file);
  fflush(file);
  funlockfile(file);
  va_end(arguments);
}

// Refuse a call: the reason is recorded, and is what cuGetErrorString says next.
static CUresult refuse(CUresult code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  record("refused %s", reason);
  return code;
}

// What cuda_build.py makes of a function of the driver or the runtime that nothing here defines.
CUresult standin_missing(const char *name) { return refuse(CUDA_ERROR_NOT_SUPPORTED, "no stand-in for %s", name); }

CUresult cuGetErrorString(CUresult code, const char **text) {
  if (!*reason) snprintf(reason, sizeof reason, "CUDA error %d", (int)code);
  *text = reason;
  return CUDA_SUCCESS;
}

// Refuse a call during a capture, which it ends.
static CUresult refuse_in(CUgraph graph, const char *what) {
  graph->invalid = true;
  return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "%s during a capture", what);
}

static CUresult refuse_spoilt(void) {
  return refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered");
}

// Refuse any call after a fault, and one that may interfere with a capture, unless the modes of the capture and the
// thread let it pass.
static CUresult unsafe(const char *what) {
  if (spoilt) return refuse_spoilt();
  if (capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
  for (CUstream stream = streams; stream; stream = stream->next) {
    CUgraph graph = stream->graph;
    if (!graph || graph->mode == CU_STREAM_CAPTURE_MODE_RELAXED) continue;
    bool everywhere = graph->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    if (everywhere || pthread_equal(graph->thread, pthread_self())) return refuse_in(graph, what);
  }
  return CUDA_SUCCESS;
}

// ---- devices and contexts

static int devices(void) {
  const char *count = getenv("GRADKERNELS_CUDA_DEVICES");
  return count ? atoi(count) : 2;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = devices();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= devices())
    return refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of %d", ordinal, devices());
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 2147483647; break;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: *value = 65535; break;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: *value = 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: *value = 64; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = SHARED_DEFAULT; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OPTIN; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 6144; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (device < 0 || device >= devices())
    return refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of %d", device, devices());
  contexts[device].device = device;
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

// torch asks before it looks whether a stream is captured.
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = true;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current");
  *device = current->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

// ---- modules and functions

static const Elf64_Shdr *section(const char *cubin, const char *prefix, const char *name) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)cubin;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(cubin + head->e_shoff);
  const char *names = cubin + sections[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; i++) {
    const char *found = names + sections[i].sh_name;
    if (!strncmp(found, prefix, strlen(prefix)) && !strcmp(found + strlen(prefix), name)) return &sections[i];
  }
  return NULL;
}

// Read .nv.info.<kernel>: records of a format, an attribute and 16 bits, a length where the format says so.
static void read_info(CUfunction function, const char *cubin, const Elf64_Shdr *info) {
  enum { WITH_LENGTH = 4, REQUIRED_THREADS = 0x10, PARAMETER = 0x17 };
  const unsigned char *at = (const unsigned char *)cubin + info->sh_offset, *end = at + info->sh_size;
  while (at + 4 <= end) {
    unsigned short length;
    memcpy(&length, at + 2, 2);
    const unsigned char *payload = at + 4;
    if (at[0] == WITH_LENGTH && at[1] == PARAMETER) {
      unsigned short ordinal;
      unsigned bits;
      memcpy(&ordinal, payload + 4, 2);
      memcpy(&bits, payload + 8, 4);
      if (ordinal >= MAX_PARAMS) abort();
      function->sizes[ordinal] = bits >> 18;
      if (ordinal >= function->params) function->params = ordinal + 1;
    } else if (at[0] == WITH_LENGTH && at[1] == REQUIRED_THREADS) {
      memcpy(&function->threads, payload, 4);
    }
    at = payload + (at[0] == WITH_LENGTH ? length : 0);
  }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT, "a module is loaded without a context");
  if (memcmp(image, ELFMAG, SELFMAG)) return refuse(CUDA_ERROR_INVALID_IMAGE, "a module that is no cubin");
  CUresult refused = unsafe("a module is loaded");
  if (refused) return refused;
  *module = calloc(1, sizeof **module);
  (*module)->context = current;
  (*module)->cubin = image;
  record("module device=%d", current->device);
  return CUDA_SUCCESS;
}

// The image is kept for as long as the process: the module refers to it.
CUresult cuModuleLoad(CUmodule *module, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return refuse(CUDA_ERROR_FILE_NOT_FOUND, "no module %s", path);
  fseek(file, 0, SEEK_END);
  long bytes = ftell(file);
  rewind(file);
  void *image = calloc(1, bytes + SELFMAG);
  size_t read = fread(image, 1, bytes, file);
  fclose(file);
  return read == (size_t)bytes ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleUnload(CUmodule module) {
  pthread_mutex_lock(&lock);
  for (CUfunction *link = &functions; *link;)
    if ((*link)->module == module)
      *link = (*link)->next;
    else
      link = &(*link)->next;
  pthread_mutex_unlock(&lock);
  record("unload");
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if (!section(module->cubin, ".text.", name))
    return refuse(CUDA_ERROR_NOT_FOUND, "no kernel %s in the module", name);
  CUfunction found = calloc(1, sizeof *found);
  found->module = module;
  found->context = module->context;
  found->name = strdup(name);
  found->shared = SHARED_DEFAULT;
  const Elf64_Shdr *info = section(module->cubin, ".nv.info.", name);
  if (info) read_info(found, module->cubin, info);
  pthread_mutex_lock(&lock);
  found->next = functions;
  functions = found;
  pthread_mutex_unlock(&lock);
  *function = found;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->threads ? function->threads : 1024; break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
  default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  if (value > SHARED_OPTIN) return refuse(CUDA_ERROR_INVALID_VALUE, "%d bytes of shared memory", value);
  function->shared = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

// ---- streams, events, graphs

static void append(struct work ***last, struct work work) {
  struct work *made = malloc(sizeof *made);
  *made = work;
  made->next = NULL;
  **last = made;
  *last = &made->next;
}

// The default stream of the current device, or the stream with this handle if it is one of that device.
static CUstream stream_of(CUstream wanted) {
  static struct CUstream_st defaults[MAX_DEVICES];
  if (!current) return NULL;
  if (wanted <= CU_STREAM_PER_THREAD) {
    CUstream found = &defaults[current->device];
    if (!found->last) found->last = &found->first;
    found->context = current;
    return found;
  }
  for (CUstream stream = streams; stream; stream = stream->next)
    if (stream == wanted) return stream->context == current ? stream : NULL;
  return NULL;
}

// Record some memory whenever a launch is executed: as the kernel would find it then. Of 0 bytes: no longer.
void standin_watch(const void *memory, size_t bytes) {
  watched = memory;
  watched_bytes = bytes;
}

static void record_watched(void) {
  char text[2 * 4096 + 1];
  if (!watched_bytes || 2 * watched_bytes >= sizeof text) return;
  for (size_t i = 0; i < watched_bytes; i++) sprintf(text + 2 * i, "%02x", watched[i]);
  record("executed memory=%s", text);
}

// Do the work of a stream, all of it or up to an event.
static void run(CUstream stream, CUevent until) {
  while (stream->first && !(until && !until->pending)) {
    struct work *work = stream->first;
    stream->first = work->next;
    if (!stream->first) stream->last = &stream->first;
    switch (work->kind) {
    case LAUNCH: record_watched(); break;
    case COPY: memcpy(work->to, work->from, work->bytes); break;
    case SET: memset(work->to, work->value, work->bytes); break;
    case RECORD: work->event->pending = false; break;
    case WAIT:
      if (work->event->pending) run(work->event->stream, work->event);
    }
    free(work);
  }
}

static void run_all(void) {
  for (CUstream stream = streams; stream; stream = stream->next) run(stream, NULL);
  CUcontext before = current;
  for (int device = 0; device < devices(); device++) {
    current = &contexts[device];
    run(stream_of(NULL), NULL);
  }
  current = before;
}

static CUresult push(CUstream handle, struct work work) {
  if (spoilt) return refuse_spoilt();
  pthread_mutex_lock(&lock);
  CUstream stream = stream_of(handle);
  if (stream && stream->graph && stream->graph->invalid) {
    pthread_mutex_unlock(&lock);
    return refuse(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "work for a capture that has ended by an error");
  }
  if (stream && !stream->graph && !stream->first && work.kind == LAUNCH) {
    record_watched();  // nothing is before it
  } else if (stream && stream->graph) {
    append(&stream->graph->last, work);
    stream->graph->length++;
  } else if (stream) {
    append(&stream->last, work);
  }
  pthread_mutex_unlock(&lock);
  if (stream) return CUDA_SUCCESS;
  return refuse(CUDA_ERROR_INVALID_HANDLE, "%p is no stream of device %d", (void *)handle,
                current ? current->device : -1);
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT, "a stream is made without a context");
  CUstream made = calloc(1, sizeof *made);
  made->context = current;
  made->last = &made->first;
  pthread_mutex_lock(&lock);
  made->next = streams;
  streams = made;
  pthread_mutex_unlock(&lock);
  *stream = made;
  return CUDA_SUCCESS;
}

CUresult cuStreamQuery(CUstream handle) {
  CUstream stream = stream_of(handle);
  if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "query of a stream of another device");
  if (stream->graph) return refuse_in(stream->graph, "its stream is queried");
  return stream->first ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
  CUstream stream = stream_of(handle);
  if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "wait for a stream of another device");
  if (stream->graph) return refuse_in(stream->graph, "its stream is synchronised");
  CUresult refused = unsafe("a stream is synchronised");
  if (refused) return refused;
  record("synchronize");
  pthread_mutex_lock(&lock);
  run(stream, NULL);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
  for (CUstream stream = streams; stream; stream = stream->next)
    if (stream->graph && stream->context == current) return refuse_in(stream->graph, "its device is synchronised");
  CUresult refused = unsafe("a device is synchronised");
  if (refused) return refused;
  record("synchronize");
  pthread_mutex_lock(&lock);
  run_all();
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
  CUstream stream = stream_of(handle);
  CUgraph graph = stream ? stream->graph : NULL;
  *status = !graph           ? CU_STREAM_CAPTURE_STATUS_NONE
            : graph->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                             : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
  CUstreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  CUstream stream = stream_of(handle);
  if (!stream || handle <= CU_STREAM_PER_THREAD || stream->graph)
    return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "capture of a stream that cannot be captured");
  CUgraph graph = stream->graph = calloc(1, sizeof *graph);
  graph->last = &graph->first;
  graph->origin = stream;
  graph->mode = mode;
  graph->thread = pthread_self();
  record("capture graph=%zu", (size_t)graph);
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) {
  CUstream stream = stream_of(handle);
  CUgraph ended = stream ? stream->graph : NULL;
  *graph = NULL;
  if (!ended) return refuse(CUDA_ERROR_ILLEGAL_STATE, "no capture to end");
  if (ended->origin != stream)
    return refuse(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "a capture is ended on another stream than it was begun on");
  for (CUstream joined = streams; joined; joined = joined->next)
    if (joined->graph == ended) joined->graph = NULL;
  if (ended->invalid) return refuse(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture has ended by an error");
  *graph = ended;
  record("captured graph=%zu length=%d", (size_t)ended, ended->length);
  return CUDA_SUCCESS;
}

// The graph that a stream is captured into, or NULL.
CUgraph standin_graph_of(CUstream handle) {
  CUstream stream = stream_of(handle);
  return stream ? stream->graph : NULL;
}

int standin_graph_length(CUgraph graph) { return graph->length; }

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  CUgraph graph = (CUgraph)executable;
  record("replay graph=%zu length=%d", (size_t)graph, graph->length);
  CUresult result = CUDA_SUCCESS;
  for (struct work *work = graph->first; work && !result; work = work->next) result = push(stream, *work);
  return result;
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
  *event = calloc(1, sizeof **event);
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
  CUstream stream = stream_of(handle);
  if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "event recorded on a stream of another device");
  event->stream = stream;
  event->graph = stream->graph;
  event->pending = !stream->graph;
  return stream->graph ? CUDA_SUCCESS : push(handle, (struct work){.kind = RECORD, .event = event});
}

// Within a capture a wait joins streams; it is no work of the graph.
CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
  CUstream stream = stream_of(handle);
  if (!stream) return refuse(CUDA_ERROR_INVALID_HANDLE, "wait in a stream of another device");
  if (event->graph && event->graph->origin->graph != event->graph)
    return refuse(CUDA_ERROR_CAPTURED_EVENT, "wait for an event of a capture that has ended");
  if (!stream->graph && event->graph) stream->graph = event->graph;
  if (!stream->graph) return push(handle, (struct work){.kind = WAIT, .event = event});
  if (event->graph == stream->graph || !event->stream) return CUDA_SUCCESS;
  stream->graph->invalid = true;
  return refuse(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "wait for work outside of the capture");
}

CUresult cuEventQuery(CUevent event) {
  if (event->graph) return refuse(CUDA_ERROR_CAPTURED_EVENT, "an event of a capture is queried");
  CUresult refused = unsafe("an event is queried");
  if (refused) return refused;
  return event->pending ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
  if (event->graph) return refuse(CUDA_ERROR_CAPTURED_EVENT, "an event of a capture is waited for");
  CUresult refused = unsafe("an event is waited for");
  if (refused) return refused;
  if (event->pending) record("wait");
  pthread_mutex_lock(&lock);
  if (event->pending) run(event->stream, event);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

// ---- memory

static struct range *range_of(const void *pointer) {
  for (struct range *range = ranges; range; range = range->next)
    if ((size_t)pointer - range->start < range->bytes) return range;
  return NULL;
}

// The device on which an address lies, -1 for pinned memory, -2 for any other.
int standin_place(const void *pointer) {
  pthread_mutex_lock(&lock);
  struct range *range = range_of(pointer);
  int place = range ? range->device : -2;
  pthread_mutex_unlock(&lock);
  return place;
}

static CUresult allocate(void **pointer, size_t bytes, int device) {
  CUresult refused = unsafe(device < 0 ? "memory is pinned" : "memory is allocated");
  if (refused) return refused;
  bytes = (bytes + 4095) & ~4095ul;
  void *made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  struct range *range = malloc(sizeof *range);
  pthread_mutex_lock(&lock);
  *range = (struct range){(size_t)made, bytes, device, ranges};
  ranges = range;
  pthread_mutex_unlock(&lock);
  if (device < 0) record("pin bytes=%zu", bytes);
  *pointer = made;
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *pointer, size_t bytes) {
  return allocate((void **)pointer, bytes, current ? current->device : 0);
}

CUresult cuMemAllocHost(void **pointer, size_t bytes) { return allocate(pointer, bytes, -1); }

CUresult cuMemFreeHost(void *pointer) {
  CUresult refused = unsafe("memory is freed");
  if (refused) return refused;
  pthread_mutex_lock(&lock);
  run_all();
  for (struct range **link = &ranges; *link; link = &(*link)->next)
    if ((*link)->start == (size_t)pointer) {
      struct range *range = *link;
      *link = range->next;
      munmap(pointer, range->bytes);
      free(range);
      break;
    }
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr pointer) { return cuMemFreeHost((void *)pointer); }

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  static const char *const names[] = {"pageable", "pinned", "device"};
  int source = standin_place((void *)from), target = standin_place((void *)to);
  bool pageable = source == -2 || target == -2;
  CUgraph graph = standin_graph_of(stream);
  if (pageable && graph) return refuse_in(graph, "pageable memory is copied");
  record("copy from=%s to=%s bytes=%zu stream=%zu graph=%zu", names[source < 0 ? source + 2 : 2],
         names[target < 0 ? target + 2 : 2], bytes, (size_t)stream, (size_t)graph);
  CUresult result = push(stream, (struct work){COPY, (void *)to, (void *)from, bytes});
  pthread_mutex_lock(&lock);
  if (pageable && !result) run(stream_of(stream), NULL);
  pthread_mutex_unlock(&lock);
  return result;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  record("set bytes=%zu stream=%zu graph=%zu", bytes, (size_t)stream, (size_t)standin_graph_of(stream));
  return push(stream, (struct work){SET, (void *)to, .bytes = bytes, .value = value});
}

// With torch's CPU build nothing is allocated here, and all memory of the process can be given to a kernel.
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  if (ranges && standin_place((void *)pointer) == -2)
    return refuse(CUDA_ERROR_INVALID_VALUE, "a kernel is given pageable memory at %p", (void *)pointer);
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

// ---- tensor maps

// What a tensor map holds here. A driver's is opaque.
struct tensor_map {
  unsigned long long address;
  unsigned type, rank;
  unsigned long long dims[5], strides[4];
  unsigned short box[5];
  unsigned char swizzle;
};

// TMA's rules, from the documentation of cuTensorMapEncodeTiled.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  static const int widths[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned spans[] = {1 << 30, 32, 64, 128};
  const CUresult invalid = CUDA_ERROR_INVALID_VALUE;
  if ((unsigned)type >= sizeof widths / sizeof *widths) return refuse(invalid, "tensor map: type %d", (int)type);
  if ((unsigned)swizzle >= sizeof spans / sizeof *spans)
    return refuse(invalid, "tensor map: swizzle %d", (int)swizzle);
  cuuint64_t width = widths[type];
  if ((size_t)map % 64) return refuse(invalid, "tensor map: itself at %p", (void *)map);
  if (!address || (size_t)address % 16) return refuse(invalid, "tensor map: address at %p", address);
  if (rank < 1 || rank > 5) return refuse(invalid, "tensor map: rank %u", rank);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse(invalid, "tensor map: interleaved");
  for (unsigned i = 0; i < rank; i++) {
    if (!dims[i] || dims[i] > 1ull << 32) return refuse(invalid, "tensor map: size %llu", dims[i]);
    if (!box[i] || box[i] > 256) return refuse(invalid, "tensor map: box of %u", box[i]);
    if (!steps[i] || steps[i] > 8) return refuse(invalid, "tensor map: element stride %u", steps[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (strides[i] % 16 || strides[i] >= 1ull << 40)
      return refuse(invalid, "tensor map: stride of %llu bytes", strides[i]);
    if (strides[i] < dims[i] * (i ? strides[i - 1] : width))
      return refuse(invalid, "tensor map: stride of %llu bytes over %llu elements", strides[i], dims[i]);
  }
  if (box[0] * width % 16 || box[0] * width > spans[swizzle])
    return refuse(invalid, "tensor map: box of %llu bytes at swizzle %d", box[0] * width, (int)swizzle);
  struct tensor_map made = {(size_t)address, type, rank, .swizzle = swizzle};
  memcpy(made.dims, dims, rank * sizeof *dims);
  memcpy(made.strides, strides, (rank - 1) * sizeof *strides);
  for (unsigned i = 0; i < rank; i++) made.box[i] = box[i];
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

// ---- launches

// A kernel that another library has compiled in.
CUresult standin_launch(const char *kernel, unsigned grid[3], CUstream stream) {
  record("other kernel=%s grid=%u,%u,%u stream=%zu graph=%zu", kernel, grid[0], grid[1], grid[2], (size_t)stream,
         (size_t)standin_graph_of(stream));
  return push(stream, (struct work){LAUNCH});
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  const CUresult invalid = CUDA_ERROR_INVALID_VALUE;
  unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  pthread_mutex_lock(&lock);
  CUfunction known = functions;
  while (known && known != function) known = known->next;
  pthread_mutex_unlock(&lock);
  if (!known) return refuse(CUDA_ERROR_INVALID_HANDLE, "launch of an unknown function %p", (void *)function);
  if (!current || function->context != current)
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "launch of %s, loaded on device %d, on device %d", function->name,
                  function->context->device, current ? current->device : -1);
  if (!stream_of(config->hStream))
    return refuse(CUDA_ERROR_INVALID_HANDLE, "launch of %s on %p, no stream of device %d", function->name,
                  (void *)config->hStream, current->device);
  if (!x || !y || !z || x > 2147483647 || y > 65535 || z > 65535)
    return refuse(invalid, "launch of %s over a grid of %u, %u, %u", function->name, x, y, z);
  if (!threads || threads > 1024 || (function->threads && threads != function->threads))
    return refuse(invalid, "launch of %s with %u threads, compiled for %u", function->name, threads,
                  function->threads);
  if (config->sharedMemBytes > function->shared)
    return refuse(invalid, "launch of %s with %u bytes of shared memory, allowed %u", function->name,
                  config->sharedMemBytes, function->shared);
  char values[2 * 4096 + MAX_PARAMS + 1], *at = values;  // parameters have 4 KiB at most
  for (int i = 0; i < function->params && log_file(); i++) {  // as cheap as a driver where no record is kept
    if (i) *at++ = ',';
    for (int byte = 0; byte < function->sizes[i]; byte++) {
      if (at + 4 > values + sizeof values) return refuse(invalid, "parameters of %s", function->name);
      at += sprintf(at, "%02x", ((unsigned char *)params[i])[byte]);
    }
  }
  *at = 0;
  record("launch kernel=%s function=%zu device=%d stream=%zu graph=%zu grid=%u,%u,%u threads=%u shared=%u params=%s",
         function->name, (size_t)function, current->device, (size_t)config->hStream,
         (size_t)standin_graph_of(config->hStream), x, y, z, threads, config->sharedMemBytes, values);
  CUresult pushed = push(config->hStream, (struct work){LAUNCH});
  const char *faulty = getenv("GRADKERNELS_CUDA_FAULT");
  if (faulty && !strcmp(faulty, function->name)) spoilt = true;
  return pushed;
}

// By which Inductor launches.
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void **params, void **extra) {
  CUlaunchConfig config = {x, y, z, threads_x, threads_y, threads_z, shared, stream};
  return cuLaunchKernelEx(&config, function, params, extra);
}
