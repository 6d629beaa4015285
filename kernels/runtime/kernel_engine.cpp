// The runtime of kernel engines. What a file may say is checked as export/runtime/engines/kernel_plan.py and kernel_file.py
// check it, and run as kernel_engine.py runs it: the same files are refused, and the same bits come out.

#include "kernel_engine.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <variant>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace {

using Json = nlohmann::json;

struct Failure {  // thrown within this file, and a ke_status at its edge
  int code;
  std::string text;
};

[[noreturn]] void fail(int code, std::string text) { throw Failure{code, std::move(text)}; }

[[noreturn]] void refuse(const std::string &text) {
  fail(KE_FILE, "not a kernel engine that this version reads: " + text);
}

ke_status status_of(int code, const std::string &text) {
  ke_status status{};
  status.code = code;
  size_t length = 0;
  for (unsigned char letter : text) {  // what a file says may not end a line or steer a terminal
    if (length + 1 == sizeof status.text) break;
    status.text[length++] = letter < 32 || letter > 126 ? '?' : static_cast<char>(letter);
  }
  return status;
}

template <typename Function>
ke_status guarded(Function function) noexcept {
  try {
    function();
    return status_of(KE_OK, "");
  } catch (const Failure &failure) {
    return status_of(failure.code, failure.text);
  } catch (const std::bad_alloc &) {
    return status_of(KE_MEMORY, "no memory left on the host");
  } catch (...) {
    return status_of(KE_FILE, "not a kernel engine that this version reads");
  }
}

// ------------------------------------------------------------------------------------------------------------- SHA-256

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotated(uint32_t value, int by) { return value >> by | value << (32 - by); }

void hash_blocks(uint32_t state[8], const uint8_t *data, size_t blocks) {
  for (; blocks--; data += 64) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
      const uint8_t *p = data + 4 * i;
      w[i] = uint32_t(p[0]) << 24 | uint32_t(p[1]) << 16 | uint32_t(p[2]) << 8 | p[3];
    }
    for (int i = 16; i < 64; i++) {
      uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
      uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t s[8];
    std::copy(state, state + 8, s);
    for (int i = 0; i < 64; i++) {
      uint32_t s1 = rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25);
      uint32_t t1 = s[7] + s1 + ((s[4] & s[5]) ^ (~s[4] & s[6])) + kRounds[i] + w[i];
      uint32_t s0 = rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22);
      uint32_t t2 = s0 + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      std::copy_backward(s, s + 7, s + 8);
      s[4] += t1;
      s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
  }
}

#if defined(__x86_64__)
bool has_hash_instructions() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1 && __get_cpuid(1, &a, &b, &c, &d) && c >> 19 & 1;
}

__attribute__((target("sha,sse4.1,ssse3"))) void hash_blocks_fast(uint32_t state[8], const uint8_t *data, size_t blocks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  __m128i low = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(state)), 0xB1);
  __m128i high = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(state + 4)), 0x1B);
  __m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0);
  for (; blocks--; data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; i++)
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(data + 16 * i)), swap);
    for (int i = 0; i < 16; i++) {
      __m128i now = w[i & 3];
      if (i >= 4) {
        __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]),
                                    _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4));
        now = w[i & 3] = _mm_sha256msg2_epu32(sum, w[(i + 3) & 3]);
      }
      __m128i rounds = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i *>(kRounds + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, rounds);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(rounds, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  low = _mm_shuffle_epi32(abef, 0x1B);
  high = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i *>(state), _mm_blend_epi16(low, high, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(state + 4), _mm_alignr_epi8(high, low, 8));
}
#elif defined(__aarch64__)
bool has_hash_instructions() { return getauxval(AT_HWCAP) >> 6 & 1; }  // HWCAP_SHA2

__attribute__((target("+crypto"))) void hash_blocks_fast(uint32_t state[8], const uint8_t *data, size_t blocks) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; blocks--; data += 64) {
    const uint32x4_t abcd_before = abcd, efgh_before = efgh;
    uint32x4_t w[4];
    for (int i = 0; i < 4; i++) w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(data + 16 * i)));
    for (int i = 0; i < 16; i++) {
      if (i >= 4)
        w[i & 3] = vsha256su1q_u32(vsha256su0q_u32(w[i & 3], w[(i + 1) & 3]), w[(i + 2) & 3], w[(i + 3) & 3]);
      const uint32x4_t rounds = vaddq_u32(w[i & 3], vld1q_u32(kRounds + 4 * i)), abcd_now = abcd;
      abcd = vsha256hq_u32(abcd, efgh, rounds);
      efgh = vsha256h2q_u32(efgh, abcd_now, rounds);
    }
    abcd = vaddq_u32(abcd, abcd_before);
    efgh = vaddq_u32(efgh, efgh_before);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}
#else
bool has_hash_instructions() { return false; }
void hash_blocks_fast(uint32_t state[8], const uint8_t *data, size_t blocks) { hash_blocks(state, data, blocks); }
#endif

std::string sha256_of(const void *content, size_t size) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  auto *data = static_cast<const uint8_t *>(content);
  auto *blocks = has_hash_instructions() ? hash_blocks_fast : hash_blocks;
  blocks(state, data, size / 64);
  uint8_t last[128] = {0};
  const size_t rest = size % 64, end = rest < 56 ? 64 : 128;
  if (rest) std::memcpy(last, data + size - rest, rest);
  last[rest] = 0x80;
  for (int i = 0; i < 8; i++) last[end - 1 - i] = static_cast<uint8_t>(uint64_t(size) * 8 >> 8 * i);
  blocks(state, last, end / 64);
  char text[65];
  for (int i = 0; i < 8; i++) std::snprintf(text + 8 * i, 9, "%08x", state[i]);
  return text;
}

// ---------------------------------------------------------------------------------------------------------------- plan

constexpr int64_t kMost = int64_t(1) << 40, kMostInt32 = 2147483647;
constexpr int64_t kAlignment = 256, kParameterBytes = 4096, kDescriptorBytes = 128;

struct Tensor {
  std::string name, dtype, layout;
  std::vector<int64_t> shape;
  int64_t row_bytes = 0;
};

struct Weight {
  std::string tensor, sha256;
  int64_t offset = 0, bytes = 0;
};

struct Kernel {
  std::string cubin, symbol;
  int64_t warps = 0, shared = 0;
  bool pdl = false;
  std::vector<std::string> parameters;
};

struct Pointer {
  bool null = false, weight = false;  // else in the arena
  int64_t offset = 0;
};

struct Descriptor {
  Pointer base;
  int type = 0;  // of CUtensorMapDataType
  int64_t item = 0, swizzle = 0;
  std::vector<int64_t> shape, strides, box;
};

using Argument = std::variant<Pointer, int64_t, Descriptor>;

struct Launch {
  size_t kernel = 0;
  int64_t grid[3] = {};
  std::vector<Argument> arguments;
};

