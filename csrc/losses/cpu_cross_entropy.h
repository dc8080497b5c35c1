// Cross-entropy on the CPU: one expert after the other. The SIMD lanes are streams of classes that share their pivot
// and are added up at the end of the row. Logits and biases of minus infinity are legal: such a class has p = 0.
#pragma once

#include <algorithm>

#include "common/grid.h"
#include "common/simd.h"  // before row_gradient.h
//
#include "losses/cpu_tile.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

// The exponentials of one tile, from the forward to the backward.
template <class T>
struct SoftmaxTile {
    Vector<T> e[kTile];  // exp(z - pivot)
    T pivot;
};

// Logits plus bias of one expert, one tile.
template <class T>
void load_biased(const CrossEntropyCall& call, int k, std::int64_t b, std::int64_t c, int count, Vector<T>* tile) {
    load_tile<T>(call.logits.dtype, call.logits.expert[k], b, c, count, tile, 1, T(kAbsent));
    if (call.bias == nullptr) return;
    Vector<T> bias[kTile];
    const Matrix from{const_cast<void*>(call.bias), call.bias_stride, 1};
    load_as<T, T>(from, k, c, count, bias, 1, T(0));
    for (int i = 0; i * kLanes<T> < count; ++i) tile[i] += bias[i];
}

