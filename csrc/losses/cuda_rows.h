// Rows of logits and gradients in device memory, as chunks of classes in registers.
//
// The storage type and the alignment are branches that all threads of a row take alike: templates on them would
// multiply the number of kernels, and the build time, for a few instructions a chunk.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/words.h"
#include "losses/cuda_plan.h"
#include "losses/call.h"

namespace shike {
namespace {

// How a chunk is accessed: with wide loads and stores of one type, or element by element.
enum class Access : int { kFloat32, kBFloat16, kFloat16, kEach };

// The same row of K experts, in chunks of N classes.
template <int K, int N = chunk_of(K)>
struct Rows {
    char* row[K];
    const Matrix* expert;
    DType dtype;
    int classes;
    int shift;      // distance of the first logit from the boundary that chunks start at
    Access access;  // of chunks that are not cut by the end of the row

    __device__ Rows(const Matrix* matrices, DType type, std::int64_t b, int class_count)
        : expert(matrices), dtype(type), classes(class_count) {
        const int bytes = bytes_of(dtype), below_boundary = (N * bytes < 16 ? N * bytes : 16) - 1;
        bool alike = true;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            row[k] = static_cast<char*>(expert[k].data) + b * expert[k].row_stride * bytes;
            alike &= expert[k].class_stride == 1;
            alike &= (int(reinterpret_cast<std::uintptr_t>(row[k]) ^ reinterpret_cast<std::uintptr_t>(row[0])) &
                      below_boundary) == 0;
        }
        shift = alike ? (int(reinterpret_cast<std::uintptr_t>(row[0])) & below_boundary) / bytes : 0;
        access = !alike                     ? Access::kEach
                 : dtype == DType::kFloat32 ? Access::kFloat32
                 : dtype == DType::kFloat16 ? Access::kFloat16
                                            : Access::kBFloat16;
    }

    // For rows that are written in the chunks of other rows.
    __device__ void in_chunks_of(const Rows& other) {
        if (other.access == Access::kEach || other.shift != shift) access = Access::kEach;
        // Opaque to the compiler, which would rather compute all this again for each chunk than keep it in registers.
#pragma unroll
        for (int k = 0; k < K; ++k) asm volatile("" : "+l"(row[k]));
        int opaque = int(access);
        asm volatile("" : "+r"(opaque));
        access = Access(opaque);
    }

    __device__ bool inside(int c) const { return c >= 0 && c <= classes - N; }

    __device__ float load_one(int k, int c) const {
        return as_float(load_bits(row[k] + std::int64_t(c) * step(k), true));
    }

    __device__ void store_one(int k, int c, float value) const {
        store_bits(row[k] + std::int64_t(c) * step(k), as_bits(value), true);
    }

    // The classes c ... c + N - 1. Those outside the row are 0.
    __device__ __forceinline__ void load(int c, float (&z)[N][K]) const {
        switch (inside(c) ? access : Access::kEach) {
            case Access::kBFloat16: {
                std::uint32_t words[K][N / 2];
#pragma unroll
                for (int k = 0; k < K; ++k) load_words(row[k] + std::int64_t(c) * 2, words[k]);
#pragma unroll
                for (int i = 0; i < N; i += 2) {
#pragma unroll
                    for (int k = 0; k < K; ++k) widen_bfloat16(words[k][i / 2], z[i][k], z[i + 1][k]);
                }
                break;
            }
            case Access::kFloat16: {
                std::uint32_t words[K][N / 2];
#pragma unroll
                for (int k = 0; k < K; ++k) load_words(row[k] + std::int64_t(c) * 2, words[k]);
#pragma unroll
                for (int i = 0; i < N; i += 2) {
#pragma unroll
                    for (int k = 0; k < K; ++k) widen_float16(words[k][i / 2], z[i][k], z[i + 1][k]);
                }
                break;
            }
            case Access::kFloat32: {
                std::uint32_t words[K][N];
#pragma unroll
                for (int k = 0; k < K; ++k) load_words(row[k] + std::int64_t(c) * 4, words[k]);
#pragma unroll
                for (int i = 0; i < N; ++i) {
#pragma unroll
                    for (int k = 0; k < K; ++k) z[i][k] = __uint_as_float(words[k][i]);
                }
                break;
            }
            default:
                load_each(c, z);
        }
    }

