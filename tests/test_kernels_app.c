/* test_kernels_app.c - products by an app: a stand-in for a device whose buffers hold 4096 bytes
 *
 * It checks what it is handed: sizes, spans, and that c is not read where beta is 0. */
#define MFT_IMPLEMENTATION
#include "mft.h"

static int device_calls, device_error;

static int device_sgemm(void *user, int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                        const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    int64_t i, j, p, most = *(const int64_t *)user / 4;
    if (device_error) return device_error;
    device_calls++;
    if (m < 1 || n < 1 || k < 1 || lda < (ta ? m : k) || ldb < (tb ? k : n) || ldc < n) return 1;
    if (((ta ? k : m) - 1) * lda + (ta ? m : k) > most || ((tb ? n : k) - 1) * ldb + (tb ? k : n) > most || (m - 1) * ldc + n > most) return 2;
    for (i = 0; i < m; i++) for (j = 0; j < n; j++) {
        double s = 0;
        for (p = 0; p < k; p++) s += (double)a[ta ? p * lda + i : i * lda + p] * b[tb ? j * ldb + p : p * ldb + j];
        c[i * ldc + j] = (float)((beta != 0 ? (double)beta * c[i * ldc + j] : 0) + (double)alpha * s);
    }
    return 0;
}

static int64_t            device_bytes = 4096;
static const mft_products device = { device_sgemm, 4096, 1, &device_bytes };

#define TEST_SUITE    "kernels_app"
#define TEST_ROW      "portable"
#define TEST_PRODUCTS device
#define TEST_MORE     TEST(test_device);
#include "test.h"

/* A device that fails: the step fails with its number. One that takes large products only is left alone. */
static void test_device(void)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    mft_tensor      *x, *w, *y;
    int64_t          shape[2] = { 20, 30 };
    int              before = device_calls, i;
    CHECK(before > 100);                    /* the suite so far went through it */
    memset(&d, 0, sizeof d);
    d.products = device; d.products.least = 0;
    for (i = 0; i < 3; i++) {
        d.products.least = i ? 1 : 0;       /* 0: a million */
        d.n_threads = 1;
        device_error = i == 2 ? 77 : 0;
        before = device_calls;
        CHECK(mft_context_create(&d, &ctx) == MFT_OK);
        x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape);
        w = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape);
        w->trainable = 1;
        y = mft_sum(ctx, mft_linear(ctx, x, w, NULL));
        CHECK((mft_backward(ctx, y) == MFT_OK) == (i < 2));
        CHECK_MSG((strstr(mft_error_message(ctx), "failed with 77") != NULL) == (i == 2), "%s", mft_error_message(ctx));
        CHECK((device_calls > before) == (i == 1));
        mft_context_destroy(ctx);
    }
    device_error = 0;
    d.products.max_bytes = 3;
    CHECK(mft_context_create(&d, &ctx) == MFT_ERR_INVALID_ARGUMENT);
}

#include "test_kernels.c"