struct Table {
  int64_t arena = 0, zeroed[2] = {};
  std::vector<int64_t> inputs, outputs;  // in the order of the tensors
  std::vector<Launch> launches;
};

struct Plan {
  std::string target;
  int64_t driver = 0, weights_bytes = 0, arena_bytes = 0;
  std::vector<Tensor> inputs, outputs;
  std::vector<Weight> weights;
  std::vector<Kernel> kernels;
  std::map<int64_t, Table> batches;
};

bool is_hex64(const std::string &text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

bool is_decimal(const std::string &text, size_t longest) {
  return !text.empty() && text.size() <= longest && text[0] != '0' &&
         text.find_first_not_of("0123456789") == std::string::npos;
}

int rank_of(const std::string &kind) { return kind.rfind("descriptor:", 0) == 0 ? kind.back() - '0' : 0; }

// Bytes of the machine's parameters that one of the plan's becomes; each is aligned to that, or to 64.
std::vector<int64_t> parameter_sizes(const std::string &kind) {
  const int rank = rank_of(kind);
  if (!rank) return {kind == "i32" ? 4 : 8};
  std::vector<int64_t> sizes{kDescriptorBytes};
  sizes.insert(sizes.end(), rank, 4);
  sizes.insert(sizes.end(), rank, 8);
  return sizes;
}

class Reader {
 public:
  Plan plan(const Json &value) {
    Plan plan;
    object(value, "the plan",
           {"target", "precision", "driver", "compilers", "inputs", "outputs", "weights", "kernels", "batches"});
    const Json &compilers = object(value["compilers"], "compilers", {"triton", "ptxas"});
    for (const char *name : {"triton", "ptxas"}) text(compilers[name], std::string("compilers.") + name);
    plan.inputs = tensors(value["inputs"], "inputs", {"float32", "uint8"});
    plan.outputs = tensors(value["outputs"], "outputs", {"float32"});
    plan.weights = weights(value["weights"], &plan.weights_bytes);
    const Json &kernels = list(value["kernels"], "kernels", 1);
    for (size_t i = 0; i < kernels.size(); i++) plan.kernels.push_back(kernel(kernels[i], at("kernels", i)));
    plan.target = string(value["target"], "target");
    if (plan.target.rfind("sm_", 0) || plan.target.size() < 5 || !is_decimal(plan.target.substr(3), 3))
      expected("target", "an architecture such as 'sm_87'");
    one_of(value["precision"], "precision", {"fp32", "fp16", "bf16", "int8"});
    plan.driver = number(value["driver"], "driver", 12000, 1000000);
    const Json &sizes = value["batches"];
    if (!sizes.is_object() || sizes.empty()) expected("batches", "an object with a batch size");
    for (const auto &[size, table_value] : sizes.items()) {
      if (!is_decimal(size, 6)) expected("batches", "a batch size of 1 to 999999");
      Table read = table(table_value, "batches." + size, std::stoll(size), plan);
      plan.arena_bytes = std::max(plan.arena_bytes, read.arena);
      plan.batches.emplace(std::stoll(size), std::move(read));
    }
    return plan;
  }

 private:
  static std::string at(const std::string &where, size_t index) { return where + "[" + std::to_string(index) + "]"; }

  [[noreturn]] static void expected(const std::string &where, const std::string &what) {
    refuse(where + ": expected " + what);
  }

  static const Json &object(const Json &value, const std::string &where, const std::set<std::string> &keys) {
    if (!value.is_object()) expected(where, "an object");
    for (const auto &[key, inner] : value.items())
      if (!keys.count(key)) refuse(where + ": the key '" + key.substr(0, 60) + "' is not known");
    for (const std::string &key : keys)
      if (!value.contains(key)) refuse(where + ": the key '" + key + "' is missing");
    return value;
  }

  static const Json &list(const Json &value, const std::string &where, size_t least = 0, size_t most = 1000000) {
    if (!value.is_array() || value.size() < least || value.size() > most)
      expected(where, "a list of " + std::to_string(least) + " to " + std::to_string(most));
    return value;
  }

  static int64_t number(const Json &value, const std::string &where, int64_t low, int64_t high, int64_t multiple = 1) {
    bool good = value.is_number_integer() || value.is_number_unsigned();
    if (good && value.is_number_unsigned()) good = value.get<uint64_t>() <= uint64_t(INT64_MAX);
    const int64_t found = good ? value.get<int64_t>() : 0;
    if (!good || found < low || found > high || found % multiple)
      expected(where, "a whole number from " + std::to_string(low) + " to " + std::to_string(high) +
                          (multiple > 1 ? ", a multiple of " + std::to_string(multiple) : ""));
    return found;
  }

  static std::string string(const Json &value, const std::string &where) {
    if (!value.is_string()) expected(where, "a text");
    return value.get<std::string>();
  }

  static std::string text(const Json &value, const std::string &where) {
    std::string found = string(value, where);
    if (found.empty() || found.size() > 200) expected(where, "a text of 1 to 200 bytes");
    for (unsigned char letter : found)
      if (letter < 32 || letter == 127) expected(where, "a text");
    return found;
  }

  static std::string one_of(const Json &value, const std::string &where, const std::set<std::string> &known) {
    std::string found = string(value, where), all;
    for (const std::string &word : known) all += (all.empty() ? "'" : ", '") + word + "'";
    if (!known.count(found)) expected(where, "one of " + all);
    return found;
  }

  static std::string hash(const Json &value, const std::string &where) {
    std::string found = string(value, where);
    if (!is_hex64(found)) expected(where, "a sha256");
    return found;
  }

  static std::vector<Tensor> tensors(const Json &value, const std::string &key, const std::set<std::string> &dtypes) {
    std::vector<Tensor> found;
    std::set<std::string> names;
    list(value, key, 1);
    for (size_t i = 0; i < value.size(); i++) {
      const std::string where = at(key, i);
      object(value[i], where, {"name", "dtype", "shape", "layout"});
      Tensor tensor;
      __int128 elements = 1;
      for (const Json &size : list(value[i]["shape"], where + ".shape", 0, 8)) {
        tensor.shape.push_back(number(size, where + ".shape", 1, kMostInt32));
        if (elements <= kMost) elements *= tensor.shape.back();
      }
      if (elements > kMost) expected(where + ".shape", "at most " + std::to_string(kMost) + " elements");
      tensor.name = text(value[i]["name"], where + ".name");
      tensor.dtype = one_of(value[i]["dtype"], where + ".dtype", dtypes);
      tensor.layout = one_of(value[i]["layout"], where + ".layout", {"NCHW", "NHWC", ""});
      tensor.row_bytes = (tensor.dtype == "uint8" ? 1 : 4) * int64_t(elements);
      if (!names.insert(tensor.name).second) expected(key, "different names");
      found.push_back(std::move(tensor));
    }
    return found;
  }

  std::vector<Weight> weights(const Json &value, int64_t *bytes) {
    std::vector<Weight> found;
    std::set<std::string> names;
    list(value, "weights");
    for (size_t i = 0; i < value.size(); i++) {
      const std::string where = at("weights", i);
      object(value[i], where, {"tensor", "offset", "bytes", "sha256"});
      Weight weight;
      weight.tensor = text(value[i]["tensor"], where + ".tensor");
      weight.offset = number(value[i]["offset"], where + ".offset", 0, kMost, kAlignment);
      weight.bytes = number(value[i]["bytes"], where + ".bytes", 1, kMost);
      weight.sha256 = hash(value[i]["sha256"], where + ".sha256");
      if (!names.insert(weight.tensor).second) refuse("weights: a tensor stands twice");
      *bytes = std::max(*bytes, weight.offset + weight.bytes);
      offsets_.insert(weight.offset);
      found.push_back(std::move(weight));
    }
    std::vector<Weight> placed = found;
    std::sort(placed.begin(), placed.end(), [](auto &a, auto &b) { return a.offset < b.offset; });
    for (size_t i = 1; i < placed.size(); i++)
      if (placed[i - 1].offset + placed[i - 1].bytes > placed[i].offset)
        refuse("weights: " + placed[i - 1].tensor + " and " + placed[i].tensor + " overlap");
    return found;
  }

  static Kernel kernel(const Json &value, const std::string &where) {
    object(value, where, {"cubin", "symbol", "warps", "ctas", "shared", "pdl", "parameters"});
    Kernel found;
    if (!value["pdl"].is_boolean()) expected(where + ".pdl", "true or false");
    found.pdl = value["pdl"].get<bool>();
    number(value["ctas"], where + ".ctas", 1, 1);
    const Json &parameters = list(value["parameters"], where + ".parameters", 0, kParameterBytes / 4);
    int64_t end = 0;
    auto add = [&end](const std::string &kind) {
      for (int64_t size : parameter_sizes(kind)) {
        const int64_t unit = std::min<int64_t>(size, 64);
        end = (end + unit - 1) / unit * unit + size;
      }
    };
    for (size_t i = 0; i < parameters.size(); i++) {
      found.parameters.push_back(one_of(parameters[i], at(where + ".parameters", i),
                                        {"pointer", "i32", "i64", "descriptor:1", "descriptor:2", "descriptor:3",
                                         "descriptor:4", "descriptor:5"}));
      add(found.parameters.back());
    }
    add("pointer");
    add("pointer");
    if (end > kParameterBytes) expected(where + ".parameters", "at most " + std::to_string(kParameterBytes) + " bytes");
    found.cubin = hash(value["cubin"], where + ".cubin");
    found.symbol = text(value["symbol"], where + ".symbol");
    found.warps = number(value["warps"], where + ".warps", 1, 32);
    found.shared = number(value["shared"], where + ".shared", 0, 1 << 20);
    return found;
  }

  Table table(const Json &value, const std::string &where, int64_t size, const Plan &plan) {
    object(value, where, {"arena", "zeroed", "inputs", "outputs", "launches"});
    Table found;
    found.arena = arena_ = number(value["arena"], where + ".arena", 1, kMost);
    weights_bytes_ = plan.weights_bytes;
    const Json &zeroed = list(value["zeroed"], where + ".zeroed", 2, 2);
    found.zeroed[0] = number(zeroed[0], where + ".zeroed", 0, arena_, kAlignment);
    found.zeroed[1] = number(zeroed[1], where + ".zeroed", 0, arena_ - found.zeroed[0]);
    found.inputs = places(value["inputs"], where + ".inputs", plan.inputs, size);
    found.outputs = places(value["outputs"], where + ".outputs", plan.outputs, size);
    const Json &launches = list(value["launches"], where + ".launches", 1);
    for (size_t i = 0; i < launches.size(); i++)
      found.launches.push_back(launch(launches[i], at(where + ".launches", i), plan.kernels));
    return found;
  }

  std::vector<int64_t> places(const Json &value, const std::string &where, const std::vector<Tensor> &tensors, int64_t size) {
    std::set<std::string> names;
    for (const Tensor &tensor : tensors) names.insert(tensor.name);
    object(value, where, names);
    std::vector<int64_t> found;
    for (const Tensor &tensor : tensors) {
      const __int128 most = __int128(arena_) - __int128(size) * tensor.row_bytes;
      found.push_back(number(value[tensor.name], where + "." + tensor.name, 0, most < 0 ? -1 : int64_t(most), kAlignment));
    }
    return found;
  }

  Launch launch(const Json &value, const std::string &where, const std::vector<Kernel> &kernels) {
    object(value, where, {"kernel", "grid", "arguments"});
    Launch found;
    found.kernel = number(value["kernel"], where + ".kernel", 0, int64_t(kernels.size()) - 1);
    const Json &grid = list(value["grid"], where + ".grid", 3, 3);
    for (int axis = 0; axis < 3; axis++) found.grid[axis] = number(grid[axis], where + ".grid", 1, axis ? 65535 : kMostInt32);
    const std::vector<std::string> &kinds = kernels[found.kernel].parameters;
    const Json &arguments = list(value["arguments"], where + ".arguments", kinds.size(), kinds.size());
    for (size_t i = 0; i < kinds.size(); i++)
      found.arguments.push_back(argument(arguments[i], at(where + ".arguments", i), kinds[i]));
    return found;
  }

  Argument argument(const Json &value, const std::string &where, const std::string &kind) {
    if (!value.is_object() || value.size() != 1) expected(where, "an object with one key");
    const std::string key = value.begin().key();
    const Json &inner = value.begin().value();
    if (kind == "pointer" && key == "null") {
      if (!inner.is_boolean() || !inner.get<bool>()) expected(where, "true");
      Pointer none;
      none.null = true;
      return none;
    }
    if (kind == "pointer" && (key == "weight" || key == "arena")) return pointer(value, where);
    if (kind == "i32" && key == "value") return number(inner, where, -kMostInt32 - 1, kMostInt32);
    if (kind == "i64" && key == "value") return number(inner, where, INT64_MIN, INT64_MAX);
    if (rank_of(kind) && key == "descriptor") return descriptor(inner, where, rank_of(kind));
    expected(where, "the argument of a parameter of kind " + kind);
  }

  Pointer pointer(const Json &value, const std::string &where) {
    if (!value.is_object() || value.size() != 1 || !(value.contains("weight") || value.contains("arena")))
      expected(where, "a weight or a place in the arena");
    Pointer found;
    found.weight = value.contains("weight");
    found.offset = number(value.begin().value(), where, 0, (found.weight ? weights_bytes_ : arena_) - 1, 16);
    if (found.weight && !offsets_.count(found.offset)) expected(where, "the offset of a weight");
    return found;
  }

  Descriptor descriptor(const Json &value, const std::string &where, size_t rank) {
    static constexpr int64_t kSwizzleBytes[] = {INT64_MAX, 32, 64, 128};
    object(value, where, {"base", "dtype", "shape", "strides", "box", "swizzle"});
    Descriptor found;
    found.base = pointer(value["base"], where + ".base");
    const std::string dtype = one_of(value["dtype"], where + ".dtype", {"float16", "bfloat16", "float32"});
    found.type = dtype == "float16" ? 6 : dtype == "float32" ? 7 : 9;
    found.item = dtype == "float32" ? 4 : 2;
    found.swizzle = number(value["swizzle"], where + ".swizzle", 0, 3);
    for (const char *key : {"shape", "strides", "box"}) list(value[key], where + "." + key, rank, rank);
    __int128 last = 0;
    for (size_t axis = 0; axis < rank; axis++) {
      const bool inner = axis == rank - 1;
      found.shape.push_back(number(value["shape"][axis], where + ".shape", 1, kMostInt32));
      found.box.push_back(number(value["box"][axis], where + ".box", 1, 256));
      found.strides.push_back(number(value["strides"][axis], where + ".strides", 1, inner ? 1 : kMost / found.item,
                                     inner ? 1 : 16 / found.item));
      last += __int128(found.shape.back() - 1) * found.strides.back();
    }
    const int64_t line = found.box.back() * found.item, most = found.base.weight ? weights_bytes_ : arena_;
    if (line % 16 || line > kSwizzleBytes[found.swizzle])
      expected(where + ".box", "rows of a multiple of 16 bytes that swizzle " + std::to_string(found.swizzle) + " holds");
    if (found.base.offset + (last + 1) * found.item > most)
      expected(where, "a tensor within the " + std::to_string(most) + " bytes of its allocation");
    return found;
  }

  std::set<int64_t> offsets_;  // of the weights
  int64_t arena_ = 0, weights_bytes_ = 0;
};

// ---------------------------------------------------------------------------------------------------------------- file

struct Bytes {
  const uint8_t *data = nullptr;
  size_t size = 0;
};

// JSON without what its readers disagree on: repeated keys, and numbers that are not whole.
Json read_json(const char *begin, const char *end) {
  std::vector<std::set<std::string>> keys;
  bool whole = true, unique = true;
  auto look = [&](int, Json::parse_event_t event, Json &parsed) {
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) unique &= keys.back().insert(parsed.get<std::string>()).second;
    if (event == Json::parse_event_t::value) whole &= !parsed.is_number_float();
    return true;
  };
  if (std::find(begin, end, '\0') != end) refuse("not JSON");
  Json value = Json::parse(begin, end, look, false);
  if (value.is_discarded()) refuse("not JSON");
  if (!unique) refuse("a key stands twice in one object of its JSON");
  if (!whole) refuse("a number that is no whole number");
  return value;
}

