// Many rows at once (docs/design.md, section 3.1). No include guard: see vec.h.
//
// Phases: W_O is transposed and K, V packed; g is formed; blocks of BT rows are scored, start to
// finish, one thread a block. The lines of a block that share a KV head read the same tiles of K
// and V: line m of them = row * group + head in group.
//
// Shapes: W_T [H, D, Vp], rho_inv [H, Dp], g [R, H, Vp], K panels [H_kv, keys / NR, K, NR] (V
// alike), tile [H_kv, lines, keys of the block]. Vp, Dp: V, D rounded up to whole panels, vectors.
//
// A row's arithmetic depends on neither the block nor the thread that it falls to: chunks of keys
// begin at fixed positions, and each chunk's float sums are added up in double.

constexpr int64_t BLOCK_ROWS = 12;        // BT
constexpr int64_t TILE_FLOATS = 1 << 25;  // in all threads' tiles, unless a block gets too small
constexpr int64_t W_COLUMNS = 128;        // coordinates per task of W_T
constexpr int64_t G_ROWS = 64;            // rows per task of g
constexpr int G_VECTORS = W > 8 ? 4 : 8;  // of g's columns, held in registers
constexpr int64_t G_GROUPS = 8;           // groups of four coordinates whose table fits L1

class Blocks : Lines {
  public:
    Blocks(const Layer& layer, int n_threads, Scores& out)
        : Lines(layer),
          out_(out),
          Vp_(round_up(layer.V, NR)),
          first_key_(layer.R ? first_visible(0) / CHUNK * CHUNK : 0),
          n_keys_(layer.R ? round_up(last_visible(layer.R - 1) - first_key_, CHUNK) : 0),
          BT_(block_rows(n_threads)),
          W_T_in_place_(layer.W_O.s1 == 1 && layer.V == Vp_),
          W_T_buffer_(W_T_in_place_ ? 0 : layer.H * layer.D * Vp_),
          v_norm_(layer.H_kv * n_keys_),
          K_panels_(layer.H_kv * n_keys_ * layer.K),
          V_panels_(layer.H_kv * n_keys_ * layer.V),
          n_groups_((layer.D + 3) / 4),
          signs_(static_cast<size_t>(layer.R * n_groups_)),
          g_(layer.R * layer.H * Vp_) {
        W_T_ = W_T_in_place_ ? Tensor3{layer.W_O.data, layer.W_O.s0, layer.W_O.s2}
                             : Tensor3{W_T_buffer_.get(), layer.D * Vp_, Vp_};
        int64_t widest = 0;
        n_blocks_ = BT_ ? (l_.R + BT_ - 1) / BT_ : 0;
        for (int64_t b = 0; b < n_blocks_; ++b) widest = std::max(widest, block_keys(b));
        for (int i = 0; i < n_threads; ++i)
            threads_.push_back(std::make_unique<Thread>(*this, line_stride(widest)));
        out_.edges.resize(static_cast<size_t>(n_blocks_));
    }

    void run() {
        const int64_t w_tasks = (l_.D + W_COLUMNS - 1) / W_COLUMNS * l_.H;
        const int64_t key_tasks = n_keys_ / CHUNK * l_.H_kv;
        const int64_t row_tasks = (l_.R + G_ROWS - 1) / G_ROWS;
        Team::run(static_cast<int>(threads_.size()),
                  {{w_tasks + key_tasks + row_tasks,
                    [&](int64_t task, int thread) {
                        Clock clock(threads_[thread]->counters);
                        if (task < w_tasks) prepare_weights(task);
                        else if (task < w_tasks + key_tasks) pack_keys(task - w_tasks);
                        else encode_signs(task - w_tasks - key_tasks);
                        clock.lap(PREPARE);
                    }},
                   {row_tasks * l_.H,
                    [&](int64_t task, int thread) { form_g(task, *threads_[thread]); }},
                   // The last blocks have the most keys, so they come first.
                   {n_blocks_, [&](int64_t task, int thread) {
                        score_block(n_blocks_ - 1 - task, *threads_[thread]);
                    }}});
        for (const auto& t : threads_) out_.counters.add(t->counters);
    }

