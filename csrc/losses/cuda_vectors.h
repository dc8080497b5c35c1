// What is read besides the logits of a row, four classes at a time: numbers of the classes, a teacher's logits, a mask.
// These begin at other boundaries than the logits' chunks, so that four classes are a part of two packets.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/words.h"
#include "losses/call.h"

namespace shike {
namespace {

// Whether the packets that the classes c ... c + 3 are a part of lie in the row.
SHIKE_DEVICE bool in_packets(int c, int classes, bool aligned) {
    const int margin = aligned ? 0 : 4;
    return c >= margin && c <= classes - 4 - margin;
}

// How far an address lies above a boundary.
template <unsigned kBytes>
SHIKE_DEVICE unsigned bytes_above(const char* address) {
    return unsigned(reinterpret_cast<std::uintptr_t>(address)) & (kBytes - 1);
}

// Predicated, for branches would make the loads of a chunk wait for each other.
SHIKE_DEVICE std::uint32_t load_word_if(bool present, const char* from) {
    std::uint32_t word = 0;
    asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
        : "+r"(word)
        : "l"(from), "r"(int(present)));
    return word;
}

SHIKE_DEVICE std::uint32_t load_half_if(bool present, const char* from) {
    std::uint32_t bits = 0;
    asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u16 %0, [%1]; }"
        : "+r"(bits)
        : "l"(from), "r"(int(present)));
    return bits;
}

// Unlike larger(), NaN where `a` is NaN.
SHIKE_DEVICE float at_least(float a, float least) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(least));
    return result;
}

SHIKE_DEVICE bool in_row(int c, int classes) { return unsigned(c) < unsigned(classes); }

SHIKE_DEVICE float load_one_if(bool present, const float* from) {
    return __uint_as_float(load_word_if(present, reinterpret_cast<const char*>(from)));
}

// Of float32 [C]; 0 outside.
SHIKE_DEVICE void load_four(const float* row, int c, int classes, float (&values)[4]) {
    const char* at = reinterpret_cast<const char*>(row) + std::int64_t(c) * 4;
    const unsigned bytes = bytes_above<16>(at);
    std::uint32_t words[4];
    if (in_packets(c, classes, bytes == 0)) {
        std::uint32_t low[4], high[4] = {}, both[8];
        load_words(at - bytes, low);
        if (bytes != 0) load_words(at - bytes + 16, high);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            both[i] = low[i];
            both[4 + i] = high[i];
        }
        shift_words<4, false>(both, bytes, words);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = load_word_if(in_row(c + i, classes), at + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(words[i]);
}

SHIKE_DEVICE void widen(std::uint32_t pair, DType dtype, float& low, float& high) {
    if (dtype == DType::kBFloat16) {
        widen_bfloat16(pair, low, high);
    } else {
        widen_float16(pair, low, high);
    }
}

// Of a row of any dtype; 0 outside.
SHIKE_DEVICE void load_four(const char* row, DType dtype, std::int64_t class_stride, int c, int classes,
                            float (&values)[4]) {
    if (dtype == DType::kFloat32 && class_stride == 1) {
        load_four(reinterpret_cast<const float*>(row), c, classes, values);
        return;
    }
    const int size = dtype == DType::kFloat32 ? 4 : 2;
    const char* at = row + std::int64_t(c) * class_stride * size;
    const unsigned bytes = bytes_above<8>(at);
    if (class_stride == 1 && in_packets(c, classes, bytes == 0)) {
        std::uint32_t low[2], high[2] = {}, words[2];
        load_words(at - bytes, low);
        if (bytes != 0) load_words(at - bytes + 8, high);
        std::uint32_t both[4] = {low[0], low[1], high[0], high[1]};
        shift_words<2, true>(both, bytes, words);
        widen(words[0], dtype, values[0], values[1]);
        widen(words[1], dtype, values[2], values[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool present = in_row(c + i, classes);
        const char* from = at + i * class_stride * size;
        float none;
        if (size == 4) {
            values[i] = __uint_as_float(load_word_if(present, from));
        } else {
            widen(load_half_if(present, from), dtype, values[i], none);
        }
    }
}

// Of bytes [C], byte i that of class c + i; 0 outside.
SHIKE_DEVICE std::uint32_t load_four(const unsigned char* row, int c, int classes) {
    const char* at = reinterpret_cast<const char*>(row) + c;
    const unsigned bytes = bytes_above<4>(at);
    if (in_packets(c, classes, bytes == 0)) {
        const auto* packet = reinterpret_cast<const unsigned*>(at - bytes);
        const unsigned low = __ldg(packet), high = bytes == 0 ? 0 : __ldg(packet + 1);
        return __funnelshift_r(low, high, bytes * 8);
    }
    std::uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (in_row(c + i, classes)) word |= std::uint32_t(__ldg(row + c + i)) << (8 * i);
    }
    return word;
}

// One element.
SHIKE_DEVICE float load_one(const char* row, DType dtype, std::int64_t class_stride, std::int64_t c) {
    if (dtype == DType::kFloat32) return __ldg(reinterpret_cast<const float*>(row) + c * class_stride);
    float value, none;
    widen(__ldg(reinterpret_cast<const unsigned short*>(row) + c * class_stride), dtype, value, none);
    return value;
}

}  // namespace
}  // namespace shike
