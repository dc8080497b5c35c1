// Dynamic knowledge transfer on the CPU. The SIMD lanes are streams of classes that share their pivots and are added up
// at the end of the row.
#pragma once

#include <cstring>

#include "common/grid.h"
#include "common/simd.h"  // before row_gradient.h
//
#include "losses/cpu_tile.h"
#include "losses/options.h"
#include "losses/row_gradient.h"

namespace shike {
namespace {

// The teacher's weight of a class, exp(max_k z_k - pivot), is the largest of e_k exp(M_k - pivot), so it needs no
// further exponential. Where the experts' largest logits are so far above those of the teacher that weights would be
// lost, it is computed from the logits: below the sum kTeacherLost, or from the distance kTeacherFar = -log of it on.
constexpr float kTeacherLost = 0x1p-80f;
constexpr float kTeacherFar = 55;

// The exponentials of one tile, from the forward to the backward.
template <class T, int K>
struct DktTile {
    Vector<T> e[kTile][K];  // exp(z - pivot)
    Vector<T> pivot[K];
};

template <class T, int K>
void load_experts(const Experts& logits, std::int64_t b, std::int64_t c, int count, Vector<T> (&z)[kTile][K]) {
    for (int k = 0; k < K; ++k) load_tile<T>(logits.dtype, logits.expert[k], b, c, count, &z[0][k], K, T(kAbsent));
}

// One class of a tile.
template <class T, int K>
SHIKE_SIMD T number_at(const Vector<T> (&tile)[kTile][K], int k, std::int64_t position) {
    return tile[position / kLanes<T>][k][position % kLanes<T>];
}
template <class T, int K>
SHIKE_SIMD void set_at(Vector<T> (&tile)[kTile][K], int k, std::int64_t position, T value) {
    tile[position / kLanes<T>][k][position % kLanes<T>] = value;
}
template <class T, int K>
SHIKE_SIMD void leave_out(Vector<T> (&z)[kTile][K], std::int64_t position, int count) {
    if (position < 0 || position >= count) return;
    for (int k = 0; k < K; ++k) set_at<T, K>(z, k, position, T(kAbsent));
}

// max_k e_k factor_k
template <class V, int K>
SHIKE_SIMD V largest_product(const V (&e)[K], const V (&factor)[K]) {
    V result = e[0] * factor[0];
    for (int k = 1; k < K; ++k) result = larger(result, e[k] * factor[k]);
    return result;
}

// What is learnt of a row while its tiles stream by; see DktState.
template <class T, int K>
struct DktLanes {
    using V = Vector<T>;

    V pivot[K], sum[K], cross[K];
    V top;  // the largest pivot, which is the teacher's
    V teacher_sum, teacher_gap;
    T total, number, weight, gap;  // of the hardest negative so far, which the teacher's sums leave out
    T z_h[K];

    SHIKE_SIMD void clear() {
        for (int k = 0; k < K; ++k) {
            pivot[k] = all<V>(kFloor);
            sum[k] = cross[k] = V{};
            z_h[k] = 0;
        }
        top = all<V>(kFloor);
        teacher_sum = teacher_gap = V{};
        total = T(kWorst);
        number = T(kNoClass);
        weight = gap = 0;
    }

