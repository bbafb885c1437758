// Register-blocked products. No include guard: see vec.h.
//
// C [m, N R] = A [m, n] B [n, NR]: m rows of A at distance lda, the NR = NV * W columns of B as
// n rows at distance ldb. Every element of C is one chain of fused multiply-adds along n,
// for every m, so a row's bits do not depend on the rows that it is computed with.

#if defined(IFR_AVX512)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;
constexpr int NR = NV * W;

template <int m, bool squared>
inline void product_rows(
    int64_t n, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc) {
    F c[m][NV];
    for (auto& row : c)
        for (F& x : row) x = set1(0.0f);
    for (int64_t i = 0; i < n; ++i) {
        F b[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            b[j] = load(B + i * ldb + j * W);
            if (squared) b[j] = b[j] * b[j];
        }
#pragma GCC unroll 16
        for (int r = 0; r < m; ++r) {
            const F a = set1(A[r * lda + i]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) c[r][j] = fma(a, b[j], c[r][j]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < m; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) store(C + r * ldc + j * W, c[r][j]);
}

// `squared`: B's elements are squared first.
template <bool squared = false>
inline void product(int m, int64_t n, const float* A, int64_t lda, const float* B, int64_t ldb,
                    float* C, int64_t ldc) {
    switch (m) {
        case 1: return product_rows<1, squared>(n, A, lda, B, ldb, C, ldc);
        case 2: return product_rows<2, squared>(n, A, lda, B, ldb, C, ldc);
        case 3: return product_rows<3, squared>(n, A, lda, B, ldb, C, ldc);
        case 4: return product_rows<4, squared>(n, A, lda, B, ldb, C, ldc);
        case 5: return product_rows<5, squared>(n, A, lda, B, ldb, C, ldc);
        case 6: return product_rows<6, squared>(n, A, lda, B, ldb, C, ldc);
#if defined(IFR_AVX512)
        case 7: return product_rows<7, squared>(n, A, lda, B, ldb, C, ldc);
        case 8: return product_rows<8, squared>(n, A, lda, B, ldb, C, ldc);
        case 9: return product_rows<9, squared>(n, A, lda, B, ldb, C, ldc);
        case 10: return product_rows<10, squared>(n, A, lda, B, ldb, C, ldc);
        case 11: return product_rows<11, squared>(n, A, lda, B, ldb, C, ldc);
        case 12: return product_rows<12, squared>(n, A, lda, B, ldb, C, ldc);
#endif
    }
}

// ND dot products at once: out[r] = x . B[r] for x [n] and rows B[r] [n], n a multiple of W.
// `squared`: B's elements are squared first.
constexpr int ND = W > 8 ? W : 8;

template <bool squared = false>
inline void dots(int64_t n, const float* x, const float* const B[ND], float out[ND]) {
    F c[ND];
#pragma GCC unroll 16
    for (int r = 0; r < ND; ++r) c[r] = set1(0.0f);
    for (int64_t i = 0; i < n; i += W) {
        const F a = load(x + i);
#pragma GCC unroll 16
        for (int r = 0; r < ND; ++r) {
            const F b = load(B[r] + i);
            c[r] = fma(a, squared ? b * b : b, c[r]);
        }
    }
#if defined(IFR_AVX2)
    const F c0123 = _mm256_hadd_ps(_mm256_hadd_ps(c[0], c[1]), _mm256_hadd_ps(c[2], c[3]));
    const F c4567 = _mm256_hadd_ps(_mm256_hadd_ps(c[4], c[5]), _mm256_hadd_ps(c[6], c[7]));
    store(out, _mm256_permute2f128_ps(c0123, c4567, 0x20) +
                   _mm256_permute2f128_ps(c0123, c4567, 0x31));
#else
#pragma GCC unroll 16
    for (int r = 0; r < ND; ++r) out[r] = sum(c[r]);
#endif
}