    __device__ __forceinline__ void store(int c, const float (&z)[N][K]) const {
        switch (inside(c) ? access : Access::kEach) {
            case Access::kBFloat16:
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    std::uint32_t words[N / 2];
#pragma unroll
                    for (int i = 0; i < N; i += 2) words[i / 2] = narrow_to_bfloat16(z[i][k], z[i + 1][k]);
                    store_words(row[k] + std::int64_t(c) * 2, words);
                }
                break;
            case Access::kFloat16:
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    std::uint32_t words[N / 2];
#pragma unroll
                    for (int i = 0; i < N; i += 2) words[i / 2] = narrow_to_float16(z[i][k], z[i + 1][k]);
                    store_words(row[k] + std::int64_t(c) * 2, words);
                }
                break;
            case Access::kFloat32:
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    std::uint32_t words[N];
#pragma unroll
                    for (int i = 0; i < N; ++i) words[i] = __float_as_uint(z[i][k]);
                    store_words(row[k] + std::int64_t(c) * 4, words);
                }
                break;
            default:
                store_each(c, z);
        }
    }

private:
    // From class to class. Opaque to the compiler, which would keep many multiples of it in registers for accesses of
    // single elements, which are rare.
    __device__ std::int64_t step(int k) const {
        std::int64_t bytes = expert[k].class_stride * bytes_of(dtype);
        asm volatile("" : "+l"(bytes));
        return bytes;
    }

    __device__ float as_float(std::uint32_t bits) const {
        float wide = __uint_as_float(bits), none;
        if (dtype == DType::kBFloat16) wide = __uint_as_float(bits << 16);
        if (dtype == DType::kFloat16) widen_float16(bits, wide, none);
        return wide;
    }

    __device__ std::uint32_t as_bits(float value) const {
        std::uint32_t bits = __float_as_uint(value);
        if (dtype == DType::kBFloat16) bits = narrow_to_bfloat16(value, 0);
        if (dtype == DType::kFloat16) bits = narrow_to_float16(value, 0);
        return bits;
    }

    // Elements one by one are predicated: branches would make the accesses of a chunk wait for each other.
    __device__ __forceinline__ std::uint32_t load_bits(const char* from, bool present) const {
        const bool two_bytes = dtype != DType::kFloat32;
        std::uint32_t bits = 0;
        asm("{ .reg .pred p, q; setp.ne.s32 p, %2, 0; setp.ne.s32 q, %3, 0;\n"
            "  @p ld.global.nc.u16 %0, [%1]; @q ld.global.nc.u32 %0, [%1]; }"
            : "+r"(bits)
            : "l"(from), "r"(int(present && two_bytes)), "r"(int(present && !two_bytes)));
        return bits;
    }

    __device__ __forceinline__ void store_bits(char* to, std::uint32_t bits, bool present) const {
        const bool two_bytes = dtype != DType::kFloat32;
        asm volatile(
            "{ .reg .pred p, q; setp.ne.s32 p, %2, 0; setp.ne.s32 q, %3, 0;\n"
            "  @p st.global.u16 [%0], %1; @q st.global.u32 [%0], %1; }" ::"l"(to),
            "r"(bits), "r"(int(present && two_bytes)), "r"(int(present && !two_bytes))
            : "memory");
    }

    __device__ __forceinline__ void load_each(int c, float (&z)[N][K]) const {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const std::int64_t bytes = step(k);
            const char* from = row[k] + c * bytes;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                z[i][k] = __uint_as_float(load_bits(from, unsigned(c + i) < unsigned(classes)));
                from += bytes;
            }
        }
        if (dtype == DType::kBFloat16) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
                for (int k = 0; k < K; ++k) z[i][k] = __uint_as_float(__float_as_uint(z[i][k]) << 16);
            }
        } else if (dtype == DType::kFloat16) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
                for (int k = 0; k < K; ++k) z[i][k] = as_float(__float_as_uint(z[i][k]));
            }
        }
    }

    __device__ __forceinline__ void store_each(int c, const float (&z)[N][K]) const {
        std::uint32_t bits[N][K];
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const std::uint32_t half = dtype == DType::kBFloat16 ? narrow_to_bfloat16(z[i][k], 0)
                                                                     : narrow_to_float16(z[i][k], 0);
                bits[i][k] = dtype == DType::kFloat32 ? __float_as_uint(z[i][k]) : half;
            }
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const std::int64_t bytes = step(k);
            char* to = row[k] + c * bytes;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                store_bits(to, bits[i][k], unsigned(c + i) < unsigned(classes));
                to += bytes;
            }
        }
    }
};

}  // namespace
}  // namespace shike