    // Adds the first n vectors of a tile that begins with class c; keeps the exponentials.
    SHIKE_SIMD void add(const V (&z)[kTile][K], int n, std::int64_t c, bool hardest_term, bool mutual_term,
                        DktTile<T, K>& kept) {
        V next[K];
        V best = all<V>(kWorst), where = all<V>(kNoClass), numbers = lane_numbers<T>() + T(c);
        for (int k = 0; k < K; ++k) next[k] = pivot[k];
        for (int i = 0; i < n; ++i) {
            for (int k = 0; k < K; ++k) next[k] = larger(next[k], z[i][k]);
            if (!hardest_term) continue;
            V of_all = z[i][0];
            for (int k = 1; k < K; ++k) of_all += z[i][k];
            const auto harder = of_all > best;  // classes come in ascending order: the lowest of several stays
            best = harder ? of_all : best;
            where = harder ? numbers : where;
            numbers += T(kLanes<T>);
        }
        for (int k = 0; k < K; ++k) next[k] = in_step(next[k]);
        move_pivots(next, c == 0, hardest_term, mutual_term);
        for (int k = 0; k < K; ++k) kept.pivot[k] = pivot[k];
        const std::int64_t hardest = hardest_term ? hardest_in(best, where, z, c) : -1;
        const std::int64_t its_vector = hardest < 0 ? -1 : hardest / kLanes<T>;

        V factor[K] = {};
        if (hardest_term) {
            for (int k = 0; k < K; ++k) factor[k] = exponential(pivot[k] - top);
        }
        // Apart first: adding one class at a time to a long sum rounds more.
        V new_sum[K] = {}, new_cross[K] = {}, new_teacher_sum{}, new_teacher_gap{};
        for (int i = 0; i < n; ++i) {
            V x[K], e[K];
            const V of_all = relative(z[i], pivot, x);
            for (int k = 0; k < K; ++k) {
                e[k] = exponential(x[k]);
                kept.e[i][k] = e[k];
                new_sum[k] += e[k];
                if (mutual_term) new_cross[k] += e[k] * (x[k] * T(K) - of_all);
            }
            if (!hardest_term) continue;
            V of_teacher = largest_product(e, factor);
            const V distance = candidate(z[i]).gap;
            if (i == its_vector) of_teacher = hold(of_teacher, distance, hardest);
            new_teacher_sum += of_teacher;
            new_teacher_gap += of_teacher * distance;
        }
        for (int k = 0; k < K; ++k) {
            sum[k] += new_sum[k];
            if (mutual_term) cross[k] += new_cross[k];
        }
        teacher_sum += new_teacher_sum;
        teacher_gap += new_teacher_gap;
    }

    SHIKE_SIMD DktState<T, K> joined() const {
        DktState<T, K> state;
        for (int k = 0; k < K; ++k) {
            state.pivot[k] = pivot[k][0];
            state.sum[k] = lane_sum<T>(sum[k]);
            state.cross[k] = lane_sum<T>(cross[k]);
        }
        state.hardest = {total, 0, 0, number};  // the finish needs no more of it
        state.teacher_pivot = top[0];
        state.teacher_sum = lane_sum<T>(teacher_sum);
        state.teacher_gap = lane_sum<T>(teacher_gap);
        return state;
    }

private:
    // Expresses the sums relative to new pivots.
    SHIKE_SIMD void move_pivots(const V (&next)[K], bool first, bool hardest_term, bool mutual_term) {
        V next_top = next[0];
        for (int k = 1; k < K; ++k) next_top = larger(next_top, next[k]);
        if (!first) {
            V move[K];
            const V moves = relative(pivot, next, move);
            for (int k = 0; k < K; ++k) {
                const V factor = exponential(move[k]);
                if (mutual_term) cross[k] = factor * (cross[k] + sum[k] * (move[k] * T(K) - moves));
                sum[k] *= factor;
            }
            if (hardest_term) {
                const V factor = exponential(top - next_top);
                teacher_sum *= factor;
                teacher_gap *= factor;
                weight *= factor[0];
            }
        }
        for (int k = 0; k < K; ++k) pivot[k] = next[k];
        top = next_top;
    }

    // The position in the tile of a harder negative than the one so far, which then joins the teacher's sums; or -1.
    SHIKE_SIMD std::int64_t hardest_in(const V& best, const V& where, const V (&z)[kTile][K], std::int64_t c) {
        const T largest = lane_maximum<T>(best);
        if (!(largest > total)) return -1;
        const V lowest_first = best == largest ? -where : all<V>(-2 * kNoClass);
        const V former = lane_numbers<T>() == T(0) ? V{} + weight : V{};
        teacher_sum += former;
        teacher_gap += former * gap;
        total = largest;
        number = -lane_maximum<T>(lowest_first);
        const std::int64_t position = std::int64_t(number) - c;
        for (int k = 0; k < K; ++k) z_h[k] = number_at<T, K>(z, k, position);
        return position;
    }

