/* A stand-in for libcuda.so.1: the driver calls that a kernel engine makes, on a machine without a GPU.

It refuses what NVIDIA's driver refuses, and does the work of a stream as late as it may: when someone waits for it. So
what is read too early, or given back too soon, shows. Device memory is a file that a Python process has mapped too; that
process executes each launch (stand_in.py). $CUDA_STAND_IN is a folder with
  device    the device, one "key value" a line
  functions every function of the known cubins, one a line: file, architecture, symbol, static shared memory, threads,
            count of parameters, then "offset:size" of each
  memory    device memory
  socket    of that process; without it launches do nothing, for measuring what the host does
*/

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default"))) int
#define BASE 0x7F0000000000ull /* of device memory; nothing of the host lies there */
#define MOST_PARAMETERS 256
#define MOST_FUNCTIONS 1024
#define MOST_HANDLES 4096

enum {
  SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
  LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901
};

typedef uint64_t address_t;

typedef struct {
  char file[64], symbol[256];
  int architecture, shared, threads, count, offsets[MOST_PARAMETERS], sizes[MOST_PARAMETERS];
} function_t;

typedef struct { char file[64]; } module_t;
typedef struct { function_t *code; int most_shared; } loaded_t; /* CUfunction */

typedef struct event event_t;
typedef struct graph graph_t;
typedef struct stream stream_t;

typedef struct op {
  enum { TO_DEVICE, TO_HOST, WITHIN, FILL, LAUNCH, RECORD, WAIT, GRAPH } kind;
  address_t to, from; /* of the device, or of the host */
  size_t size;
  void *staged; /* what pageable memory held when the copy was asked for */
  int value, grid[3], shared, dependent;
  function_t *code;
  unsigned char *parameters;
  event_t *event;
  stream_t *other;
  long ticket;
  graph_t *graph;
  struct op *next;
} op_t;

