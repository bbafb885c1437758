// One row, as in a decode step (docs/design.md, section 3.1). No include guard: see vec.h.
//
// K, V and W_O are read in place: a single row reads too little of them to pay for packing.
// Tasks depend on shapes alone, and so do the bits of the results.

constexpr int64_t ROW_KEYS = 256;         // keys per task, a multiple of CHUNK
constexpr int64_t COORDINATE_TASKS = 16;  // at most
constexpr int64_t AHEAD = 4096;           // bytes; a processor's own prefetching stops with a page
constexpr int Z_VECTORS = 8;              // of an attention output, held in registers

// The keys of one row in tasks, and its lines.
class Row : protected Lines {
  protected:
    struct Thread : Scratch {
        explicit Thread(const Row& of)
            : Scratch(of.l_, of.Dp_),
              q(of.group_ * of.Kp_),
              g(of.group_ * of.Vp_),
              weights(of.group_ * of.Vp_),
              padded(ND * std::max(of.Kp_, of.Vp_)) {}

        Listed listed;
        Buffer q, g, weights, padded;
    };

    Row(const Layer& layer, int n_threads)
        : Lines(layer),
          Kp_(round_up(layer.K, W)),
          Vp_(round_up(layer.V, W)),
          first_key_(first_visible(0) / CHUNK * CHUNK),
          n_keys_(round_up(last_visible(0) - first_key_, CHUNK)),
          key_tasks_((n_keys_ + ROW_KEYS - 1) / ROW_KEYS),
          scores_(layer.H * n_keys_),
          lines_(static_cast<size_t>(layer.H)) {
        for (int64_t h = 0; h < l_.H; ++h) {
            lines_[h].head = h;
            lines_[h].first = first_visible(0) / NR * NR;
            lines_[h].last = round_up(last_visible(0), NR);
            lines_[h].of_key = scores_.get() + h * n_keys_ - first_key_;
        }
        for (int i = 0; i < n_threads; ++i) threads_.push_back(std::make_unique<Thread>(*this));
    }

    // The keys of a task: from the first to the second.
    std::pair<int64_t, int64_t> keys_of(int64_t task) const {
        const int64_t start = first_key_ + task % key_tasks_ * ROW_KEYS;
        return {std::max(start, lines_[0].first), std::min(start + ROW_KEYS, lines_[0].last)};
    }

    // Products of q and the keys of a task for the heads that share them.
    void read_keys(int64_t task, Thread& s) {
        const int64_t hk = task / key_tasks_;
        for (int64_t m = 0; m < group_; ++m) {
            float* q = s.q.get() + m * Kp_;
            scaled(l_.K, l_.q.at(0, hk * group_ + m), q_scale(), q);
            std::fill(q + l_.K, q + Kp_, 0.0f);
        }
        const int64_t last = last_visible(0) - 1;
        for_keys(task, l_.k, l_.K, s, [&](int64_t j, const float* const* k) {
            for (int i = 0; i < ND; ++i) fetch(l_.v.at(std::min(j + i, last), hk), l_.V, 0);
            for (int64_t m = 0; m < group_; ++m)
                dots(Kp_, s.q.get() + m * Kp_, k, lines_[hk * group_ + m].of_key + j);
        });
    }

    // Hands over the keys of a task, ND at a time: the first of them, and their rows of x [S, H_kv,
    // width], padded to whole vectors. The last visible key is repeated to fill up.
    template <class Use>
    void for_keys(int64_t task, const Tensor3& x, int64_t width, Thread& s, Use use) {
        const int64_t hk = task / key_tasks_, last = last_visible(0) - 1;
        const int64_t padded = round_up(width, W);
        const auto [start, stop] = keys_of(task);
        for (int64_t j = start; j < stop; j += ND) {
            const float* rows[ND];
            for (int k = 0; k < ND; ++k) {
                rows[k] = x.at(std::min(j + k, last), hk);
                fetch(rows[k], width);
                if (width == padded) continue;
                float* copy = s.padded.get() + k * padded;
                std::copy_n(rows[k], width, copy);
                std::fill(copy + width, copy + padded, 0.0f);
                rows[k] = copy;
            }
            use(j, rows);
        }
    }

    static void fetch(const float* row, int64_t width, int64_t ahead = AHEAD) {
        const char* from = reinterpret_cast<const char*>(row) + ahead;
        for (int64_t i = 0; i < 4 * width; i += 64) __builtin_prefetch(from + i);
    }

    const int64_t Kp_, Vp_, first_key_, n_keys_, key_tasks_;
    const Buffer scores_;      // [H, keys]
    std::vector<Line> lines_;  // [H]
    std::vector<std::unique_ptr<Thread>> threads_;
};

