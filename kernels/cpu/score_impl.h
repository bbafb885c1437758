// One layer's scoring (docs/design.md, section 3.1). No include guard: see vec.h.
//
// With s = sign(y), w = row_scale * alpha and g = gate * (W_O[h] @ s), for every visible pair
//
//     lin = w (v . g)                       proximity = max(lin - correction, 0)
//     a = |w| |gate * v| (rounded up)       correction = 2 sum_i max(s_i p_i - |y_i|, 0)
//
// over the coordinates i with |y_i| / rho_i < a, rho_i = |W_O[h][:, i]|, p_i = w (gate * v) . W_O[h][:, i].
//
// Phases: W_O is transposed and K, V packed; g is formed; blocks of BT rows are scored, start to
// finish, one thread a block. In a block the (row, head) pairs that share a KV head are `lines`:
// line m = row * group + head in group; lines read the same tiles of K and V.
//
// Shapes: W_T [H, D, Vp], rho_inv [H, Dp], g [R, H, Vp], K panels [H_kv, keys / NR, K, NR] (V alike),
// tile [H_kv, lines, keys of the block]: scores, then e = exp(score - max), then proximities.
//
// A row's arithmetic depends on neither the block nor the thread that it falls to: chunks of keys
// begin at fixed positions, and each chunk's float sums are added up in double.

constexpr int64_t CHUNK = 64;          // keys per tile of G V^T, a multiple of NR
constexpr int64_t G_ROWS = 4 * MR;     // rows per task of g
constexpr int64_t W_COLUMNS = 64;      // coordinates per task of W_T
constexpr int64_t BLOCK_ROWS = 12;     // BT
constexpr int64_t TILE_FLOATS = 1 << 23;  // of one thread, if a block of MR rows allows
constexpr float ROUND_UP = 1 + 1.0f / 1024;  // ../breakpoints.py
constexpr float LOG2_E = 1.4426950408889634f;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A cache-line-aligned array of floats.
class Buffer {
  public:
    explicit Buffer(int64_t n)
        : data_(static_cast<float*>(std::aligned_alloc(64, round_up(std::max<int64_t>(n, 1) * 4, 64)))) {
        if (!data_) throw std::bad_alloc();
    }
    float* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data_;
};

struct Pair {
    int64_t key;
    float w, a;
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

// max(|y|_1 - |y - part|_1, 0), subtracted coordinate by coordinate: a few huge coordinates of y
// would swallow the rest of a difference of two norms.
inline double proximity(int64_t D, const float* part, const float* y) {
    double total = 0;
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
    return std::max(total, 0.0);
}

// One thread's memory.
struct Scratch {
    Scratch(int64_t lines, int64_t tile, int64_t rows, int64_t group_lines, const Layer& l,
            int64_t Vp, int64_t Dp)
        : tile(tile),
          y(rows * Dp),
          signs(G_ROWS * l.D),
          q(group_lines * l.K),
          g(group_lines * Vp),
          gate(l.value_gate.data ? group_lines * Vp : 0),
          dots(group_lines * CHUNK),
          squares(l.value_gate.data ? group_lines * CHUNK : 0),
          part(Vp),
          candidate_y(l.D + 8),
          w_scale(group_lines),
          smallest_breakpoint(group_lines),
          line_sum(lines),
          listed(group_lines),
          candidates(l.D),
          ordered(l.D + 8) {}

