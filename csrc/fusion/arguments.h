// The calls of depth-wise knowledge fusion from the keyword arguments of Python.
#pragma once

#include "common/arguments.h"
#include "fusion/call.h"

namespace shike {

// dtype and shape (B, C, H, W).
inline MapShape map_shape(Arguments& in) {
    const DType dtype = in["dtype"].dtype();
    std::int64_t size[4];
    in["shape"].each(4, [&](int i, const Value& value) { size[i] = value.integer(); });
    return {size[0], size[1], size[2], size[3], dtype};
}

inline FeatureMap map_of(const Value& value) {
    const Array map = value.array(4);
    return {map.data, map.stride[0], map.stride[1], map.stride[2], map.stride[3]};
}

// The size of a list that must have `least` to `most` elements.
inline int count_of(const Value& list, int least, int most) {
    const int count = list.size();
    if (count < least || count > most) {
        list.refuse("expected " + std::to_string(least) + " to " + std::to_string(most) + " elements, got " +
                    std::to_string(count));
    }
    return count;
}

// relu, deep and shallow of K experts; shortcut of as many or none.
inline Fusion maps_of(Arguments& in) {
    Fusion call{};
    call.shape = map_shape(in);
    const Value relu = in["relu"];
    call.count = count_of(relu, 1, kMaxExperts);
    relu.each(call.count, [&](int k, const Value& flag) { call.expert[k].relu = flag.flag(); });
    in["deep"].each(call.count, [&](int k, const Value& map) { call.expert[k].deep = map_of(map); });
    in["shallow"].each(call.count, [&](int k, const Value& map) { call.expert[k].shallow = map_of(map); });
    const Value shortcut = in["shortcut"];
    call.folded = shortcut.size() > 0;
    if (call.folded) {
        shortcut.each(call.count, [&](int k, const Value& map) { call.expert[k].shortcut = map_of(map); });
    }
    return call;
}

inline BatchNorm& norm_of(Fusion& call, int index) {
    return index < call.count ? call.expert[index].norm : call.expert[index - call.count].deep_norm;
}

// maps_of, and weight and bias of the n norms: those of the shallow maps, then those of the deep ones.
inline Fusion fusion_of(Arguments& in) {
    Fusion call = maps_of(in);
    const Value weight = in["weight"];
    call.normalised = weight.size() > 0;
    const int norms = call.norms();
    if (call.folded && !call.normalised) weight.refuse("expected norms for the deep maps too where there are shortcuts");
    weight.each(norms, [&](int i, const Value& vector) { norm_of(call, i).weight = vector.memory_or_null(1); });
    in["bias"].each(norms, [&](int i, const Value& vector) { norm_of(call, i).bias = vector.memory_or_null(1); });
    return call;
}

// fusion_of, and what only a forward needs of the norms. The lists of running statistics may be empty.
inline Fusion forward_of(Arguments& in) {
    Fusion call = fusion_of(in);
    const int norms = call.norms();
    const Value mean = in["running_mean"];
    const int kept = mean.size() > 0 ? norms : 0;
    mean.each(kept, [&](int i, const Value& vector) { norm_of(call, i).running_mean = vector.memory_or_null(1); });
    in["running_var"].each(kept,
            [&](int i, const Value& vector) { norm_of(call, i).running_var = vector.memory_or_null(1); });
    in["momentum"].each(norms, [&](int i, const Value& number) { norm_of(call, i).momentum = number.number(); });
    in["eps"].each(norms, [&](int i, const Value& number) { norm_of(call, i).eps = number.number(); });
    return call;
}

inline MapList map_list(Arguments& in) {
    MapList maps{};
    maps.shape = map_shape(in);
    const Value list = in["maps"];
    maps.count = count_of(list, 1, 2 * kMaxExperts);
    list.each(maps.count, [&](int i, const Value& map) { maps.map[i] = map_of(map); });
    return maps;
}

// The gradient of f, and memory for those of the maps, which `call` describes.
inline FusionGradient gradient_of(Arguments& in, const Fusion& call) {
    FusionGradient gradient{};
    gradient.grad_output = in["grad_output"].memory(3);
    gradient.vectors = in["vectors"].memory(3);
    gradient.inverse_count = in["inverse_count"].number();
    in["grad_deep"].each(call.count, [&](int k, const Value& map) { gradient.expert[k].deep = map_of(map); });
    in["grad_shallow"].each(call.count, [&](int k, const Value& map) { gradient.expert[k].shallow = map_of(map); });
    in["grad_shortcut"].each(call.folded ? call.count : 0,
            [&](int k, const Value& map) { gradient.expert[k].shortcut = map_of(map); });
    return gradient;
}

// The results of a forward.
struct ForwardResults {
    FusionSaved saved;
    bool training;
    void* f;
    void* statistics;
};

inline ForwardResults results_of(Arguments& in) {
    const bool training = in["training"].flag();
    void* f = in["f"].memory(3);
    void* sums = in["sums"].memory(4);
    void* mean_rstd = in["mean_rstd"].memory(3);
    return {{sums, mean_rstd}, training, f, in["statistics"].memory(3)};
}

}  // namespace shike
