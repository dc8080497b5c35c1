// What the calls of all operators share.
#pragma once

namespace shike {

constexpr int kMaxExperts = 8;

// Of the tensors. Arithmetic and state are float64 for float64 tensors, else float32: the accumulation dtype.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

}  // namespace shike
