/* test_kernels_cblas.c - the row that hands f32 products to a BLAS: its calls, checked with one of our own */
#define MFT_USE_CBLAS
#define TEST_SUITE "kernels_cblas"
#define TEST_ROW   "cblas"
#include "test_kernels.c"

static int calls;

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc)
{
    int i, j, p;
    if (__atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) == 0) printf("cblas_sgemm was called\n");
    if (order != 101 || lda < (trans_a == 111 ? k : m) || ldb < (trans_b == 111 ? n : k) || ldc < n) { c[0] = NAN; return; }
    for (i = 0; i < m; i++) for (j = 0; j < n; j++) {
        double s = 0;
        for (p = 0; p < k; p++) s += (double)a[trans_a == 111 ? i * lda + p : p * lda + i] * b[trans_b == 111 ? p * ldb + j : j * ldb + p];
        c[i * ldc + j] = (float)((beta != 0 ? (double)beta * c[i * ldc + j] : 0) + (double)alpha * s);
    }
}
