// A sum whose roundings are kept beside it.
#pragma once

#include "common/macros.h"

namespace shike {
namespace {

struct CompensatedSum {
    float leading = 0, rest = 0;

    SHIKE_DEVICE void add(float number) {
        const float total = leading + number, added = total - leading;
        rest += (leading - (total - added)) + (number - added);
        leading = total;
    }
    SHIKE_DEVICE float value() const { return leading + rest; }
};

}  // namespace
}  // namespace shike