struct graph { op_t *first, *last; int count; };
struct event { stream_t *stream; long ticket; struct timespec when; };
struct stream { op_t *first, *last; long asked, done; graph_t *capture; int mode, broken; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int started, failed, users, emulates, connection = -1, live;
static int driver = 13010, major_ = 8, minor_ = 7, optin = 166912, integrated;
static size_t room;
static char *memory;
static address_t top = BASE + 4096;
static function_t *functions;
static int function_count;
static struct { address_t address; size_t size; } allocated[MOST_HANDLES], pinned[MOST_HANDLES];
static int allocated_end, pinned_end, stream_end; /* behind the last in use */
static stream_t legacy, *streams[MOST_HANDLES];
static int context; /* its address is the handle of the one context */
static __thread void *current[64];
static __thread int depth;
static __thread int capturing;

/* ------------------------------------------------------------------------------------------------ the other process */

static int ask(const char *text, const void *payload, uint32_t size) {
  uint32_t length = strlen(text);
  int32_t answer;
  if (!emulates) return SUCCESS;
  if (write(connection, &length, 4) != 4 || write(connection, &size, 4) != 4 ||
      write(connection, text, length) != (ssize_t)length)
    abort();
  for (uint32_t sent = 0; sent < size;) {
    ssize_t n = write(connection, (const char *)payload + sent, size - sent);
    if (n <= 0) abort();
    sent += n;
  }
  if (recv(connection, &answer, 4, MSG_WAITALL) != 4) abort();
  return answer;
}

static void tell(const char *what, address_t address, size_t size) {
  char text[128];
  snprintf(text, sizeof text, "%s %llu %zu", what, (unsigned long long)address, size);
  ask(text, NULL, 0);
}

static int begin(void) {
  const char *folder = getenv("CUDA_STAND_IN");
  char path[4096], key[64];
  long value;
  if (!folder) return NO_DEVICE;
  snprintf(path, sizeof path, "%s/device", folder);
  FILE *file = fopen(path, "r");
  if (!file) return NO_DEVICE;
  while (fscanf(file, "%63s %ld", key, &value) == 2) {
    if (!strcmp(key, "driver")) driver = value;
    if (!strcmp(key, "capability")) major_ = value / 10, minor_ = value % 10;
    if (!strcmp(key, "shared")) optin = value;
    if (!strcmp(key, "memory")) room = value;
    if (!strcmp(key, "integrated")) integrated = value;
    if (!strcmp(key, "fails") && value) { fclose(file); return value; }
  }
  fclose(file);
  functions = calloc(MOST_FUNCTIONS, sizeof *functions);
  snprintf(path, sizeof path, "%s/functions", folder);
  file = fopen(path, "r");
  if (!file) return NO_DEVICE;
  function_t *f = functions;
  while (function_count < MOST_FUNCTIONS && fscanf(file, "%63s %d %255s %d %d %d", f->file, &f->architecture, f->symbol,
                                                   &f->shared, &f->threads, &f->count) == 6) {
    for (int i = 0; i < f->count; i++)
      if (fscanf(file, "%d:%d", &f->offsets[i], &f->sizes[i]) != 2) abort();
    f++, function_count++;
  }
  fclose(file);
  snprintf(path, sizeof path, "%s/memory", folder);
  int descriptor = open(path, O_RDWR);
  memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (memory == MAP_FAILED) return OUT_OF_MEMORY;
  struct sockaddr_un name = {.sun_family = AF_UNIX};
  snprintf(name.sun_path, sizeof name.sun_path, "%s/socket", folder);
  connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  emulates = !connect(connection, (struct sockaddr *)&name, sizeof name);
  return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------------- what is held */

static int on_device(address_t address, size_t size) {
  for (int i = 0; i < allocated_end; i++)
    if (allocated[i].size && address >= allocated[i].address && address + size <= allocated[i].address + allocated[i].size)
      return 1;
  return 0;
}

static int is_pinned(address_t address) {
  for (int i = 0; i < pinned_end; i++)
    if (pinned[i].size && address >= pinned[i].address && address < pinned[i].address + pinned[i].size) return 1;
  return 0;
}

static char *host(address_t address) { return memory + (address - BASE); }

#define ENTER                                                                   \
  pthread_mutex_lock(&lock);                                                    \
  int result = !started ? NOT_INITIALIZED : failed ? failed : !depth || !current[depth - 1] ? INVALID_CONTEXT : SUCCESS; \
  if (result) goto leave;
#define LEAVE                  \
  leave:                       \
  pthread_mutex_unlock(&lock); \
  return result;
#define REFUSE(error) { result = error; goto leave; }
#define NEVER_CAPTURED if (capturing) REFUSE(CAPTURE_UNSUPPORTED)

static stream_t *stream_of(void *handle) {
  if (handle == NULL || handle == (void *)1 || handle == (void *)2) return &legacy;
  for (int i = 0; i < stream_end; i++)
    if (streams[i] == handle) return handle;
  return NULL;
}

/* -------------------------------------------------------------------------------------------------------------- work */

static void drain(stream_t *stream, long ticket);

static void execute(op_t *op) {
  if (failed) return;
  char text[512];
  switch (op->kind) {
  case TO_DEVICE:
    memcpy(host(op->to), op->staged ? op->staged : (void *)op->from, op->size);
    tell("written", op->to, op->size);
    break;
  case TO_HOST:
    memcpy((void *)op->to, host(op->from), op->size);
    break;
  case WITHIN:
    memmove(host(op->to), host(op->from), op->size);
    tell("written", op->to, op->size);
    break;
  case FILL:
    memset(host(op->to), op->value, op->size);
    tell(op->value == 0xFF ? "poisoned" : "written", op->to, op->size);
    break;
  case LAUNCH:
    if (emulates) {
      snprintf(text, sizeof text, "launch %s %s %d %d %d %d %d", op->code->file, op->code->symbol, op->grid[0], op->grid[1],
               op->grid[2], op->shared, op->dependent);
      failed = ask(text, op->parameters, op->size);
    }
    break;
  case RECORD:
    clock_gettime(CLOCK_MONOTONIC, &op->event->when);
    break;
  case WAIT:
    drain(op->other, op->ticket);
    break;
  case GRAPH:
    for (op_t *inner = op->graph->first; inner; inner = inner->next) execute(inner);
    break;
  }
}

static void release(op_t *op) {
  free(op->staged);
  free(op->parameters);
  free(op);
}

static void drain(stream_t *stream, long ticket) {
  while (stream->first && stream->done < ticket) {
    op_t *op = stream->first;
    stream->first = op->next;
    if (!stream->first) stream->last = NULL;
    stream->done++;
    execute(op);
    release(op);
  }
}

static void drain_all(void) {
  drain(&legacy, legacy.asked);
  for (int i = 0; i < stream_end; i++)
    if (streams[i]) drain(streams[i], streams[i]->asked);
}

static int append(stream_t *stream, op_t op) {
  op_t *kept = malloc(sizeof *kept);
  *kept = op;
  kept->next = NULL;
  op_t **first = stream->capture ? &stream->capture->first : &stream->first;
  op_t **last = stream->capture ? &stream->capture->last : &stream->last;
  if (*last) (*last)->next = kept; else *first = kept;
  *last = kept;
  if (stream->capture) stream->capture->count++; else stream->asked++;
  return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ device and context */

API cuInit(unsigned flags) {
  pthread_mutex_lock(&lock);
  int result = flags ? INVALID_VALUE : started ? SUCCESS : begin();
  if (!result) started = 1;
  pthread_mutex_unlock(&lock);
  return result;
}
API cuDriverGetVersion(int *version) {
  *version = driver;
  return SUCCESS;
}
API cuDeviceGetCount(int *count) {
  *count = 1;
  return started ? SUCCESS : NOT_INITIALIZED;
}
API cuDeviceGet(int *device, int ordinal) {
  *device = 0;
  return !started ? NOT_INITIALIZED : ordinal ? INVALID_DEVICE : SUCCESS;
}
API cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (!started) return NOT_INITIALIZED;
  if (device) return INVALID_DEVICE;
  switch (attribute) {
  case 16: *value = 16; break;
  case 18: *value = integrated; break;
  case 19: case 41: *value = 1; break;
  case 75: *value = major_; break;
  case 76: *value = minor_; break;
  case 97: *value = optin; break;
  default: return INVALID_VALUE;
  }
  return SUCCESS;
}
API cuDeviceGetName(char *name, int length, int device) {
  snprintf(name, length, "stand-in");
  return device ? INVALID_DEVICE : SUCCESS;
}
API cuDevicePrimaryCtxRetain(void **handle, int device) {
  if (!started) return NOT_INITIALIZED;
  if (device) return INVALID_DEVICE;
  pthread_mutex_lock(&lock);
  users++;
  pthread_mutex_unlock(&lock);
  *handle = &context;
  return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
  pthread_mutex_lock(&lock);
  int result = device || !users ? INVALID_CONTEXT : SUCCESS;
  if (!result && !--users) {
    drain_all();
    tell("released", 0, live);
  }
  pthread_mutex_unlock(&lock);
  return result;
}
API cuCtxPushCurrent_v2(void *handle) {
  if (handle != &context || depth == 64) return INVALID_CONTEXT;
  if (!users) return INVALID_CONTEXT;
  current[depth++] = handle;
  return SUCCESS;
}
API cuCtxPopCurrent_v2(void **handle) {
  if (!depth) return INVALID_CONTEXT;
  void *top = current[--depth];
  if (handle) *handle = top;
  return SUCCESS;
}
API cuCtxSetCurrent(void *handle) {
  if (handle && (handle != &context || !users)) return INVALID_CONTEXT;
  if (!depth) depth = 1;
  current[depth - 1] = handle;
  return SUCCESS;
}
API cuCtxGetCurrent(void **handle) {
  *handle = depth ? current[depth - 1] : NULL;
  return SUCCESS;
}
API cuCtxSynchronize(void) {
  ENTER NEVER_CAPTURED
  drain_all();
  result = failed;
  LEAVE
}

/* ------------------------------------------------------------------------------------------------------------ modules */

API cuModuleLoadData(void **module, const void *image) {
  ENTER NEVER_CAPTURED
  result = memcmp(image, "\177ELF", 4) ? INVALID_IMAGE : NOT_FOUND;
  for (int i = 0; i < function_count && result == NOT_FOUND; i++) {
    char path[4096];
    struct stat facts;
    snprintf(path, sizeof path, "%s/%s", getenv("CUDA_STAND_IN"), functions[i].file);
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &facts)) abort();
    char *known = mmap(NULL, facts.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (!memcmp(known, image, 64) && !memcmp(known, image, facts.st_size)) {
      result = functions[i].architecture == 10 * major_ + minor_ ? SUCCESS : NO_BINARY;
      module_t *made = calloc(1, sizeof *made);
      strcpy(made->file, functions[i].file);
      *module = made;
      live += !result;
    }
    munmap(known, facts.st_size);
    close(file);
  }
  if (result == NOT_FOUND) result = INVALID_IMAGE;
  LEAVE
}
API cuModuleUnload(void *module) {
  ENTER
  drain_all();
  free(module);
  live--;
  LEAVE
}
API cuModuleGetFunction(void **function, void *module, const char *name) {
  ENTER
  result = NOT_FOUND;
  for (int i = 0; i < function_count; i++)
    if (!strcmp(functions[i].file, ((module_t *)module)->file) && !strcmp(functions[i].symbol, name)) {
      loaded_t *made = calloc(1, sizeof *made); /* as long as the process, as short as that is */
      *made = (loaded_t){&functions[i], 48 << 10};
      *function = made;
      result = SUCCESS;
      break;
    }
  LEAVE
}
API cuFuncGetAttribute(int *value, int attribute, void *function) {
  ENTER
  loaded_t *f = function;
  switch (attribute) {
  case 0: *value = f->code->threads; break;
  case 1: *value = f->code->shared; break;
  case 3: *value = 0; break;
  case 4: *value = 64; break;
  case 8: *value = f->most_shared; break;
  default: result = INVALID_VALUE;
  }
  LEAVE
}
API cuFuncSetAttribute(void *function, int attribute, int value) {
  ENTER
  loaded_t *f = function;
  if (attribute != 8 || value < 0 || value + f->code->shared > optin) REFUSE(INVALID_VALUE)
  f->most_shared = value;
  LEAVE
}

/* ------------------------------------------------------------------------------------------------------------- memory */

API cuMemAlloc_v2(address_t *address, size_t size) {
  ENTER NEVER_CAPTURED
  if (!size) REFUSE(INVALID_VALUE)
  size_t taken = (size + 8191) / 4096 * 4096; /* and a guard behind it */
  if (top + taken > BASE + room) REFUSE(OUT_OF_MEMORY)
  for (int i = 0; i < MOST_HANDLES; i++)
    if (!allocated[i].size) {
      if (i >= allocated_end) allocated_end = i + 1;
      allocated[i].address = *address = top;
      allocated[i].size = size;
      break;
    }
  top += taken;
  live++;
  if (emulates) memset(host(*address), 0xFF, size);
  tell("allocated", *address, size);
  LEAVE
}
API cuMemFree_v2(address_t address) {
  ENTER NEVER_CAPTURED
  drain_all();
  result = INVALID_VALUE;
  for (int i = 0; i < MOST_HANDLES; i++)
    if (allocated[i].size && allocated[i].address == address) {
      tell("freed", address, allocated[i].size);
      allocated[i].size = 0;
      live--;
      result = SUCCESS;
    }
  LEAVE
}
API cuMemGetInfo_v2(size_t *left, size_t *all) {
  ENTER
  *all = room, *left = BASE + room - top;
  LEAVE
}
API cuMemHostAlloc(void **address, size_t size, unsigned flags) {
  ENTER NEVER_CAPTURED
  (void)flags;
  *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  for (int i = 0; i < MOST_HANDLES; i++)
    if (!pinned[i].size) {
      if (i >= pinned_end) pinned_end = i + 1;
      pinned[i].address = (address_t)*address, pinned[i].size = size;
      break;
    }
  live++;
  LEAVE
}
API cuMemFreeHost(void *address) {
  ENTER NEVER_CAPTURED
  drain_all();
  result = INVALID_VALUE;
  for (int i = 0; i < MOST_HANDLES; i++)
    if (pinned[i].size && pinned[i].address == (address_t)address) {
      pinned[i].size = 0;
      free(address);
      live--;
      result = SUCCESS;
    }
  LEAVE
}
API cuPointerGetAttribute(void *value, int attribute, address_t address) {
  ENTER
  if (attribute != 2 || !(on_device(address, 1) || is_pinned(address))) REFUSE(INVALID_VALUE)
  *(unsigned *)value = on_device(address, 1) ? 2 : 1;
  LEAVE
}

static int copy(int kind, address_t to, address_t from, size_t size, void *handle, int waits) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream) REFUSE(INVALID_HANDLE)
  if ((kind != TO_HOST) != on_device(to, size) || (kind != TO_DEVICE) != on_device(from, size)) REFUSE(INVALID_VALUE)
  op_t op = {.kind = kind, .to = to, .from = from, .size = size};
  if (kind == TO_DEVICE && !is_pinned(from) && !waits) {
    if (stream->capture) REFUSE(CAPTURE_UNSUPPORTED)
    op.staged = memcpy(malloc(size), (void *)from, size);
  }
  result = append(stream, op);
  LEAVE
}
static int and_wait(int result) {
  if (result) return result;
  pthread_mutex_lock(&lock);
  drain(&legacy, legacy.asked);
  pthread_mutex_unlock(&lock);
  return failed;
}
API cuMemcpyHtoDAsync_v2(address_t to, const void *from, size_t size, void *stream) {
  return copy(TO_DEVICE, to, (address_t)from, size, stream, 0);
}
API cuMemcpyDtoHAsync_v2(void *to, address_t from, size_t size, void *stream) {
  return copy(TO_HOST, (address_t)to, from, size, stream, 0);
}
API cuMemcpyDtoDAsync_v2(address_t to, address_t from, size_t size, void *stream) {
  return copy(WITHIN, to, from, size, stream, 0);
}
API cuMemcpyHtoD_v2(address_t to, const void *from, size_t size) {
  return capturing ? CAPTURE_UNSUPPORTED : and_wait(copy(TO_DEVICE, to, (address_t)from, size, NULL, 1));
}
API cuMemcpyDtoH_v2(void *to, address_t from, size_t size) {
  return capturing ? CAPTURE_UNSUPPORTED : and_wait(copy(TO_HOST, (address_t)to, from, size, NULL, 1));
}
API cuMemsetD8Async(address_t to, unsigned char value, size_t size, void *handle) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream) REFUSE(INVALID_HANDLE)
  if (!on_device(to, size)) REFUSE(INVALID_VALUE)
  result = append(stream, (op_t){.kind = FILL, .to = to, .value = value, .size = size});
  LEAVE
}