// The row's attention output, and its weights. Keys and values are read once: each task has a
// softmax of its own, and these are combined at the end.
class RowAttention : Row {
  public:
    RowAttention(const Layer& layer, int n_threads, const Attention& out)
        : Row(layer, n_threads),
          to_(out),
          z_parts_(key_tasks_ * layer.H * Vp_),
          tops_(static_cast<size_t>(key_tasks_ * layer.H)),
          totals_(tops_.size()) {}

    void run() {
        Team::run(static_cast<int>(threads_.size()),
                  {{key_tasks_ * l_.H_kv,
                    [&](int64_t task, int thread) {
                        read_keys(task, *threads_[thread]);
                        read_values(task);
                    }},
                   {l_.H, [&](int64_t h, int) { join(h); }}});
    }

  private:
    void read_values(int64_t task) {
        const int64_t hk = task / key_tasks_;
        const auto [start, stop] = keys_of(task);
        const int64_t last = std::min(stop, last_visible(0));
        for (int64_t h = hk * group_; h < (hk + 1) * group_; ++h) {
            const int64_t part = task % key_tasks_ * l_.H + h;
            tops_[part] = settle(lines_[h], start, stop);
            totals_[part] = exponentials(lines_[h], start, stop, tops_[part]);
            std::fill_n(z_parts_.get() + part * Vp_, Vp_, 0.0f);
        }
        // A chunk of V stays in L1 while all heads read it.
        for (int64_t j = std::max(start, first_visible(0)); j < last;) {
            const int64_t n = std::min(last, (j / CHUNK + 1) * CHUNK) - j;
            for (int64_t h = hk * group_; h < (hk + 1) * group_; ++h)
                add_values(n, lines_[h].of_key + j, l_.v.at(j, hk),
                           z_parts_.get() + (task % key_tasks_ * l_.H + h) * Vp_);
            j += n;
        }
    }

    // z [V] += e [n] v [n, V]
    void add_values(int64_t n, const float* e, const float* v, float* z) const {
        int64_t i = 0;
        for (; i + Z_VECTORS * W <= l_.V; i += Z_VECTORS * W)
            add_columns<Z_VECTORS>(n, e, v + i, z + i);
        for (; i + W <= l_.V; i += W) add_columns<1>(n, e, v + i, z + i);
        for (; i < l_.V; ++i)
            for (int64_t j = 0; j < n; ++j) z[i] += e[j] * v[j * l_.v.s0 + i];
    }

    template <int n_vectors>
    void add_columns(int64_t n, const float* e, const float* v, float* z) const {
        F sum[n_vectors];
#pragma GCC unroll 8
        for (int k = 0; k < n_vectors; ++k) sum[k] = load(z + k * W);
        for (int64_t j = 0, stride = l_.v.s0; j < n; ++j) {
            const F e_j = set1(e[j]);
#pragma GCC unroll 8
            for (int k = 0; k < n_vectors; ++k)
                sum[k] = fma(e_j, load(v + j * stride + k * W), sum[k]);
        }
#pragma GCC unroll 8
        for (int k = 0; k < n_vectors; ++k) store(z + k * W, sum[k]);
    }

    void join(int64_t h) {
        const Line& line = lines_[h];
        float top = sink(line);
        for (int64_t task = 0; task < key_tasks_; ++task)
            top = std::max(top, tops_[task * l_.H + h]);
        double total = std::exp2(sink(line) - top);
        for (int64_t task = 0; task < key_tasks_; ++task)
            total += totals_[task * l_.H + h] * std::exp2(tops_[task * l_.H + h] - top);
        float *z = to_.z + h * l_.V, *weights = to_.weights + h * l_.S;
        std::fill_n(z, l_.V, 0.0f);
        std::fill_n(weights, first_visible(0), 0.0f);
        for (int64_t task = 0; task < key_tasks_; ++task) {
            const int64_t part = task * l_.H + h;
            const float share = static_cast<float>(std::exp2(tops_[part] - top) / total);
            const float* from = z_parts_.get() + part * Vp_;
            for (int64_t i = 0; i < l_.V; ++i) z[i] += share * from[i];
            const auto [start, stop] = keys_of(task);
            const int64_t first = std::max(start, first_visible(0));
            scaled(std::min(stop, last_visible(0)) - first, line.of_key + first, share,
                   weights + first);
        }
    }

    const Attention& to_;
    const Buffer z_parts_;  // [key tasks, H, Vp]
    std::vector<float> tops_;
    std::vector<double> totals_;  // [key tasks, H]
};

