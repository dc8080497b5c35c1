// Rows of logits and gradients in device memory, as chunks of classes in registers.
//
// float32 is a parameter of the templates, because its chunks have fewer classes. Whether two bytes are a bfloat16 or a
// float16, and the alignment, are branches that all threads of a row take alike.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/words.h"
#include "losses/cuda_plan.h"
#include "losses/call.h"

namespace shike {
namespace {

// How chunks that no end of the row cuts are accessed.
enum class Access : int {
    kWide,     // one packet of 16 bytes (8 for more than four experts of two bytes) an expert
    kShifted,  // the same, but experts are misaligned to each other: two packets, of which parts are taken
    kEach      // element by element: other strides
};

// The same row of K experts, in chunks of N classes.
template <int K, bool kFloat, int kChunk = chunk_of(K, kFloat)>
struct Rows {
    static constexpr int N = kChunk;
    static constexpr int kBytes = kFloat ? 4 : 2;    // of an element
    static constexpr unsigned kPacket = N * kBytes;  // bytes of a chunk
    static constexpr int kWords = kPacket / 4;
    using Words = std::uint32_t[K][kWords];

    char* row[K];
    const Matrix* expert;
    int classes;
    int shift;         // distance of the first logit from the boundary that chunks start at
    bool half;         // float16
    Access access;
    int first, last;   // chunks from first to last are read in packets

    __device__ Rows(const Matrix* matrices, DType dtype, std::int64_t b, std::int64_t batch, int class_count)
        : expert(matrices), classes(class_count), half(dtype == DType::kFloat16) {
        bool contiguous = true, packed = true;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            row[k] = static_cast<char*>(expert[k].data) + b * expert[k].row_stride * kBytes;
            contiguous &= expert[k].class_stride == 1;
            packed &= expert[k].row_stride == classes;
        }
        align(contiguous, contiguous ? int(reinterpret_cast<std::uintptr_t>(row[0]) % kSector) / kBytes : 0);
        // Packets that an end of the row cuts may reach into other rows, where these are next to it and not too few.
        const bool before = packed && b * classes >= N - 1, behind = packed && (batch - 1 - b) * classes >= N - 1;
        first = access == Access::kShifted ? N : before ? 1 - N : 0;
        last = access == Access::kShifted ? classes - 2 * N : behind ? classes - 1 : classes - N;
        keep_in_registers();
    }

    // For rows that are written in the chunks of other rows.
    __device__ void in_chunks_of(const Rows& other) {
        align(access != Access::kEach, other.shift);
        keep_in_registers();
    }

    // Whether a chunk, and `margin` classes on either side, lie in the row.
    __device__ bool inside(int c, int margin = 0) const { return c >= margin && c <= classes - N - margin; }
    // Whether a chunk can be read with this access.
    __device__ bool reads(Access with, int c) const { return access == with && c >= first && c <= last; }

    __device__ float load_one(int k, int c) const { return as_float(load_bits(row[k] + std::int64_t(c) * step(k), true)); }

    __device__ void store_one(int k, int c, float value) const {
        store_bits(row[k] + std::int64_t(c) * step(k), as_bits(value), true);
    }

