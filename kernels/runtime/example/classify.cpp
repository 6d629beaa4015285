// Classify one image by a kernel engine: classify model.sm_87.kernels image.f32
//
// The image is raw float32, as the network takes it: normalised, in the layout that the engine names (NCHW).

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <vector>

#include "kernel_engine.h"

int main(int count, char **arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: %s ENGINE IMAGE\n", arguments[0]), 2;
  kernel_engine::Engine engine;
  kernel_engine::Context context;
  kernel_engine::Status status = engine.open(arguments[1]);
  if (status) status = context.create(engine);
  if (!status) return std::fprintf(stderr, "%s\n", status.text), 1;

  const ke_tensor input = ke_input(engine.get(), 0), output = ke_output(engine.get(), 0);
  std::ifstream file(arguments[2], std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (image.size() != input.row_bytes) {
    std::fprintf(stderr, "%s has %zu bytes, the network takes %zu\n", arguments[2], image.size(), input.row_bytes);
    return 1;
  }

  std::vector<float> scores(output.row_bytes / sizeof(float));
  const void *inputs[] = {image.data()};
  void *outputs[] = {scores.data()};
  status = context.run(1, inputs, outputs);
  if (!status) return std::fprintf(stderr, "%s\n", status.text), 1;
  const auto best = std::max_element(scores.begin(), scores.end());
  std::printf("class %td, score %.6g\n", best - scores.begin(), *best);
}
