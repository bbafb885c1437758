// One layer's scoring (docs/design.md, section 3.1). No include guard: see vec.h.
//
// With s = sign(y), w = row_scale * alpha and g = gate * (W_O[h] @ s), for every visible pair
//
//     lin = w (v . g)                       proximity = max(lin + offset - correction, floor)
//     a = |w| |gate * v| (rounded up)       correction = 2 sum_i max(s_i p_i - |y_i|, 0)
//
// over the coordinates i with |y_i| / rho_i < a, where rho_i = |W_O[h][:, i]| and
// p_i = w (gate * v) . W_O[h][:, i].
//
// Phases: W_O is transposed and K, V packed; g is formed; blocks of BT rows are scored, start to
// finish, one thread a block. In a block the (row, head) pairs that share a KV head are `lines`:
// line m = row * group + head in group; lines read the same tiles of K and V.
//
// Shapes: W_T [H, D, Vp], rho_inv [H, Dp], g [R, H, Vp], K panels [H_kv, keys / NR, K, NR] (V
// alike), tile [H_kv, lines, keys of the block]: scores, then e = exp(score - max), then
// proximities. Vp, Dp: V, D rounded up to whole panels, vectors.
//
// A row's arithmetic depends on neither the block nor the thread that it falls to: chunks of keys
// begin at fixed positions, and each chunk's float sums are added up in double.

constexpr int64_t BLOCK_ROWS = 12;        // BT
constexpr int64_t TILE_FLOATS = 1 << 25;  // of all threads' tiles, unless blocks got too small
constexpr int64_t CHUNK = 64;             // keys per tile of G V^T, a multiple of NR
constexpr int64_t ALONE_FLOATS = 1 << 18;  // work that is not worth waking a thread for
constexpr int64_t W_COLUMNS = 128;        // coordinates per task of W_T
constexpr int64_t G_ROWS = 64;            // rows per task of g
constexpr int64_t FFN_FLOATS = 1 << 15;   // rows times D per task of score_ffn
constexpr int G_VECTORS = W > 8 ? 4 : 8;  // of g's columns, held in registers
constexpr int64_t G_GROUPS = 8;           // groups of four coordinates whose table fits L1
constexpr int N_BUCKETS = 128, BUCKET_SHIFT = 19;  // of breakpoints, by exponent and mantissa
constexpr int64_t SHORT = 4;                       // extents up to here are short
constexpr float ROUND_UP = 1 + 1.0f / 1024;        // ../breakpoints.py
constexpr float LOG2_E = 1.4426950408889634f;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// y [n] = a x
inline void scaled(int64_t n, const float* __restrict x, float a, float* __restrict y) {
    for (int64_t i = 0; i < n; ++i) y[i] = a * x[i];
}

// y [n, m] = x [m, n] transposed; x's elements at distances s0, s1, y's rows at distance stride.
inline void transpose(int64_t m, int64_t n, const float* __restrict x, int64_t s0, int64_t s1,
                      float* __restrict y, int64_t stride) {
    int64_t whole_m = 0, whole_n = 0;
    if (s1 == 1) {
        whole_m = m / SIDE * SIDE;
        whole_n = n / SIDE * SIDE;
        for (int64_t i = 0; i < whole_m; i += SIDE)
            for (int64_t j = 0; j < whole_n; j += SIDE)
                transpose_tile(x + i * s0 + j, s0, y + j * stride + i, stride);
    }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = i < whole_m ? whole_n : 0; j < n; ++j)
            y[j * stride + i] = x[i * s0 + j * s1];
}

// A cache-line-aligned array of floats.
class Buffer {
  public:
    explicit Buffer(int64_t n)
        : data_(static_cast<float*>(std::aligned_alloc(64, round_up(4 * n + 4, 64)))) {
        if (!data_) throw std::bad_alloc();
    }
    float* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data_;
};

// The listed pairs of a line. Keys are held as floats, exact below 2^24, to be compressed as such.
struct Listed {
    int64_t n = 0;
    std::vector<float> key, w, a;
    void reserve(int64_t more) {
        if (n + more <= static_cast<int64_t>(key.size())) return;
        const size_t size = 2 * static_cast<size_t>(n + more);
        key.resize(size);
        w.resize(size);
        a.resize(size);
    }
};

struct OrderedPair {
    const float* v;
    int64_t key;
    float w;
    int32_t extent;
};

