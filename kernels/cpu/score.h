// Inputs and results of the kernel (../contract.py), as plain pointers and strides.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace ifr {

// [n0, n1, n2] floats at distances s0, s1, s2
struct Tensor3 {
    const float* data = nullptr;
    int64_t s0 = 0, s1 = 0, s2 = 1;
    const float* at(int64_t i, int64_t j) const { return data + i * s0 + j * s1; }
};

struct Matrix {
    const float* data = nullptr;
    int64_t stride = 0;
    const float* row(int64_t i) const { return data + i * stride; }
};

struct Layer {
    int64_t R, S, H, H_kv, K, V, D;
    const int64_t* rows;  // [R]
    Matrix resid_pre, y;  // [R, D]
    Tensor3 q, k, v;      // [R, H, K], [S, H_kv, K], [S, H_kv, V], contiguous in the last
    Tensor3 W_O;          // [H, V, D]
    float scale, keep;
    const float* row_scale = nullptr;     // [R]
    Tensor3 value_gate;                   // [R, H, V], contiguous in the last
    int64_t window = 0;                   // 0: none
    float softcap = 0;                    // 0: none
    const float* sinks = nullptr;         // [H]
    const float* alibi_slopes = nullptr;  // [H]
    const float* log_sum_exp = nullptr;   // [R, H]
    Matrix ffn;                           // [R, D]
    const float* weights = nullptr;       // [H, S] of one row, if attention left them
    const float* norms = nullptr;         // [H_kv, norms_stride] of v's rows, if known
    int64_t norms_stride = 0;             // at least S plus a vector of keys
    const float* offset = nullptr;        // [R]
    float floor = 0;
};

// Seconds of all threads together by stage, and counts.
enum Stage { PREPARE, SCORES, SOFTMAX, LINEAR, CORRECT, FINISH, N_STAGES };
struct Counters {
    std::array<double, N_STAGES> seconds{};
    int64_t pairs = 0;    // (row, head, visible key)
    int64_t listed = 0;   // pairs with lin > 0 and a coordinate that can flip
    int64_t visited = 0;  // coordinates, of all pairs together
    void add(const Counters& other) {
        for (int i = 0; i < N_STAGES; ++i) seconds[i] += other.seconds[i];
        pairs += other.pairs;
        listed += other.listed;
        visited += other.visited;
    }
};

struct Edges {
    std::vector<int64_t> row, source;
    std::vector<float> weight, head_weight;  // [N], [N, H]
};

struct Scores {
    float *residual, *ffn, *head_total;  // [R], [R] or null, [R, H]
    bool* unattributed;                  // [R]
    float *linear, *total;               // [R]
    std::vector<Edges> edges;            // by row block, in order
    Counters counters;
};

struct Attention {
    float *z, *weights;  // [H, V], [H, S]
};

struct FFNParts {
    int64_t R, D;
    Matrix resid_mid, resid_post;
    float *residual, *ffn;
    bool* unattributed;
};

#define IFR_DECLARE(isa)                                                  \
    namespace isa {                                                       \
    void score_attention(const Layer& layer, int n_threads, Scores& out); \
    void score_ffn(const FFNParts& parts, int n_threads);                 \
    void attend_row(const Layer& layer, int n_threads, const Attention& out); \
    }
IFR_DECLARE(baseline)
#if defined(__x86_64__)
IFR_DECLARE(avx2)
IFR_DECLARE(avx512)
#endif
#undef IFR_DECLARE

}  // namespace ifr
