/* The runtime of kernel engines (model.<sm>.kernels): a network's own GPU kernels, run by the NVIDIA driver alone.

Needs libcuda.so.1, which is part of every driver, when an engine is opened; no CUDA toolkit, neither to build nor to run.
No function throws, and none keeps state outside of what it is given.

Threads: an engine holds the weights and may be used by any thread; a context holds one run's memory and serves one caller
at a time (a second one waits). Runs of different contexts may overlap. An engine outlives its contexts.

Values are contiguous, one row per image: inputs [N, ...] float32 or bytes, as `ke_input` says; outputs float32. */

#ifndef KERNEL_ENGINE_H
#define KERNEL_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ke_engine ke_engine;
typedef struct ke_context ke_context;

enum {
  KE_OK = 0,
  KE_FILE = 1,     /* the file is truncated, altered, of another version or no kernel engine */
  KE_DEVICE = 2,   /* no GPU or driver, or not the one that the file is for */
  KE_DRIVER = 3,   /* the driver refused a call */
  KE_ARGUMENT = 4, /* an argument of the caller's */
  KE_MEMORY = 5    /* no memory left, on the host or on the GPU */
};

/* What a call came to: one of the codes above, and where it is not KE_OK one line that says why. */
typedef struct {
  int code;
  char text[252];
} ke_status;

/* An input or output. Its strings and its shape live as long as the engine. */
typedef struct {
  const char *name;
  const char *dtype;    /* "float32", of an input also "uint8" */
  const char *layout;   /* "NCHW", "NHWC", or "" where it is no image */
  const int64_t *shape; /* of one image, without the batch */
  int rank;
  size_t row_bytes;     /* of one image */
} ke_tensor;

/* Check a file and load it onto a GPU. Where `sha256` is not NULL, the file has to have it (64 hexadecimal digits, as in the
manifest of its bundle). On success `*engine` is to be closed by `ke_close`; else it is NULL. */
ke_status ke_open(const char *path, int device, const char *sha256, ke_engine **engine);
/* The same of a file in memory, which may be given back afterwards. */
ke_status ke_open_bytes(const void *content, size_t size, int device, ke_engine **engine);
void ke_close(ke_engine *engine);

int ke_input_count(const ke_engine *engine);
int ke_output_count(const ke_engine *engine);
ke_tensor ke_input(const ke_engine *engine, int index);
ke_tensor ke_output(const ke_engine *engine, int index);
/* The batch sizes that have launches of their own, in ascending order; any other runs as the next larger one. */
int ke_batch_count(const ke_engine *engine);
int64_t ke_batch(const ke_engine *engine, int index);
/* Bytes on the GPU: of the weights, once, and of each context. */
size_t ke_weights_bytes(const ke_engine *engine);
size_t ke_arena_bytes(const ke_engine *engine);

ke_status ke_context_create(ke_engine *engine, ke_context **context);
/* Waits until the GPU is done with it. */
void ke_context_destroy(ke_context *context);

/* Run `count` images and wait. Every pointer is of the host, pageable or pinned, or of the GPU. */
ke_status ke_run(ke_context *context, int64_t count, const void *const *inputs, void *const *outputs);
/* The same on a stream of the caller's (a CUstream or cudaStream_t, NULL for the default stream), without waiting: inputs in
pinned or GPU memory have to stay, and outputs are there, once the stream is done. An input that is NULL has been written to
`ke_input_address` before, on this stream; an output that is NULL is left at `ke_output_address`. */
ke_status ke_enqueue(ke_context *context, int64_t count, const void *const *inputs, void *const *outputs, void *stream);
/* Where a run of `count` images reads an input or leaves an output, in GPU memory; 0 for what there is not. */
uint64_t ke_input_address(const ke_context *context, int64_t count, int index);
uint64_t ke_output_address(const ke_context *context, int64_t count, int index);

#ifdef __cplusplus
} /* extern "C" */

#include <utility>

/* The same for C++17: what is opened is closed, and every error is a value. */
namespace kernel_engine {

struct Status : ke_status {
  Status(const ke_status &status) : ke_status(status) {}
  explicit operator bool() const { return code == KE_OK; }
};

class Engine {
 public:
  Engine() = default;
  Engine(Engine &&other) noexcept : engine_(std::exchange(other.engine_, nullptr)) {}
  Engine &operator=(Engine &&other) noexcept {
    std::swap(engine_, other.engine_);
    return *this;
  }
  ~Engine() { ke_close(engine_); }
  Status open(const char *path, int device = 0, const char *sha256 = nullptr) {
    ke_close(std::exchange(engine_, nullptr));
    return ke_open(path, device, sha256, &engine_);
  }
  ke_engine *get() const { return engine_; }

 private:
  ke_engine *engine_ = nullptr;
};

class Context {
 public:
  Context() = default;
  Context(Context &&other) noexcept : context_(std::exchange(other.context_, nullptr)) {}
  Context &operator=(Context &&other) noexcept {
    std::swap(context_, other.context_);
    return *this;
  }
  ~Context() { ke_context_destroy(context_); }
  Status create(const Engine &engine) {
    ke_context_destroy(std::exchange(context_, nullptr));
    return ke_context_create(engine.get(), &context_);
  }
  Status run(int64_t count, const void *const *inputs, void *const *outputs) {
    return ke_run(context_, count, inputs, outputs);
  }
  Status enqueue(int64_t count, const void *const *inputs, void *const *outputs, void *stream) {
    return ke_enqueue(context_, count, inputs, outputs, stream);
  }
  ke_context *get() const { return context_; }

 private:
  ke_context *context_ = nullptr;
};

}  // namespace kernel_engine
#endif
#endif