int64_t item_bytes(const std::string &dtype) {
  static const std::map<std::string, int> sizes = {
      {"BOOL", 1}, {"U8", 1}, {"I8", 1}, {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
      {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4}, {"I64", 8}, {"U64", 8}, {"F64", 8}};
  auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

// Where a tensor of the header lies, whose type and shape have as many bytes.
std::pair<uint64_t, uint64_t> range_of(const Json &entry) {
  auto wrong = [] { refuse("an entry of its header is no tensor"); };
  if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets"))
    wrong();
  const Json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  if (!dtype.is_string() || !shape.is_array() || !offsets.is_array() || offsets.size() != 2 || shape.size() > 16) wrong();
  const int64_t item = item_bytes(dtype.get<std::string>());
  if (!item) wrong();
  auto size = [&](const Json &value) {
    if (!value.is_number_unsigned() && !(value.is_number_integer() && value.get<int64_t>() >= 0)) wrong();
    if (value.get<uint64_t>() > uint64_t(INT64_MAX)) wrong();
    return value.get<uint64_t>();
  };
  const uint64_t start = size(offsets[0]), stop = size(offsets[1]);
  if (start > stop) wrong();
  unsigned __int128 bytes = item;
  bool empty = false;
  for (const Json &n : shape) empty |= size(n) == 0;
  for (const Json &n : shape)
    if (bytes <= uint64_t(INT64_MAX)) bytes *= size(n);
  if ((empty ? 0 : bytes) != stop - start) refuse("a tensor of its header has another size than its type and shape");
  return {start, stop};
}

struct File {
  Plan plan;
  std::map<std::string, Bytes> tensors;
};

std::string metadata_of(const Json &metadata, const char *key) {
  return metadata.contains(key) ? metadata[key].get<std::string>() : "";
}

File read_file(Bytes content) {
  uint64_t length = 0;
  for (int i = 7; i >= 0 && content.size >= 10; i--) length = length << 8 | content.data[i];
  if (content.size < 10 || length < 2 || length > uint64_t(100) << 20 || length > content.size - 8)
    refuse(std::to_string(content.size) + " bytes that are no safetensors file, or one that was cut off");
  auto *begin = reinterpret_cast<const char *>(content.data + 8);
  if (*begin != '{') refuse("its header is no object of JSON");
  Json header = read_json(begin, begin + length);
  Json metadata = header.contains("__metadata__") ? header["__metadata__"] : Json::object();
  header.erase("__metadata__");
  if (!metadata.is_object()) refuse("its metadata is no object of texts");
  for (const auto &[key, value] : metadata.items())
    if (!value.is_string()) refuse("its metadata is no object of texts");

  File file;
  const Bytes data{content.data + 8 + length, content.size - 8 - size_t(length)};
  std::vector<std::tuple<uint64_t, uint64_t, std::string>> ranges;
  for (const auto &[name, entry] : header.items()) {
    const auto [start, stop] = range_of(entry);
    ranges.emplace_back(start, stop, name);
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t end = 0;
  for (const auto &[start, stop, name] : ranges) {
    if (start != end) refuse("its tensors overlap or leave a gap at '" + name.substr(0, 80) + "'");
    end = stop;
    if (end > data.size) break;
    file.tensors[name] = {data.data + start, size_t(stop - start)};
  }
  if (end != data.size)
    refuse("its tensors have " + std::to_string(end) + " bytes, the file has " + std::to_string(data.size) +
           ": it was cut off or continued");

  if (metadata_of(metadata, "format") != "resnet-deploy.kernels")
    refuse("its format is '" + metadata_of(metadata, "format").substr(0, 40) + "', expected 'resnet-deploy.kernels'");
  if (metadata_of(metadata, "version") != "1")
    refuse("its version is '" + metadata_of(metadata, "version").substr(0, 40) + "', expected '1': export it again");
  if (metadata.size() != 4 || !metadata.contains("plan") || !metadata.contains("sha256"))
    refuse("its metadata is not format, plan, sha256, version");
  const std::string text = metadata["plan"].get<std::string>();
  if (sha256_of(text.data(), text.size()) != metadata_of(metadata, "sha256"))
    refuse("its plan was altered: it has another sha256");
  file.plan = Reader().plan(read_json(text.data(), text.data() + text.size()));

  std::map<std::string, std::string> expected;  // tensor -> sha256
  for (const Kernel &kernel : file.plan.kernels) expected["cubin." + kernel.cubin] = kernel.cubin;
  for (const Weight &weight : file.plan.weights)
    if (!expected.emplace(weight.tensor, weight.sha256).second) refuse("its tensors are not those of its plan");
  bool same = expected.size() == file.tensors.size();
  for (const auto &[name, hash] : expected) same &= file.tensors.count(name) == 1;
  if (!same) refuse("its tensors are not those of its plan");
  for (const Weight &weight : file.plan.weights)
    if (int64_t(file.tensors[weight.tensor].size) != weight.bytes)
      refuse(weight.tensor + " has " + std::to_string(file.tensors[weight.tensor].size) + " bytes, its plan says " +
             std::to_string(weight.bytes));
  for (const auto &[name, hash] : expected) {
    const Bytes tensor = file.tensors[name];
    if (sha256_of(tensor.data, tensor.size) != hash) refuse(name.substr(0, 20) + " was altered: it has another sha256");
  }
  for (const Kernel &kernel : file.plan.kernels) {
    const Bytes cubin = file.tensors["cubin." + kernel.cubin];
    if (cubin.size < 64 || std::memcmp(cubin.data, "\177ELF", 4) || cubin.data[18] != 190 || cubin.data[19])
      refuse("cubin." + kernel.cubin.substr(0, 14) + " is no machine code of a GPU");
  }
  return file;
}

// -------------------------------------------------------------------------------------------------------------- driver

using Address = uint64_t;  // of the GPU
struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    int32_t allowed;
    char room[64];
  } value;
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void *stream;
  LaunchAttribute *attributes;
  unsigned count;
};

// What the driver exports, by the names under which it keeps these versions of its calls.
#define KE_CALLS(CALL)                                                        \
  CALL(cuInit, "cuInit", unsigned)                                            \
  CALL(cuDriverGetVersion, "cuDriverGetVersion", int *)                       \
  CALL(cuDeviceGet, "cuDeviceGet", int *, int)                                \
  CALL(cuDeviceGetAttribute, "cuDeviceGetAttribute", int *, int, int)         \
  CALL(cuPrimaryRetain, "cuDevicePrimaryCtxRetain", void **, int)             \
  CALL(cuPrimaryRelease, "cuDevicePrimaryCtxRelease_v2", int)                 \
  CALL(cuPush, "cuCtxPushCurrent_v2", void *)                                 \
  CALL(cuPop, "cuCtxPopCurrent_v2", void **)                                  \
  CALL(cuModuleLoadData, "cuModuleLoadData", void **, const void *)           \
  CALL(cuModuleUnload, "cuModuleUnload", void *)                              \
  CALL(cuModuleGetFunction, "cuModuleGetFunction", void **, void *, const char *) \
  CALL(cuFuncGetAttribute, "cuFuncGetAttribute", int *, int, void *)          \
  CALL(cuFuncSetAttribute, "cuFuncSetAttribute", void *, int, int)            \
  CALL(cuMemAlloc, "cuMemAlloc_v2", Address *, size_t)                        \
  CALL(cuMemFree, "cuMemFree_v2", Address)                                    \
  CALL(cuMemcpyHtoD, "cuMemcpyHtoD_v2", Address, const void *, size_t)        \
  CALL(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", Address, const void *, size_t, void *) \
  CALL(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", void *, Address, size_t, void *) \
  CALL(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", Address, Address, size_t, void *) \
  CALL(cuMemsetD8Async, "cuMemsetD8Async", Address, unsigned char, size_t, void *) \
  CALL(cuPointerGetAttribute, "cuPointerGetAttribute", void *, int, Address)  \
  CALL(cuStreamCreate, "cuStreamCreate", void **, unsigned)                   \
  CALL(cuStreamDestroy, "cuStreamDestroy_v2", void *)                         \
  CALL(cuStreamSynchronize, "cuStreamSynchronize", void *)                    \
  CALL(cuStreamWaitEvent, "cuStreamWaitEvent", void *, void *, unsigned)      \
  CALL(cuBeginCapture, "cuStreamBeginCapture_v2", void *, int)                \
  CALL(cuEndCapture, "cuStreamEndCapture", void *, void **)                   \
  CALL(cuEventCreate, "cuEventCreate", void **, unsigned)                     \
  CALL(cuEventDestroy, "cuEventDestroy_v2", void *)                           \
  CALL(cuEventRecord, "cuEventRecord", void *, void *)                        \
  CALL(cuEventSynchronize, "cuEventSynchronize", void *)                      \
  CALL(cuGraphInstantiate, "cuGraphInstantiateWithFlags", void **, void *, unsigned long long) \
  CALL(cuGraphDestroy, "cuGraphDestroy", void *)                              \
  CALL(cuGraphExecDestroy, "cuGraphExecDestroy", void *)                      \
  CALL(cuGraphLaunch, "cuGraphLaunch", void *, void *)                        \
  CALL(cuLaunchKernelEx, "cuLaunchKernelEx", const LaunchConfig *, void *, void **, void **) \
  CALL(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled", void *, int, unsigned, Address, const uint64_t *, const uint64_t *, \
       const uint32_t *, const uint32_t *, int, int, int, int)                \
  CALL(cuGetErrorName, "cuGetErrorName", int, const char **)

struct Driver {
#define KE_DECLARE(member, name, ...) int (*member)(__VA_ARGS__) = nullptr;
  KE_CALLS(KE_DECLARE)
#undef KE_DECLARE

  void load() {
    // Never closed: the driver keeps threads, and the system counts who has it open.
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) fail(KE_DEVICE, std::string("no NVIDIA driver here: ") + dlerror());
#define KE_FIND(member, name, ...)                                    \
  member = reinterpret_cast<decltype(member)>(dlsym(library, name)); \
  if (!member) fail(KE_DEVICE, "the NVIDIA driver is too old: it lacks " name);
    KE_CALLS(KE_FIND)
#undef KE_FIND
  }

  void check(int error, const char *doing) const {
    if (!error) return;
    static const std::map<int, const char *> advice = {
        {2, "its memory is full; end what else uses it, or export a smaller largest batch"},
        {34, "libcuda.so.1 is the toolkit's stub; take its folder out of LD_LIBRARY_PATH"},
        {46, "another process has the GPU for itself"},
        {100, "no NVIDIA GPU here"},
        {101, "no such GPU here"},
        {200, "the file's machine code is not what this driver reads; update the driver"},
        {209, "the file is for another GPU; export it for this one"},
        {214, "its memory has a fault; reset it, or start the machine anew"},
        {222, "the file is newer than the driver; update the driver"},
        {304, "the system refuses it; may this user open /dev/nvidia* or /dev/nvgpu?"},
        {500, "the file's machine code lacks what its plan names; export it again"},
        {700, "a kernel left its memory; check the bundle with verify.py, export it again"},
        {701, "a kernel needs more registers or shared memory than this GPU has"},
        {702, "a kernel took too long for a GPU that has a screen"},
        {716, "a kernel left its memory; check the bundle with verify.py, export it again"},
        {719, "a kernel failed; check the bundle with verify.py, export it again"},
        {802, "its services are not running"},
        {803, "its kernel module and its library are of different versions; start it anew"},
    };
    const char *name = nullptr;
    if (cuGetErrorName(error, &name) || !name) name = "an unknown error";
    auto found = advice.find(error);
    fail(error == 2 ? KE_MEMORY : error == 100 || error == 101 || error == 209 ? KE_DEVICE : KE_DRIVER,
         std::string("the GPU's driver refuses ") + doing + ": " + name +
             (found == advice.end() ? "" : std::string(": ") + found->second));
  }
};