    Buffer tile, y, signs, q, g, gate, dots, squares, part, candidate_y;
    std::vector<float> w_scale, smallest_breakpoint;
    std::vector<double> line_sum;  // [H_kv, lines] sums of proximities over keys
    std::vector<std::vector<Pair>> listed;
    struct Candidate {
        int32_t bucket;
        int32_t i;
    };
    std::vector<Candidate> candidates;
    std::vector<int32_t> ordered;
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
          W_T_(layer.H * layer.D * Vp_),
          rho_inv_(layer.H * Dp_),
          v_norm_(layer.H_kv * n_keys_),
          K_panels_(layer.H_kv * n_keys_ * layer.K),
          V_panels_(layer.H_kv * n_keys_ * layer.V),
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
        Team::run(static_cast<int>(scratch_.size()),
                  {{w_tasks + key_tasks,
                    [&](int64_t task, int thread) {
                        Clock clock(scratch_[thread]->counters);
                        task < w_tasks ? transpose_weights(task) : pack_keys(task - w_tasks);
                        clock.lap(PREPARE);
                    }},
                   {(l_.R + G_ROWS - 1) / G_ROWS,
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
        while (rows > MR && rows * l_.H * n_keys_ > TILE_FLOATS) rows /= 2;
        return std::min(rows, (l_.R + n_threads - 1) / n_threads);
    }

    // W_T [D, Vp] and rho_inv of one head, W_COLUMNS coordinates a task.
    void transpose_weights(int64_t task) {
        const int64_t h = task % l_.H, start = task / l_.H * W_COLUMNS;
        const int64_t stop = std::min(l_.D, start + W_COLUMNS);
        float* W_T = W_T_.get() + h * l_.D * Vp_;
        for (int64_t i = start; i < stop; ++i)
            std::fill(W_T + i * Vp_ + l_.V, W_T + (i + 1) * Vp_, 0.0f);
        if (l_.W_O.s1 == 1) {
            for (int64_t i = start; i < stop; ++i)
                std::copy_n(l_.W_O.data + h * l_.W_O.s0 + i * l_.W_O.s2, l_.V, W_T + i * Vp_);
        } else {
            for (int64_t v = 0; v < l_.V; ++v) {
                const float* row = l_.W_O.at(h, v);
                for (int64_t i = start; i < stop; ++i) W_T[i * Vp_ + v] = row[i * l_.W_O.s2];
            }
        }
        float* rho_inv = rho_inv_.get() + h * Dp_;
        for (int64_t i = start; i < stop; ++i) {
            F squares = set1(0.0f);
            for (int64_t v = 0; v < Vp_; v += W) {
                const F w = load(W_T + i * Vp_ + v);
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
            for (int64_t j = 0; j < n; ++j) {
                const float* from = x.at(first_key_ + start + j, hk);
                float* to = panels + j / NR * NR * width + j % NR;
                for (int64_t i = 0; i < width; ++i) to[i * NR] = from[i];
            }
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

    // g [rows, H, Vp] = s @ W_T of G_ROWS rows.
    void form_g(int64_t task, Scratch& s) {
        Clock clock(s.counters);
        const int64_t start = task * G_ROWS, stop = std::min(l_.R, start + G_ROWS);
        float* signs = s.signs.get();
        for (int64_t r = start; r < stop; ++r) {
            const float* y = l_.y.row(r);
            float* to = signs + (r - start) * l_.D;
            for (int64_t i = 0; i < l_.D; ++i) to[i] = y[i] >= 0 ? 1.0f : -1.0f;
        }
        for (int64_t h = 0; h < l_.H; ++h)
            for (int64_t v = 0; v < Vp_; v += NR)
                for (int64_t r = start; r < stop; r += MR)
                    product(static_cast<int>(std::min<int64_t>(MR, stop - r)), l_.D,
                            signs + (r - start) * l_.D, l_.D, W_T_.get() + h * l_.D * Vp_ + v, Vp_,
                            g_.get() + (r * l_.H + h) * Vp_ + v, l_.H * Vp_);
        clock.lap(PREPARE);
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
            for (int64_t i = 0; i < l_.D; ++i) y[i] = from[i] + 0.0f;  // -0.0 becomes 0.0
            std::fill(y + l_.D, y + Dp_, FLT_MAX);
            s.counters.pairs += l_.H * (last_visible(row + r) - first_visible(row + r));
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

    // q (times what the scores are to be scaled by), g, gate^2 and the smallest breakpoint per line.
    void gather_lines(const Block& b, int64_t hk, Scratch& s) {
        const float scale = l_.softcap ? l_.scale / l_.softcap : l_.scale * LOG2_E;
        for (int64_t m = 0; m < b.n_rows * group_; ++m) {
            const int64_t r = b.row + m / group_, h = hk * group_ + m % group_;
            const float* q = l_.q.at(r, h);
            for (int64_t i = 0; i < l_.K; ++i) s.q.get()[m * l_.K + i] = q[i] * scale;
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
            for (int64_t i = 0; i < Dp_; i += W) low = min(low, abs(load(y + i)) * load(rho_inv + i));
            s.smallest_breakpoint[m] = smallest(low);
        }
    }

    // Which whole panels the lines m to m + n may see: keys [first, last).
    void panel_range(const Block& b, int64_t m, int64_t n, int64_t& first, int64_t& last) const {
        first = first_visible(b.row + m / group_) / NR * NR;
        last = round_up(last_visible(b.row + (m + n - 1) / group_), NR);
    }

    void scores(const Block& b, int64_t hk, float* tile, Scratch& s) {
        const int64_t lines = b.n_rows * group_;
        int64_t begin, end, ignored;
        panel_range(b, 0, 1, begin, ignored);
        panel_range(b, lines - 1, 1, ignored, end);
        for (int64_t key = begin; key < end; key += NR) {
            const float* panel = K_panels_.get() + (hk * n_keys_ + key - first_key_) * l_.K;
            for (int64_t m = 0; m < lines; m += MR) {
                const int64_t n = std::min<int64_t>(MR, lines - m);
                int64_t first, last;
                panel_range(b, m, n, first, last);
                if (first <= key && key < last)
                    product(static_cast<int>(n), l_.K, s.q.get() + m * l_.K, l_.K, panel, NR,
                            tile + m * b.stride + key - b.key, b.stride);
            }
        }
    }

    // Scores become e, zero where a key is not visible; w_scale = w / e.
    void softmax(const Block& b, int64_t hk, int64_t m, float* tile, Scratch& s) {
        const int64_t row = b.row + m / group_, h = hk * group_ + m % group_;
        int64_t first, last;
        panel_range(b, m, 1, first, last);
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

    // e becomes max(lin, 0); pairs with lin > 0 and a above the smallest breakpoint are listed.
    void linear(const Block& b, int64_t hk, float* tile, Scratch& s) {
        const int64_t lines = b.n_rows * group_;
        for (int64_t m = 0; m < lines; ++m) {
            s.listed[m].clear();
            s.line_sum[hk * lines + m] = 0;
        }
        int64_t begin, end, ignored;
        panel_range(b, 0, 1, begin, ignored);
        panel_range(b, lines - 1, 1, ignored, end);
        for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
            for (int64_t key = std::max(begin, chunk); key < std::min(end, chunk + CHUNK); key += NR) {
                const float* panel = V_panels_.get() + (hk * n_keys_ + key - first_key_) * l_.V;
                for (int64_t m = 0; m < lines; m += MR) {
                    const int64_t n = std::min<int64_t>(MR, lines - m);
                    int64_t first, last;
                    panel_range(b, m, n, first, last);
                    if (key < first || last <= key) continue;
                    product(static_cast<int>(n), l_.V, s.g.get() + m * Vp_, Vp_, panel, NR,
                            s.dots.get() + m * CHUNK + key - chunk, CHUNK);
                    if (l_.value_gate.data)
                        product<true>(static_cast<int>(n), l_.V, s.gate.get() + m * Vp_, Vp_, panel,
                                      NR, s.squares.get() + m * CHUNK + key - chunk, CHUNK);
                }
            }
            for (int64_t m = 0; m < lines; ++m) {
                int64_t first, last;
                panel_range(b, m, 1, first, last);
                linear_chunk(b, hk, m, chunk, std::max(first, chunk), std::min(last, chunk + CHUNK),
                             tile, s);
            }
        }
    }

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
        F lanes = zero;
        for (int64_t j = first; j < last; j += W) {
            const F e = load(line + j);
            const F w = e * w_scale;
            const F lin = w * load(dots + j);
            const F v_norm = l_.value_gate.data ? sqrt(load(squares + j)) : load(norm + j);
            const F a = e * a_scale * v_norm;
            const F positive = max(lin, zero);
            const M listed = both(less(zero, lin), less(smallest, a));
            store(line + j, positive);
            lanes = lanes + unless(listed, positive);
            if (unsigned lanes_listed = bits(listed)) {
                float w_lane[W], a_lane[W];
                store(w_lane, w);
                store(a_lane, a);
                for (; lanes_listed; lanes_listed &= lanes_listed - 1) {
                    const int i = __builtin_ctz(lanes_listed);
                    s.listed[m].push_back({j + i, w_lane[i], a_lane[i]});
                }
            }
        }
        s.line_sum[hk * b.n_rows * group_ + m] += sum(lanes);
    }

    // Takes the correction off the listed pairs of a line.
    //
    // Candidates, the coordinates whose breakpoint is below the largest a, are put in order by
    // buckets of breakpoints, 16 to an octave; a pair visits all buckets up to its own a's.
    void correct(const Block& b, int64_t hk, int64_t m, float* tile, Scratch& s) {
        const std::vector<Pair>& pairs = s.listed[m];
        if (pairs.empty()) return;
        constexpr int N_BUCKETS = 128, SHIFT = 19;
        const int64_t r = m / group_, h = hk * group_ + m % group_;
        float a_max = 0;
        for (const Pair& pair : pairs) a_max = std::max(a_max, pair.a);
        const int32_t top = float_bits(a_max);
        const auto bucket = [top](float x) {
            return std::max(0, N_BUCKETS - 1 - ((top - float_bits(x)) >> SHIFT));
        };

        const float* y = s.y.get() + r * Dp_;
        const float* rho_inv = rho_inv_.get() + h * Dp_;
        int32_t end[N_BUCKETS + 1] = {};
        int64_t n = 0;
        for (int64_t i = 0; i < Dp_; i += W) {
            const F point = abs(load(y + i)) * load(rho_inv + i);
            unsigned below = bits(less(point, set1(a_max)));
            if (!below) continue;
            float lane[W];
            store(lane, point);
            for (; below; below &= below - 1) {
                const int lane_i = __builtin_ctz(below);
                const int to = bucket(lane[lane_i]);
                s.candidates[n++] = {to, static_cast<int32_t>(i) + lane_i};
                ++end[to + 1];
            }
        }
        for (int i = 0; i < N_BUCKETS; ++i) end[i + 1] += end[i];
        float* candidate_y = s.candidate_y.get();
        for (int64_t c = 0; c < n; ++c) {
            const int32_t at = end[s.candidates[c].bucket]++;  // begin of a bucket becomes its end
            s.ordered[at] = s.candidates[c].i;
            candidate_y[at] = y[s.candidates[c].i];
        }
        for (int64_t c = n; c < round_up(n, 8); ++c) {
            s.ordered[c] = 0;
            candidate_y[c] = FLT_MAX;
        }

        const float* W_T = W_T_.get() + h * l_.D * Vp_;
        const float* gate = l_.value_gate.data ? l_.value_gate.at(b.row + r, h) : nullptr;
        float* line = tile + m * b.stride - b.key;
        float* part = s.part.get();
        std::fill(part + l_.V, part + Vp_, 0.0f);
        double& line_sum = s.line_sum[hk * b.n_rows * group_ + m];
        for (const Pair& pair : pairs) {
            const float* v = l_.v.at(pair.key, hk);
            for (int64_t i = 0; i < l_.V; ++i) part[i] = pair.w * v[i];
            if (gate)
                for (int64_t i = 0; i < l_.V; ++i) part[i] *= gate[i];
            const int64_t extent = end[bucket(pair.a)];
            float over[8] = {};
            for (int64_t c = 0; c < extent; c += 8) {
                const float* column[8];
                for (int i = 0; i < 8; ++i) column[i] = W_T + s.ordered[c + i] * Vp_;
                float p[8];
                eight_dots(Vp_, part, column, p);
                for (int i = 0; i < 8; ++i) {
                    const float beyond = std::copysign(1.0f, candidate_y[c + i]) * (p[i] - candidate_y[c + i]);
                    over[i] += std::max(beyond, 0.0f);
                }
            }
            float correction = 0;
            for (int i = 0; i < 8; ++i) correction += over[i];
            line[pair.key] = std::max(line[pair.key] - 2 * correction, 0.0f);
            line_sum += line[pair.key];
            s.counters.visited += extent;
        }
        s.counters.listed += static_cast<int64_t>(pairs.size());
    }

    static int32_t float_bits(float x) {
        int32_t as_int;
        std::memcpy(&as_int, &x, sizeof x);
        return as_int;
    }

    // Denominator, importances and edges of a row.
    void finish(const Block& b, int64_t r, Scratch& s, Edges& edges) {
        const int64_t row = b.row + r, lines = b.n_rows * group_;
        const auto line_of = [&](int64_t h) { return h / group_ * lines + r * group_ + h % group_; };
        const double residual = proximity(l_.D, l_.resid_pre.row(row), l_.y.row(row));
        const double ffn = l_.ffn.data ? proximity(l_.D, l_.ffn.row(row), l_.y.row(row)) : 0;
        double total = residual + ffn;
        for (int64_t h = 0; h < l_.H; ++h) total += s.line_sum[line_of(h)];

        const int64_t first = first_visible(row), last = last_visible(row);
        out_.unattributed[row] = total == 0;
        if (total == 0) {
            // Each of the n parts gets 1 / n.
            const double n_parts = 1 + l_.H * (last - first) + (l_.ffn.data ? 1 : 0);
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
        out_.residual[row] = static_cast<float>(residual / total);
        if (out_.ffn) out_.ffn[row] = static_cast<float>(ffn / total);
        for (int64_t h = 0; h < l_.H; ++h)
            out_.head_total[row * l_.H + h] = static_cast<float>(s.line_sum[line_of(h)] / total);

        const float inverse = static_cast<float>(1 / total);
        const float* tile = s.tile.get() - b.key;
        int64_t begin, end;
        panel_range(b, r * group_, 1, begin, end);
        for (int64_t j = begin; j < end; j += W) {
            F weights = set1(0.0f);
            for (int64_t h = 0; h < l_.H; ++h)
                weights = weights + load(tile + line_of(h) * b.stride + j);
            weights = weights * set1(inverse);
            unsigned kept = bits(less(set1(l_.keep), weights));
            if (!kept) continue;
            float lane[W];
            store(lane, weights);
            for (; kept; kept &= kept - 1) {
                const int i = __builtin_ctz(kept);
                add_edge(edges, row, j + i, lane[i]);
                for (int64_t h = 0; h < l_.H; ++h)
                    edges.head_weight.push_back(tile[line_of(h) * b.stride + j + i] * inverse);
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
    const Buffer W_T_, rho_inv_, v_norm_, K_panels_, V_panels_, g_;
    std::vector<std::unique_ptr<Scratch>> scratch_;
};

void score_attention(const Layer& layer, int n_threads, Scores& out) {
    Scorer(layer, n_threads, out).run();
}

// The two parts of resid_post in sequential blocks: resid_mid and the FFN's output.
void score_ffn(const FFNParts& x, int n_threads) {
    constexpr int64_t ROWS = 16;
    const auto run = [&](int64_t task, int) {
        std::vector<float> output(static_cast<size_t>(x.D));
        for (int64_t r = task * ROWS; r < std::min(x.R, (task + 1) * ROWS); ++r) {
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
    Team::run(n_threads, {{(x.R + ROWS - 1) / ROWS, run}});
}