    // Takes the weight of the hardest negative out of those of its vector.
    SHIKE_SIMD V hold(const V& of_teacher, const V& distance, std::int64_t position) {
        T weights[kLanes<T>], distances[kLanes<T>];
        std::memcpy(weights, &of_teacher, sizeof(V));
        std::memcpy(distances, &distance, sizeof(V));
        weight = weights[position % kLanes<T>];
        gap = distances[position % kLanes<T>];
        return lane_numbers<T>() == T(position % kLanes<T>) ? V{} : of_teacher;
    }
};

// The teacher's sums from the logits, relative to the largest of those that count.
template <class T, int K>
void read_teacher(const DktCall& call, std::int64_t b, std::int64_t y, DktState<T, K>& state) {
    using V = Vector<T>;
    constexpr int kStep = kTile * kLanes<T>;
    V z[kTile][K], strongest[kTile];
    V pivot = all<V>(kFloor), sum{}, gap{};
    for (std::int64_t c = 0; c < call.logits.classes; c += kStep) {
        const int count = smaller(call.logits.classes - c, kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        load_experts<T, K>(call.logits, b, c, count, z);
        leave_out<T, K>(z, y - c, count);
        leave_out<T, K>(z, std::int64_t(state.hardest.number) - c, count);
        V next = pivot;
        for (int i = 0; i < n; ++i) {
            strongest[i] = candidate(z[i]).strongest;
            next = larger(next, strongest[i]);
        }
        next = in_step(next);
        const V factor = exponential(pivot - next);
        sum *= factor;
        gap *= factor;
        pivot = next;
        for (int i = 0; i < n; ++i) {
            const V weight = exponential(strongest[i] - pivot);
            sum += weight;
            gap += weight * candidate(z[i]).gap;
        }
    }
    state.teacher_pivot = pivot[0];
    state.teacher_sum = lane_sum<T>(sum);
    state.teacher_gap = lane_sum<T>(gap);
}

// One row's state; z_y and z_h become its logits at the target and at the hardest negative. The tiles are kept where
// there is room for them, one after the other or each in the place of the former.
template <class T, int K>
DktState<T, K> dkt_row(const DktCall& call, const DktOptions<T>& options, std::int64_t b, T (&z_y)[K], T (&z_h)[K],
                       DktTile<T, K>* tiles, bool keep) {
    using V = Vector<T>;
    constexpr int kStep = kTile * kLanes<T>;
    const std::int64_t y = call.target.data[b * call.target.stride];
    V z[kTile][K];
    DktLanes<T, K> lanes;
    lanes.clear();
    for (std::int64_t c = 0; c < call.logits.classes; c += kStep) {
        const int count = smaller(call.logits.classes - c, kStep);
        load_experts<T, K>(call.logits, b, c, count, z);
        if (c <= y && y < c + count) {
            for (int k = 0; k < K; ++k) z_y[k] = number_at<T, K>(z, k, y - c);
            leave_out<T, K>(z, y - c, count);
        }
        lanes.add(z, (count + kLanes<T> - 1) / kLanes<T>, c, options.hardest_term, options.mutual_term, *tiles);
        if (keep) ++tiles;
    }
    DktState<T, K> state = lanes.joined();
    if (options.hardest_term && !(state.teacher_sum >= T(kTeacherLost))) read_teacher<T, K>(call, b, y, state);
    for (int k = 0; k < K; ++k) z_h[k] = lanes.z_h[k];
    return state;
}

// The forward of up to kLanes rows: logarithms cost as much for all lanes as for one, so the rows end together.
template <class T, int K>
void dkt_forward_of(const DktCall& call, const DktOptions<T>& options, double* terms, std::int64_t first, int rows,
                    DktSaved<T, K>* saved, DktTile<T, K>* tiles, std::int64_t tiles_of_row) {
    using V = Vector<T>;
    DktState<V, K> states;
    states.clear();
    V z_y[K] = {}, z_h[K] = {};
    for (int lane = 0; lane < rows; ++lane) {
        T row_z_y[K] = {}, row_z_h[K] = {};
        const DktState<T, K> state = dkt_row<T, K>(call, options, first + lane, row_z_y, row_z_h,
                                                   tiles + lane * tiles_of_row, tiles_of_row > 0);
        set_lane<T>(states, lane, state);
        set_lane<T>(z_y, lane, row_z_y);
        set_lane<T>(z_h, lane, row_z_h);
    }
    DktSaved<V, K> all_saved;
    const DktTerms<V> row_terms = finish(states, z_y, z_h, options, all_saved);
    for (int lane = 0; lane < rows; ++lane) {
        get_lane<T>(all_saved, lane, saved[lane]);
        double* of_row = terms + 3 * (first + lane);
        of_row[0] = double(row_terms.cross_entropy[lane]);
        of_row[1] = double(row_terms.hardest[lane]);
        of_row[2] = double(row_terms.mutual[lane]);
    }
}

// The students' part of the gradient: e = exp(z - pivot), and all of the share of the class in the teachers.
template <class V, int K>
SHIKE_SIMD void students(const DktGradient<V, K>& row, const V (&z)[K], const V (&e)[K], V share_of_all,
                         bool mutual_term, V (&gradient)[K]) {
    if (mutual_term) {
        V x[K];
        const V of_all = relative(z, row.pivot, x);
        for (int k = 0; k < K; ++k) {
            gradient[k] = e[k] * (row.slope[k] + row.bend[k] * (x[k] * float(K) - of_all));
            share_of_all += row.share[k] * e[k];
        }
    } else {
        for (int k = 0; k < K; ++k) gradient[k] = e[k] * row.slope[k];
    }
    for (int k = 0; k < K; ++k) gradient[k] -= share_of_all;
}

// z -> gradient at classes that are neither the target nor the hardest negative; `weight` is the teacher's.
template <class V, int K>
SHIKE_SIMD void differentiate(const DktGradient<V, K>& row, V (&z)[K], const V (&e)[K], const V& weight,
                              bool hardest_term, bool mutual_term) {
    V gradient[K];
    if (hardest_term) {
        const Candidate<V> entry = candidate(z);
        const V q = row.q_scale * weight;
        V to_strongest = q * (entry.gap * row.teacher_slope - row.gap_mean);
        students(row, z, e, q, mutual_term, gradient);
        for (int k = 0; k < K - 1; ++k) {  // all of it to the first expert that attains the maximum
            const auto wins = z[k] == entry.strongest;
            gradient[k] += wins ? to_strongest : V{};
            to_strongest = wins ? V{} : to_strongest;
        }
        gradient[K - 1] += to_strongest;
    } else {
        students(row, z, e, V{}, mutual_term, gradient);
    }
    for (int k = 0; k < K; ++k) z[k] = gradient[k];
}

// z -> gradient at the hardest negative, in every lane: the teacher's logit is the mean of the experts.
template <class V, int K>
SHIKE_SIMD void differentiate_hardest(const DktGradient<V, K>& row, V (&z)[K], const V (&e)[K], bool mutual_term) {
    const V mean = candidate(z).total / float(K);
    V gap{};
    for (int k = 0; k < K; ++k) gap += mean - z[k];
    const V q = row.q_scale * exponential(mean - row.teacher_pivot);
    const V to_each = q * (gap * row.teacher_slope - row.gap_mean) / float(K);
    V gradient[K];
    students(row, z, e, q, mutual_term, gradient);
    for (int k = 0; k < K; ++k) z[k] = gradient[k] + to_each;
}

// The gradient of one row, times grad_output. `kept`: the exponentials of the forward, or null.
template <class T, int K>
void dkt_gradient(const DktCall& call, const DktOptions<T>& options, const Experts& gradient, T grad_output,
                  std::int64_t b, const DktSaved<T, K>& saved, const DktTile<T, K>* kept) {
    using V = Vector<T>;
    constexpr int kStep = kTile * kLanes<T>;
    const std::int64_t classes = call.logits.classes;
    const std::int64_t y = call.target.data[b * call.target.stride], h = std::int64_t(saved.hardest);
    const auto row = DktGradient<V, K>::of(saved, options, grad_output);
    V factor[K] = {};
    bool far = false;
    if (options.hardest_term) {
        for (int k = 0; k < K; ++k) {
            far = far || !(saved.pivot[k] - saved.teacher_pivot <= T(kTeacherFar));
            factor[k] = exponential(row.pivot[k] - row.teacher_pivot);
        }
    }
    V z[kTile][K];
    DktTile<T, K> own;
    for (std::int64_t c = 0; c < classes; c += kStep) {
        const int count = smaller(classes - c, kStep), n = (count + kLanes<T> - 1) / kLanes<T>;
        load_experts<T, K>(call.logits, b, c, count, z);
        if (kept == nullptr) {
            for (int i = 0; i < n; ++i) {
                for (int k = 0; k < K; ++k) own.e[i][k] = exponential(z[i][k] - row.pivot[k]);
            }
        } else if (classes > kStep) {  // later tiles may have moved the pivots
            V to_last[K];
            for (int k = 0; k < K; ++k) to_last[k] = exponential(kept->pivot[k] - row.pivot[k]);
            for (int i = 0; i < n; ++i) {
                for (int k = 0; k < K; ++k) own.e[i][k] = kept->e[i][k] * to_last[k];
            }
            ++kept;
        }
        const V(&e)[kTile][K] = kept == nullptr || classes > kStep ? own.e : kept->e;

        const bool has_hardest = c <= h && h < c + count;
        V z_h[K], e_h[K];
        if (has_hardest) {
            for (int k = 0; k < K; ++k) {
                z_h[k] = V{} + number_at<T, K>(z, k, h - c);
                e_h[k] = V{} + number_at<T, K>(e, k, h - c);
            }
        }
        for (int i = 0; i < n; ++i) {
            V weight{};
            if (far) {
                weight = exponential(candidate(z[i]).strongest - row.teacher_pivot);
            } else if (options.hardest_term) {
                weight = largest_product(e[i], factor);
            }
            differentiate(row, z[i], e[i], weight, options.hardest_term, options.mutual_term);
        }
        if (has_hardest) {
            differentiate_hardest(row, z_h, e_h, options.mutual_term);
            for (int k = 0; k < K; ++k) set_at<T, K>(z, k, h - c, z_h[k][0]);
        }
        if (c <= y && y < c + count) {
            for (int k = 0; k < K; ++k) set_at<T, K>(z, k, y - c, grad_output * saved.target_gradient[k]);
        }
        for (int k = 0; k < K; ++k) store_tile<T>(gradient.dtype, gradient.expert[k], b, c, count, &z[0][k], K);
    }
}

template <class T, int K>
void dkt_forward_rows(const DktCall& call, double* terms, std::int64_t first, std::int64_t last) {
    const DktOptions<T> options = with_factors(options_of<T>(call), call);
    DktTile<T, K> tile;
    for (std::int64_t b = first; b < last; b += kLanes<T>) {
        dkt_forward_of<T, K>(call, options, terms, b, smaller(last - b, kLanes<T>),
                             static_cast<DktSaved<T, K>*>(call.saved) + b, &tile, 0);
    }
}

template <class T, int K>
void dkt_backward_rows(const DktCall& call, const Experts& gradient, double grad_output, std::int64_t first,
                       std::int64_t last) {
    const DktOptions<T> options = with_factors(options_of<T>(call), call);
    for (std::int64_t b = first; b < last; ++b) {
        dkt_gradient<T, K>(call, options, gradient, T(grad_output), b, static_cast<DktSaved<T, K>*>(call.saved)[b],
                           nullptr);
    }
}

// Forward and backward of some rows after the other: their logits are still in the cache, and their exponentials too
// unless a row is very long.
template <class T, int K>
void dkt_both_rows(const DktCall& call, const Experts& gradient, double* terms, std::int64_t first,
                   std::int64_t last) {
    const DktOptions<T> options = with_factors(options_of<T>(call), call);
    const KeptTiles<T, DktTile<T, K>> kept(call.logits.classes);
    DktSaved<T, K> saved[kLanes<T>];
    for (std::int64_t b = first; b < last; b += kept.rows) {
        const int rows = smaller(last - b, kept.rows);
        dkt_forward_of<T, K>(call, options, terms, b, rows, saved, kept.tiles.get(), kept.of_row);
        for (int row = 0; row < rows; ++row) {
            dkt_gradient<T, K>(call, options, gradient, T(1), b + row, saved[row], kept.of(row));
        }
    }
}

}  // namespace
}  // namespace shike
