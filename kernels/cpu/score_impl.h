// The kernel's entry points, for any instruction set. No include guard: see vec.h.

constexpr int64_t ALONE_FLOATS = 1 << 18;  // work too small to wake a thread for
constexpr int64_t FFN_FLOATS = 1 << 15;    // rows times D per task of score_ffn

void score_attention(const Layer& layer, int n_threads, Scores& out) {
    // About as many floats as the products and W_O take: 0.1 ms at ALONE_FLOATS.
    const int64_t keys = layer.R ? layer.rows[layer.R - 1] + 1 : 0;
    const int64_t work = layer.H * layer.D * layer.V * (1 + layer.R / 4) +
                         layer.H * layer.R * keys * (layer.K + layer.V);
    n_threads = work < ALONE_FLOATS ? 1 : n_threads;
    if (layer.R == 1) OneRow(layer, n_threads, out).run();
    else Blocks(layer, n_threads, out).run();
}

// The attention of the layer's one row; inputs that only scoring reads may be missing.
void attend_row(const Layer& layer, int n_threads, const Attention& out) {
    const int64_t work = layer.H * (layer.rows[0] + 1) * (layer.K + layer.V);
    RowAttention(layer, work < ALONE_FLOATS ? 1 : n_threads, out).run();
}

// The two parts of resid_post in sequential blocks: resid_mid and the FFN's output.
void score_ffn(const FFNParts& x, int n_threads) {
    const int64_t task_rows = std::max<int64_t>(1, FFN_FLOATS / std::max<int64_t>(1, x.D));
    const auto run = [&](int64_t task, int) {
        std::vector<float> output(static_cast<size_t>(x.D));
        for (int64_t r = task * task_rows; r < std::min(x.R, (task + 1) * task_rows); ++r) {
            const float *mid = x.resid_mid.row(r), *post = x.resid_post.row(r);
            for (int64_t i = 0; i < x.D; ++i) output[i] = post[i] - mid[i];
            const double residual = proximity(x.D, mid, post);
            const double ffn = proximity(x.D, output.data(), post);
            const double total = residual + ffn;
            x.unattributed[r] = total == 0;
            x.residual[r] = total == 0 ? 0.5f : static_cast<float>(residual / total);
            x.ffn[r] = total == 0 ? 0.5f : static_cast<float>(ffn / total);
        }
    };
    Team::run(n_threads, {{(x.R + task_rows - 1) / task_rows, run}});
}