// The GPU's context, in which everything is done; the thread's own again afterwards.
class Current {
 public:
  Current(const Driver &driver, void *context) : driver_(driver) { driver.check(driver.cuPush(context), "its context"); }
  ~Current() { driver_.cuPop(nullptr); }
  Current(const Current &) = delete;
  Current &operator=(const Current &) = delete;

 private:
  const Driver &driver_;
};

constexpr int kGraphsWithEdges = 12030;  // the driver from which a graph keeps a programmatic edge between two launches
constexpr int kDriverOfSmallTensors = 13010;
constexpr int64_t kSmallTensor = 128 << 10, kPlainShared = 48 << 10;
constexpr uint64_t kSmallTensorBit = uint64_t(1) << 21;

std::string version(int64_t driver) { return std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10); }

}  // namespace

// -------------------------------------------------------------------------------------------------- engine and context

struct ke_engine {
  Driver driver;
  Plan plan;
  int device = 0, version = 0, shared = 0;
  void *context = nullptr;  // CUcontext
  std::vector<void *> modules, functions;
  Address weights = 0;

  void open(Bytes content, int number);
  ~ke_engine();

 private:
  void check_device();
  void load(const File &file);
};

struct ke_context {
  ke_engine *engine = nullptr;
  std::mutex one_at_a_time;
  void *stream = nullptr, *done = nullptr;
  Address arena = 0;
  std::map<int64_t, void *> graphs;
  int64_t last = 0;             // the batch size of the last run
  void *last_stream = nullptr;  // and where that was
  bool ran = false;

