// Work on lines, the (row, head) pairs, after their products are formed: softmax, lin,
// corrections, importances (docs/design.md, section 3.1). No include guard: see vec.h.
//
// With s = sign(y), w = row_scale * alpha and g = gate * (W_O[h] @ s), for every visible pair
//
//     lin = w (v . g)                       proximity = max(lin + offset - correction, floor)
//     a = |w| |gate * v| (rounded up)       correction = 2 sum_i max(s_i p_i - |y_i|, 0)
//
// over the coordinates i with |y_i| / rho_i < a, where rho_i = |W_O[h][:, i]| and
// p_i = w (gate * v) . W_O[h][:, i].
//
// Two programs form the products: blocks.h for many rows at once, row.h for one. The latter also
// computes attention, and can leave its weights.

constexpr int64_t CHUNK = 64;  // keys summed in float, a multiple of NR
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

// Adds the time since the last call to a stage.
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

// 1 / rho of columns whose squares sum to x. A column of zeros gets a huge finite number, as
// 0 * inf is NaN; if y_i = 0 too, its coordinate is visited and gives 0.
inline float inverse_norm(float x) { return std::min(1 / std::sqrt(x), FLT_MAX); }
inline F inverse_norm(F x) { return min(set1(1.0f) / sqrt(x), set1(FLT_MAX)); }

struct Line {
    int64_t row, head;
    int64_t first, last;  // keys, in whole panels
    float* of_key;        // by key: scores, then e = exp(score - max), then proximities
    const float* y;       // [Dp] padded with values that never flip
    float smallest_breakpoint;
    float w_scale;   // w / e
    double sum = 0;  // of the proximities
    double lin = 0;  // of lin
};

// The pairs of a line with lin + offset above the floor and a above its smallest breakpoint. Keys
// are floats, exact below 2^24, so that vectors of them can be compressed.
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

// One thread's memory for corrections.
struct Scratch {
    Scratch(const Layer& l, int64_t Dp)
        : candidate_y(Dp + ND), point(Dp + W), coordinate(Dp + W), bucket(Dp), columns(Dp + ND) {
        heads.reserve(l.H);
    }

    Buffer candidate_y;
    std::vector<float> point, coordinate;
    std::vector<int32_t> bucket, pair_bucket;
    std::vector<const float*> columns;
    std::vector<OrderedPair> pairs;
    std::vector<float> over, gated;
    std::vector<const Line*> heads;
    int32_t top_bits, bucket_end[N_BUCKETS + 1];
    Counters counters;
};

class Lines {
  protected:
    explicit Lines(const Layer& layer)
        : l_(layer),
          group_(layer.H / layer.H_kv),
          Dp_(round_up(layer.D, W)),
          rho_inv_(layer.H * Dp_) {}

    int64_t first_visible(int64_t row) const {
        return l_.window ? std::max<int64_t>(0, l_.rows[row] + 1 - l_.window) : 0;
    }
    int64_t last_visible(int64_t row) const { return l_.rows[row] + 1; }  // exclusive

    // The factor of q that makes its product with k an input of `softmax`.
    float q_scale() const { return l_.softcap ? l_.scale / l_.softcap : l_.scale * LOG2_E; }

    // Row `row` of y as lines read it, [Dp].
    void copy_y(int64_t row, float* y) const {
        const float* from = l_.y.row(row);
        for (int64_t i = 0, D = l_.D; i < D; ++i) y[i] = from[i] + 0.0f;  // -0.0 becomes 0.0
        std::fill(y + l_.D, y + Dp_, FLT_MAX);
    }

    // Scores become e, zero where a key is not visible.
    void softmax(Line& line) const {
        float top = settle(line, line.first, line.last);
        if (l_.log_sum_exp) top = l_.log_sum_exp[line.row * l_.H + line.head] * LOG2_E;
        else top = std::max(top, sink(line));
        double total = exponentials(line, line.first, line.last, top);
        if (l_.log_sum_exp) total = 1;
        else total += std::exp2(sink(line) - top);
        line.w_scale =
            (l_.row_scale ? l_.row_scale[line.row] : 1.0f) / static_cast<float>(total);
    }

    // The sink's score: it takes weight and moves nothing.
    float sink(const Line& line) const {
        return l_.sinks ? l_.sinks[line.head] * LOG2_E : -INFINITY;
    }

    // Products of q and k become scores, to the base 2, from keys `first` to `last`: -inf where a
    // key is not visible. Returns the largest.
    float settle(const Line& line, int64_t first, int64_t last) const {
        float* x = line.of_key;
        if (l_.softcap)
            for (int64_t j = first; j < last; j += W)
                store(x + j, tanh(load(x + j)) * set1(l_.softcap * LOG2_E));
        if (l_.alibi_slopes) {
            const float slope = l_.alibi_slopes[line.head] * LOG2_E;
            for (int64_t j = first; j < last; ++j)
                x[j] += slope * static_cast<float>(j - l_.rows[line.row]);
        }
        for (int64_t j = first; j < std::min(first_visible(line.row), last); ++j) x[j] = -INFINITY;
        for (int64_t j = std::max(last_visible(line.row), first); j < last; ++j) x[j] = -INFINITY;
        F tops = set1(-INFINITY);
        for (int64_t j = first; j < last; j += W) tops = max(tops, load(x + j));
        return largest(tops);
    }

