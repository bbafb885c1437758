// The Python face of the kernel: checks shapes and strides, picks the instruction set, writes
// into arrays that Python allocated. It allocates only the edge lists, whose length it finds.
#include "binding.h"

namespace {

// The blocks' lists end to end, as a numpy array that owns its memory.
template <class T, class List>
nb::object joined(const std::vector<ifr::Edges>& edges, List list, size_t width) {
    size_t n = 0;
    for (const ifr::Edges& block : edges) n += (block.*list).size();
    auto* all = new std::vector<T>();
    nb::capsule owner(all, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    all->reserve(n);
    for (const ifr::Edges& block : edges)
        all->insert(all->end(), (block.*list).begin(), (block.*list).end());
    if (width)
        return nb::ndarray<nb::numpy, T, nb::ndim<2>>(all->data(), {n / width, width}, owner)
            .cast();
    return nb::ndarray<nb::numpy, T, nb::ndim<1>>(all->data(), {n}, owner).cast();
}

// Inputs of attention, checked.
ifr::Layer attention_of(int64_t R, const Floats<3>& q, const Floats<3>& k, const Floats<3>& v,
                        double scale, std::optional<int64_t> window, std::optional<double> softcap,
                        const std::optional<Packed>& sinks,
                        const std::optional<Packed>& alibi_slopes) {
    ifr::Layer l{};
    l.R = R;
    l.S = static_cast<int64_t>(k.shape(0));
    l.H = static_cast<int64_t>(q.shape(1));
    l.H_kv = static_cast<int64_t>(k.shape(1));
    l.K = static_cast<int64_t>(q.shape(2));
    l.V = static_cast<int64_t>(v.shape(2));
    if (l.H_kv < 1 || l.H < 1 || l.H % l.H_kv)
        throw nb::value_error("q's heads must be a multiple of k's and v's");
    if (l.S >= 1 << 24) throw nb::value_error("the number of keys must be below 2^24");
    l.q = tensor3(q, "q", {l.R, l.H, l.K});
    l.k = tensor3(k, "k", {l.S, l.H_kv, l.K});
    l.v = tensor3(v, "v", {l.S, l.H_kv, l.V});
    set_scores(l, scale, window, softcap, sinks);
    l.alibi_slopes = packed(alibi_slopes, "alibi_slopes", l.H);
    return l;
}

nb::tuple score_attention(
    Rows rows, Floats<2> resid_pre, Floats<2> y, Floats<3> q, Floats<3> k, Floats<3> v,
    Floats<3> W_O, double scale, std::optional<Packed> row_scale,
    std::optional<Floats<3>> value_gate, std::optional<int64_t> window,
    std::optional<double> softcap, std::optional<Packed> sinks, std::optional<Packed> alibi_slopes,
    std::optional<Packed2> log_sum_exp, std::optional<Floats<2>> ffn,
    std::optional<Packed> offset, double floor, double keep,
    Out residual, std::optional<Out> ffn_out, Out2 head_total, OutFlags unattributed, Out linear,
    Out total, const std::string& isa, int n_threads) {
    ifr::Layer l = attention_of(static_cast<int64_t>(rows.shape(0)), q, k, v, scale, window,
                                softcap, sinks, alibi_slopes);
    l.D = static_cast<int64_t>(y.shape(1));
    if (l.D < 1 || l.D >= 1 << 24) throw nb::value_error("D must be at least 1, and below 2^24");
    if (n_threads < 1) throw nb::value_error("n_threads must be at least 1");
    l.rows = rows.data();
    for (int64_t r = 0; r < l.R; ++r)
        if (l.rows[r] < 0 || l.rows[r] >= l.S || (r && l.rows[r] <= l.rows[r - 1]))
            throw nb::value_error("rows must be strictly ascending positions among the keys");
    l.resid_pre = matrix(resid_pre, "resid_pre", l.R, l.D);
    l.y = matrix(y, "y", l.R, l.D);
    check_shape(W_O, "W_O", {l.H, l.V, l.D});
    l.W_O = {W_O.data(), W_O.stride(0), W_O.stride(1), W_O.stride(2)};
    l.keep = static_cast<float>(keep);
    l.row_scale = packed(row_scale, "row_scale", l.R);
    if (value_gate) l.value_gate = tensor3(*value_gate, "value_gate", {l.R, l.H, l.V});
    if (log_sum_exp) {
        check_shape(*log_sum_exp, "log_sum_exp", {l.R, l.H});
        l.log_sum_exp = log_sum_exp->data();
    }
    if (ffn) l.ffn = matrix(*ffn, "ffn", l.R, l.D);
    if (!(floor >= 0)) throw nb::value_error("floor must be at least 0");
    l.offset = packed(offset, "offset", l.R);
    l.floor = static_cast<float>(floor);
    check_shape(residual, "residual", {l.R});
    check_shape(head_total, "head_total", {l.R, l.H});
    check_shape(unattributed, "unattributed", {l.R});
    check_shape(linear, "linear", {l.R});
    check_shape(total, "total", {l.R});
    if (ffn.has_value() != ffn_out.has_value())
        throw nb::value_error("ffn_out is for parallel blocks, and needed there");
    if (ffn_out) check_shape(*ffn_out, "ffn_out", {l.R});

    const Isa kernel = find_isa(isa);
    ifr::Scores out{residual.data(), ffn_out ? ffn_out->data() : nullptr, head_total.data(),
                    unattributed.data(), linear.data(), total.data(), {}, {}};
    {
        nb::gil_scoped_release released;
        kernel.score_attention(l, n_threads, out);
    }
    const ifr::Counters& counters = out.counters;
    return nb::make_tuple(
        joined<int64_t>(out.edges, &ifr::Edges::row, 0),
        joined<int64_t>(out.edges, &ifr::Edges::source, 0),
        joined<float>(out.edges, &ifr::Edges::weight, 0),
        joined<float>(out.edges, &ifr::Edges::head_weight, static_cast<size_t>(l.H)),
        nb::make_tuple(counters.pairs, counters.listed, counters.visited,
                       std::vector<double>(counters.seconds.begin(), counters.seconds.end())));
}

void score_ffn(Floats<2> resid_mid, Floats<2> resid_post, Out residual, Out ffn,
               OutFlags unattributed, const std::string& isa, int n_threads) {
    ifr::FFNParts x{};
    x.R = static_cast<int64_t>(resid_post.shape(0));
    x.D = static_cast<int64_t>(resid_post.shape(1));
    if (n_threads < 1) throw nb::value_error("n_threads must be at least 1");
    x.resid_mid = matrix(resid_mid, "resid_mid", x.R, x.D);
    x.resid_post = matrix(resid_post, "resid_post", x.R, x.D);
    check_shape(residual, "residual", {x.R});
    check_shape(ffn, "ffn", {x.R});
    check_shape(unattributed, "unattributed", {x.R});
    x.residual = residual.data();
    x.ffn = ffn.data();
    x.unattributed = unattributed.data();
    const Isa kernel = find_isa(isa);
    nb::gil_scoped_release released;
    kernel.score_ffn(x, n_threads);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // objects that live until the interpreter ends are not leaks
    m.def("isas", &usable_isas, "Instruction sets that this processor has, the default first.");
    m.def("pool", &ifr::Team::pool,
          "The OpenMP library whose threads are used; empty where each call makes its own.");
    m.def("score_attention", &score_attention, "rows"_a.noconvert(), "resid_pre"_a.noconvert(),
          "y"_a.noconvert(), "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
          "W_O"_a.noconvert(), "scale"_a, "row_scale"_a.noconvert().none(),
          "value_gate"_a.noconvert().none(), "window"_a.none(), "softcap"_a.none(),
          "sinks"_a.noconvert().none(), "alibi_slopes"_a.noconvert().none(),
          "log_sum_exp"_a.noconvert().none(), "ffn"_a.noconvert().none(),
          "offset"_a.noconvert().none(), "floor"_a, "keep"_a,
          "residual"_a.noconvert(), "ffn_out"_a.noconvert().none(), "head_total"_a.noconvert(),
          "unattributed"_a.noconvert(), "linear"_a.noconvert(), "total"_a.noconvert(), "isa"_a,
          "n_threads"_a);
    m.def("score_ffn", &score_ffn, "resid_mid"_a.noconvert(), "resid_post"_a.noconvert(),
          "residual"_a.noconvert(), "ffn"_a.noconvert(), "unattributed"_a.noconvert(), "isa"_a,
          "n_threads"_a);
    bind_step(m);
}
