// One kernel of expanded prefill as a function for test_prefill.py: KERNEL names it, kernel_text.h
// is its source with headers inlined, but for those that warpgroup_sim.h stands in for.
#include "simt.h"
//
#include "warpgroup_sim.h"
//
#include "kernel_text.h"

#include <tuple>

template <class T>
T argument(const long long*& at) {
    const long long bits = *at++;
    if constexpr (std::is_same_v<T, float>) {
        double value;
        memcpy(&value, &bits, 8);
        return (float)value;
    } else {
        return (T)bits;
    }
}

template <class... A>
void call(dim3 grid, dim3 block, void (*kernel)(A...), const long long* at) {
    std::tuple<A...> values{argument<A>(at)...};  // braces: from left to right
    std::apply([&](A... a) { simt::launch(grid, block, kernel, a...); }, values);
}

extern "C" void run(int grid_x, int grid_y, int block, const long long* arguments) {
    sim_barriers.clear();
    call(dim3(grid_x, grid_y, 1), dim3(block, 1, 1), KERNEL, arguments);
}