    // Scores from keys `first` to `last` become e = exp(score - top). Returns their sum.
    double exponentials(const Line& line, int64_t first, int64_t last, float top) const {
        double total = 0;
        for (int64_t chunk = first / CHUNK * CHUNK; chunk < last; chunk += CHUNK) {
            const int64_t stop = std::min(last, chunk + CHUNK);
            F lanes = set1(0.0f);
            for (int64_t j = std::max(first, chunk); j < stop; j += W) {
                const F e = exp2(load(line.of_key + j) - set1(top));
                store(line.of_key + j, e);
                lanes = lanes + e;
            }
            total += sum(lanes);
        }
        return total;
    }

    // From keys `first` to `last`, all of one chunk: e becomes max(lin + offset, floor), and pairs
    // where that is above the floor, and a above the smallest breakpoint, are listed. By key: v . g
    // in `dots`; |v| in `norms`, or its square if there is a gate.
    void linear(Line& line, int64_t first, int64_t last, const float* dots, const float* norms,
                Listed& list) const {
        const auto keys = l_.value_gate.data
                              ? (shifted() ? &Lines::linear_keys<true, true>
                                           : &Lines::linear_keys<true, false>)
                              : (shifted() ? &Lines::linear_keys<false, true>
                                           : &Lines::linear_keys<false, false>);
        (this->*keys)(line, first, last, dots, norms, list);
    }

