// What a call of depth-wise knowledge fusion consists of, for the CPU and the CUDA kernels. No pointer is owned here.
//
//   f[k, b, c] = 1/(H W) sum_hw D_k A_k
//   D = deep                                        or, where there is a shortcut, relu(gamma' y_hat + beta' + shortcut)
//   A = shallow, gamma x_hat + beta, or its ReLU    with y = deep, x = shallow, x_hat = (x - mean_c) rstd_c
//
// docs/kernels.md derives the sums and gradients.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace shike {

// [B, C, H, W]; strides in elements.
struct FeatureMap {
    void* data;
    std::int64_t b, c, h, w;
};

struct MapShape {
    std::int64_t batch, channels, height, width;
    DType dtype;

    std::int64_t positions() const { return height * width; }
    std::int64_t values() const { return batch * positions(); }  // of a channel: N
};

// A BatchNorm; all vectors [C], contiguous, in the accumulation dtype.
struct BatchNorm {
    const void* weight;  // gamma; null: 1
    const void* bias;    // beta; null: 0
    void* running_mean;  // updated by a training forward; null: not kept
    void* running_var;
    double momentum;
    double eps;
};

struct ExpertFusion {
    FeatureMap deep, shallow, shortcut;  // shortcut: only where Fusion::folded
    BatchNorm norm, deep_norm;       // of the shallow map (where Fusion::normalised); of the deep one (where folded)
    bool relu;                           // of the normalised shallow map
};

struct Fusion {
    ExpertFusion expert[kMaxExperts];
    int count;  // K
    MapShape shape;
    bool normalised;  // the shallow maps pass through a BatchNorm
    bool folded;      // so do the deep ones, and a shortcut is added and ReLU applied; only where normalised

    int norms() const { return normalised ? (folded ? 2 * count : count) : 0; }  // n
    int sums() const { return normalised ? (folded ? 4 : 2) : 0; }               // S
};

// What is saved for the backward, in the accumulation dtype, contiguous; norms in the order shallow 0 ... K - 1, then
// deep 0 ... K - 1.
struct FusionSaved {
    void* sums;         // [K, S, B, C]: M1 = sum m D x_hat, M2 = sum m D, P1 = sum m' A y_hat, P2 = sum m' A over (h, w)
    void* mean_rstd;  // [n, 3, C]: the mean's leading part, the rest of the mean, 1 / sqrt(var + eps)
};

// The gradients of an expert's maps; shapes and dtypes are the maps', strides their own.
struct ExpertGradient {
    FeatureMap deep, shallow, shortcut;
};

struct FusionGradient {
    const void* grad_output;  // d(loss)/d(f): [K, B, C], contiguous, the maps' dtype
    ExpertGradient expert[kMaxExperts];
    const void* vectors;   // [n, 2, C]: d(weight), d(bias); of all processes where statistics are synchronised
    double inverse_count;  // 1 / N, N of all processes where statistics are synchronised; 0: constant statistics
};

// Maps whose statistics are asked for.
struct MapList {
    FeatureMap map[2 * kMaxExperts];
    int count;
    MapShape shape;
};

}  // namespace shike
