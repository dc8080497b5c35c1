// The CPU kernels of the expert losses, compiled once for each instruction set. The SIMD lanes are streams of classes
// (see row_state.h) that share their pivots and are added up at the end of the row.
#include "losses/cpu_kernels.h"

#include <array>
#include <utility>

#include "common/cpu_level.h"
#include "common/grid.h"
#include "common/simd.h"  // before row_gradient.h
//
#include "losses/cpu_tile.h"
#include "losses/options.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

// Ends the streams of a row: one state from lanes that share their pivots.
template <class T, int K>
DktState<T, K> joined(const DktState<Vector<T>, K>& lanes, bool hardest_term) {
    using V = Vector<T>;
    DktState<T, K> state;
    state.clear();
    for (int k = 0; k < K; ++k) {
        state.pivot[k] = lanes.pivot[k][0];
        state.sum[k] = lane_sum<T>(lanes.sum[k]);
        state.cross[k] = lane_sum<T>(lanes.cross[k]);
    }
    if (!hardest_term) return state;
    const Candidate<V>& candidates = lanes.hardest;
    const T total = lane_maximum<T>(candidates.total);
    const V lowest_first = candidates.total == total ? -candidates.number : all<V>(-2 * kNoClass);
    const T number = -lane_maximum<T>(lowest_first);
    const auto wins = (candidates.total == total) & (candidates.number == number);
    state.hardest = {total, 0, 0, number};  // the finish needs no more of it
    // The other lanes' candidates join the teacher's sums.
    const V strongest = wins ? all<V>(kAbsent) : candidates.strongest;
    state.teacher_pivot = larger(lanes.teacher_pivot[0], lane_maximum<T>(strongest));
    const V weight = exponential(strongest - state.teacher_pivot);
    const V factor = exponential(lanes.teacher_pivot - state.teacher_pivot);
    state.teacher_sum = lane_sum<T>(lanes.teacher_sum * factor + weight);
    state.teacher_gap = lane_sum<T>(lanes.teacher_gap * factor + weight * candidates.gap);
    return state;
}

template <class T>
SoftmaxState<T> joined(const SoftmaxState<Vector<T>>& lanes) {
    return {lanes.pivot[0], lane_sum<T>(lanes.sum), lane_sum<T>(lanes.linear), lane_sum<T>(lanes.count)};
}

// Several rows' numbers, one row a lane.
template <class OfLanes, class OfRow, class T>
void set_lane(OfLanes& lanes, int lane, const OfRow& row) {
    constexpr std::size_t kCount = sizeof(OfRow) / sizeof(T);
    static_assert(sizeof(OfLanes) == kCount * sizeof(Vector<T>), "the same members");
    for (std::size_t i = 0; i < kCount; ++i) {
        std::memcpy(reinterpret_cast<char*>(&lanes) + (i * kLanes<T> + std::size_t(lane)) * sizeof(T),
                    reinterpret_cast<const char*>(&row) + i * sizeof(T), sizeof(T));
    }
}

template <class OfRow, class OfLanes, class T>
void get_lane(const OfLanes& lanes, int lane, OfRow& row) {
    constexpr std::size_t kCount = sizeof(OfRow) / sizeof(T);
    static_assert(sizeof(OfLanes) == kCount * sizeof(Vector<T>), "the same members");
    for (std::size_t i = 0; i < kCount; ++i) {
        std::memcpy(reinterpret_cast<char*>(&row) + i * sizeof(T),
                    reinterpret_cast<const char*>(&lanes) + (i * kLanes<T> + std::size_t(lane)) * sizeof(T), sizeof(T));
    }
}

// One row's state; z_y and z_h become its logits at the target and at the hardest negative.
template <class T, int K>
DktState<T, K> dkt_row(const DktCall& call, const DktOptions<T>& options, std::int64_t b, T (&z_y)[K], T (&z_h)[K]) {
    using V = Vector<T>;
    const std::int64_t classes = call.logits.classes;
    const std::int64_t y = call.target.data[b * call.target.stride];
    constexpr int kStep = kTile * kLanes<T>;
    V tile[kTile][K];
    DktState<V, K> lanes;
    lanes.clear();
    for (std::int64_t c = 0; c < classes; c += kStep) {
        const int count = smaller(classes - c, kStep);
        for (int k = 0; k < K; ++k) {
            load_tile<T>(call.logits.dtype, call.logits.expert[k], b, c, count, &tile[0][k], K, T(kAbsent));
        }
        if (c <= y && y < c + count) {
            const int i = int(y - c) / kLanes<T>, lane = int(y - c) % kLanes<T>;
            for (int k = 0; k < K; ++k) {
                z_y[k] = tile[i][k][lane];
                tile[i][k][lane] = T(kAbsent);
            }
        }
        lanes.add(tile, lane_numbers<T>() + T(c), float(kLanes<T>), options.hardest_term, options.mutual_term,
                  (count + kLanes<T> - 1) / kLanes<T>);
    }
    const DktState<T, K> state = joined<T, K>(lanes, options.hardest_term);
    if (state.hardest.number < T(classes)) {  // not so where the term is off, or NaN logits left no candidate
        for (int k = 0; k < K; ++k) {
            z_h[k] = load_one<T>(call.logits.dtype, call.logits.expert[k], b, std::int64_t(state.hardest.number));
        }
    }
    return state;
}