  void create();
  void enqueue(int64_t count, const void *const *inputs, void *const *outputs, void *where);
  ~ke_context();

 private:
  void *record(const Table &table);
  void launch(const Launch &launch);
  Address address(const Pointer &pointer) const {
    return pointer.null ? 0 : (pointer.weight ? engine->weights : arena) + pointer.offset;
  }
  void encode(const Descriptor &tensor, uint8_t *map) const;
};

void ke_engine::open(Bytes content, int number) {
  File file = read_file(content);
  plan = std::move(file.plan);
  driver.load();
  driver.check(driver.cuInit(0), "to start");
  driver.check(driver.cuDriverGetVersion(&version), "its version");
  driver.check(driver.cuDeviceGet(&device, number), "the GPU");
  check_device();
  driver.check(driver.cuPrimaryRetain(&context, device), "a context");
  Current current(driver, context);
  load(file);
}

void ke_engine::check_device() {
  int major = 0, minor = 0;
  driver.check(driver.cuDeviceGetAttribute(&major, 75, device), "its compute capability");
  driver.check(driver.cuDeviceGetAttribute(&minor, 76, device), "its compute capability");
  driver.check(driver.cuDeviceGetAttribute(&shared, 97, device), "its shared memory");
  const std::string here = "sm_" + std::to_string(10 * major + minor);
  if (here != plan.target)
    fail(KE_DEVICE, "the engine cannot run here: it is for " + plan.target + ", this GPU is " + here +
                        ": export it for that one");
  if (version < plan.driver)
    fail(KE_DEVICE, "the engine cannot run here: it needs a driver for CUDA " + ::version(plan.driver) +
                        " or newer, the one here is for " + ::version(version) + ": update it");
  for (const Kernel &kernel : plan.kernels)
    if (kernel.shared > shared)
      fail(KE_DEVICE, "the engine cannot run here: it needs " + std::to_string(kernel.shared) +
                          " bytes of shared memory per block, this GPU has " + std::to_string(shared));
}

