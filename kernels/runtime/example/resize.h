// Scaling pictures of 8 bits as Pillow does, to the last level: what networks are trained and calibrated behind.
//
// A new pixel is a weighted sum of the old ones around its place. The weights are a filter, as wide as the picture
// shrinks, so that all old pixels count: OpenCV's INTER_LINEAR reads two of them in a row and skips the rest. Rows come
// first, columns after, each rounded to 8 bits; weights sum to one and are rounded to 22 bits behind the point.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace picture {

// Height, width and interleaved channels, row by row.
struct Image {
  int height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;
};

enum class Filter { bilinear, bicubic };

namespace detail {

constexpr int kBits = 32 - 8 - 2;  // of a weight: a sum of 8-bit values, with overshoot and sign, stays within 32

inline double reach(Filter filter) { return filter == Filter::bilinear ? 1.0 : 2.0; }

// The triangle, or Keys' cubic with a = -1/2.
inline double weight(Filter filter, double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (filter == Filter::bilinear) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

// Of one new pixel: the first old one that counts, and the weights from there on.
struct Taps {
  int first = 0;
  std::vector<int32_t> weights;
};

inline std::vector<Taps> taps(int before, int after, Filter filter) {
  const double scale = static_cast<double>(before) / after, shrinks = std::max(scale, 1.0);
  const double half = reach(filter) * shrinks, per_pixel = 1.0 / shrinks;
  std::vector<Taps> all(after);
  for (int index = 0; index < after; ++index) {
    const double centre = (index + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(centre - half + 0.5));
    const int last = std::min(before, static_cast<int>(centre + half + 0.5));
    std::vector<double> exact;
    double sum = 0.0;
    for (int place = first; place < last; ++place) {
      exact.push_back(weight(filter, (place - centre + 0.5) * per_pixel));
      sum += exact.back();
    }
    all[index].first = first;
    for (const double value : exact) {
      const double fixed = (sum != 0.0 ? value / sum : value) * (1 << kBits);
      all[index].weights.push_back(static_cast<int32_t>(fixed < 0.0 ? fixed - 0.5 : fixed + 0.5));
    }
  }
  return all;
}

inline uint8_t level(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

}  // namespace detail

// The whole picture at another size, whatever its proportions.
inline Image resize(const Image &given, int height, int width, Filter filter) {
  constexpr int32_t half = 1 << (detail::kBits - 1);
  const int channels = given.channels;
  Image wide = given;
  if (width != given.width) {
    wide = {given.height, width, channels, std::vector<uint8_t>(size_t(given.height) * width * channels)};
    const auto taps = detail::taps(given.width, width, filter);
    for (int y = 0; y < given.height; ++y)
      for (int x = 0; x < width; ++x)
        for (int c = 0; c < channels; ++c) {
          const uint8_t *from = &given.pixels[(size_t(y) * given.width + taps[x].first) * channels + c];
          int32_t sum = half;
          for (size_t i = 0; i < taps[x].weights.size(); ++i) sum += taps[x].weights[i] * from[i * channels];
          wide.pixels[(size_t(y) * width + x) * channels + c] = detail::level(sum);
        }
  }
  if (height == wide.height) return wide;
  Image result{height, width, channels, std::vector<uint8_t>(size_t(height) * width * channels)};
  const auto taps = detail::taps(wide.height, height, filter);
  const size_t row = size_t(width) * channels;
  for (int y = 0; y < height; ++y)
    for (size_t x = 0; x < row; ++x) {
      const uint8_t *from = &wide.pixels[taps[y].first * row + x];
      int32_t sum = half;
      for (size_t i = 0; i < taps[y].weights.size(); ++i) sum += taps[y].weights[i] * from[i * row];
      result.pixels[y * row + x] = detail::level(sum);
    }
  return result;
}

// A rectangle of the picture.
inline Image crop(const Image &given, int top, int left, int height, int width) {
  Image cut{height, width, given.channels, {}};
  for (int y = top; y < top + height; ++y) {
    const auto row = given.pixels.begin() + (std::ptrdiff_t(y) * given.width + left) * given.channels;
    cut.pixels.insert(cut.pixels.end(), row, row + std::ptrdiff_t(width) * given.channels);
  }
  return cut;
}

// What `preprocessing` in a bundle's manifest says of pixels: resize, keep_aspect, size, interpolation.
struct Steps {
  int resize_height, resize_width;
  bool keep_aspect;
  int height, width;
  Filter filter;
};

// Half of an even number's neighbour goes to the even half, as Python rounds.
inline int rounded_half(int value) { return value / 2 + (value % 2 && value / 2 % 2); }

inline Image prepare(const Image &given, const Steps &steps) {
  int64_t height = steps.resize_height, width = steps.resize_width;
  if (steps.keep_aspect) {  // the side that touches has its exact length, the other is rounded down
    if (given.width * height <= given.height * width)
      height = width * given.height / given.width;
    else
      width = height * given.width / given.height;
  }
  const Image scaled = resize(given, static_cast<int>(height), static_cast<int>(width), steps.filter);
  const int top = rounded_half(scaled.height - steps.height), left = rounded_half(scaled.width - steps.width);
  return crop(scaled, top, left, steps.height, steps.width);
}

// (x / 255 - mean) / std in float32, by channel: [C, H, W].
inline std::vector<float> normalise(const Image &image, const std::vector<float> &mean, const std::vector<float> &std) {
  const size_t plane = size_t(image.height) * image.width;
  std::vector<float> values(plane * image.channels);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t c = i / plane;
    values[i] = (image.pixels[i % plane * image.channels + c] / 255.0f - mean[c]) / std[c];
  }
  return values;
}

}  // namespace picture
