// Shared by the Python faces of the kernel (module.cpp, step.cpp): array types, checks of shapes
// and strides, parameters of attention scores, the instruction sets.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "score.h"
#include "team.h"

namespace nb = nanobind;
using namespace nb::literals;

template <int rank>
using Floats = nb::ndarray<const float, nb::ndim<rank>, nb::device::cpu>;
using Packed = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Packed2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <int rank>
using Store = nb::ndarray<float, nb::ndim<rank>, nb::device::cpu>;
using OutFlags = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct Isa {
    const char* name;
    void (*score_attention)(const ifr::Layer&, int, ifr::Scores&);
    void (*score_ffn)(const ifr::FFNParts&, int);
    void (*attend_row)(const ifr::Layer&, int, const ifr::Attention&);
    bool usable;
};

// Best first; sets after the baseline are never picked automatically.
inline std::vector<Isa> isas() {
    std::vector<Isa> all;
#if defined(__x86_64__)
    all.push_back({"avx2", ifr::avx2::score_attention, ifr::avx2::score_ffn, ifr::avx2::attend_row,
                   __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
    all.push_back({"baseline", ifr::baseline::score_attention, ifr::baseline::score_ffn,
                   ifr::baseline::attend_row, true});
#if defined(__x86_64__)
    all.push_back({"avx512", ifr::avx512::score_attention, ifr::avx512::score_ffn,
                   ifr::avx512::attend_row,
                   __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")});
#endif
    return all;
}

inline std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        if (isa.usable) names.emplace_back(isa.name);
    return names;
}

inline Isa find_isa(const std::string& name) {
    for (const Isa& isa : isas())
        if (isa.usable && name == isa.name) return isa;
    throw nb::value_error(("this processor has no instruction set '" + name + "'").c_str());
}

template <class Array>
void check_shape(const Array& x, const char* name, std::initializer_list<int64_t> shape) {
    std::string expected, got;
    bool equal = true;
    size_t i = 0;
    for (int64_t n : shape) {
        const int64_t size = static_cast<int64_t>(x.shape(i++));
        equal &= size == n;
        expected += (expected.empty() ? "" : ", ") + std::to_string(n);
        got += (got.empty() ? "" : ", ") + std::to_string(size);
    }
    if (!equal)
        throw nb::value_error(
            (std::string(name) + ": expected shape [" + expected + "], got [" + got + "]").c_str());
}

template <class Array>
void check_last_contiguous(const Array& x, const char* name) {
    const size_t last = x.ndim() - 1;
    if (x.stride(last) != 1 && x.shape(last) > 1)
        throw nb::value_error(
            (std::string(name) + " must be contiguous in its last dimension").c_str());
}

template <class Array>
ifr::Tensor3 tensor3(const Array& x, const char* name, std::initializer_list<int64_t> shape) {
    check_shape(x, name, shape);
    check_last_contiguous(x, name);
    return {x.data(), x.stride(0), x.stride(1), 1};
}

inline ifr::Matrix matrix(const Floats<2>& x, const char* name, int64_t R, int64_t D) {
    check_shape(x, name, {R, D});
    check_last_contiguous(x, name);
    return {x.data(), x.stride(0)};
}

inline const float* packed(const std::optional<Packed>& x, const char* name, int64_t n) {
    if (!x) return nullptr;
    check_shape(*x, name, {n});
    return x->data();
}

// Parameters that turn products of q and k into scores, checked.
inline void set_scores(ifr::Layer& l, double scale, std::optional<int64_t> window,
                       std::optional<double> softcap, const std::optional<Packed>& sinks) {
    if (window && *window < 1) throw nb::value_error("window must be at least 1");
    if (softcap && !(*softcap > 0)) throw nb::value_error("softcap must be above 0");
    l.scale = static_cast<float>(scale);
    l.window = window.value_or(0);
    l.softcap = static_cast<float>(softcap.value_or(0));
    l.sinks = packed(sinks, "sinks", l.H);
}

void bind_step(nb::module_& m);