/* ------------------------------------------------------------------------------------------------- streams and events */

API cuStreamCreate(void **handle, unsigned flags) {
  ENTER
  if (flags > 1) REFUSE(INVALID_VALUE)
  result = OUT_OF_MEMORY;
  for (int i = 0; i < MOST_HANDLES; i++)
    if (!streams[i]) {
      if (i >= stream_end) stream_end = i + 1;
      *handle = streams[i] = calloc(1, sizeof(stream_t));
      live++;
      result = SUCCESS;
      break;
    }
  LEAVE
}
API cuStreamDestroy_v2(void *handle) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream || stream == &legacy) REFUSE(INVALID_HANDLE)
  drain(stream, stream->asked);
  for (int i = 0; i < MOST_HANDLES; i++)
    if (streams[i] == stream) streams[i] = NULL; /* its memory stays: events may name it */
  live--;
  LEAVE
}
API cuStreamSynchronize(void *handle) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream) REFUSE(INVALID_HANDLE)
  if (stream->capture) { stream->broken = 1; REFUSE(CAPTURE_UNSUPPORTED) }
  drain(stream, stream->asked);
  result = failed;
  LEAVE
}
API cuStreamQuery(void *handle) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream) REFUSE(INVALID_HANDLE)
  result = stream->first ? NOT_READY : SUCCESS;
  LEAVE
}
API cuStreamWaitEvent(void *handle, void *event, unsigned flags) {
  ENTER
  stream_t *stream = stream_of(handle);
  event_t *e = event;
  if (!stream || flags) REFUSE(INVALID_HANDLE)
  if (e->stream) result = append(stream, (op_t){.kind = WAIT, .other = e->stream, .ticket = e->ticket});
  LEAVE
}
API cuEventCreate(void **event, unsigned flags) {
  ENTER
  (void)flags;
  *event = calloc(1, sizeof(event_t));
  live++;
  LEAVE
}
API cuEventDestroy_v2(void *event) {
  ENTER
  drain_all();
  free(event);
  live--;
  LEAVE
}
API cuEventRecord(void *event, void *handle) {
  ENTER
  stream_t *stream = stream_of(handle);
  event_t *e = event;
  if (!stream) REFUSE(INVALID_HANDLE)
  result = append(stream, (op_t){.kind = RECORD, .event = e});
  if (!stream->capture) e->stream = stream, e->ticket = stream->asked;
  LEAVE
}
API cuEventSynchronize(void *event) {
  ENTER NEVER_CAPTURED
  event_t *e = event;
  if (e->stream) drain(e->stream, e->ticket);
  result = failed;
  LEAVE
}
API cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
  struct timespec a = ((event_t *)start)->when, b = ((event_t *)end)->when;
  *milliseconds = (b.tv_sec - a.tv_sec) * 1e3f + (b.tv_nsec - a.tv_nsec) / 1e6f;
  return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ launches and graphs */

