// The CPU kernels of depth-wise knowledge fusion, one table for each instruction set that was compiled and that may be
// chosen at run time.
#pragma once

#include <algorithm>

#include "dkf.h"

namespace shike {

// How the maps of a call are shared out. It follows from shapes and layouts alone, so that no result depends on the
// number of threads.
struct DkfBlocks {
    std::int64_t group;       // samples whose statistics are taken together
    std::int64_t groups;      // of the batch
    std::int64_t width;       // channels of a block
    std::int64_t per_map;     // blocks of channels
    std::int64_t rows;        // positions of a tile

    std::int64_t group_begin(std::int64_t g) const { return g * group; }
};

// What a group of samples contributes to the statistics of a channel.
struct DkfPartials {
    double* mean;     // [maps, groups, C]
    double* squares;  // [maps, groups, C]: squared distances from that mean
};

// Sums over the positions that a forward of one pass takes while the statistics are not known yet; [B, C] each.
struct DkfMoments {
    double* product;  // sum_hw deep (x - x[0, c, 0, 0])
    double* deep;     // sum_hw deep
};

// Work comes in units that are independent of each other; threads take ranges of them.
struct DkfKernels {
    // A unit is a group of samples and a block of channels. `moments`: none, or where the sums with `deep` go.
    void (*statistics)(const FeatureMap& map, const FeatureMap* deep, const MapShape&, const DkfBlocks&,
                       const DkfPartials&, const DkfMoments&, std::int64_t first, std::int64_t last);
    // A unit is a sample. Ends a forward of one pass.
    void (*finish_moments)(const Fusion&, int expert, const DkfMoments&, const FusionState&, void* f,
                           std::int64_t first, std::int64_t last);
    // A unit is an expert, a sample and a block of channels.
    void (*forward)(const Fusion&, int expert, const DkfBlocks&, const FusionState&, void* f, std::int64_t first,
                    std::int64_t last);
    // A unit is a normalisation and a block of channels.
    void (*vector_gradients)(const Fusion&, const FusionState&, const void* incoming, void* vectors, std::int64_t width,
                             std::int64_t first, std::int64_t last);
    // A unit is an expert, a sample and a block of channels.
    void (*map_gradients)(const Fusion&, int expert, const DkfBlocks&, const FusionState&, const FusionGradient&,
                          std::int64_t first, std::int64_t last);
};

// Null where the compiler does not target that instruction set. Only the generic kernels take float64.
const DkfKernels* dkf_generic_kernels();
const DkfKernels* dkf_avx2_kernels();
const DkfKernels* dkf_avx512_kernels();

// The blocks for maps of this shape; `channels_inside`: channels are neighbours in the memory of every map.
DkfBlocks dkf_blocks(const MapShape& shape, bool channels_inside);

}  // namespace shike
