// Neighbouring numbers of a map in device memory, as floats.
#pragma once

#include "common/half.h"
#include "common/words.h"

namespace shike {
namespace {

// V neighbouring numbers: one, or as many as a power of two of up to 16 bytes holds.
template <DType kType, int V>
struct Packet {
    static constexpr int kBytes = bytes_of(kType) * V;
    static_assert(kBytes <= 16, "one access");

    std::uint32_t words[kBytes < 4 ? 1 : kBytes / 4];

    SHIKE_DEVICE void load(const char* from) {
        if constexpr (kBytes >= 8) {
            load_words(from, words);
        } else {
            words[0] = kBytes == 4 ? __ldg(reinterpret_cast<const unsigned*>(from))
                                   : __ldg(reinterpret_cast<const unsigned short*>(from));
        }
    }

    SHIKE_DEVICE void store(char* to) const {
        if constexpr (kBytes >= 8) {
            store_words(to, words);
        } else if constexpr (kBytes == 4) {
            *reinterpret_cast<std::uint32_t*>(to) = words[0];
        } else {
            *reinterpret_cast<std::uint16_t*>(to) = std::uint16_t(words[0]);
        }
    }

    SHIKE_DEVICE void clear() {
        SHIKE_UNROLL
        for (std::uint32_t& word : words) word = 0;
    }

    SHIKE_DEVICE void get(float (&values)[V]) const {
        float rest;
        SHIKE_UNROLL
        for (int i = 0; i < V; i += kType == DType::kFloat32 ? 1 : 2) {
            float& second = V > 1 && kType != DType::kFloat32 ? values[(i + 1) % V] : rest;
            if constexpr (kType == DType::kFloat32) values[i] = float_of(words[i]);
            if constexpr (kType == DType::kBFloat16) widen_bfloat16(words[i / 2], values[i], second);
            if constexpr (kType == DType::kFloat16) widen_float16(words[i / 2], values[i], second);
        }
    }

    SHIKE_DEVICE void set(const float (&values)[V]) {
        SHIKE_UNROLL
        for (int i = 0; i < V; i += kType == DType::kFloat32 ? 1 : 2) {
            const float second = V > 1 ? values[(i + 1) % V] : 0;
            if constexpr (kType == DType::kFloat32) words[i] = bits_of(values[i]);
            if constexpr (kType == DType::kBFloat16) words[i / 2] = narrow_to_bfloat16(values[i], second);
            if constexpr (kType == DType::kFloat16) words[i / 2] = narrow_to_float16(values[i], second);
        }
    }
};

}  // namespace
}  // namespace shike