typedef struct { int id; char padding[4]; unsigned char value[64]; } attribute_t;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  attribute_t *attributes;
  unsigned count;
} config_t;

API cuLaunchKernelEx(const config_t *config, void *function, void **parameters, void **extra) {
  ENTER
  stream_t *stream = stream_of(config->stream);
  loaded_t *f = function;
  op_t op = {.kind = LAUNCH, .code = f->code, .shared = config->shared};
  if (!stream) REFUSE(INVALID_HANDLE)
  if (extra || config->block[1] != 1 || config->block[2] != 1 || (int)config->block[0] != f->code->threads)
    REFUSE(INVALID_VALUE)
  for (int axis = 0; axis < 3; axis++) {
    if (!config->grid[axis] || config->grid[axis] > (axis ? 65535u : 0x7FFFFFFFu)) REFUSE(INVALID_VALUE)
    op.grid[axis] = config->grid[axis];
  }
  if ((int)config->shared > f->most_shared || (int)config->shared + f->code->shared > optin) REFUSE(INVALID_VALUE)
  for (unsigned i = 0; i < config->count; i++) {
    if (config->attributes[i].id != 6) REFUSE(NOT_SUPPORTED)
    memcpy(&op.dependent, config->attributes[i].value, 4);
  }
  if (op.dependent && major_ < 9) REFUSE(INVALID_VALUE)
  int last = f->code->count - 1;
  op.size = last < 0 ? 0 : f->code->offsets[last] + f->code->sizes[last];
  op.parameters = calloc(1, op.size + 1);
  for (int i = 0; i <= last; i++) memcpy(op.parameters + f->code->offsets[i], parameters[i], f->code->sizes[i]);
  result = append(stream, op);
  LEAVE
}
API cuStreamBeginCapture_v2(void *handle, int mode) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream || stream == &legacy) REFUSE(CAPTURE_UNSUPPORTED)
  if (stream->capture) REFUSE(INVALID_VALUE)
  stream->capture = calloc(1, sizeof(graph_t));
  stream->mode = mode, stream->broken = 0;
  capturing += mode != 2;
  LEAVE
}
API cuStreamEndCapture(void *handle, void **graph) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream || !stream->capture) REFUSE(INVALID_VALUE)
  *graph = stream->broken ? NULL : stream->capture;
  result = stream->broken ? CAPTURE_INVALIDATED : SUCCESS;
  capturing -= stream->mode != 2;
  stream->capture = NULL;
  live += !stream->broken;
  LEAVE
}
API cuStreamIsCapturing(void *handle, int *status) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream) REFUSE(INVALID_HANDLE)
  *status = stream->capture != NULL;
  LEAVE
}
API cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  ENTER
  if (flags) REFUSE(NOT_SUPPORTED)
  graph_t *made = calloc(1, sizeof *made);
  stream_t into = {.capture = made};
  for (op_t *op = ((graph_t *)graph)->first; op; op = op->next) {
    append(&into, *op);
    if (op->parameters) made->last->parameters = memcpy(malloc(op->size + 1), op->parameters, op->size);
  }
  *executable = made;
  live++;
  LEAVE
}
static void forget(graph_t *graph) {
  for (op_t *op = graph->first, *next; op; op = next) {
    next = op->next;
    release(op);
  }
  free(graph);
  live--;
}
API cuGraphDestroy(void *graph) {
  ENTER
  forget(graph);
  LEAVE
}
API cuGraphExecDestroy(void *executable) {
  ENTER
  drain_all();
  forget(executable);
  LEAVE
}
API cuGraphUpload(void *executable, void *handle) {
  ENTER
  if (!executable || !stream_of(handle)) REFUSE(INVALID_HANDLE)
  LEAVE
}
API cuGraphLaunch(void *executable, void *handle) {
  ENTER
  stream_t *stream = stream_of(handle);
  if (!stream) REFUSE(INVALID_HANDLE)
  result = append(stream, (op_t){.kind = GRAPH, .graph = executable});
  LEAVE
}

