// Runs an engine in every way that its header promises, and says how long the host is busy with a call.
//
// exercise run ENGINE INPUT OUTPUT COUNT...   batches of so many images out of INPUT, one after the other, by ke_run
// exercise ways ENGINE INPUT                  host, pinned and GPU memory, streams, places, threads: all of the same bits
// exercise time ENGINE COUNT                  seconds to open and to the first result, those of them that the processor
//                                             worked, and microseconds per ke_enqueue

#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "kernel_engine.h"

namespace {

using Values = std::vector<float>;

void check(const kernel_engine::Status &status) {
  if (status) return;
  std::fprintf(stderr, "%d: %s\n", status.code, status.text);
  std::exit(1);
}

void demand(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::exit(1);
}

Values read(const char *path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  Values values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

template <typename Function>
Function driver_call(const char *name) {
  static void *library = dlopen("libcuda.so.1", RTLD_NOW);
  auto found = reinterpret_cast<Function>(dlsym(library, name));
  demand(found != nullptr, name);
  return found;
}

struct Network {
  kernel_engine::Engine engine;
  size_t row, scores;

  explicit Network(const char *path) {
    check(engine.open(path));
    row = ke_input(engine.get(), 0).row_bytes / sizeof(float);
    scores = ke_output(engine.get(), 0).row_bytes / sizeof(float);
  }

  Values run(kernel_engine::Context &context, const float *images, int64_t count) const {
    Values found(scores * size_t(count), -1.0f);
    const void *inputs[] = {images};
    void *outputs[] = {found.data()};
    check(context.run(count, inputs, outputs));
    return found;
  }
};

int run(int count, char **arguments) {
  Network network(arguments[0]);
  kernel_engine::Context context;
  check(context.create(network.engine));
  const Values images = read(arguments[1]);
  std::ofstream out(arguments[2], std::ios::binary);
  size_t at = 0;
  for (int i = 3; i < count; i++) {
    const int64_t batch = std::atoll(arguments[i]);
    demand((at + size_t(batch)) * network.row <= images.size(), "as many images");
    const Values found = network.run(context, images.data() + at * network.row, batch);
    out.write(reinterpret_cast<const char *>(found.data()), std::streamsize(found.size() * sizeof(float)));
    at += size_t(batch);
  }
  return 0;
}

int ways(char **arguments) {
  using Address = uint64_t;
  Network network(arguments[0]);
  kernel_engine::Context context;
  check(context.create(network.engine));
  const Values images = read(arguments[1]);
  const int64_t count = 2;
  const Values expected = network.run(context, images.data(), count);
  const size_t in = size_t(count) * network.row * sizeof(float), out = expected.size() * sizeof(float);
  auto same = [&](const void *found) { return !std::memcmp(found, expected.data(), out); };

  auto retain = driver_call<int (*)(void **, int)>("cuDevicePrimaryCtxRetain");
  auto push = driver_call<int (*)(void *)>("cuCtxPushCurrent_v2");
  auto pop = driver_call<int (*)(void **)>("cuCtxPopCurrent_v2");
  auto current = driver_call<int (*)(void **)>("cuCtxGetCurrent");
  auto give_back = driver_call<int (*)(int)>("cuDevicePrimaryCtxRelease_v2");
  auto allocate = driver_call<int (*)(Address *, size_t)>("cuMemAlloc_v2");
  auto release = driver_call<int (*)(Address)>("cuMemFree_v2");
  auto pin = driver_call<int (*)(void **, size_t, unsigned)>("cuMemHostAlloc");
  auto unpin = driver_call<int (*)(void *)>("cuMemFreeHost");
  auto upload = driver_call<int (*)(Address, const void *, size_t)>("cuMemcpyHtoD_v2");
  auto download = driver_call<int (*)(void *, Address, size_t)>("cuMemcpyDtoH_v2");
  auto make_stream = driver_call<int (*)(void **, unsigned)>("cuStreamCreate");
  auto end_stream = driver_call<int (*)(void *)>("cuStreamDestroy_v2");
  auto wait = driver_call<int (*)(void *)>("cuStreamSynchronize");

  void *driver_context = nullptr, *before = &before, *stream = nullptr, *pinned_in = nullptr, *pinned_out = nullptr;
  demand(!current(&before) && !before, "no context is left on the caller's thread");
  demand(!retain(&driver_context, 0) && !push(driver_context), "the caller's own context");
  Address device_in = 0, device_out = 0;
  demand(!allocate(&device_in, in) && !allocate(&device_out, out) && !upload(device_in, images.data(), in), "GPU memory");
  demand(!pin(&pinned_in, in, 0) && !pin(&pinned_out, out, 0) && !make_stream(&stream, 1), "pinned memory, a stream");

  {  // GPU memory on the caller's stream
    const void *inputs[] = {reinterpret_cast<void *>(device_in)};
    void *outputs[] = {reinterpret_cast<void *>(device_out)};
    check(context.enqueue(count, inputs, outputs, stream));
    demand(!wait(stream), "the end of a stream");
    Values found(expected.size());
    demand(!download(found.data(), device_out, out) && same(found.data()), "GPU memory gives the same bits");
  }
  {  // pinned memory: nothing is there before the stream is done
    std::memcpy(pinned_in, images.data(), in);
    std::memset(pinned_out, 0, out);
    const void *inputs[] = {pinned_in};
    void *outputs[] = {pinned_out};
    check(context.enqueue(count, inputs, outputs, stream));
    demand(!same(pinned_out), "a call returns before the work is done");
    demand(!wait(stream) && same(pinned_out), "pinned memory gives the same bits");
  }
  {  // in place: no copy at all
    const Address from = ke_input_address(context.get(), count, 0), to = ke_output_address(context.get(), count, 0);
    demand(from && to && !ke_input_address(context.get(), count, 1) && !ke_output_address(context.get(), 1000, 0), "places");
    demand(!upload(from, images.data(), in), "an input in its place");
    const void *inputs[] = {nullptr};
    void *outputs[] = {nullptr};
    check(context.enqueue(count, inputs, outputs, stream));
    demand(!wait(stream), "the end of a stream");
    Values found(expected.size());
    demand(!download(found.data(), to, out) && same(found.data()), "in place gives the same bits");
  }
  {  // another stream waits for the one before, and the default stream does
    const void *inputs[] = {pinned_in};
    Values first(expected.size()), second(network.scores), third(expected.size());
    void *outputs[] = {first.data()}, *other[] = {second.data()}, *again[] = {third.data()};
    check(context.enqueue(count, inputs, outputs, stream));
    check(context.enqueue(1, inputs, other, nullptr));
    check(context.enqueue(count, inputs, again, stream));
    demand(!wait(stream) && !wait(nullptr), "the end of two streams");
    demand(same(first.data()) && same(third.data()), "runs of one context do not overlap");
  }
  demand(!end_stream(stream) && !release(device_in) && !release(device_out) && !unpin(pinned_in) && !unpin(pinned_out) &&
             !pop(nullptr) && !give_back(0),
         "all is given back");

  // Several engines, each with several contexts, on threads of their own.
  Network second(arguments[0]);
  std::vector<Values> found(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < found.size(); i++)
    threads.emplace_back([&, i] {
      kernel_engine::Context own;
      check(own.create(i % 2 ? second.engine : network.engine));
      for (int again = 0; again < 2; again++) found[i] = (i % 2 ? second : network).run(own, images.data(), count);
    });
  for (std::thread &thread : threads) thread.join();
  for (const Values &one : found) demand(same(one.data()), "threads give the same bits");

  // What a caller gets wrong is a value.
  const void *inputs[] = {images.data()};
  void *outputs[] = {found[0].data()};
  for (int64_t wrong : {int64_t(0), int64_t(-1), int64_t(1000)})
    demand(context.run(wrong, inputs, outputs).code == KE_ARGUMENT, "a batch that there is not");
  demand(context.run(1, nullptr, outputs).code == KE_ARGUMENT, "no inputs");
  demand(ke_run(nullptr, 1, inputs, outputs).code == KE_ARGUMENT, "no context");
  ke_engine *none = nullptr;
  demand(ke_open("/nowhere", 0, nullptr, &none).code == KE_FILE && !none, "no file");
  demand(ke_open("/", 0, nullptr, &none).code == KE_FILE && !none, "a folder");
  demand(ke_open(arguments[0], 7, nullptr, &none).code == KE_DEVICE && !none, "no such GPU");
  demand(ke_open(arguments[0], 0, std::string(64, '0').c_str(), &none).code == KE_FILE && !none, "another sha256");
  demand(ke_input(network.engine.get(), 1).name == nullptr && ke_batch(network.engine.get(), 99) == 0, "no such input");
  return 0;
}

int time(char **arguments) {
  using Clock = std::chrono::steady_clock;
  auto seconds = [](Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); };
  auto began = Clock::now();
  Network network(arguments[0]);
  kernel_engine::Context context;
  check(context.create(network.engine));
  const double opened = seconds(began);
  const int64_t batch = ke_batch(network.engine.get(), 0);
  void *driver_context = nullptr, *images = nullptr, *found = nullptr;
  demand(!driver_call<int (*)(void **, int)>("cuDevicePrimaryCtxRetain")(&driver_context, 0) &&
             !driver_call<int (*)(void *)>("cuCtxPushCurrent_v2")(driver_context),
         "the caller's own context");
  auto pin = driver_call<int (*)(void **, size_t, unsigned)>("cuMemHostAlloc");
  demand(!pin(&images, network.row * size_t(batch) * sizeof(float), 0) &&
             !pin(&found, network.scores * size_t(batch) * sizeof(float), 0),
         "pinned memory, which the driver does not copy during a call");
  const void *inputs[] = {images};
  void *outputs[] = {found};
  check(context.run(batch, inputs, outputs));
  const double ready = seconds(began), worked = double(std::clock()) / CLOCKS_PER_SEC;
  const int times = std::atoi(arguments[1]);
  double busy = 0;
  auto processor = [] {  // seconds that this thread has worked: machines of tests are busy with others
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
  };
  auto wait = driver_call<int (*)(void *)>("cuStreamSynchronize");
  for (int i = 0; i < times; i += 100) {
    const double start = processor();
    for (int j = 0; j < 100; j++) check(context.enqueue(batch, inputs, outputs, nullptr));
    busy += processor() - start;
    demand(!wait(nullptr), "the end of the default stream");
  }
  auto unpin = driver_call<int (*)(void *)>("cuMemFreeHost");
  demand(!unpin(images) && !unpin(found) && !driver_call<int (*)(void **)>("cuCtxPopCurrent_v2")(nullptr) &&
             !driver_call<int (*)(int)>("cuDevicePrimaryCtxRelease_v2")(0),
         "all is given back");
  std::printf("open %.6f ready %.6f worked %.6f call %.3f\n", opened, ready, worked, busy / times * 1e6);
  return 0;
}

}  // namespace

int main(int count, char **arguments) {
  const std::string what = count > 2 ? arguments[1] : "";
  if (what == "run") return run(count - 2, arguments + 2);
  if (what == "ways") return ways(arguments + 2);
  if (what == "time") return time(arguments + 2);
  return 2;
}