    // The words of the classes c ... c + N - 1; what lies outside the row is undefined.
    __device__ __forceinline__ void fetch(int c, Words& words) const {
#pragma unroll
        for (int k = 0; k < K; ++k) load_words(row[k] + std::int64_t(c) * kBytes, words[k]);
    }
    __device__ __forceinline__ void fetch_shifted(int c, Words& words) const {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const char* from = row[k] + std::int64_t(c) * kBytes;
            const unsigned bytes = misaligned(from);
            std::uint32_t low[kWords], high[kWords] = {}, both[2 * kWords];
            load_words(from - bytes, low);
            if (bytes != 0) load_words(from - bytes + kPacket, high);
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                both[i] = low[i];
                both[kWords + i] = high[i];
            }
            shift_words<kWords, !kFloat>(both, bytes, words[k]);
        }
    }

    __device__ __forceinline__ void widen(const Words& words, float (&z)[N][K]) const {
        if constexpr (kFloat) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
#pragma unroll
                for (int k = 0; k < K; ++k) z[i][k] = __uint_as_float(words[k][i]);
            }
        } else if (half) {
#pragma unroll
            for (int i = 0; i < N; i += 2) {
#pragma unroll
                for (int k = 0; k < K; ++k) widen_float16(words[k][i / 2], z[i][k], z[i + 1][k]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; i += 2) {
#pragma unroll
                for (int k = 0; k < K; ++k) widen_bfloat16(words[k][i / 2], z[i][k], z[i + 1][k]);
            }
        }
    }

    // The same for any c, element by element.
    __device__ __forceinline__ void fetch_each(int c, Words& words) const {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const std::int64_t bytes = step(k);
            const char* from = row[k] + c * bytes;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const std::uint32_t bits = load_bits(from, unsigned(c + i) < unsigned(classes));
                std::uint32_t& word = words[k][i * kBytes / 4];
                word = kFloat || i % 2 == 0 ? bits : word | bits << 16;
                from += bytes;
            }
        }
    }

    __device__ __forceinline__ void store(int c, const float (&z)[N][K]) const {
        Words words;
        if constexpr (kFloat) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < N; ++i) words[k][i] = __float_as_uint(z[i][k]);
            }
        } else if (half) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < N; i += 2) words[k][i / 2] = narrow_to_float16(z[i][k], z[i + 1][k]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < K; ++k) {
#pragma unroll
                for (int i = 0; i < N; i += 2) words[k][i / 2] = narrow_to_bfloat16(z[i][k], z[i + 1][k]);
            }
        }
        if (access == Access::kEach || !inside(c)) {
            store_each(c, words);
        } else if (access == Access::kWide) {
#pragma unroll
            for (int k = 0; k < K; ++k) store_words(row[k] + std::int64_t(c) * kBytes, words[k]);
        } else {
#pragma unroll
            for (int k = 0; k < K; ++k) store_shifted(row[k] + std::int64_t(c) * kBytes, words[k]);
        }
    }

private:
    __device__ static unsigned misaligned(const char* address) {
        return unsigned(reinterpret_cast<std::uintptr_t>(address)) & (kPacket - 1);
    }

    __device__ void align(bool contiguous, int boundary) {
        shift = boundary;
        bool aligned = true;
#pragma unroll
        for (int k = 0; k < K; ++k) aligned &= misaligned(row[k] - boundary * kBytes) == 0;
        access = !contiguous ? Access::kEach : aligned ? Access::kWide : Access::kShifted;
    }

    // Opaque to the compiler, which would rather compute this again for each chunk.
    __device__ void keep_in_registers() {
#pragma unroll
        for (int k = 0; k < K; ++k) asm volatile("" : "+l"(row[k]));
        int opaque = int(access);
        asm volatile("" : "+r"(opaque));
        access = Access(opaque);
    }

    // From class to class, read anew each time: the compiler would keep it in registers for accesses of single elements,
    // which are rare.
    __device__ std::int64_t step(int k) const {
        int none;
        asm volatile("mov.u32 %0, 0;" : "=r"(none));
        return expert[k + none].class_stride * kBytes;
    }

    __device__ float as_float(std::uint32_t bits) const {
        if (kFloat) return __uint_as_float(bits);
        float wide = __uint_as_float(bits << 16), none;
        if (half) widen_float16(bits, wide, none);
        return wide;
    }

    __device__ std::uint32_t as_bits(float value) const {
        if (kFloat) return __float_as_uint(value);
        return half ? narrow_to_float16(value, 0) : narrow_to_bfloat16(value, 0);
    }

    // Elements one by one are predicated: branches would make the accesses of a chunk wait for each other.
    __device__ __forceinline__ std::uint32_t load_bits(const char* from, bool present) const {
        std::uint32_t bits = 0;
        if constexpr (kFloat) {
            asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
                : "+r"(bits)
                : "l"(from), "r"(int(present)));
        } else {
            asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u16 %0, [%1]; }"
                : "+r"(bits)
                : "l"(from), "r"(int(present)));
        }
        return bits;
    }

    __device__ __forceinline__ void store_bits(char* to, std::uint32_t bits, bool present) const {
        if constexpr (kFloat) {
            asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u32 [%0], %1; }" ::"l"(to), "r"(bits),
                         "r"(int(present))
                         : "memory");
        } else {
            asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u16 [%0], %1; }" ::"l"(to), "r"(bits),
                         "r"(int(present))
                         : "memory");
        }
    }

    // A chunk that begins between two packets.
    __device__ __forceinline__ void store_shifted(char* to, const std::uint32_t (&words)[kWords]) const {
        if (kFloat || (misaligned(to) & 2u) == 0) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                asm volatile("st.global.u32 [%0], %1;" ::"l"(to + 4 * i), "r"(words[i]) : "memory");
            }
            return;
        }
        asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