// Adds the time since it was last asked to a stage.
class Clock {
  public:
    explicit Clock(Counters& counters) : counters_(counters) {}
    void lap(Stage stage) {
        const auto now = std::chrono::steady_clock::now();
        counters_.seconds[stage] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

  private:
    Counters& counters_;
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// max(|y|_1 - |y - part|_1 + offset, floor), subtracted coordinate by coordinate: a few huge
// coordinates of y would swallow the rest of a difference of two norms.
inline double proximity(int64_t D, const float* part, const float* y, double offset = 0,
                        double floor = 0) {
    double total = offset;
    for (int64_t start = 0; start < D; start += CHUNK) {
        const int64_t stop = std::min(D, start + CHUNK);
        F lanes = set1(0.0f);
        int64_t i = start;
        for (; i + W <= stop; i += W) {
            const F y_i = load(y + i);
            lanes = lanes + (abs(y_i) - abs(y_i - load(part + i)));
        }
        float rest = 0;
        for (; i < stop; ++i) rest += std::fabs(y[i]) - std::fabs(y[i] - part[i]);
        total += static_cast<double>(sum(lanes)) + rest;
    }
    return std::max(total, floor);
}

// One thread's memory.
struct Scratch {
    Scratch(int64_t lines, int64_t tile, int64_t rows, int64_t group_lines, const Layer& l,
            int64_t Vp, int64_t Dp)
        : tile(tile),
          y(rows * Dp),
          table(G_GROUPS * 8 * G_VECTORS * W),
          q(group_lines * l.K),
          g(group_lines * Vp),
          gate(l.value_gate.data ? group_lines * Vp : 0),
          dots(group_lines * CHUNK),
          squares(l.value_gate.data ? group_lines * CHUNK : 0),
          candidate_y(Dp + ND),
          w_scale(group_lines),
          smallest_breakpoint(group_lines),
          line_sum(lines),
          line_linear(lines),
          line_first(group_lines),
          line_last(group_lines),
          listed(group_lines),
          head_lines(l.H),
          point(Dp + W),
          coordinate(Dp + W),
          bucket(Dp),
          columns(Dp + ND) {}

    Buffer tile, y, table, q, g, gate, dots, squares, candidate_y;
    std::vector<float> w_scale, smallest_breakpoint;
    std::vector<double> line_sum;     // [H_kv, lines] sums of proximities over keys
    std::vector<double> line_linear;  // [H_kv, lines] sums of lin over keys
    std::vector<int64_t> line_first, line_last;  // keys of a line, in whole panels
    std::vector<Listed> listed;
    std::vector<const float*> head_lines;
    std::vector<float> point, coordinate;
    std::vector<int32_t> bucket, pair_bucket;
    std::vector<const float*> columns;
    std::vector<OrderedPair> pairs;
    std::vector<float> over, gated;
    int32_t top_bits, bucket_end[N_BUCKETS + 1];
    Counters counters;
};

class Scorer {
  public:
    Scorer(const Layer& layer, int n_threads, Scores& out)
        : l_(layer),
          out_(out),
          group_(layer.H / layer.H_kv),
          Vp_(round_up(layer.V, NR)),
          Dp_(round_up(layer.D, W)),
          first_key_(layer.R ? first_visible(0) / CHUNK * CHUNK : 0),
          n_keys_(layer.R ? round_up(last_visible(layer.R - 1) - first_key_, CHUNK) : 0),
          BT_(block_rows(n_threads)),
          W_T_in_place_(layer.W_O.s1 == 1 && layer.V == Vp_),
          W_T_buffer_(W_T_in_place_ ? 0 : layer.H * layer.D * Vp_),
          W_T_(W_T_in_place_ ? Tensor3{layer.W_O.data, layer.W_O.s0, layer.W_O.s2}
                             : Tensor3{W_T_buffer_.get(), layer.D * Vp_, Vp_}),
          rho_inv_(layer.H * Dp_),
          v_norm_(layer.H_kv * n_keys_),
          K_panels_(layer.H_kv * n_keys_ * layer.K),
          V_panels_(layer.H_kv * n_keys_ * layer.V),
          n_groups_((layer.D + 3) / 4),
          signs_(static_cast<size_t>(layer.R * n_groups_)),
          g_(layer.R * layer.H * Vp_) {
        int64_t widest = 0;
        n_blocks_ = BT_ ? (l_.R + BT_ - 1) / BT_ : 0;
        for (int64_t b = 0; b < n_blocks_; ++b) widest = std::max(widest, block_keys(b));
        const int64_t lines = BT_ * l_.H;
        for (int i = 0; i < n_threads; ++i)
            scratch_.push_back(std::make_unique<Scratch>(
                lines, lines * line_stride(widest), BT_, BT_ * group_, l_, Vp_, Dp_));
        out_.edges.resize(static_cast<size_t>(n_blocks_));
    }

    void run() {
        const int64_t w_tasks = (l_.D + W_COLUMNS - 1) / W_COLUMNS * l_.H;
        const int64_t key_tasks = n_keys_ / CHUNK * l_.H_kv;
        const int64_t row_tasks = (l_.R + G_ROWS - 1) / G_ROWS;
        Team::run(static_cast<int>(scratch_.size()),
                  {{w_tasks + key_tasks + row_tasks,
                    [&](int64_t task, int thread) {
                        Clock clock(scratch_[thread]->counters);
                        if (task < w_tasks) prepare_weights(task);
                        else if (task < w_tasks + key_tasks) pack_keys(task - w_tasks);
                        else encode_signs(task - w_tasks - key_tasks);
                        clock.lap(PREPARE);
                    }},
                   {row_tasks * l_.H,
                    [&](int64_t task, int thread) { form_g(task, *scratch_[thread]); }},
                   // The last blocks have the most keys: they come first.
                   {n_blocks_, [&](int64_t task, int thread) {
                        score_block(n_blocks_ - 1 - task, *scratch_[thread]);
                    }}});
        for (const auto& s : scratch_) {
            for (int i = 0; i < N_STAGES; ++i)
                out_.counters.seconds[i] += s->counters.seconds[i];
            out_.counters.pairs += s->counters.pairs;
            out_.counters.listed += s->counters.listed;
            out_.counters.visited += s->counters.visited;
        }
    }

  private:
    int64_t first_visible(int64_t row) const {
        return l_.window ? std::max<int64_t>(0, l_.rows[row] + 1 - l_.window) : 0;
    }
    int64_t last_visible(int64_t row) const { return l_.rows[row] + 1; }  // exclusive

    // Where the keys of a block begin, and how many there are, in whole chunks.
    int64_t block_first(int64_t block) const { return first_visible(block * BT_) / CHUNK * CHUNK; }
    int64_t block_keys(int64_t block) const {
        const int64_t last = last_visible(std::min(l_.R, (block + 1) * BT_) - 1);
        return round_up(last - block_first(block), CHUNK);
    }
    // An odd number of cache lines, so that lines spread over all sets of a cache.
    static int64_t line_stride(int64_t n_keys) { return round_up(n_keys, 32) + 16; }

    int64_t block_rows(int n_threads) const {
        int64_t rows = BLOCK_ROWS;
        while (rows > 3 && n_threads * rows * l_.H * n_keys_ > TILE_FLOATS) rows /= 2;
        const int64_t blocks = 2 * n_threads;  // at least, where there are rows: threads end together
        return std::min(rows, (l_.R + blocks - 1) / blocks);
    }

    // W_T [D, Vp] (W_O itself, where it lies so) and rho_inv of one head, W_COLUMNS coordinates a
    // task.
    void prepare_weights(int64_t task) {
        const int64_t h = task % l_.H, start = task / l_.H * W_COLUMNS;
        const int64_t stop = std::min(l_.D, start + W_COLUMNS);
        if (!W_T_in_place_) {
            float* W_T = W_T_buffer_.get() + (h * l_.D + start) * Vp_;
            if (l_.V < Vp_) std::fill_n(W_T, (stop - start) * Vp_, 0.0f);
            transpose(l_.V, stop - start, l_.W_O.data + h * l_.W_O.s0 + start * l_.W_O.s2,
                      l_.W_O.s1, l_.W_O.s2, W_T, Vp_);
        }
        float* rho_inv = rho_inv_.get() + h * Dp_;
        for (int64_t i = start; i < stop; ++i) {
            F squares = set1(0.0f);
            for (int64_t v = 0; v < Vp_; v += W) {
                const F w = load(W_T_.at(h, i) + v);
                squares = fma(w, w, squares);
            }
            // A column of zeros gets a huge finite number, as 0 * inf would be no number; where
            // y_i = 0 too its coordinate is then visited, and gives 0.
            rho_inv[i] = std::min(1 / std::sqrt(sum(squares)), FLT_MAX);
        }
        if (stop == l_.D) std::fill(rho_inv + stop, rho_inv + Dp_, FLT_MAX);
    }

    // K and V panels and |v| of CHUNK keys of one KV head; keys past the last are zero.
    void pack_keys(int64_t task) {
        const int64_t hk = task % l_.H_kv, start = task / l_.H_kv * CHUNK;
        const int64_t n = std::min(CHUNK, l_.S - first_key_ - start);
        const auto pack = [&](const Tensor3& x, int64_t width, float* panels) {
            panels += (hk * n_keys_ + start) * width;
            if (n < CHUNK) std::fill_n(panels, CHUNK * width, 0.0f);
            for (int64_t j = 0; j < n; j += NR)
                transpose(std::min<int64_t>(NR, n - j), width, x.at(first_key_ + start + j, hk),
                          x.s0, 1, panels + j * width, NR);
        };
        pack(l_.k, l_.K, K_panels_.get());
        pack(l_.v, l_.V, V_panels_.get());
        float* norm = v_norm_.get() + hk * n_keys_ + start;
        const float* panel = V_panels_.get() + (hk * n_keys_ + start) * l_.V;
        for (int64_t j = 0; j < CHUNK; j += W) {
            const float* column = panel + j / NR * NR * l_.V + j % NR;
            F squares = set1(0.0f);
            for (int64_t i = 0; i < l_.V; ++i) {
                const F v = load(column + i * NR);
                squares = fma(v, v, squares);
            }
            store(norm + j, sqrt(squares));
        }
    }

    // Signs of y, a byte per group of four coordinates: bit 3 is set where the first is negative,
    // bits 0 to 2 where the second to fourth have not the sign of the first.
    void encode_signs(int64_t task) {
        constexpr uint8_t CODE[16] = {0, 15, 1, 14, 2, 13, 3, 12, 4, 11, 5, 10, 6, 9, 7, 8};
        for (int64_t r = task * G_ROWS; r < std::min(l_.R, (task + 1) * G_ROWS); ++r) {
            const float* y = l_.y.row(r);
            uint8_t* code = signs_.data() + r * n_groups_;
            int64_t i = 0;
            for (; i + W <= l_.D; i += W) {
                const unsigned negative = bits(less(load(y + i), set1(0.0f)));
                for (int k = 0; k < W / 4; ++k) *code++ = CODE[negative >> 4 * k & 15];
            }
            for (; i < l_.D; i += 4) {
                unsigned negative = 0;
                for (int64_t k = i; k < std::min(l_.D, i + 4); ++k)
                    negative |= (y[k] < 0) << (k - i);
                *code++ = CODE[negative];
            }
        }
    }

    // g [rows, Vp] of one head and G_ROWS rows = s @ W_T. As s is +-1, four rows of W_T have but 8
    // sums up to sign: they are tabled once, and each row adds one entry instead of four rows.
    void form_g(int64_t task, Scratch& s) {
        Clock clock(s.counters);
        const int64_t h = task % l_.H, start = task / l_.H * G_ROWS;
        const int64_t stop = std::min(l_.R, start + G_ROWS);
        for (int64_t r = start; r < stop; ++r)
            std::fill_n(g_.get() + (r * l_.H + h) * Vp_, Vp_, 0.0f);
        for (int64_t column = 0; column < Vp_; column += G_VECTORS * W) {
            const int64_t width = std::min<int64_t>(G_VECTORS * W, Vp_ - column);
            for (int64_t group = 0; group < n_groups_; group += G_GROUPS) {
                const int64_t n = std::min(G_GROUPS, n_groups_ - group);
                for (int64_t i = 0; i < n; ++i)
                    table_sums(W_T_.at(h, 0) + column, 4 * (group + i), width,
                               s.table.get() + i * 8 * G_VECTORS * W);
                for (int64_t r = start; r < stop; ++r) {
                    const uint8_t* code = signs_.data() + r * n_groups_ + group;
                    float* g = g_.get() + (r * l_.H + h) * Vp_ + column;
                    switch (width / W) {
                        case 2: add_sums<2>(n, s.table.get(), code, g); break;
                        case 4: add_sums<4>(n, s.table.get(), code, g); break;
                        case 6: add_sums<6>(n, s.table.get(), code, g); break;
                        case 8: add_sums<8>(n, s.table.get(), code, g); break;
                    }
                }
            }
        }
        clock.lap(PREPARE);
    }

    // The sums w_i +- w_i+1 +- w_i+2 +- w_i+3 of rows of W_T, [8, G_VECTORS * W].
    void table_sums(const float* W_T, int64_t i, int64_t width, float* table) const {
        constexpr int64_t STRIDE = G_VECTORS * W;
        for (int64_t j = 0; j < width; j += W) {
            F w[4];
            for (int k = 0; k < 4; ++k)
                w[k] = i + k < l_.D ? load(W_T + (i + k) * W_T_.s1 + j) : set1(0.0f);
            const F a[2] = {w[0] + w[1], w[0] - w[1]}, b = w[2] + w[3], c = w[2] - w[3];
            for (int k = 0; k < 2; ++k) {
                store(table + k * STRIDE + j, a[k] + b);
                store(table + (k + 2) * STRIDE + j, a[k] - c);
                store(table + (k + 4) * STRIDE + j, a[k] + c);
                store(table + (k + 6) * STRIDE + j, a[k] - b);
            }
        }
    }

    template <int n_vectors>
    static void add_sums(int64_t n, const float* table, const uint8_t* code, float* g) {
        constexpr int64_t STRIDE = G_VECTORS * W;
        constexpr float SIGN[2] = {1.0f, -1.0f};
        F sum[n_vectors];
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; ++j) sum[j] = load(g + j * W);
        for (int64_t i = 0; i < n; ++i) {
            const float* entry = table + (i * 8 + (code[i] & 7)) * STRIDE;
            const F sign = set1(SIGN[code[i] >> 3]);
#pragma GCC unroll 8
            for (int j = 0; j < n_vectors; ++j) sum[j] = fma(sign, load(entry + j * W), sum[j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < n_vectors; ++j) store(g + j * W, sum[j]);
    }

    struct Block {
        int64_t row, n_rows, key, stride;  // first row, first key (of the tile's first column)
    };

    void score_block(int64_t block, Scratch& s) {
        const int64_t row = block * BT_;
        const Block b{row, std::min(BT_, l_.R - row), block_first(block),
                      line_stride(block_keys(block))};
        for (int64_t r = 0; r < b.n_rows; ++r) {
            const float* from = l_.y.row(row + r);
            float* y = s.y.get() + r * Dp_;
            for (int64_t i = 0, D = l_.D; i < D; ++i) y[i] = from[i] + 0.0f;  // -0.0 becomes 0.0
            std::fill(y + l_.D, y + Dp_, FLT_MAX);
            s.counters.pairs += l_.H * (last_visible(row + r) - first_visible(row + r));
        }
        for (int64_t m = 0; m < b.n_rows * group_; ++m) {
            s.line_first[m] = first_visible(row + m / group_) / NR * NR;
            s.line_last[m] = round_up(last_visible(row + m / group_), NR);
        }
        Clock clock(s.counters);
        for (int64_t hk = 0; hk < l_.H_kv; ++hk) {
            float* tile = s.tile.get() + hk * b.n_rows * group_ * b.stride;
            gather_lines(b, hk, s);
            clock.lap(PREPARE);
            scores(b, hk, tile, s);
            clock.lap(SCORES);
            for (int64_t m = 0; m < b.n_rows * group_; ++m) softmax(b, hk, m, tile, s);
            clock.lap(SOFTMAX);
            linear(b, hk, tile, s);
            clock.lap(LINEAR);
            for (int64_t m = 0; m < b.n_rows * group_; ++m) correct(b, hk, m, tile, s);
            clock.lap(CORRECT);
        }
        for (int64_t r = 0; r < b.n_rows; ++r) finish(b, r, s, out_.edges[block]);
        clock.lap(FINISH);
    }

    // q (times what the scores are to be scaled by), g, gate^2 and the smallest breakpoint of
    // each line.
    void gather_lines(const Block& b, int64_t hk, Scratch& s) {
        const float scale = l_.softcap ? l_.scale / l_.softcap : l_.scale * LOG2_E;
        for (int64_t m = 0; m < b.n_rows * group_; ++m) {
            const int64_t r = b.row + m / group_, h = hk * group_ + m % group_;
            scaled(l_.K, l_.q.at(r, h), scale, s.q.get() + m * l_.K);
            float* g = s.g.get() + m * Vp_;
            std::copy_n(g_.get() + (r * l_.H + h) * Vp_, Vp_, g);
            if (l_.value_gate.data) {
                const float* gate = l_.value_gate.at(r, h);
                for (int64_t i = 0; i < l_.V; ++i) {
                    g[i] *= gate[i];
                    s.gate.get()[m * Vp_ + i] = gate[i] * gate[i];
                }
            }
            const float* y = s.y.get() + m / group_ * Dp_;
            const float* rho_inv = rho_inv_.get() + h * Dp_;
            F low = set1(FLT_MAX);
            for (int64_t i = 0; i < Dp_; i += W)
                low = min(low, abs(load(y + i)) * load(rho_inv + i));
            s.smallest_breakpoint[m] = smallest(low);
        }
    }

    // Whether any of the lines m to m + n sees the panel that begins at the key.
    static bool any_sees(int64_t m, int64_t n, int64_t key, const Scratch& s) {
        for (int64_t i = m; i < m + n; ++i)
            if (s.line_first[i] <= key && key < s.line_last[i]) return true;
        return false;
    }

    void scores(const Block& b, int64_t hk, float* tile, Scratch& s) {
        const int64_t lines = b.n_rows * group_;
        for (int64_t key = s.line_first[0]; key < s.line_last[lines - 1]; key += NR) {
            const float* panel = K_panels_.get() + (hk * n_keys_ + key - first_key_) * l_.K;
            for (int64_t m = 0; m < lines; m += MR) {
                const int64_t n = std::min<int64_t>(MR, lines - m);
                if (any_sees(m, n, key, s))
                    product(static_cast<int>(n), l_.K, s.q.get() + m * l_.K, l_.K, panel, NR,
                            tile + m * b.stride + key - b.key, b.stride);
            }
        }
    }

    // Scores become e, zero where a key is not visible; w_scale = w / e.
    void softmax(const Block& b, int64_t hk, int64_t m, float* tile, Scratch& s) {
        const int64_t row = b.row + m / group_, h = hk * group_ + m % group_;
        const int64_t first = s.line_first[m], last = s.line_last[m];
        float* line = tile + m * b.stride - b.key;
        if (l_.softcap)
            for (int64_t j = first; j < last; j += W)
                store(line + j, tanh(load(line + j)) * set1(l_.softcap * LOG2_E));
        if (l_.alibi_slopes)
            for (int64_t j = first; j < last; ++j)
                line[j] += l_.alibi_slopes[h] * LOG2_E * static_cast<float>(j - l_.rows[row]);
        std::fill(line + first, line + first_visible(row), -INFINITY);
        std::fill(line + last_visible(row), line + last, -INFINITY);

        float top;
        if (l_.log_sum_exp) {
            top = l_.log_sum_exp[row * l_.H + h] * LOG2_E;
        } else {
            F tops = set1(-INFINITY);
            for (int64_t j = first; j < last; j += W) tops = max(tops, load(line + j));
            top = largest(tops);
            if (l_.sinks) top = std::max(top, l_.sinks[h] * LOG2_E);
        }
        double total = 0;
        for (int64_t chunk = first / CHUNK * CHUNK; chunk < last; chunk += CHUNK) {
            const int64_t stop = std::min(last, chunk + CHUNK);
            F lanes = set1(0.0f);
            for (int64_t j = std::max(first, chunk); j < stop; j += W) {
                const F e = exp2(load(line + j) - set1(top));
                store(line + j, e);
                lanes = lanes + e;
            }
            total += sum(lanes);
        }
        if (l_.log_sum_exp) total = 1;
        else if (l_.sinks) total += std::exp2(l_.sinks[h] * LOG2_E - top);
        s.w_scale[m] = (l_.row_scale ? l_.row_scale[row] : 1.0f) / static_cast<float>(total);
    }

    // e becomes max(lin + offset, floor); pairs where that is above the floor, and a above the
    // smallest breakpoint, are listed.
    void linear(const Block& b, int64_t hk, float* tile, Scratch& s) {
        const int64_t lines = b.n_rows * group_;
        for (int64_t m = 0; m < lines; ++m) {
            s.listed[m].n = 0;
            s.line_sum[hk * lines + m] = s.line_linear[hk * lines + m] = 0;
        }
        const int64_t begin = s.line_first[0], end = s.line_last[lines - 1];
        for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
            const int64_t stop = std::min(end, chunk + CHUNK);
            for (int64_t key = std::max(begin, chunk); key < stop; key += NR) {
                const float* panel = V_panels_.get() + (hk * n_keys_ + key - first_key_) * l_.V;
                for (int64_t m = 0; m < lines; m += MR) {
                    const int64_t n = std::min<int64_t>(MR, lines - m);
                    if (!any_sees(m, n, key, s)) continue;
                    product(static_cast<int>(n), l_.V, s.g.get() + m * Vp_, Vp_, panel, NR,
                            s.dots.get() + m * CHUNK + key - chunk, CHUNK);
                    if (l_.value_gate.data)
                        product<true>(static_cast<int>(n), l_.V, s.gate.get() + m * Vp_, Vp_, panel,
                                      NR, s.squares.get() + m * CHUNK + key - chunk, CHUNK);
                }
            }
            for (int64_t m = 0; m < lines; ++m) {
                const int64_t first = std::max(s.line_first[m], chunk);
                const int64_t last = std::min(s.line_last[m], stop);
                if (first >= last) continue;
                const auto chunk_of =
                    l_.value_gate.data
                        ? (shifted() ? &Scorer::linear_chunk<true, true>
                                     : &Scorer::linear_chunk<true, false>)
                        : (shifted() ? &Scorer::linear_chunk<false, true>
                                     : &Scorer::linear_chunk<false, false>);
                (this->*chunk_of)(b, hk, m, chunk, first, last, tile, s);
            }
        }
    }

    // Whether a pair without weight has a proximity.
    bool shifted() const { return l_.offset || l_.floor > 0; }

    template <bool gated, bool shifted>
    void linear_chunk(const Block& b, int64_t hk, int64_t m, int64_t chunk, int64_t first,
                      int64_t last, float* tile, Scratch& s) {
        float* line = tile + m * b.stride - b.key;
        const float* dots = s.dots.get() + m * CHUNK - chunk;
        const float* squares = s.squares.get() + m * CHUNK - chunk;
        const float* norm = v_norm_.get() + hk * n_keys_ - first_key_;
        const F w_scale = set1(s.w_scale[m]);
        const F a_scale = set1(std::fabs(s.w_scale[m]) * ROUND_UP);
        const F smallest = set1(s.smallest_breakpoint[m]);
        const F zero = set1(0.0f);
        const int64_t row = b.row + m / group_;
        const F offset = set1(l_.offset ? l_.offset[row] : 0.0f);
        const F floor = set1(l_.floor);
        const F first_seen = set1(static_cast<float>(first_visible(row)));
        const F last_seen = set1(static_cast<float>(last_visible(row) - 1));
        Listed& list = s.listed[m];
        list.reserve(CHUNK + W);
        float *key = &list.key[list.n], *list_w = &list.w[list.n], *list_a = &list.a[list.n];
        int64_t n = 0;
        F lanes = zero, linear_lanes = zero;
        for (int64_t j = first; j < last; j += W) {
            const F e = load(line + j);
            const F w = e * w_scale;
            const F lin = w * load(dots + j);
            const F v_norm = gated ? sqrt(load(squares + j)) : load(norm + j);
            const F a = e * a_scale * v_norm;
            F positive = max(lin, zero);
            M listed = both(less(zero, lin), less(smallest, a));
            if constexpr (shifted) {
                const F keys = iota() + set1(static_cast<float>(j));
                const F bound = lin + offset;
                positive = unless(less(keys, first_seen),
                                  unless(less(last_seen, keys), max(bound, floor)));
                listed = both(less(floor, positive), less(smallest, a));
            }
            store(line + j, positive);
            lanes = lanes + unless(listed, positive);
            linear_lanes = linear_lanes + lin;
            if (const unsigned which = bits(listed)) {
                store(key + n, compressed(iota() + set1(static_cast<float>(j)), which));
                store(list_w + n, compressed(w, which));
                store(list_a + n, compressed(a, which));
                n += __builtin_popcount(which);
            }
        }
        list.n += n;
        s.line_sum[hk * b.n_rows * group_ + m] += sum(lanes);
        s.line_linear[hk * b.n_rows * group_ + m] += sum(linear_lanes);
    }

    // Takes the corrections off the listed pairs of a line.
    //
    // Candidates (the coordinates whose breakpoint is below the largest a) and pairs are put in
    // order by buckets of breakpoint or a, 16 to an octave; a pair's extent, the coordinates that
    // it visits, is all buckets up to its own. Pairs come longest extent first. Long ones take ND
    // coordinates at a time, all pairs before the next ND, so that those columns of W_O are read
    // once; short ones take one coordinate for ND pairs at a time.
    void correct(const Block& b, int64_t hk, int64_t m, float* tile, Scratch& s) {
        const int64_t n_pairs = s.listed[m].n;
        if (!n_pairs) return;
        order_candidates(m, hk, s);
        order_pairs(b, m, hk, s);

        const int64_t width = round_up(l_.V, W);
        float* line = tile + m * b.stride - b.key;
        double line_sum = 0;
        int64_t n_long = 0;
        while (n_long < n_pairs && s.pairs[n_long].extent > SHORT) ++n_long;
        std::fill_n(s.over.begin(), n_long * ND, 0.0f);
        for (int64_t c = 0; n_long && c < s.pairs[0].extent; c += ND) {
            const float* const* columns = s.columns.data() + c;
            const float* y = s.candidate_y.get() + c;
            float* over = s.over.data();
            const OrderedPair* end = s.pairs.data() + n_long;
            for (const OrderedPair* pair = s.pairs.data(); pair < end && pair->extent > c; ++pair) {
                float p[ND];
                dots(width, pair->v, columns, p);
                for (int k = 0; k < ND; k += W, over += W)
                    store(over, load(over) + beyond(set1(pair->w) * load(p + k), load(y + k)));
            }
        }
        for (int64_t i = 0; i < n_long; ++i) {
            F over = set1(0.0f);
            for (int k = 0; k < ND; k += W) over = over + load(s.over.data() + i * ND + k);
            line_sum += corrected(line[s.pairs[i].key], sum(over));
        }
        for (int64_t start = n_long; start < n_pairs; start += ND) {
            const int64_t n = std::min<int64_t>(ND, n_pairs - start);
            const float* v[ND];
            float w[ND], over[ND] = {};
            for (int64_t i = 0; i < ND; ++i) {
                const OrderedPair& pair = s.pairs[start + std::min(i, n - 1)];
                v[i] = pair.v;
                w[i] = pair.w;
            }
            for (int64_t c = 0; c < s.pairs[start].extent; ++c) {
                float p[ND];
                dots(width, s.columns[c], v, p);
                const F y = set1(s.candidate_y.get()[c]);
                for (int k = 0; k < ND; k += W)
                    store(over + k, load(over + k) + beyond(load(w + k) * load(p + k), y));
            }
            for (int64_t i = 0; i < n; ++i)
                line_sum += corrected(line[s.pairs[start + i].key], over[i]);
        }
        s.line_sum[hk * b.n_rows * group_ + m] += line_sum;
    }

    // max(s p - |y|, 0)
    static F beyond(F p, F y) { return max(flip(p - y, sign_of(y)), set1(0.0f)); }

    float corrected(float& proximity, float over) const {
        return proximity = std::max(proximity - 2 * over, l_.floor);
    }

    // The buckets of non-negative floats x; `top_bits` belong to the largest there can be.
    static void buckets(int64_t n, const float* __restrict x, int32_t top_bits,
                        int32_t* __restrict out) {
        for (int64_t i = 0; i < n; ++i)
            out[i] = std::max(0, N_BUCKETS - 1 - ((top_bits - float_bits(x[i])) >> BUCKET_SHIFT));
    }

    // Columns of W_O and y of the coordinates whose breakpoint is below the line's largest a,
    // and where each bucket of breakpoints ends.
    void order_candidates(int64_t m, int64_t hk, Scratch& s) {
        const float* y = s.y.get() + m / group_ * Dp_;
        const int64_t h = hk * group_ + m % group_;
        const float* rho_inv = rho_inv_.get() + h * Dp_;
        const Listed& list = s.listed[m];
        const float a_max = *std::max_element(list.a.begin(), list.a.begin() + list.n);
        s.top_bits = float_bits(a_max);
        float *points = s.point.data(), *coordinate = s.coordinate.data();
        int64_t n = 0;
        F coordinates = iota();
        for (int64_t i = 0, stop = Dp_; i < stop; i += W) {
            const F point = abs(load(y + i)) * load(rho_inv + i);
            const unsigned below = bits(less(point, set1(a_max)));
            store(points + n, compressed(point, below));
            store(coordinate + n, compressed(coordinates, below));
            coordinates = coordinates + set1(W);
            n += __builtin_popcount(below);
        }
        int32_t* bucket = s.bucket.data();
        buckets(n, points, s.top_bits, bucket);
        int32_t* end = s.bucket_end;
        std::fill_n(end, N_BUCKETS + 1, 0);
        for (int64_t c = 0; c < n; ++c) ++end[bucket[c] + 1];
        for (int i = 0; i < N_BUCKETS; ++i) end[i + 1] += end[i];
        const float* W_T = W_T_.at(h, 0);
        float* candidate_y = s.candidate_y.get();
        const float** columns = s.columns.data();
        for (int64_t c = 0, stride = W_T_.s1; c < n; ++c) {
            const int32_t at = end[bucket[c]]++;  // a bucket's begin becomes its end
            const int64_t i = static_cast<int64_t>(coordinate[c]);
            columns[at] = W_T + i * stride;
            candidate_y[at] = y[i];
        }
        for (int64_t c = n; c < n + ND; ++c) {
            columns[c] = W_T;
            candidate_y[c] = FLT_MAX;
        }
    }

    // The listed pairs, longest extent first, with the rows of gate * v that they need.
    void order_pairs(const Block& b, int64_t m, int64_t hk, Scratch& s) {
        const Listed& list = s.listed[m];
        const size_t n_pairs = static_cast<size_t>(list.n);
        if (s.pairs.size() < n_pairs) {
            s.pairs.resize(n_pairs);
            s.over.resize(n_pairs * ND);
            s.pair_bucket.resize(n_pairs);
        }
        buckets(list.n, list.a.data(), s.top_bits, s.pair_bucket.data());
        const int32_t* bucket = s.pair_bucket.data();
        int32_t begin[N_BUCKETS + 1] = {};
        for (int64_t i = 0; i < list.n; ++i) ++begin[N_BUCKETS - bucket[i]];
        for (int i = 0; i < N_BUCKETS; ++i) begin[i + 1] += begin[i];
        const float *key = list.key.data(), *w = list.w.data();
        const float* v = l_.v.data + hk * l_.v.s1;
        OrderedPair* pairs = s.pairs.data();
        int64_t visited = 0;
        for (int64_t i = 0, n = list.n, stride = l_.v.s0; i < n; ++i) {
            const int64_t j = static_cast<int64_t>(key[i]);
            const int32_t extent = s.bucket_end[bucket[i]];
            pairs[begin[N_BUCKETS - 1 - bucket[i]]++] = {v + j * stride, j, w[i], extent};
            visited += extent;
        }
        s.counters.visited += visited;
        s.counters.listed += list.n;
        if (l_.V % W || l_.value_gate.data)
            gate_pairs(list.n, b.row + m / group_, hk * group_ + m % group_, s);
    }

    // Copies of the pairs' v: padded to whole vectors, times the gate.
    void gate_pairs(int64_t n, int64_t row, int64_t h, Scratch& s) {
        const int64_t width = round_up(l_.V, W);
        if (static_cast<int64_t>(s.gated.size()) < n * width)
            s.gated.resize(static_cast<size_t>(n * width));
        for (int64_t i = 0; i < n; ++i) {
            float* gated = s.gated.data() + i * width;
            std::copy_n(s.pairs[i].v, l_.V, gated);
            std::fill(gated + l_.V, gated + width, 0.0f);
            if (l_.value_gate.data) {
                const float* gate = l_.value_gate.at(row, h);
                for (int64_t k = 0; k < l_.V; ++k) gated[k] *= gate[k];
            }
            s.pairs[i].v = gated;
        }
    }

    static int32_t float_bits(float x) {
        int32_t as_int;
        std::memcpy(&as_int, &x, sizeof x);
        return as_int;
    }

    // Denominator, importances and edges of a row.
    void finish(const Block& b, int64_t r, Scratch& s, Edges& edges) {
        const int64_t row = b.row + r, lines = b.n_rows * group_;
        const auto line_of = [&](int64_t h) {
            return h / group_ * lines + r * group_ + h % group_;
        };
        const auto of = [&](const Matrix& part) {
            return proximity(l_.D, part.row(row), l_.y.row(row), l_.offset ? l_.offset[row] : 0,
                             l_.floor);
        };
        const double residual = of(l_.resid_pre), ffn = l_.ffn.data ? of(l_.ffn) : 0;
        double total = residual + ffn, linear = 0;
        for (int64_t h = 0; h < l_.H; ++h) {
            total += s.line_sum[line_of(h)];
            linear += s.line_linear[line_of(h)];
        }
        out_.linear[row] = static_cast<float>(linear);

        const int64_t first = first_visible(row), last = last_visible(row);
        out_.unattributed[row] = total == 0;
        if (total == 0) {
            // Each of the n parts gets 1 / n.
            const double n_parts = 1 + l_.H * (last - first) + (l_.ffn.data ? 1 : 0);
            out_.total[row] = static_cast<float>(n_parts);
            const float share = static_cast<float>(1 / n_parts);
            out_.residual[row] = share;
            if (out_.ffn) out_.ffn[row] = share;
            const float head = static_cast<float>((last - first) / n_parts);
            std::fill_n(out_.head_total + row * l_.H, l_.H, head);
            const float weight = static_cast<float>(l_.H / n_parts);
            for (int64_t j = first; j < last && weight > l_.keep; ++j) {
                add_edge(edges, row, j, weight);
                edges.head_weight.insert(edges.head_weight.end(), l_.H, share);
            }
            return;
        }
        out_.total[row] = static_cast<float>(total);
        out_.residual[row] = static_cast<float>(residual / total);
        if (out_.ffn) out_.ffn[row] = static_cast<float>(ffn / total);
        for (int64_t h = 0; h < l_.H; ++h)
            out_.head_total[row * l_.H + h] = static_cast<float>(s.line_sum[line_of(h)] / total);

        const F threshold = set1(static_cast<float>(l_.keep * total));
        const float* tile = s.tile.get() - b.key;
        const float** head_lines = s.head_lines.data();
        for (int64_t h = 0; h < l_.H; ++h) head_lines[h] = tile + line_of(h) * b.stride;
        const int64_t n_heads = l_.H, stop = s.line_last[r * group_];
        for (int64_t j = s.line_first[r * group_]; j < stop; j += W) {
            F weights = set1(0.0f);
            for (int64_t h = 0; h < n_heads; ++h) weights = weights + load(head_lines[h] + j);
            unsigned kept = bits(less(threshold, weights));
            if (!kept) continue;
            float lane[W];
            store(lane, weights);
            for (; kept; kept &= kept - 1) {
                const int i = __builtin_ctz(kept);
                add_edge(edges, row, j + i, static_cast<float>(lane[i] / total));
                for (int64_t h = 0; h < n_heads; ++h)
                    edges.head_weight.push_back(
                        static_cast<float>(head_lines[h][j + i] / total));
            }
        }
    }

    static void add_edge(Edges& edges, int64_t row, int64_t source, float weight) {
        edges.row.push_back(row);
        edges.source.push_back(source);
        edges.weight.push_back(weight);
    }

    const Layer& l_;
    Scores& out_;
    const int64_t group_, Vp_, Dp_, first_key_, n_keys_, BT_;
    int64_t n_blocks_;
    const bool W_T_in_place_;
    const Buffer W_T_buffer_;
    const Tensor3 W_T_;  // [H, D, Vp]
    const Buffer rho_inv_, v_norm_, K_panels_, V_panels_;
    const int64_t n_groups_;
    std::vector<uint8_t> signs_;  // [R, n_groups], see form_g
    const Buffer g_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
};

void score_attention(const Layer& layer, int n_threads, Scores& out) {
    // About as many floats as the products and W_O take: 0.1 ms at ALONE_FLOATS.
    const int64_t keys = layer.R ? layer.rows[layer.R - 1] + 1 : 0;
    const int64_t work = layer.H * layer.D * layer.V * (1 + layer.R / 4) +
                         layer.H * layer.R * keys * (layer.K + layer.V);
    Scorer(layer, work < ALONE_FLOATS ? 1 : n_threads, out).run();
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
