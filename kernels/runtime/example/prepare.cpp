// Prepare one picture as a bundle says: prepare BUNDLE/manifest.json picture.ppm input
//
// The picture is binary PPM (RGB) or PGM (grey), as many channels as the network takes; `input` is what the network
// takes: raw float32 [C, H, W], or bytes [H, W, C]. Of the bundle's golden-picture.png it is golden-picture.npy.

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "resize.h"

namespace {

picture::Image read(const char *path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int most = 0;
  picture::Image image;
  file >> kind >> image.width >> image.height >> most;
  file.get();  // one blank before the pixels
  if (!file || (kind != "P5" && kind != "P6") || most != 255) throw std::runtime_error("expected PPM or PGM of 8 bits");
  image.channels = kind == "P5" ? 1 : 3;
  image.pixels.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (image.width < 1 || image.height < 1 ||
      image.pixels.size() != size_t(image.width) * image.height * image.channels)
    throw std::runtime_error("expected as many pixels as its header says");
  return image;
}

picture::Steps steps_of(const nlohmann::json &record) {
  const std::string interpolation = record.at("interpolation");
  if (interpolation != "bilinear" && interpolation != "bicubic")
    throw std::runtime_error("expected bilinear or bicubic, got " + interpolation);
  return {record.at("resize")[0],
          record.at("resize")[1],
          record.at("keep_aspect"),
          record.at("size")[0],
          record.at("size")[1],
          interpolation == "bilinear" ? picture::Filter::bilinear : picture::Filter::bicubic};
}

}  // namespace

int main(int count, char **arguments) try {
  if (count != 4) return std::fprintf(stderr, "usage: %s MANIFEST PICTURE INPUT\n", arguments[0]), 2;
  const auto manifest = nlohmann::json::parse(std::ifstream(arguments[1]));
  const auto &record = manifest.at("model").at("preprocessing");
  const picture::Image image = read(arguments[2]);
  const std::vector<float> mean = record.at("mean"), std = record.at("std");
  if (image.channels != int(mean.size())) throw std::runtime_error("expected as many channels as the network takes");
  const picture::Image prepared = picture::prepare(image, steps_of(record));
  std::ofstream file(arguments[3], std::ios::binary);
  if (manifest.at("inputs")[0].at("dtype") == "uint8") {
    file.write(reinterpret_cast<const char *>(prepared.pixels.data()), prepared.pixels.size());
  } else {
    const std::vector<float> input = picture::normalise(prepared, mean, std);
    file.write(reinterpret_cast<const char *>(input.data()), input.size() * sizeof(float));
  }
  return file.flush() ? 0 : 1;
} catch (const std::exception &error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
