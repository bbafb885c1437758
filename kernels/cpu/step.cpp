// A layer in decode steps: a store of its keys and values, to which each step adds one, and the
// results of that step's attention that its scores need.
#include "binding.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t PADDING = 64;  // keys past the last whose norms a kernel may read

// Scores of rows added one by one, each of a layer of its own.
class StepScores {
  public:
    explicit StepScores(int64_t H) : H_(H) {}

    void add(const ifr::Layer& layer, const Isa& kernel, int n_threads) {
        float residual, ffn, linear, total;
        bool unattributed;
        std::vector<float> head_total(static_cast<size_t>(H_));
        ifr::Scores out{&residual, layer.ffn.data ? &ffn : nullptr, head_total.data(),
                        &unattributed, &linear, &total, {}, {}};
        kernel.score_attention(layer, n_threads, out);
        for (ifr::Edges& block : out.edges) {
            edges_.row.insert(edges_.row.end(), block.source.size(), static_cast<int64_t>(n_));
            const auto append = [](auto& to, const auto& from) {
                to.insert(to.end(), from.begin(), from.end());
            };
            append(edges_.source, block.source);
            append(edges_.weight, block.weight);
            append(edges_.head_weight, block.head_weight);
        }
        residual_.push_back(residual);
        if (layer.ffn.data) ffn_.push_back(ffn);
        head_total_.insert(head_total_.end(), head_total.begin(), head_total.end());
        unattributed_.push_back(unattributed);
        linear_.push_back(linear);
        total_.push_back(total);
        ++n_;
    }

    // All scores so far, as numpy arrays; none are left.
    nb::tuple take() {
        nb::tuple taken = nb::make_tuple(
            array(residual_), ffn_.empty() ? nb::none() : array(ffn_), array(head_total_, width()),
            nb::make_tuple(array(edges_.row), array(edges_.source), array(edges_.weight),
                           array(edges_.head_weight, width())),
            array(unattributed_), array(linear_), array(total_));
        *this = StepScores(H_);
        return taken;
    }

    int64_t n_heads() const { return H_; }

  private:
    size_t width() const { return static_cast<size_t>(H_); }

    template <class T>
    static nb::object array(std::vector<T>& of, size_t width = 0) {
        auto* all = new std::vector<T>(std::move(of));
        nb::capsule owner(all, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
        if (width)
            return nb::ndarray<nb::numpy, T, nb::ndim<2>>(
                       all->data(), {all->size() / width, width}, owner)
                .cast();
        return nb::ndarray<nb::numpy, T, nb::ndim<1>>(all->data(), {all->size()}, owner).cast();
    }

    int64_t H_, n_ = 0;
    std::vector<float> residual_, ffn_, head_total_, linear_, total_;
    std::vector<uint8_t> unattributed_;
    ifr::Edges edges_;
};

class StepLayer {
  public:
    StepLayer(Store<3> k, Store<3> v, int64_t n_keys, Floats<3> W_O,
              std::optional<Packed> alibi_slopes, const std::string& isa)
        : k_(k), v_(v), W_O_(W_O), alibi_slopes_(alibi_slopes), kernel_(find_isa(isa)) {
        room_ = static_cast<int64_t>(k.shape(0));
        l_.R = 1;
        l_.H_kv = static_cast<int64_t>(k.shape(1));
        l_.K = static_cast<int64_t>(k.shape(2));
        l_.V = static_cast<int64_t>(v.shape(2));
        l_.H = static_cast<int64_t>(W_O.shape(0));
        l_.D = static_cast<int64_t>(W_O.shape(2));
        if (l_.H_kv < 1 || l_.H < 1 || l_.H % l_.H_kv)
            throw nb::value_error("W_O's heads must be a multiple of k's and v's");
        if (l_.D < 1 || l_.D >= 1 << 24)
            throw nb::value_error("D must be at least 1, and below 2^24");
        if (room_ >= 1 << 24) throw nb::value_error("the number of keys must be below 2^24");
        if (n_keys < 0 || n_keys > room_) throw nb::value_error("n_keys must be at most the room");
        l_.k = tensor3(k, "k", {room_, l_.H_kv, l_.K});
        l_.v = tensor3(v, "v", {room_, l_.H_kv, l_.V});
        check_shape(W_O, "W_O", {l_.H, l_.V, l_.D});
        l_.W_O = {W_O.data(), W_O.stride(0), W_O.stride(1), W_O.stride(2)};
        l_.alibi_slopes = packed(alibi_slopes_, "alibi_slopes", l_.H);
        l_.rows = &row_;
        norms_stride_ = room_ + PADDING;
        norms_.resize(static_cast<size_t>(l_.H_kv * norms_stride_));
        while (l_.S < n_keys) add_norms();
    }

    StepLayer(const StepLayer&) = delete;  // l_ points into it

