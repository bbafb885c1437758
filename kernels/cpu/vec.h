// Float vectors of W lanes, the same names for every instruction set. No include guard: each
// isa_*.cpp includes this once, inside its own namespace, with IFR_AVX512, IFR_AVX2 or neither.
//
// F: W floats. M: a mask of W lanes. bits(m): lane i as bit i. compressed(x, m): the lanes of x
// whose bits are set in m come first. sum: in an order that depends on W alone.

#if defined(IFR_AVX512)

constexpr int W = 16;
using F = __m512;
using M = __mmask16;
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
inline M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M both(M a, M b) { return a & b; }
inline unsigned bits(M m) { return m; }
inline F where(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
inline F unless(M m, F a) { return _mm512_maskz_mov_ps(static_cast<M>(~m), a); }
inline F select(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
inline F sign_of(F a) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}
inline F flip(F a, F sign) {
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_castps_si512(sign)));
}
// p 2^n, n in the low bits of t
inline F scale_by(F p, F t) {
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
inline F compressed(F x, unsigned m) {
    return _mm512_maskz_compress_ps(static_cast<M>(m), x);
}
inline float sum(F x) {
    return _mm512_reduce_add_ps(x);
}

#elif defined(IFR_AVX2)

constexpr int W = 8;
using F = __m256;
using M = __m256;
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
inline M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline M both(M a, M b) { return _mm256_and_ps(a, b); }
inline unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
inline F where(M m, F a) { return _mm256_and_ps(m, a); }
inline F unless(M m, F a) { return _mm256_andnot_ps(m, a); }
inline F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
inline F sign_of(F a) { return _mm256_and_ps(_mm256_set1_ps(-0.0f), a); }
inline F flip(F a, F sign) { return _mm256_xor_ps(a, sign); }
// p 2^n, n in the low bits of t
inline F scale_by(F p, F t) {
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
// COMPRESS[m]: the lanes whose bits are set in m, in order, a byte each
struct CompressTable {
    uint64_t lanes[256] = {};
    constexpr CompressTable() {
        for (int m = 0; m < 256; ++m)
            for (int lane = 0, n = 0; lane < 8; ++lane)
                if (m >> lane & 1) lanes[m] |= static_cast<uint64_t>(lane) << 8 * n++;
    }
};
constexpr CompressTable COMPRESS;
inline F compressed(F x, unsigned m) {
    const __m128i lanes = _mm_cvtsi64_si128(static_cast<long long>(COMPRESS.lanes[m]));
    return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(lanes));
}
inline float sum(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

#else

constexpr int W = 4;
using F = float __attribute__((vector_size(16)));
using M = int32_t __attribute__((vector_size(16)));
using U = uint32_t __attribute__((vector_size(16)));
inline F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
inline F set1(float x) { return F{x, x, x, x}; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline M less(F a, F b) { return a < b; }
inline F where(M m, F a) { return (F)(m & (M)a); }
inline F unless(M m, F a) { return (F)(~m & (M)a); }
inline F select(M m, F a, F b) { return (F)((m & (M)a) | (~m & (M)b)); }
inline F max(F a, F b) { return select(b < a, a, b); }
inline F min(F a, F b) { return select(a < b, a, b); }
inline F sign_of(F a) { return (F)((M)a & INT32_MIN); }
inline F flip(F a, F sign) { return (F)((M)a ^ (M)sign); }
inline F abs(F a) { return (F)((M)a & INT32_MAX); }
inline F sqrt(F a) { return F{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])}; }
inline M both(M a, M b) { return a & b; }
inline unsigned bits(M m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
// p 2^n, n in the low bits of t; modulo 2^32, as unused lanes may hold anything
inline F scale_by(F p, F t) { return (F)((U)p + ((U)t << 23)); }
inline F compressed(F x, unsigned m) {
    F out = x;
    for (int n = 0; m; m &= m - 1) out[n++] = x[__builtin_ctz(m)];
    return out;
}
inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }

#endif

// 0, 1, 2 ... W - 1
inline F iota() {
    float lane[W];
    for (int i = 0; i < W; ++i) lane[i] = static_cast<float>(i);
    return load(lane);
}

inline float largest(F x) {
    float lane[W];
    store(lane, x);
    float top = lane[0];
    for (int i = 1; i < W; ++i) top = lane[i] > top ? lane[i] : top;
    return top;
}

inline float smallest(F x) {
    float lane[W];
    store(lane, x);
    float low = lane[0];
    for (int i = 1; i < W; ++i) low = lane[i] < low ? lane[i] : low;
    return low;
}

// 2^x within 1 ulp for x in [-125, 127], 0 below (-inf and NaN included).
// 2^f on [-1/2, 1/2] by its minimax polynomial of degree 6 (relative error 1.9e-9); adding
// 1.5 * 2^23 rounds x to an integer and leaves that integer in the low bits.
inline F exp2(F x) {
    const F magic = set1(12582912.0f);
    const F t = min(x, set1(127.0f)) + magic;
    const F f = x - (t - magic);
    F p = set1(0.00015345824067480862f);
    p = fma(p, f, set1(0.0013399935560300946f));
    p = fma(p, f, set1(0.009618489071726799f));
    p = fma(p, f, set1(0.05550328642129898f));
    p = fma(p, f, set1(0.24022646248340607f));
    p = fma(p, f, set1(0.6931471824645996f));
    p = fma(p, f, set1(1.0f));
    return where(less(set1(-125.0f), x), scale_by(p, t));
}

// tanh: an odd polynomial near 0 (Cephes), 1 - 2 / (e^2x + 1) beyond.
inline F tanh(F x) {
    const F magnitude = abs(x);
    const F z = x * x;
    F p = set1(-5.70498872745e-3f);
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    const F near = fma(p * z, x, x);
    const F e = exp2(min(magnitude, set1(40.0f)) * set1(2.8853900817779268f));
    const F far = flip(set1(1.0f) - set1(2.0f) / (e + set1(1.0f)), sign_of(x));
    return select(less(magnitude, set1(0.625f)), near, far);
}

// y [SIDE, SIDE] = x transposed, rows at distances s and t.
constexpr int SIDE = 8;
inline void transpose_tile(const float* x, int64_t s, float* y, int64_t t) {
#if defined(IFR_AVX2) || defined(IFR_AVX512)
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(x + i * s);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
            a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0x44);
            a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(y + i * t, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(y + (i + 4) * t, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
#else
    for (int i = 0; i < SIDE; ++i)
        for (int j = 0; j < SIDE; ++j) y[j * t + i] = x[i * s + j];
#endif
}