void ke_engine::load(const File &file) {
  std::map<std::string, void *> loaded;
  for (const Kernel &kernel : plan.kernels) {
    if (!loaded.count(kernel.cubin)) {
      const Bytes cubin = file.tensors.at("cubin." + kernel.cubin);
      std::vector<uint64_t> aligned(cubin.size / 8 + 1);  // which the file does not promise
      std::memcpy(aligned.data(), cubin.data, cubin.size);
      void *module = nullptr;
      driver.check(driver.cuModuleLoadData(&module, aligned.data()), "machine code");
      modules.push_back(module);
      loaded[kernel.cubin] = module;
    }
    void *function = nullptr;
    int fixed = 0, threads = 0;
    driver.check(driver.cuModuleGetFunction(&function, loaded[kernel.cubin], kernel.symbol.c_str()), "a kernel");
    driver.check(driver.cuFuncGetAttribute(&fixed, 1, function), "a kernel's shared memory");
    driver.check(driver.cuFuncGetAttribute(&threads, 0, function), "a kernel's threads");
    if (kernel.shared + fixed > shared || 32 * kernel.warps > threads)
      fail(KE_DEVICE, kernel.symbol + " needs " + std::to_string(kernel.shared + fixed) + " bytes of shared memory and " +
                          std::to_string(32 * kernel.warps) + " threads per block: this GPU has " + std::to_string(shared) +
                          " and " + std::to_string(threads));
    if (kernel.shared + fixed > kPlainShared)
      driver.check(driver.cuFuncSetAttribute(function, 8, shared - fixed), "shared memory");
    functions.push_back(function);
  }
  driver.check(driver.cuMemAlloc(&weights, std::max<int64_t>(1, plan.weights_bytes)), "memory for the weights");
  for (const Weight &weight : plan.weights) {
    const Bytes data = file.tensors.at(weight.tensor);
    driver.check(driver.cuMemcpyHtoD(weights + weight.offset, data.data, data.size), "the weights");
  }
}

ke_engine::~ke_engine() {
  if (!context) return;
  if (!driver.cuPush(context)) {
    if (weights) driver.cuMemFree(weights);
    for (void *module : modules) driver.cuModuleUnload(module);
    driver.cuPop(nullptr);
  }
  driver.cuPrimaryRelease(device);
}