// One row of one expert. The tiles are kept where there is room for them, one after the other or each in the place of
// the former.
template <class T>
SoftmaxState<T> softmax_row(const CrossEntropyCall& call, int k, std::int64_t b, T& z_y, SoftmaxTile<T>* tiles,
                            bool keep) {
    using V = Vector<T>;
    constexpr int kStep = kTile * kLanes<T>;
    const std::int64_t classes = call.logits.classes, y = call.target.data[b * call.target.stride];
    const bool smoothing = call.label_smoothing != 0;
    V z[kTile], sum{}, linear{};
    T pivot = T(kFloor);
    for (std::int64_t c = 0; c < classes; c += kStep) {
        const int count = smaller(classes - c, kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        load_biased<T>(call, k, b, c, count, z);
        if (c <= y && y < c + count) z_y = z[(y - c) / kLanes<T>][(y - c) % kLanes<T>];
        V next = V{} + pivot;
        for (int i = 0; i < n; ++i) next = larger(next, z[i]);
        next = in_step(next);
        if (c > 0) {
            const V move = V{} + pivot - next;
            sum *= exponential(move);
            if (smoothing) linear += move * T(c / kLanes<T>);  // each lane has seen so many classes
        }
        pivot = tiles->pivot = next[0];
        V new_sum{};
        for (int i = 0; i < n; ++i) {
            const V x = z[i] - next, e = exponential(x);
            tiles->e[i] = e;
            new_sum += e;
            if (smoothing) linear += lane_numbers<T>() + T(i * kLanes<T>) < T(count) ? x : V{};
        }
        sum += new_sum;
        if (keep) ++tiles;
    }
    return {pivot, lane_sum<T>(sum), lane_sum<T>(linear), T(classes)};
}

// The forward of up to kLanes rows of one expert, which end together.
template <class T>
void softmax_rows(const CrossEntropyCall& call, int k, std::int64_t first, int rows, double* terms, T* pivots,
                  T* scales, SoftmaxTile<T>* tiles, std::int64_t tiles_of_row) {
    using V = Vector<T>;
    SoftmaxState<V> states{V{}, all<V>(1), V{}, V{}};
    V z_y{};
    for (int lane = 0; lane < rows; ++lane) {
        T row_z_y = 0;
        set_lane<T>(states, lane, softmax_row<T>(call, k, first + lane, row_z_y, tiles + lane * tiles_of_row,
                                                 tiles_of_row > 0));
        set_lane<T>(z_y, lane, row_z_y);
    }
    const V scale = 1 / states.sum;
    const V of_rows = finish(states, z_y, T(call.label_smoothing), T(call.logits.classes));
    for (int lane = 0; lane < rows; ++lane) {
        pivots[lane] = states.pivot[lane];
        scales[lane] = scale[lane];
        terms[first + lane] += double(of_rows[lane]);
    }
}

// What multiplies the gradient of a call.
template <class T>
struct SoftmaxScales {
    T everything, everywhere, at_target;

    SoftmaxScales(const CrossEntropyCall& call, double grad_output)
        : everything(T(grad_output / double(call.logits.batch))),
          everywhere(everything * T(call.label_smoothing / double(call.logits.classes))),
          at_target(everything * T(1 - call.label_smoothing)) {}
};

// The gradient of one row of one expert, p = exp(z - pivot) / sum. `kept`: the exponentials of the forward, or null.
template <class T>
void softmax_gradient(const CrossEntropyCall& call, const Experts& gradient, const SoftmaxScales<T>& scales, int k,
                      std::int64_t b, T pivot, T inverse_sum, const SoftmaxTile<T>* kept) {
    using V = Vector<T>;
    constexpr int kStep = kTile * kLanes<T>;
    const std::int64_t classes = call.logits.classes, y = call.target.data[b * call.target.stride];
    const T p_scale = scales.everything * inverse_sum;
    V tile[kTile];
    for (std::int64_t c = 0; c < classes; c += kStep) {
        const int count = smaller(classes - c, kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        if (kept == nullptr) {
            load_biased<T>(call, k, b, c, count, tile);
            for (int i = 0; i < n; ++i) tile[i] = p_scale * exponential(tile[i] - pivot) - scales.everywhere;
        } else {
            V of_tile = V{} + p_scale;  // later tiles may have moved the pivot
            if (classes > kStep) of_tile *= exponential(V{} + kept->pivot - pivot);
            for (int i = 0; i < n; ++i) tile[i] = of_tile * kept->e[i] - scales.everywhere;
            ++kept;
        }
        if (c <= y && y < c + count) tile[(y - c) / kLanes<T>][(y - c) % kLanes<T>] -= scales.at_target;
        store_tile<T>(gradient.dtype, gradient.expert[k], b, c, count, tile, 1);
    }
}

template <class T>
void cross_entropy_forward(const CrossEntropyCall& call, double* terms, std::int64_t first_row,
                           std::int64_t last_row) {
    const int experts = call.logits.count;
    SoftmaxTile<T> tile;
    T pivots[kLanes<T>], scales[kLanes<T>];
    for (std::int64_t first = first_row; first < last_row; first += kLanes<T>) {
        const int rows = smaller(last_row - first, kLanes<T>);
        std::fill(terms + first, terms + first + rows, 0.0);
        for (int k = 0; k < experts; ++k) {
            softmax_rows<T>(call, k, first, rows, terms, pivots, scales, &tile, 0);
            for (int row = 0; row < rows; ++row) {
                T* saved = static_cast<T*>(call.saved) + (first + row) * 2 * experts + k;
                saved[0] = pivots[row];
                saved[experts] = scales[row];
            }
        }
    }
}

template <class T>
void cross_entropy_backward(const CrossEntropyCall& call, const Experts& gradient, double grad_output,
                            std::int64_t first_row, std::int64_t last_row) {
    const int experts = call.logits.count;
    const SoftmaxScales<T> scales(call, grad_output);
    for (std::int64_t b = first_row; b < last_row; ++b) {
        const T* saved = static_cast<const T*>(call.saved) + b * 2 * experts;
        for (int k = 0; k < experts; ++k) {
            softmax_gradient<T>(call, gradient, scales, k, b, saved[k], saved[experts + k], nullptr);
        }
    }
}

// Forward and backward of some rows after the other.
template <class T>
void cross_entropy_both(const CrossEntropyCall& call, const Experts& gradient, double* terms, std::int64_t first_row,
                        std::int64_t last_row) {
    const SoftmaxScales<T> scales(call, 1);
    const KeptTiles<T, SoftmaxTile<T>> kept(call.logits.classes);
    T pivots[kLanes<T>], inverse_sums[kLanes<T>];
    for (std::int64_t first = first_row; first < last_row; first += kept.rows) {
        const int rows = smaller(last_row - first, kept.rows);
        std::fill(terms + first, terms + first + rows, 0.0);
        for (int k = 0; k < call.logits.count; ++k) {
            softmax_rows<T>(call, k, first, rows, terms, pivots, inverse_sums, kept.tiles.get(), kept.of_row);
            for (int row = 0; row < rows; ++row) {
                softmax_gradient<T>(call, gradient, scales, k, first + row, pivots[row], inverse_sums[row],
                                    kept.of(row));
            }
        }
    }
}

}  // namespace
}  // namespace shike
