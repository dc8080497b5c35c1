// The CPU kernels of depth-wise knowledge fusion: a table, of which there is one for each instruction set
// (common/cpu_level.h).
#pragma once

#include "fusion/call.h"

namespace shike {

// How the maps of a call are shared out. It follows from shapes and layouts alone, so that no result depends on the
// number of threads.
struct MapBlocks {
    std::int64_t group;       // samples whose statistics are taken together
    std::int64_t groups;      // of the batch
    std::int64_t width;       // channels of a block
    std::int64_t per_map;     // blocks of channels
    std::int64_t rows;        // positions of a tile

    std::int64_t group_begin(std::int64_t g) const { return g * group; }
};

// What a group of samples contributes to the statistics of a channel.
struct Partials {
    double* mean;     // [maps, groups, C]
    double* squares;  // [maps, groups, C]: squared distances from that mean
};

// Sums over the positions that a forward of one pass takes while the statistics are not known yet; [B, C] each.
struct Moments {
    double* product;  // sum_hw deep (x - x[0, c, 0, 0])
    double* deep;     // sum_hw deep
};

// Work comes in units that are independent of each other; threads take ranges of them.
struct FusionKernels {
    // A unit is a group of samples and a block of channels. `moments`: none, or where the sums with `deep` go.
    void (*statistics)(const FeatureMap& map, const FeatureMap* deep, const MapShape&, const MapBlocks&,
                       const Partials&, const Moments&, std::int64_t first, std::int64_t last);
    // A unit is a sample. Ends a forward of one pass.
    void (*finish_moments)(const Fusion&, int expert, const Moments&, const FusionSaved&, void* f,
                           std::int64_t first, std::int64_t last);
    // A unit is an expert, a sample and a block of channels.
    void (*forward)(const Fusion&, int expert, const MapBlocks&, const FusionSaved&, void* f, std::int64_t first,
                    std::int64_t last);
    // A unit is a normalisation and a block of channels.
    void (*vector_gradients)(const Fusion&, const FusionSaved&, const void* grad_output, void* vectors, std::int64_t width,
                             std::int64_t first, std::int64_t last);
    // A unit is an expert, a sample and a block of channels.
    void (*map_gradients)(const Fusion&, int expert, const MapBlocks&, const FusionSaved&, const FusionGradient&,
                          std::int64_t first, std::int64_t last);
};

}  // namespace shike