/* -------------------------------------------------------------------------------------------------------- tensor maps */

API cuTensorMapEncodeTiled(uint64_t *map, int dtype, unsigned rank, address_t address, const uint64_t *shape,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave, int swizzle,
                           int promotion, int fill) {
  static const int items[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  static const unsigned widths[] = {0, 32, 64, 128};
  if (!started) return NOT_INITIALIZED;
  if (major_ < 9) return NOT_SUPPORTED;
  if ((uintptr_t)map % 64 || rank < 1 || rank > 5 || address % 16 || dtype < 0 || dtype > 9 || interleave || swizzle < 0 ||
      swizzle > 3 || promotion != 2 || fill)
    return INVALID_VALUE;
  unsigned line = box[0] * items[dtype];
  if (line % 16 || (swizzle && line > widths[swizzle])) return INVALID_VALUE;
  uint64_t words[16] = {0};
  unsigned char *rest = (unsigned char *)(words + 4);
  memcpy(words, "STAND-IN", 8);
  words[1] = 1 << 21;
  words[2] = address;
  words[3] = dtype | rank << 8 | swizzle << 16;
  for (unsigned axis = 0; axis < rank; axis++) {
    if (!shape[axis] || shape[axis] >= 1ull << 32 || !box[axis] || box[axis] > 256 || steps[axis] != 1) return INVALID_VALUE;
    if (axis + 1 < rank && (strides[axis] % 16 || strides[axis] >= 1ull << 40)) return INVALID_VALUE;
    uint64_t stride = axis + 1 < rank ? strides[axis] : 0;
    uint32_t size = shape[axis];
    uint16_t side = box[axis];
    memcpy(rest + 8 * axis, &stride, 8);
    memcpy(rest + 40 + 4 * axis, &size, 4);
    memcpy(rest + 60 + 2 * axis, &side, 2);
  }
  memcpy(map, words, 128);
  return SUCCESS;
}

/* -------------------------------------------------------------------------------------------------------------- names */

static const struct { int code; const char *name, *words; } errors[] = {
  {SUCCESS, "CUDA_SUCCESS", "no error"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
  {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
  {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
  {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
  {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
  {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
  {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
  {NO_BINARY, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
  {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
  {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"}, {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
  {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
  {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
  {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
  {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
  {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
};

API cuGetErrorName(int code, const char **name) {
  for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == code) { *name = errors[i].name; return SUCCESS; }
  *name = NULL;
  return INVALID_VALUE;
}
API cuGetErrorString(int code, const char **words) {
  for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == code) { *words = errors[i].words; return SUCCESS; }
  *words = NULL;
  return INVALID_VALUE;
}

API cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status);
#define NAMED(name) {#name, (void *)name}
#define OLDER(name) {#name, (void *)name##_v2}
static const struct { const char *name; void *function; } exported[] = {
  NAMED(cuInit), NAMED(cuDriverGetVersion), NAMED(cuDeviceGetCount), NAMED(cuDeviceGet), NAMED(cuDeviceGetAttribute),
  NAMED(cuDeviceGetName), NAMED(cuDevicePrimaryCtxRetain), OLDER(cuDevicePrimaryCtxRelease), OLDER(cuCtxPushCurrent),
  OLDER(cuCtxPopCurrent), NAMED(cuCtxSetCurrent), NAMED(cuCtxGetCurrent), NAMED(cuCtxSynchronize), NAMED(cuModuleLoadData),
  NAMED(cuModuleUnload), NAMED(cuModuleGetFunction), NAMED(cuFuncGetAttribute), NAMED(cuFuncSetAttribute), OLDER(cuMemAlloc),
  OLDER(cuMemFree), OLDER(cuMemGetInfo), NAMED(cuMemHostAlloc), NAMED(cuMemFreeHost), NAMED(cuPointerGetAttribute),
  OLDER(cuMemcpyHtoDAsync), OLDER(cuMemcpyDtoHAsync), OLDER(cuMemcpyDtoDAsync), OLDER(cuMemcpyHtoD), OLDER(cuMemcpyDtoH),
  NAMED(cuMemsetD8Async), NAMED(cuStreamCreate), OLDER(cuStreamDestroy), NAMED(cuStreamSynchronize), NAMED(cuStreamQuery),
  NAMED(cuStreamWaitEvent), NAMED(cuEventCreate), OLDER(cuEventDestroy), NAMED(cuEventRecord), NAMED(cuEventSynchronize),
  OLDER(cuEventElapsedTime), NAMED(cuLaunchKernelEx), OLDER(cuStreamBeginCapture), NAMED(cuStreamEndCapture),
  NAMED(cuStreamIsCapturing), {"cuGraphInstantiate", (void *)cuGraphInstantiateWithFlags}, NAMED(cuGraphInstantiateWithFlags),
  NAMED(cuGraphDestroy), NAMED(cuGraphExecDestroy), NAMED(cuGraphUpload), NAMED(cuGraphLaunch), NAMED(cuTensorMapEncodeTiled),
  NAMED(cuGetErrorName), NAMED(cuGetErrorString), OLDER(cuGetProcAddress),
};

API cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  *function = NULL;
  for (unsigned i = 0; i < sizeof exported / sizeof *exported; i++)
    if (!strcmp(exported[i].name, symbol)) *function = exported[i].function;
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}