    // Subtracts the corrections from the listed pairs of a line.
    //
    // Candidates (the coordinates whose breakpoint is below the largest a) and pairs are put in
    // order by buckets of breakpoint or a, 16 to an octave; a pair's extent, the coordinates that
    // it visits, is all buckets up to its own. Pairs come longest extent first. Long ones take ND
    // coordinates at a time, all pairs before the next ND, so that those columns of W_O are read
    // once; short ones take one coordinate for ND pairs at a time.
    void correct(Line& line, const Listed& list, Scratch& s) const {
        const int64_t n_pairs = list.n;
        if (!n_pairs) return;
        order_candidates(line, list, s);
        order_pairs(line, list, s);

        const int64_t width = round_up(l_.V, W);
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
            line_sum += corrected(line.of_key[s.pairs[i].key], sum(over));
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
                line_sum += corrected(line.of_key[s.pairs[start + i].key], over[i]);
        }
        line.sum += line_sum;
    }

    // Denominator, importances and edges of a row, whose lines are s.heads [H].
    void finish(int64_t row, Scratch& s, Scores& out, Edges& edges) const {
        const auto of = [&](const Matrix& part) {
            return proximity(l_.D, part.row(row), l_.y.row(row), l_.offset ? l_.offset[row] : 0,
                             l_.floor);
        };
        const double residual = of(l_.resid_pre), ffn = l_.ffn.data ? of(l_.ffn) : 0;
        double total = residual + ffn, lin = 0;
        for (const Line* line : s.heads) {
            total += line->sum;
            lin += line->lin;
        }
        out.linear[row] = static_cast<float>(lin);

        const int64_t first = first_visible(row), last = last_visible(row);
        out.unattributed[row] = total == 0;
        if (total == 0) {
            // Each of the n parts gets 1 / n.
            const double n_parts = 1 + l_.H * (last - first) + (l_.ffn.data ? 1 : 0);
            out.total[row] = static_cast<float>(n_parts);
            const float share = static_cast<float>(1 / n_parts);
            out.residual[row] = share;
            if (out.ffn) out.ffn[row] = share;
            const float head = static_cast<float>((last - first) / n_parts);
            std::fill_n(out.head_total + row * l_.H, l_.H, head);
            const float weight = static_cast<float>(l_.H / n_parts);
            for (int64_t j = first; j < last && weight > l_.keep; ++j) {
                add_edge(edges, row, j, weight);
                edges.head_weight.insert(edges.head_weight.end(), l_.H, share);
            }
            return;
        }
        out.total[row] = static_cast<float>(total);
        out.residual[row] = static_cast<float>(residual / total);
        if (out.ffn) out.ffn[row] = static_cast<float>(ffn / total);
        for (int64_t h = 0; h < l_.H; ++h)
            out.head_total[row * l_.H + h] = static_cast<float>(s.heads[h]->sum / total);

        const F threshold = set1(static_cast<float>(l_.keep * total));
        const Line* const* heads = s.heads.data();
        const int64_t n_heads = l_.H, stop = heads[0]->last;
        for (int64_t j = heads[0]->first; j < stop; j += W) {
            F weights = set1(0.0f);
            for (int64_t h = 0; h < n_heads; ++h) weights = weights + load(heads[h]->of_key + j);
            unsigned kept = bits(less(threshold, weights));
            if (!kept) continue;
            float lane[W];
            store(lane, weights);
            for (; kept; kept &= kept - 1) {
                const int i = __builtin_ctz(kept);
                add_edge(edges, row, j + i, static_cast<float>(lane[i] / total));
                for (int64_t h = 0; h < n_heads; ++h)
                    edges.head_weight.push_back(
                        static_cast<float>(heads[h]->of_key[j + i] / total));
            }
        }
    }

    const Layer& l_;
    const int64_t group_, Dp_;
    const Buffer rho_inv_;  // [H, Dp]
    Tensor3 W_T_;           // [H, D, V]: columns of W_O, padded to whole vectors

  private:
    // True if a pair without weight has a proximity.
    bool shifted() const { return l_.offset || l_.floor > 0; }

    template <bool gated, bool shifted>
    void linear_keys(Line& line, int64_t first, int64_t last, const float* dots,
                     const float* norms, Listed& list) const {
        const F w_scale = set1(line.w_scale);
        const F a_scale = set1(std::fabs(line.w_scale) * ROUND_UP);
        const F smallest = set1(line.smallest_breakpoint);
        const F zero = set1(0.0f);
        const F offset = set1(l_.offset ? l_.offset[line.row] : 0.0f);
        const F floor = set1(l_.floor);
        const F first_seen = set1(static_cast<float>(first_visible(line.row)));
        const F last_seen = set1(static_cast<float>(last_visible(line.row) - 1));
        list.reserve(CHUNK + W);
        float *key = &list.key[list.n], *list_w = &list.w[list.n], *list_a = &list.a[list.n];
        int64_t n = 0;
        F lanes = zero, lin_lanes = zero;
        for (int64_t j = first; j < last; j += W) {
            const F e = load(line.of_key + j);
            const F w = e * w_scale;
            const F lin = w * load(dots + j);
            const F v_norm = gated ? sqrt(load(norms + j)) : load(norms + j);
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
            store(line.of_key + j, positive);
            lanes = lanes + unless(listed, positive);
            lin_lanes = lin_lanes + lin;
            if (const unsigned which = bits(listed)) {
                store(key + n, compressed(iota() + set1(static_cast<float>(j)), which));
                store(list_w + n, compressed(w, which));
                store(list_a + n, compressed(a, which));
                n += __builtin_popcount(which);
            }
        }
        list.n += n;
        line.sum += sum(lanes);
        line.lin += sum(lin_lanes);
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
    // and the end of each bucket of breakpoints.
    void order_candidates(const Line& line, const Listed& list, Scratch& s) const {
        const float* rho_inv = rho_inv_.get() + line.head * Dp_;
        const float a_max = *std::max_element(list.a.begin(), list.a.begin() + list.n);
        s.top_bits = float_bits(a_max);
        float *points = s.point.data(), *coordinate = s.coordinate.data();
        int64_t n = 0;
        F coordinates = iota();
        for (int64_t i = 0, stop = Dp_; i < stop; i += W) {
            const F point = abs(load(line.y + i)) * load(rho_inv + i);
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
        const float* W_T = W_T_.at(line.head, 0);
        float* candidate_y = s.candidate_y.get();
        const float** columns = s.columns.data();
        for (int64_t c = 0, stride = W_T_.s1; c < n; ++c) {
            const int32_t at = end[bucket[c]]++;  // the bucket's begin becomes its end
            const int64_t i = static_cast<int64_t>(coordinate[c]);
            columns[at] = W_T + i * stride;
            candidate_y[at] = line.y[i];
        }
        for (int64_t c = n; c < n + ND; ++c) {
            columns[c] = W_T;
            candidate_y[c] = FLT_MAX;
        }
    }

    // The listed pairs, longest extent first, with the rows of gate * v that they need.
    void order_pairs(const Line& line, const Listed& list, Scratch& s) const {
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
        const float* v = l_.v.data + line.head / group_ * l_.v.s1;
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
        if (l_.V % W || l_.value_gate.data) gate_pairs(list.n, line, s);
    }

    // Copies of the pairs' v: padded to whole vectors, times the gate.
    void gate_pairs(int64_t n, const Line& line, Scratch& s) const {
        const int64_t width = round_up(l_.V, W);
        if (static_cast<int64_t>(s.gated.size()) < n * width)
            s.gated.resize(static_cast<size_t>(n * width));
        for (int64_t i = 0; i < n; ++i) {
            float* gated = s.gated.data() + i * width;
            std::copy_n(s.pairs[i].v, l_.V, gated);
            std::fill(gated + l_.V, gated + width, 0.0f);
            if (l_.value_gate.data) {
                const float* gate = l_.value_gate.at(line.row, line.head);
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

    static void add_edge(Edges& edges, int64_t row, int64_t source, float weight) {
        edges.row.push_back(row);
        edges.source.push_back(source);
        edges.weight.push_back(weight);
    }
};