#pragma unroll
        for (int i = 1; i < kWords; ++i) {
            asm volatile("st.global.u32 [%0], %1;" ::"l"(to + 4 * i - 2), "r"(__funnelshift_r(words[i - 1], words[i], 16))
                         : "memory");
        }
        asm volatile("st.global.u16 [%0], %1;" ::"l"(to + 4 * kWords - 2), "r"(words[kWords - 1] >> 16) : "memory");
    }

    // Any chunk, element by element; pairs of two-byte elements in one access where they begin at a multiple of 4 bytes.
    __device__ __forceinline__ void store_each(int c, const Words& words) const {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const std::int64_t bytes = step(k);
            char* to = row[k] + c * bytes;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const std::uint32_t word = words[k][i * kBytes / 4];
                bool present = unsigned(c + i) < unsigned(classes);
                if (!kFloat) {
                    const bool pair = access == Access::kWide && unsigned(c + i / 2 * 2) < unsigned(classes) &&
                                      unsigned(c + i / 2 * 2 + 1) < unsigned(classes);
                    if (i % 2 == 0 && pair) asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
                    present &= !pair;
                }
                store_bits(to, kFloat || i % 2 == 0 ? word : word >> 16, present);
                to += bytes;
            }
        }
    }
};

// Calls work(c, z) for the chunks of a thread, in ascending order, and before that keep(words, c). The words of the next
// kAhead chunks are under way while one chunk is worked on. Classes outside the row are undefined.
template <int kAhead, int K, bool kFloat, int N, class Keep, class Work>
__device__ __forceinline__ void for_chunks(const Rows<K, kFloat, N>& rows, int first, int stride, Keep keep,
                                           Work work) {
    typename Rows<K, kFloat, N>::Words words[kAhead];
    bool under_way[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        under_way[i] = rows.reads(Access::kWide, first + i * stride);
        if (under_way[i]) rows.fetch(first + i * stride, words[i]);
    }
#pragma unroll 1
    for (int round = first; round < rows.classes; round += kAhead * stride) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int c = round + i * stride;
            if (i > 0 && c >= rows.classes) break;
            float z[N][K];
            if (!under_way[i]) {
                if (rows.reads(Access::kShifted, c)) {
                    rows.fetch_shifted(c, words[i]);
                } else {
                    rows.fetch_each(c, words[i]);
                }
            }
            keep(words[i], c);
            rows.widen(words[i], z);
            const int next = c + kAhead * stride;
            under_way[i] = rows.reads(Access::kWide, next);
            if (under_way[i]) rows.fetch(next, words[i]);
            work(c, z);
        }
    }
}

struct KeepNothing {
    template <class Words>
    __device__ void operator()(const Words&, int) const {}
};

}  // namespace
}  // namespace shike