    // The output z [1, 1, H, V] of a new query's attention, whose key and value are kept.
    void attend(Floats<4> q, Floats<4> k, Floats<4> v, double scale, std::optional<int64_t> window,
                std::optional<double> softcap, std::optional<Packed> sinks, Store<4> z,
                int n_threads) {
        if (l_.S == room_) throw nb::value_error("the store has no room for another key");
        if (n_threads < 1) throw nb::value_error("n_threads must be at least 1");
        ifr::Layer l = l_;
        l.q = of_row(q, "q", l_.H, l_.K);
        set_scores(l, scale, window, softcap, sinks);
        const ifr::Tensor3 key = of_row(k, "k", l_.H_kv, l_.K);
        const ifr::Tensor3 value = of_row(v, "v", l_.H_kv, l_.V);
        check_shape(z, "z", {1, 1, l_.H, l_.V});
        if ((l_.H > 1 && z.stride(2) != l_.V) || (l_.V > 1 && z.stride(3) != 1))
            throw nb::value_error("z must be contiguous");
        attended_ = false;
        keep_row(key, k_, l_.K);
        keep_row(value, v_, l_.V);
        add_norms();
        l.S = l_.S;
        row_ = l_.S - 1;
        l_.window = l.window;  // the weights already contain the other options
        weights_.resize(static_cast<size_t>(l_.H * l_.S));
        const ifr::Attention out{z.data(), weights_.data()};
        nb::gil_scoped_release released;
        kernel_.attend_row(l, n_threads, out);
        attended_ = true;
    }

    // Scores of the row that attended last.
    void score(Floats<2> resid_pre, Floats<2> y, std::optional<Packed> row_scale,
               std::optional<Floats<3>> value_gate, std::optional<Floats<2>> ffn, double keep,
               StepScores& into, int n_threads) {
        if (!attended_) throw nb::value_error("no row has attended since the last was scored");
        if (n_threads < 1) throw nb::value_error("n_threads must be at least 1");
        if (into.n_heads() != l_.H) throw nb::value_error("into is for another number of heads");
        ifr::Layer l = l_;
        l.resid_pre = matrix(resid_pre, "resid_pre", 1, l.D);
        l.y = matrix(y, "y", 1, l.D);
        l.row_scale = packed(row_scale, "row_scale", 1);
        if (value_gate) l.value_gate = tensor3(*value_gate, "value_gate", {1, l.H, l.V});
        if (ffn) l.ffn = matrix(*ffn, "ffn", 1, l.D);
        l.keep = static_cast<float>(keep);
        l.weights = weights_.data();
        l.norms = norms_.data();
        l.norms_stride = norms_stride_;
        {
            nb::gil_scoped_release released;
            into.add(l, kernel_, n_threads);
        }
        attended_ = false;
    }

  private:
    // x [1, heads, 1, width] as [1, heads, width].
    static ifr::Tensor3 of_row(const Floats<4>& x, const char* name, int64_t heads, int64_t width) {
        check_shape(x, name, {1, heads, 1, width});
        check_last_contiguous(x, name);
        return {x.data(), 0, x.stride(1), 1};
    }

    void keep_row(const ifr::Tensor3& x, Store<3>& store, int64_t width) const {
        for (int64_t h = 0; h < l_.H_kv; ++h)
            std::copy_n(x.at(0, h), width,
                        store.data() + l_.S * store.stride(0) + h * store.stride(1));
    }

    // |v| of the next key, which becomes one of the keys.
    void add_norms() {
        for (int64_t h = 0; h < l_.H_kv; ++h) {
            const float* v = l_.v.at(l_.S, h);
            double squares = 0;
            for (int64_t i = 0; i < l_.V; ++i) squares += static_cast<double>(v[i]) * v[i];
            norms_[static_cast<size_t>(h * norms_stride_ + l_.S)] =
                static_cast<float>(std::sqrt(squares));
        }
        ++l_.S;
    }

    Store<3> k_, v_;
    Floats<3> W_O_;
    std::optional<Packed> alibi_slopes_;
    const Isa kernel_;
    ifr::Layer l_{};
    int64_t room_, norms_stride_, row_ = 0;
    std::vector<float> norms_;    // [H_kv, room + PADDING]
    std::vector<float> weights_;  // [H, S] of the newest row
    bool attended_ = false;
};

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<StepScores>(m, "StepScores", "Scores of rows, one after the other.")
        .def(nb::init<int64_t>(), "n_heads"_a)
        .def("take", &StepScores::take, "All there are, as numpy arrays; none are left.");
    nb::class_<StepLayer>(m, "StepLayer", "A layer's keys and values, and its newest row.")
        .def(nb::init<Store<3>, Store<3>, int64_t, Floats<3>, std::optional<Packed>,
                      const std::string&>(),
             "k"_a.noconvert(), "v"_a.noconvert(), "n_keys"_a, "W_O"_a.noconvert(),
             "alibi_slopes"_a.noconvert().none(), "isa"_a)
        .def("attend", &StepLayer::attend, "q"_a.noconvert(), "k"_a.noconvert(),
             "v"_a.noconvert(), "scale"_a, "window"_a.none(), "softcap"_a.none(),
             "sinks"_a.noconvert().none(), "z"_a.noconvert(), "n_threads"_a)
        .def("score", &StepLayer::score, "resid_pre"_a.noconvert(), "y"_a.noconvert(),
             "row_scale"_a.noconvert().none(), "value_gate"_a.noconvert().none(),
             "ffn"_a.noconvert().none(), "keep"_a, "into"_a, "n_threads"_a);
}
