// Sums in float32 that lose less than their last bit.
#pragma once

#include "row_state.h"

namespace shike {
namespace {

// A sum whose roundings are kept beside it.
struct CompensatedSum {
    float leading = 0, rest = 0;

    SHIKE_HD void add(float number) {
        const float total = leading + number, added = total - leading;
        rest += (leading - (total - added)) + (number - added);
        leading = total;
    }
    SHIKE_HD float value() const { return leading + rest; }
};

}  // namespace
}  // namespace shike