// The row's scores. Phases: by coordinates, g in parts and rho_inv; by keys, products with q
// | by keys, v . g and |v| | by heads, the rest of each line.
//
// Shapes: g_parts [tasks, H, Vp], dots [H, keys], norms [H_kv, keys], or with a gate their
// squares [H, keys]. Kp, Vp: K, V rounded up to whole vectors.
class OneRow : Row {
  public:
    OneRow(const Layer& layer, int n_threads, Scores& out)
        : Row(layer, n_threads),
          out_(out),
          n_columns_(round_up((layer.D + COORDINATE_TASKS - 1) / COORDINATE_TASKS, W)),
          column_tasks_((layer.D + n_columns_ - 1) / n_columns_),
          W_T_in_place_(layer.W_O.s1 == 1 && layer.V == Vp_),
          W_T_buffer_(W_T_in_place_ ? 0 : layer.H * layer.D * Vp_),
          y_(Dp_),
          g_parts_(column_tasks_ * layer.H * Vp_),
          dots_(layer.H * n_keys_),
          norms_(layer.norms && !layer.value_gate.data
                     ? 0
                     : (layer.value_gate.data ? layer.H : layer.H_kv) * n_keys_),
          lowest_(static_cast<size_t>(column_tasks_ * layer.H)) {
        W_T_ = W_T_in_place_ ? Tensor3{layer.W_O.data, layer.W_O.s0, layer.W_O.s2}
                             : Tensor3{W_T_buffer_.get(), layer.D * Vp_, Vp_};
        copy_y(0, y_.get());
        for (Line& line : lines_) line.y = y_.get();
        out_.edges.resize(1);
    }

    void run() {
        Team::run(static_cast<int>(threads_.size()),
                  {{column_tasks_ + (l_.weights ? 0 : key_tasks_ * l_.H_kv),
                    [&](int64_t task, int thread) {
                        Clock clock(threads_[thread]->counters);
                        if (task < column_tasks_) {
                            read_columns(task);
                            clock.lap(PREPARE);
                        } else {
                            read_keys(task - column_tasks_, *threads_[thread]);
                            clock.lap(SCORES);
                        }
                    }},
                   {key_tasks_ * l_.H_kv,
                    [&](int64_t task, int thread) {
                        Clock clock(threads_[thread]->counters);
                        read_values(task, *threads_[thread]);
                        clock.lap(LINEAR);
                    }},
                   {l_.H, [&](int64_t h, int thread) { score_line(h, *threads_[thread]); }}});
        Thread& s = *threads_[0];
        Clock clock(s.counters);
        for (const Line& line : lines_) s.heads.push_back(&line);
        finish(0, s, out_, out_.edges[0]);
        clock.lap(FINISH);
        s.counters.pairs = l_.H * (last_visible(0) - first_visible(0));
        for (const auto& t : threads_) out_.counters.add(t->counters);
    }

  private:
    // Columns of W_O: their part of g, their norms, and the smallest of their breakpoints by head.
    void read_columns(int64_t task) {
        const int64_t start = task * n_columns_, stop = std::min(l_.D, start + n_columns_);
        if (!W_T_in_place_) transpose_columns(start, stop);
        float* g_part = g_parts_.get() + task * l_.H * Vp_;
        std::fill_n(g_part, l_.H * Vp_, 0.0f);
        for (int64_t i = start; i < stop; i += 4) {
            F sign[4];
            int64_t column[4];
            for (int k = 0; k < 4; ++k) {
                column[k] = std::min(i + k, stop - 1);
                sign[k] = set1(i + k >= stop ? 0.0f : y_.get()[i + k] < 0 ? -1.0f : 1.0f);
            }
            for (int64_t h = 0; h < l_.H; ++h) {
                const float* w[4];
                F squares[4];
                for (int k = 0; k < 4; ++k) {
                    w[k] = W_T_.at(h, column[k]);
                    fetch(w[k], l_.V, 16 * W_T_.s1);
                    squares[k] = set1(0.0f);
                }
                float* g = g_part + h * Vp_;
                for (int64_t v = 0; v < Vp_; v += W) {
                    F sum = load(g + v);
                    for (int k = 0; k < 4; ++k) {
                        const F w_k = load(w[k] + v);
                        sum = fma(sign[k], w_k, sum);
                        squares[k] = fma(w_k, w_k, squares[k]);
                    }
                    store(g + v, sum);
                }
                for (int k = 0; k < 4; ++k) rho_inv_.get()[h * Dp_ + column[k]] = sum(squares[k]);
            }
        }
        const int64_t padded = round_up(stop, W);
        for (int64_t h = 0; h < l_.H; ++h) {
            float* rho_inv = rho_inv_.get() + h * Dp_;
            std::fill(rho_inv + stop, rho_inv + padded, 0.0f);
            F low = set1(FLT_MAX);
            for (int64_t i = start; i < padded; i += W) {
                const F inverse = inverse_norm(load(rho_inv + i));
                store(rho_inv + i, inverse);
                low = min(low, abs(load(y_.get() + i)) * inverse);
            }
            lowest_[task * l_.H + h] = smallest(low);
        }
    }