  private:
    // One thread's memory: for a block and, by m, for the lines of one KV head.
    struct Thread : Scratch {
        Thread(const Blocks& of, int64_t stride)
            : Scratch(of.l_, of.Dp_),
              lines(of.BT_ * of.l_.H),
              listed(of.BT_ * of.group_),
              tile(of.BT_ * of.l_.H * stride),
              y(of.BT_ * of.Dp_),
              table(G_GROUPS * 8 * G_VECTORS * W),
              q(of.BT_ * of.group_ * of.l_.K),
              g(of.BT_ * of.group_ * of.Vp_),
              gate(of.l_.value_gate.data ? of.BT_ * of.group_ * of.Vp_ : 0),
              dots(of.BT_ * of.group_ * CHUNK),
              squares(of.l_.value_gate.data ? of.BT_ * of.group_ * CHUNK : 0) {}

        std::vector<Line> lines;  // [H_kv, lines]
        std::vector<Listed> listed;
        Buffer tile, y, table, q, g, gate, dots, squares;
    };

    // First key and number of keys of a block, in whole chunks.
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
            rho_inv[i] = inverse_norm(sum(squares));
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
    // bits 0 to 2 where the sign of the second to fourth differs from the first's.
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

    // g [rows, Vp] of one head and G_ROWS rows = s @ W_T. As s is +-1, four rows of W_T have only
    // 8 sums up to sign. A table holds these, and each row adds one entry instead of four rows.
    void form_g(int64_t task, Thread& s) {
        Clock clock(s.counters);
        const int64_t row_tasks = (l_.R + G_ROWS - 1) / G_ROWS;
        const int64_t h = task / row_tasks, start = task % row_tasks * G_ROWS;
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

    void score_block(int64_t block, Thread& s) {
        const int64_t row = block * BT_;
        const Block b{row, std::min(BT_, l_.R - row), block_first(block),
                      line_stride(block_keys(block))};
        const int64_t n = b.n_rows * group_;
        for (int64_t r = 0; r < b.n_rows; ++r) {
            copy_y(row + r, s.y.get() + r * Dp_);
            s.counters.pairs += l_.H * (last_visible(row + r) - first_visible(row + r));
        }
        Clock clock(s.counters);
        for (int64_t hk = 0; hk < l_.H_kv; ++hk) {
            Line* lines = s.lines.data() + hk * n;
            gather_lines(b, hk, lines, s);
            clock.lap(PREPARE);
            scores(n, hk, lines, s);
            clock.lap(SCORES);
            for (int64_t m = 0; m < n; ++m) softmax(lines[m]);
            clock.lap(SOFTMAX);
            products(n, hk, lines, s);
            clock.lap(LINEAR);
            for (int64_t m = 0; m < n; ++m) correct(lines[m], s.listed[m], s);
            clock.lap(CORRECT);
        }
        for (int64_t r = 0; r < b.n_rows; ++r) {
            s.heads.clear();
            for (int64_t h = 0; h < l_.H; ++h)
                s.heads.push_back(&s.lines[h / group_ * n + r * group_ + h % group_]);
            finish(row + r, s, out_, out_.edges[block]);
        }
        clock.lap(FINISH);
    }

    // The lines of a KV head, and the q (times the scale of scores), g and gate^2 of each.
    void gather_lines(const Block& b, int64_t hk, Line* lines, Thread& s) {
        for (int64_t m = 0; m < b.n_rows * group_; ++m) {
            const int64_t r = b.row + m / group_, h = hk * group_ + m % group_;
            scaled(l_.K, l_.q.at(r, h), q_scale(), s.q.get() + m * l_.K);
            float* g = s.g.get() + m * Vp_;
            std::copy_n(g_.get() + (r * l_.H + h) * Vp_, Vp_, g);
            if (l_.value_gate.data) {
                const float* gate = l_.value_gate.at(r, h);
                for (int64_t i = 0; i < l_.V; ++i) {
                    g[i] *= gate[i];
                    s.gate.get()[m * Vp_ + i] = gate[i] * gate[i];
                }
            }
            Line line{};
            line.row = r;
            line.head = h;
            line.first = first_visible(r) / NR * NR;
            line.last = round_up(last_visible(r), NR);
            line.of_key = s.tile.get() + (hk * b.n_rows * group_ + m) * b.stride - b.key;
            line.y = s.y.get() + m / group_ * Dp_;
            const float* rho_inv = rho_inv_.get() + h * Dp_;
            F low = set1(FLT_MAX);
            for (int64_t i = 0; i < Dp_; i += W)
                low = min(low, abs(load(line.y + i)) * load(rho_inv + i));
            line.smallest_breakpoint = smallest(low);
            lines[m] = line;
            s.listed[m].n = 0;
        }
    }

    // True if any of n lines sees the panel that begins at the key.
    static bool any_sees(int64_t n, const Line* lines, int64_t key) {
        for (int64_t i = 0; i < n; ++i)
            if (lines[i].first <= key && key < lines[i].last) return true;
        return false;
    }

    void scores(int64_t n_lines, int64_t hk, const Line* lines, Thread& s) {
        const int64_t stride = n_lines > 1 ? lines[1].of_key - lines[0].of_key : 0;
        for (int64_t key = lines[0].first; key < lines[n_lines - 1].last; key += NR) {
            const float* panel = K_panels_.get() + (hk * n_keys_ + key - first_key_) * l_.K;
            for (int64_t m = 0; m < n_lines; m += MR) {
                const int64_t n = std::min<int64_t>(MR, n_lines - m);
                if (any_sees(n, lines + m, key))
                    product(static_cast<int>(n), l_.K, s.q.get() + m * l_.K, l_.K, panel, NR,
                            lines[m].of_key + key, stride);
            }
        }
    }

    // v . g, chunk by chunk of keys, passed on to `linear`.
    void products(int64_t n_lines, int64_t hk, Line* lines, Thread& s) {
        const bool gated = l_.value_gate.data;
        const float* norms = v_norm_.get() + hk * n_keys_ - first_key_;
        const int64_t begin = lines[0].first, end = lines[n_lines - 1].last;
        for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
            const int64_t stop = std::min(end, chunk + CHUNK);
            for (int64_t key = std::max(begin, chunk); key < stop; key += NR) {
                const float* panel = V_panels_.get() + (hk * n_keys_ + key - first_key_) * l_.V;
                for (int64_t m = 0; m < n_lines; m += MR) {
                    const int64_t n = std::min<int64_t>(MR, n_lines - m);
                    if (!any_sees(n, lines + m, key)) continue;
                    product(static_cast<int>(n), l_.V, s.g.get() + m * Vp_, Vp_, panel, NR,
                            s.dots.get() + m * CHUNK + key - chunk, CHUNK);
                    if (gated)
                        product<true>(static_cast<int>(n), l_.V, s.gate.get() + m * Vp_, Vp_, panel,
                                      NR, s.squares.get() + m * CHUNK + key - chunk, CHUNK);
                }
            }
            for (int64_t m = 0; m < n_lines; ++m) {
                const int64_t first = std::max(lines[m].first, chunk);
                const int64_t last = std::min(lines[m].last, stop);
                const float* squares = s.squares.get() + m * CHUNK - chunk;
                if (first < last)
                    linear(lines[m], first, last, s.dots.get() + m * CHUNK - chunk,
                           gated ? squares : norms, s.listed[m]);
            }
        }
    }

    Scores& out_;
    const int64_t Vp_, first_key_, n_keys_, BT_;
    int64_t n_blocks_;
    const bool W_T_in_place_;
    const Buffer W_T_buffer_, v_norm_, K_panels_, V_panels_;
    const int64_t n_groups_;
    std::vector<uint8_t> signs_;  // [R, n_groups], see form_g
    const Buffer g_;
    std::vector<std::unique_ptr<Thread>> threads_;
};
