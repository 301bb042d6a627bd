// Op        dsa_select: the top_k best rows of each token by index score, ascending; ties to the lower
//           row, as NumPy's stable sort
// Shapes    chosen [n, top_k], -1 where a token may see fewer rows; scores [n, ld], of which token t
//           has pos[t] + 1; pos [n], -1 = padded, chooses nothing
// Dtypes    scores float32; chosen int32
// Grid      (CLUSTER, n), 1024 threads: a cluster a token
// Assumes   scores 16-byte aligned, ld a multiple of 4
// Variants  CLUSTER=1; CLUSTER=2 @9.0; CLUSTER=4 @9.0; CLUSTER=8 @9.0
// Spills    none
// Numerics  exact; integer counts, so two runs are alike
// Bound by  latency of four cluster barriers for few tokens; 12 n n_kv bytes of L2 for many
// Sources   include/select.cuh
// Tested by tests/gpu/test_cuda_sparse.py, tests/kernels/test_dsa.py
#include "pdl.cuh"
#include "select.cuh"

extern "C" __global__ void __cluster_bounds__(SELECT_THREADS)
dsa_select(int* chosen, const float* scores, const int* pos, int top_k, long long ld) {
    __shared__ SelectShared s;
    pdl_launch();
    select_clear(s);
    pdl_wait();
    const int row = blockIdx.y, n = pos[row] + 1;
    int* out = chosen + (long long)row * top_k;
    if (n <= top_k) {
        for (int i = blockIdx.x * SELECT_THREADS + threadIdx.x; i < top_k; i += CLUSTER * SELECT_THREADS)
            out[i] = i < n ? i : -1;
        cluster_wait();
        return;
    }
    RowShare share(scores + row * ld, n);
    cluster_wait();
    select(share, top_k, s, [&](int place, int at) { out[place] = at; });
}
