// A part of a step's rows, for calls that were laid out once for all rows of any step.
#pragma once
#include <cstdint>

#include "schedule.h"

struct Rows {
    int64_t begin, count;
    const int64_t *positions, *slots;  // of these rows
    Schedule* schedule;                // of these rows' attention
    int32_t threads;                   // that make the call together
};