void ke_context::create() {
  const Driver &driver = engine->driver;
  Current current(driver, engine->context);
  driver.check(driver.cuStreamCreate(&stream, 1), "a stream");
  driver.check(driver.cuEventCreate(&done, 2), "an event");
  driver.check(driver.cuMemAlloc(&arena, engine->plan.arena_bytes), "memory for the activations");
  for (const auto &[size, table] : engine->plan.batches) graphs[size] = record(table);
}

ke_context::~ke_context() {
  const Driver &driver = engine->driver;
  if (driver.cuPush(engine->context)) return;
  if (ran) driver.cuEventSynchronize(done);
  for (const auto &[size, graph] : graphs) driver.cuGraphExecDestroy(graph);
  if (arena) driver.cuMemFree(arena);
  if (done) driver.cuEventDestroy(done);
  if (stream) driver.cuStreamDestroy(stream);
  driver.cuPop(nullptr);
}

void *ke_context::record(const Table &table) {
  const Driver &driver = engine->driver;
  void *graph = nullptr, *executable = nullptr;
  driver.check(driver.cuBeginCapture(stream, 1), "to record");
  try {
    for (const Launch &one : table.launches) launch(one);
  } catch (...) {
    if (!driver.cuEndCapture(stream, &graph) && graph) driver.cuGraphDestroy(graph);
    throw;
  }
  driver.check(driver.cuEndCapture(stream, &graph), "what was recorded");
  const int error = driver.cuGraphInstantiate(&executable, graph, 0);
  driver.cuGraphDestroy(graph);
  driver.check(error, "a graph");
  return executable;
}

void ke_context::launch(const Launch &launch) {
  const Driver &driver = engine->driver;
  const Kernel &kernel = engine->plan.kernels[launch.kernel];
  struct alignas(64) Value {
    uint8_t bytes[kDescriptorBytes];
  };
  std::vector<Value> values;
  auto add = [&values](const void *data, size_t size) {
    values.emplace_back();
    std::memcpy(values.back().bytes, data, size);
  };
  for (size_t i = 0; i < launch.arguments.size(); i++) {
    const Argument &argument = launch.arguments[i];
    if (auto *pointer = std::get_if<Pointer>(&argument)) {
      const Address place = address(*pointer);
      add(&place, 8);
    } else if (auto *number = std::get_if<int64_t>(&argument)) {
      const int32_t narrow = int32_t(*number);
      kernel.parameters[i] == "i32" ? add(&narrow, 4) : add(number, 8);
    } else {
      const Descriptor &tensor = std::get<Descriptor>(argument);
      Value map{};
      encode(tensor, map.bytes);
      values.push_back(map);
      for (int64_t size : tensor.shape) {
        const int32_t narrow = int32_t(size);
        add(&narrow, 4);
      }
      for (int64_t stride : tensor.strides) add(&stride, 8);
    }
  }
  const Address none = 0;
  add(&none, 8);  // scratch memory, of which kernels have none
  add(&none, 8);
  std::vector<void *> parameters;
  for (Value &value : values) parameters.push_back(value.bytes);
  LaunchAttribute overlap{};
  overlap.id = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  overlap.value.allowed = 1;
  LaunchConfig config{};
  for (int axis = 0; axis < 3; axis++) config.grid[axis] = unsigned(launch.grid[axis]);
  config.block[0] = unsigned(32 * kernel.warps);
  config.block[1] = config.block[2] = 1;
  config.shared = unsigned(kernel.shared);
  config.stream = stream;
  config.attributes = &overlap;
  config.count = kernel.pdl && engine->version >= kGraphsWithEdges;
  driver.check(driver.cuLaunchKernelEx(&config, engine->functions[launch.kernel], parameters.data(), nullptr), "a launch");
}

// As Triton's own driver encodes it: innermost axis first, strides in bytes but for the innermost.
void ke_context::encode(const Descriptor &tensor, uint8_t *map) const {
  const int rank = int(tensor.shape.size());
  uint64_t shape[5], strides[5];
  uint32_t box[5], steps[5] = {1, 1, 1, 1, 1};
  for (int axis = 0; axis < rank; axis++) {
    shape[axis] = uint64_t(tensor.shape[rank - 1 - axis]);
    box[axis] = uint32_t(tensor.box[rank - 1 - axis]);
    if (axis) strides[axis - 1] = uint64_t(tensor.strides[rank - 1 - axis] * tensor.item);
  }
  strides[rank - 1] = shape[rank - 1] * (rank == 1 ? uint64_t(tensor.item) : strides[rank - 2]);
  engine->driver.check(
      engine->driver.cuTensorMapEncodeTiled(map, tensor.type, unsigned(rank), address(tensor.base), shape, strides, box, steps,
                                            0 /* no interleave */, int(tensor.swizzle), 2 /* L2 promotion to 128 bytes */,
                                            0 /* zeros outside */),
      "a tensor map");
  uint64_t last = (shape[0] - 1) * uint64_t(tensor.item);
  for (int axis = 1; axis < rank; axis++) last += (shape[axis] - 1) * strides[axis - 1];
  if (engine->version <= kDriverOfSmallTensors && int64_t(last) + 1 < kSmallTensor) {
    uint64_t word;
    std::memcpy(&word, map + 8, 8);
    word &= ~kSmallTensorBit;  // as Triton and CUTLASS do for these drivers
    std::memcpy(map + 8, &word, 8);
  }
}

void ke_context::enqueue(int64_t count, const void *const *inputs, void *const *outputs, void *where) {
  const Driver &driver = engine->driver;
  const Plan &plan = engine->plan;
  const auto found = plan.batches.lower_bound(count);
  if (count < 1 || found == plan.batches.end())
    fail(KE_ARGUMENT, "the engine runs batches of 1 to " + std::to_string(plan.batches.rbegin()->first) + " images, got " +
                          std::to_string(count));
  if (!inputs || !outputs) fail(KE_ARGUMENT, "expected inputs and outputs");
  const auto &[size, table] = *found;
  auto on_gpu = [&driver](const void *pointer) {
    unsigned kind = 0;  // memory that the driver does not know is the host's
    return !driver.cuPointerGetAttribute(&kind, 2, reinterpret_cast<Address>(pointer)) && kind == 2;
  };
  Current current(driver, engine->context);
  if (ran && last_stream != where) driver.check(driver.cuStreamWaitEvent(where, done, 0), "to wait");
  if (size != last && table.zeroed[1])  // another batch size has other values in its place
    driver.check(driver.cuMemsetD8Async(arena + table.zeroed[0], 0, table.zeroed[1], where), "to clear memory");
  last = size;
  for (size_t i = 0; i < plan.inputs.size(); i++) {
    const Address place = arena + table.inputs[i];
    const int64_t row = plan.inputs[i].row_bytes, bytes = count * row;
    if (inputs[i])
      driver.check(on_gpu(inputs[i]) ? driver.cuMemcpyDtoDAsync(place, reinterpret_cast<Address>(inputs[i]), bytes, where)
                                     : driver.cuMemcpyHtoDAsync(place, inputs[i], bytes, where),
                   "an input");
    if (count < size) driver.check(driver.cuMemsetD8Async(place + bytes, 0, (size - count) * row, where), "to clear memory");
  }
  driver.check(driver.cuGraphLaunch(graphs.at(size), where), "to run");
  for (size_t i = 0; i < plan.outputs.size(); i++) {
    const Address place = arena + table.outputs[i];
    const int64_t bytes = count * plan.outputs[i].row_bytes;
    if (outputs[i])
      driver.check(on_gpu(outputs[i]) ? driver.cuMemcpyDtoDAsync(reinterpret_cast<Address>(outputs[i]), place, bytes, where)
                                      : driver.cuMemcpyDtoHAsync(outputs[i], place, bytes, where),
                   "an output");
  }
  driver.check(driver.cuEventRecord(done, where), "to mark the end");
  last_stream = where;
  ran = true;
}