    void transpose_columns(int64_t start, int64_t stop) {
        for (int64_t h = 0; h < l_.H; ++h) {
            float* W_T = W_T_buffer_.get() + (h * l_.D + start) * Vp_;
            if (l_.V < Vp_) std::fill_n(W_T, (stop - start) * Vp_, 0.0f);
            transpose(l_.V, stop - start, l_.W_O.data + h * l_.W_O.s0 + start * l_.W_O.s2,
                      l_.W_O.s1, l_.W_O.s2, W_T, Vp_);
        }
    }

    // v . g of some keys for the heads that share them, and |v|.
    void read_values(int64_t task, Thread& s) {
        const int64_t hk = task / key_tasks_;
        const bool gated = l_.value_gate.data;
        std::fill_n(s.weights.get(), group_ * Vp_, gated ? 0.0f : 1.0f);
        for (int64_t m = 0; m < group_; ++m) {
            const int64_t h = hk * group_ + m;
            float *g = s.g.get() + m * Vp_, *weights = s.weights.get() + m * Vp_;
            std::copy_n(g_parts_.get() + h * Vp_, Vp_, g);
            for (int64_t part = 1; part < column_tasks_; ++part) {
                const float* more = g_parts_.get() + (part * l_.H + h) * Vp_;
                for (int64_t i = 0; i < Vp_; i += W) store(g + i, load(g + i) + load(more + i));
            }
            if (!gated) continue;
            const float* gate = l_.value_gate.at(0, h);
            for (int64_t i = 0; i < l_.V; ++i) {
                g[i] *= gate[i];
                weights[i] = gate[i] * gate[i];
            }
        }
        for_keys(task, l_.v, l_.V, s, [&](int64_t j, const float* const* v) {
            for (int64_t m = 0; m < group_; ++m) {
                const int64_t h = hk * group_ + m;
                dots(Vp_, s.g.get() + m * Vp_, v, dots_.get() + h * n_keys_ + j - first_key_);
                if (gated) dots<true>(Vp_, s.weights.get() + m * Vp_, v, norms_of(h) + j);
            }
            if (gated || l_.norms) return;
            float* norms = norms_of(hk) + j;
            dots<true>(Vp_, s.weights.get(), v, norms);
            for (int i = 0; i < ND; i += W) store(norms + i, sqrt(load(norms + i)));
        });
    }

    float* norms_of(int64_t head) const { return norms_.get() + head * n_keys_ - first_key_; }

    void score_line(int64_t h, Thread& s) {
        Clock clock(s.counters);
        Line& line = lines_[h];
        line.smallest_breakpoint = FLT_MAX;
        for (int64_t task = 0; task < column_tasks_; ++task)
            line.smallest_breakpoint =
                std::min(line.smallest_breakpoint, lowest_[task * l_.H + h]);
        if (l_.weights) take_weights(line);
        else softmax(line);
        clock.lap(SOFTMAX);
        const float* dots = dots_.get() + h * n_keys_ - first_key_;
        const float* norms = l_.value_gate.data ? norms_of(h)
                             : l_.norms         ? l_.norms + h / group_ * l_.norms_stride
                                                : norms_of(h / group_);
        s.listed.n = 0;
        for (int64_t chunk = first_key_; chunk < line.last; chunk += CHUNK)
            linear(line, std::max(chunk, line.first), std::min(chunk + CHUNK, line.last), dots,
                   norms, s.listed);
        clock.lap(LINEAR);
        correct(line, s.listed, s);
        clock.lap(CORRECT);
    }

    void take_weights(Line& line) const {
        const int64_t first = first_visible(0), last = last_visible(0);
        std::fill(line.of_key + line.first, line.of_key + first, 0.0f);
        std::copy_n(l_.weights + line.head * l_.S + first, last - first, line.of_key + first);
        std::fill(line.of_key + last, line.of_key + line.last, 0.0f);
        line.w_scale = l_.row_scale ? l_.row_scale[0] : 1.0f;
    }

    Scores& out_;
    const int64_t n_columns_, column_tasks_;
    const bool W_T_in_place_;
    const Buffer W_T_buffer_, y_, g_parts_, dots_, norms_;
    std::vector<float> lowest_;  // [column tasks, H]
};