template <class T, int K>
void dkt_forward_rows(const DktCall& call, double* terms, std::int64_t first_row, std::int64_t last_row) {
    using V = Vector<T>;
    const DktOptions<T> options = with_factors(options_of<T>(call), call);
    for (std::int64_t first = first_row; first < last_row; first += kLanes<T>) {
        const int rows = smaller(last_row - first, kLanes<T>);
        DktState<V, K> states;  // logarithms cost as much for all lanes as for one: so the rows end together
        states.clear();
        V z_y[K] = {}, z_h[K] = {};
        for (int lane = 0; lane < rows; ++lane) {
            T row_z_y[K] = {}, row_z_h[K] = {};
            const DktState<T, K> state = dkt_row<T, K>(call, options, first + lane, row_z_y, row_z_h);
            set_lane<DktState<V, K>, DktState<T, K>, T>(states, lane, state);
            set_lane<V[K], T[K], T>(z_y, lane, row_z_y);
            set_lane<V[K], T[K], T>(z_h, lane, row_z_h);
        }
        DktSaved<V, K> saved;
        const DktTerms<V> row_terms = finish(states, z_y, z_h, options, saved);
        for (int lane = 0; lane < rows; ++lane) {
            get_lane<DktSaved<T, K>, DktSaved<V, K>, T>(saved, lane, static_cast<DktSaved<T, K>*>(call.saved)[first + lane]);
            double* of_row = terms + 3 * (first + lane);
            of_row[0] = double(row_terms.cross_entropy[lane]);
            of_row[1] = double(row_terms.hardest[lane]);
            of_row[2] = double(row_terms.mutual[lane]);
        }
    }
}

template <class T, int K>
void dkt_backward_rows(const DktCall& call, const Experts& gradient, double grad_output, std::int64_t first_row,
                       std::int64_t last_row) {
    using V = Vector<T>;
    const DktOptions<T> options = with_factors(options_of<T>(call), call);
    const std::int64_t classes = call.logits.classes;
    constexpr int kStep = kTile * kLanes<T>;
    V tile[kTile][K];
    for (std::int64_t b = first_row; b < last_row; ++b) {
        const std::int64_t y = call.target.data[b * call.target.stride];
        const DktSaved<T, K>& saved = static_cast<const DktSaved<T, K>*>(call.saved)[b];
        const std::int64_t h = std::int64_t(saved.hardest);
        const auto row = DktGradient<V, K>::of(saved, options, T(grad_output));
        for (std::int64_t c = 0; c < classes; c += kStep) {
            const int count = smaller(classes - c, kStep);
            for (int k = 0; k < K; ++k) {
                load_tile<T>(call.logits.dtype, call.logits.expert[k], b, c, count, &tile[0][k], K, T(kAbsent));
            }
            const bool has_hardest = c <= h && h < c + count;
            V at_hardest[K] = {};  // in every lane: the exponential of a vector is as fast as that of a number
            if (has_hardest) {
                for (int k = 0; k < K; ++k) at_hardest[k] += tile[(h - c) / kLanes<T>][k][(h - c) % kLanes<T>];
                row.apply_at_hardest(at_hardest, options.mutual_term);
            }
            for (int i = 0; i * kLanes<T> < count; ++i) row.apply(tile[i], options.hardest_term, options.mutual_term);
            if (has_hardest) {
                for (int k = 0; k < K; ++k) tile[(h - c) / kLanes<T>][k][(h - c) % kLanes<T>] = at_hardest[k][0];
            }
            if (c <= y && y < c + count) {
                for (int k = 0; k < K; ++k) {
                    tile[(y - c) / kLanes<T>][k][(y - c) % kLanes<T>] = T(grad_output) * saved.target_gradient[k];
                }
            }
            for (int k = 0; k < K; ++k) {
                store_tile<T>(gradient.dtype, gradient.expert[k], b, c, count, &tile[0][k], K);
            }
        }
    }
}

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