// ---------------------------------------------------------------------------------------------------------------- edge

namespace {

ke_tensor described(const Tensor &tensor) {
  return {tensor.name.c_str(), tensor.dtype.c_str(), tensor.layout.c_str(), tensor.shape.data(), int(tensor.shape.size()),
          size_t(tensor.row_bytes)};
}

ke_tensor described(const std::vector<Tensor> &tensors, int index) {
  return index < 0 || size_t(index) >= tensors.size() ? ke_tensor{} : described(tensors[size_t(index)]);
}

uint64_t place(const ke_context *context, int64_t count, int index, std::vector<int64_t> Table::*places) {
  const auto found = context->engine->plan.batches.lower_bound(count);
  if (count < 1 || found == context->engine->plan.batches.end()) return 0;
  const std::vector<int64_t> &offsets = found->second.*places;
  return index < 0 || size_t(index) >= offsets.size() ? 0 : context->arena + uint64_t(offsets[size_t(index)]);
}

struct Content {  // a whole file in memory, which nobody can change or cut off while it is read
  std::unique_ptr<uint8_t, void (*)(void *)> data{nullptr, std::free};
  size_t size = 0;
};

Content content_of(const char *path) {
  const int file = ::open(path, O_RDONLY | O_CLOEXEC);
  struct stat facts {};
  Content content;
  const bool regular = file >= 0 && !fstat(file, &facts) && S_ISREG(facts.st_mode);
  if (regular) {
    content.data.reset(static_cast<uint8_t *>(std::malloc(size_t(facts.st_size) + 1)));
    while (content.data && content.size < size_t(facts.st_size)) {
      const ssize_t n = ::read(file, content.data.get() + content.size, size_t(facts.st_size) - content.size);
      if (n <= 0) break;
      content.size += size_t(n);
    }
  }
  if (file >= 0) ::close(file);
  if (!regular) fail(KE_FILE, std::string("cannot read ") + path);
  if (!content.data) throw std::bad_alloc();
  return content;
}

}  // namespace

#define KE_EXPORT __attribute__((visibility("default")))

extern "C" {

KE_EXPORT ke_status ke_open(const char *path, int device, const char *sha256, ke_engine **engine) {
  if (engine) *engine = nullptr;
  return guarded([&] {
    if (!path || !engine) fail(KE_ARGUMENT, "expected a path and a place for the engine");
    const Content content = content_of(path);
    if (sha256 && sha256_of(content.data.get(), content.size) != sha256)
      fail(KE_FILE, std::string(path) + " was altered: it has another sha256 than its manifest says");
    auto opened = std::make_unique<ke_engine>();
    opened->open({content.data.get(), content.size}, device);
    *engine = opened.release();
  });
}

KE_EXPORT ke_status ke_open_bytes(const void *content, size_t size, int device, ke_engine **engine) {
  if (engine) *engine = nullptr;
  return guarded([&] {
    if (!content || !engine) fail(KE_ARGUMENT, "expected a file's bytes and a place for the engine");
    auto opened = std::make_unique<ke_engine>();
    opened->open({static_cast<const uint8_t *>(content), size}, device);
    *engine = opened.release();
  });
}

KE_EXPORT void ke_close(ke_engine *engine) { delete engine; }

KE_EXPORT int ke_input_count(const ke_engine *engine) { return int(engine->plan.inputs.size()); }
KE_EXPORT int ke_output_count(const ke_engine *engine) { return int(engine->plan.outputs.size()); }
KE_EXPORT ke_tensor ke_input(const ke_engine *engine, int index) { return described(engine->plan.inputs, index); }
KE_EXPORT ke_tensor ke_output(const ke_engine *engine, int index) { return described(engine->plan.outputs, index); }
KE_EXPORT int ke_batch_count(const ke_engine *engine) { return int(engine->plan.batches.size()); }
KE_EXPORT int64_t ke_batch(const ke_engine *engine, int index) {
  if (index < 0 || index >= ke_batch_count(engine)) return 0;
  return std::next(engine->plan.batches.begin(), index)->first;
}
KE_EXPORT size_t ke_weights_bytes(const ke_engine *engine) { return size_t(engine->plan.weights_bytes); }
KE_EXPORT size_t ke_arena_bytes(const ke_engine *engine) { return size_t(engine->plan.arena_bytes); }

KE_EXPORT ke_status ke_context_create(ke_engine *engine, ke_context **context) {
  if (context) *context = nullptr;
  return guarded([&] {
    if (!engine || !context) fail(KE_ARGUMENT, "expected an engine and a place for the context");
    auto created = std::make_unique<ke_context>();
    created->engine = engine;
    created->create();
    *context = created.release();
  });
}

KE_EXPORT void ke_context_destroy(ke_context *context) { delete context; }

KE_EXPORT ke_status ke_enqueue(ke_context *context, int64_t count, const void *const *inputs, void *const *outputs,
                               void *stream) {
  return guarded([&] {
    if (!context) fail(KE_ARGUMENT, "expected a context");
    const std::lock_guard<std::mutex> lock(context->one_at_a_time);
    context->enqueue(count, inputs, outputs, stream);
  });
}

KE_EXPORT ke_status ke_run(ke_context *context, int64_t count, const void *const *inputs, void *const *outputs) {
  return guarded([&] {
    if (!context) fail(KE_ARGUMENT, "expected a context");
    const std::lock_guard<std::mutex> lock(context->one_at_a_time);
    context->enqueue(count, inputs, outputs, context->stream);
    const Driver &driver = context->engine->driver;
    Current current(driver, context->engine->context);
    driver.check(driver.cuStreamSynchronize(context->stream), "to finish");
  });
}

KE_EXPORT uint64_t ke_input_address(const ke_context *context, int64_t count, int index) {
  return place(context, count, index, &Table::inputs);
}
KE_EXPORT uint64_t ke_output_address(const ke_context *context, int64_t count, int index) {
  return place(context, count, index, &Table::outputs);
}

}  // extern "C"
