// One kernel of expanded prefill as a function for test_prefill.py: KERNEL names it, kernel_text.h
// is its source with headers inlined, but for those that warpgroup_sim.h stands in for.
#include <tuple>
//
#include "simt.h"
//
#include "warpgroup_sim.h"
//
#include "kernel_text.h"

template <class Argument>
Argument argument(const long long*& at) {
    const long long bits = *at++;
    if constexpr (std::is_same_v<Argument, float>) {
        double value;
        memcpy(&value, &bits, 8);
        return (float)value;
    } else {
        return (Argument)bits;
    }
}

template <class... Args>
void call(dim3 grid, dim3 block, void (*kernel)(Args...), const long long* at) {
    std::tuple<Args...> values{argument<Args>(at)...};  // braces: from left to right
    std::apply([&](Args... a) { simt::launch(grid, block, kernel, a...); }, values);
}

extern "C" void run(int grid_x, int grid_y, int block, const long long* arguments) {
    sim_barriers.clear();
    call(dim3(grid_x, grid_y, 1), dim3(block, 1, 1), KERNEL, arguments);
}