template <class T>
void cross_entropy_forward(const CrossEntropyCall& call, double* terms, std::int64_t first_row,
                                std::int64_t last_row) {
    using V = Vector<T>;
    const std::int64_t classes = call.logits.classes;
    const int experts = call.logits.count;
    const bool smoothing = call.label_smoothing != 0;
    constexpr int kStep = kTile * kLanes<T>;
    V tile[kTile];
    for (std::int64_t b = first_row; b < last_row; ++b) {
        const std::int64_t y = call.target.data[b * call.target.stride];
        T* saved = static_cast<T*>(call.saved) + b * 2 * experts;
        terms[b] = 0;
        for (int k = 0; k < experts; ++k) {
            SoftmaxState<V> lanes;
            lanes.clear();
            T z_y = 0;
            for (std::int64_t c = 0; c < classes; c += kStep) {
                const int count = smaller(classes - c, kStep);
                load_biased<T>(call, k, b, c, count, tile);
                if (c <= y && y < c + count) z_y = tile[(y - c) / kLanes<T>][(y - c) % kLanes<T>];
                lanes.add(tile, lane_numbers<T>(), float(kLanes<T>), float(count), smoothing,
                          (count + kLanes<T> - 1) / kLanes<T>);
            }
            const SoftmaxState<T> state = joined<T>(lanes);
            saved[k] = state.pivot;
            saved[experts + k] = 1 / state.sum;
            terms[b] += double(finish(state, z_y, T(call.label_smoothing), T(classes)));
        }
    }
}

template <class T>
void cross_entropy_backward(const CrossEntropyCall& call, const Experts& gradient, double grad_output,
                                 std::int64_t first_row, std::int64_t last_row) {
    using V = Vector<T>;
    const std::int64_t classes = call.logits.classes;
    const int experts = call.logits.count;
    const T scale = T(grad_output / double(call.logits.batch));
    const T everywhere = scale * T(call.label_smoothing / double(classes));
    const T at_target = scale * T(1 - call.label_smoothing);
    constexpr int kStep = kTile * kLanes<T>;
    V tile[kTile];
    for (std::int64_t b = first_row; b < last_row; ++b) {
        const std::int64_t y = call.target.data[b * call.target.stride];
        const T* saved = static_cast<const T*>(call.saved) + b * 2 * experts;
        for (int k = 0; k < experts; ++k) {
            const T pivot = saved[k], p_scale = scale * saved[experts + k];
            for (std::int64_t c = 0; c < classes; c += kStep) {
                const int count = smaller(classes - c, kStep);
                load_biased<T>(call, k, b, c, count, tile);
                for (int i = 0; i * kLanes<T> < count; ++i) {
                    tile[i] = p_scale * exponential(tile[i] - pivot) - everywhere;
                }
                if (c <= y && y < c + count) tile[(y - c) / kLanes<T>][(y - c) % kLanes<T>] -= at_target;
                store_tile<T>(gradient.dtype, gradient.expert[k], b, c, count, tile, 1);
            }
        }
    }
}

using ExpertCounts = std::make_index_sequence<kMaxExperts>;

// The instances for 1, 2, ..., kMaxExperts experts.
template <class T, std::size_t... I>
constexpr auto forward_table(std::index_sequence<I...>) {
    return std::array{&dkt_forward_rows<T, int(I) + 1>...};
}
template <class T, std::size_t... I>
constexpr auto backward_table(std::index_sequence<I...>) {
    return std::array{&dkt_backward_rows<T, int(I) + 1>...};
}

template <class T>
void dkt_forward(const DktCall& call, double* terms, std::int64_t first, std::int64_t last) {
    static constexpr auto table = forward_table<T>(ExpertCounts{});
    table[std::size_t(call.logits.count - 1)](call, terms, first, last);
}

template <class T>
void dkt_backward(const DktCall& call, const Experts& gradient, double grad_output, std::int64_t first,
                  std::int64_t last) {
    static constexpr auto table = backward_table<T>(ExpertCounts{});
    table[std::size_t(call.logits.count - 1)](call, gradient, grad_output, first, last);
}

template <class T>
constexpr LossKernels kKernels{dkt_forward<T>, dkt_backward<T>, cross_entropy_forward<T>, cross_entropy_backward<T>};

}  // namespace

template <>
const LossKernels& kernels_at<LossKernels, CpuLevel::SHIKE_CPU_LEVEL>() {
    return kKernels<float>;
}

#if SHIKE_FLOAT64
template <>
const LossKernels& float64_kernels<LossKernels>() {
    return kKernels<double>;
}
#endif

}  // namespace shike
