// How a row of the generalised expert loss ends: from what its classes have added up to, the labels' left out, to the
// loss and the coefficients of the gradient. Compiled for host and device; V is one row, or a vector of rows.
//
// Row logits are x = scale z + bias; m is the margin at a label. y and y' are the two labels; where there is no second
// one, or it is the first, x_b is kAbsent and weight_b is 0.
#pragma once

#include "losses/call.h"
#include "losses/row_state.h"

namespace shike {
namespace {

// What the classes of one expert's row add up to. No x is much larger than the pivot M; kFloor where there is no class.
template <class V>
struct ExpertSums {
    V pivot;   // M
    V sum;     // sum of exp(x - M)
    V linear;  // sum of x - M, for label smoothing
};

template <class V>
struct Labels {
    V x_a, x_b;            // without margins
    V margin_a, margin_b;
    V weight_a, weight_b;
};

// d(weighted loss) / dx, and the loss.
template <class V>
struct CrossEntropyEnd {
    V loss_a, loss_b;  // of the labels, without weights
    V p_scale;         // the gradient at other classes: p_scale exp(x - M) - everywhere
    V everywhere;
    V at_a, at_b;      // all of it at the labels
    V log_sum;         // log sum of exp(x), without margin
    V p_target;        // of y, without margin
};

template <class V>
struct LabelEnd {
    V loss, of_rest, own, own_left, of_other;
    V top, log_total;  // log of the sum of exponentials: their sum
};

// -log p of one label, `own` with its margin, beside the other label.
template <class V>
SHIKE_HD LabelEnd<V> end_label(const ExpertSums<V>& sums, V own, V other) {
    const V top = larger(larger(sums.pivot, own), other);
    const V of_rest = exponential(sums.pivot - top), of_other = exponential(other - top);
    const V others = sums.sum * of_rest + of_other, e = exponential(own - top);
    const V total = others + e, inverse = 1 / total;
    const auto leads = own >= top;
    LabelEnd<V> end;
    // Where the label leads, e is 1, or NaN where the label's logit is infinite: the logarithm takes what is beside it.
    const V log_rest = logarithm_1p(leads ? others + (e - 1) : total - 1);
    const V log_small = logarithm(total);  // a margin may leave all of it far below 1
    const V log_total = total > 0.5f ? log_rest : log_small;
    end.loss = leads ? log_rest : log_total + (top - own);
    end.of_rest = of_rest * inverse;
    end.own = e * inverse;
    end.own_left = others * inverse;  // 1 - p
    end.of_other = of_other * inverse;
    end.top = top;
    end.log_total = log_total;
    return end;
}

template <class V, class T>
SHIKE_HD CrossEntropyEnd<V> end_cross_entropy(const ExpertSums<V>& sums, const Labels<V>& row, bool two_labels,
                                              bool margins, T smoothing, T classes) {
    const V own_a = row.x_a - row.margin_a;
    const LabelEnd<V> a = end_label(sums, own_a, row.x_b);
    const V shared = V{} + smoothing / classes;
    CrossEntropyEnd<V> end;
    const auto second = row.x_b > all<V>(kAbsent);
    // Where there is no class but the labels any pivot does, and one near their logits keeps differences to it exact.
    const V pivot = sums.pivot == all<V>(kFloor) ? larger(row.x_a, row.x_b) : sums.pivot;
    const V beside_b = second ? row.x_b - pivot : V{};
    end.loss_a = a.loss;
    if (smoothing != 0) {
        const V mean = (sums.linear + (own_a - pivot) + beside_b) / classes;
        end.loss_a = (1 - smoothing) * a.loss + smoothing * (a.log_total + (a.top - pivot) - mean);
    }
    end.p_scale = row.weight_a * a.of_rest;
    end.everywhere = row.weight_a * shared;
    end.at_a = row.weight_a * (smoothing - shared - a.own_left);
    end.at_b = row.weight_a * (a.of_other - shared);
    end.loss_b = end.loss_a;
    if (two_labels) {
        const V own_b = row.x_b - row.margin_b;
        const LabelEnd<V> b = end_label(sums, own_b, row.x_a);
        V loss_b = b.loss;
        if (smoothing != 0) {
            const V mean = (sums.linear + (row.x_a - pivot) + (own_b - pivot)) / classes;
            loss_b = (1 - smoothing) * b.loss + smoothing * (b.log_total + (b.top - pivot) - mean);
        }
        end.loss_b = second ? loss_b : end.loss_a;
        end.p_scale += row.weight_b * b.of_rest;
        end.everywhere += row.weight_b * shared;
        end.at_a += row.weight_b * (b.of_other - shared);
        end.at_b += row.weight_b * (smoothing - shared - b.own_left);
    }
    LabelEnd<V> plain = a;
    if (margins) plain = end_label(sums, row.x_a, row.x_b);
    end.log_sum = plain.top + plain.log_total;
    end.p_target = plain.own;
    return end;
}

// What a softmax of divergence logits adds up to, with the labels' terms again.
template <class V>
struct SoftmaxEnd {
    V scale;         // p = scale exp(d - M) at other classes
    V log_sum;       // relative to M
    V rest;          // sum of those p
    V p[2], left[2]; // at the labels: p and 1 - p
    V log_p[2];
};

template <class V>
SHIKE_HD SoftmaxEnd<V> end_softmax(V pivot, V sum, V d_a, V d_b) {
    const V top = larger(larger(pivot, d_a), d_b);
    const V of_rest = exponential(pivot - top), e_a = exponential(d_a - top), e_b = exponential(d_b - top);
    const V rest = sum * of_rest, total = rest + e_a + e_b, inverse = 1 / total;
    const V log_total = logarithm(total);  // not by way of the pivot, which is far away where there is no other class
    SoftmaxEnd<V> end;
    end.scale = of_rest * inverse;
    end.log_sum = log_total + (top - pivot);
    end.rest = rest * inverse;
    end.p[0] = e_a * inverse;
    end.p[1] = e_b * inverse;
    end.left[0] = (rest + e_b) * inverse;
    end.left[1] = (rest + e_a) * inverse;
    end.log_p[0] = (d_a - top) - log_total;
    end.log_p[1] = (d_b - top) - log_total;
    return end;
}

// d(divergence) / dd of expert k at other classes, f = exp(d - M), xr = d - M:
//   others: f_k (slope_k + bend_k (V xr_k - X)) - out_k sum_j share_j f_j,   V = sum of out, X = sum_i out_i xr_i
//   else:   f_k slope_k - share_k f_t
template <class V>
struct DivergenceEnd {
    V slope, bend, share, out;
    V at[2];    // all of it at the labels
    V of_row;   // the divergence, weighted
};

// What all experts have in common where they teach each other.
template <class V>
struct OthersSums {
    V students, teachers;  // weights
    V log_sums;
    V log_p[2], left[2];   // at the labels
};

// What one expert adds to them.
template <class V>
SHIKE_HD OthersSums<V> of_others(const SoftmaxEnd<V>& softmax, V of_teacher, V of_student) {
    return {of_student,
            of_teacher,
            of_student * softmax.log_sum,
            {of_student * softmax.log_p[0], of_student * softmax.log_p[1]},
            {of_teacher * softmax.left[0], of_teacher * softmax.left[1]}};
}

template <class V>
SHIKE_HD void add(OthersSums<V>& sums, const OthersSums<V>& other) {
    sums.students += other.students;
    sums.teachers += other.teachers;
    sums.log_sums += other.log_sums;
    SHIKE_UNROLL
    for (int s = 0; s < 2; ++s) {
        sums.log_p[s] += other.log_p[s];
        sums.left[s] += other.left[s];
    }
}

// One of the experts that teach each other. `cross`: sum over classes of f_k (V xr_k - X).
template <class V>
SHIKE_HD DivergenceEnd<V> end_others(const OthersSums<V>& all_of, const SoftmaxEnd<V>& own, V cross, V of_teacher,
                                     V of_student, bool teacher_gradient, const bool* present) {
    DivergenceEnd<V> end;
    const V offset = all_of.students * own.log_sum - all_of.log_sums;
    V divergence = own.scale * cross - own.rest * offset;
    V apart[2] = {V{}, V{}};
    SHIKE_UNROLL
    for (int s = 0; s < 2; ++s) {
        if (!present[s]) continue;
        // 0 where p is 0: a label that is absent has a logarithm without meaning
        apart[s] = own.p[s] > V{} ? all_of.students * own.log_p[s] - all_of.log_p[s] : V{};
        divergence += own.p[s] * apart[s];
    }
    const V bend = teacher_gradient ? of_teacher : V{};
    end.slope = own.scale * (of_student * all_of.teachers - bend * (offset + divergence));
    end.bend = own.scale * bend;
    end.share = own.scale * of_teacher;
    end.out = of_student;
    end.of_row = of_teacher * divergence;
    SHIKE_UNROLL
    for (int s = 0; s < 2; ++s) {
        end.at[s] = V{};
        if (!present[s]) continue;
        end.at[s] = of_student * (all_of.left[s] - all_of.teachers * own.left[s]) +
                    bend * own.p[s] * (apart[s] - divergence);
    }
    return end;
}

// A teacher of one expert; `cross`: sum over classes of f_t ((u - M_t) - xr).
template <class V>
SHIKE_HD DivergenceEnd<V> end_teacher(const SoftmaxEnd<V>& teacher, const SoftmaxEnd<V>& student, V cross, V weight,
                                      const bool* present) {
    DivergenceEnd<V> end;
    V divergence = teacher.scale * cross - teacher.rest * (teacher.log_sum - student.log_sum);
    SHIKE_UNROLL
    for (int s = 0; s < 2; ++s) {
        end.at[s] = V{};
        if (!present[s]) continue;
        divergence += teacher.p[s] > V{} ? teacher.p[s] * (teacher.log_p[s] - student.log_p[s]) : V{};
        end.at[s] = weight * (teacher.left[s] - student.left[s]);
    }
    end.slope = weight * student.scale;
    end.bend = V{};
    end.share = weight * teacher.scale;
    end.out = V{};
    end.of_row = weight * divergence;
    return end;
}

// What the forward leaves for the backward, of an expert and a row.
template <class T>
struct ExpertSaved {
    T pivot, p_scale, everywhere;
    T at[2];  // d(loss) / dz at the labels, the divergence's share included
    T kl_pivot, slope, bend, share, out, teacher_pivot;
    T spare;
};

}  // namespace
}  // namespace shike
