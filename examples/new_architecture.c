/* new_architecture.c - a network of your own from tensors and tape alone; only mft.h is needed
 *
 *     build/new_architecture
 *
 * Two layers with a gate learn the parity of three bits, which no single layer can. */
#define MFT_IMPLEMENTATION
#include "mft.h"

#include <stdio.h>
#include <string.h>

enum { IN = 3, HIDDEN = 16, ROWS = 8, STEPS = 400 };

/* A held, trainable [rows, cols] with small numbers in it. */
static mft_tensor *weight(mft_context *ctx, int64_t rows, int64_t cols, unsigned *seed)
{
    int64_t     shape[2], i;
    mft_tensor *w;
    shape[0] = rows; shape[1] = cols;
    w = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape);
    if (!w) return NULL;
    for (i = 0; i < rows * cols; i++) {
        *seed = *seed * 1664525u + 1013904223u;
        ((float *)w->data)[i] = ((float)(*seed >> 8) / 8388608.0f - 1.0f) * 0.7f;
    }
    w->trainable = 1;
    return w;
}

int main(void)
{
    mft_context   *ctx = NULL;
    mft_optimizer *opt = NULL;
    mft_optimizer_desc od;
    mft_tensor    *params[3], *x, *y;
    float          bits[ROWS * IN], parity[ROWS];
    int64_t        x_shape[2] = { ROWS, IN }, y_shape[2] = { ROWS, 1 };
    unsigned       seed = 7;
    float          loss_value = 0;
    int            i, k, step;

    if (mft_context_create(NULL, &ctx) != MFT_OK) return 1;
    for (i = 0; i < ROWS; i++)
        for (parity[i] = 0, k = 0; k < IN; k++) {
            bits[i * IN + k] = (i >> k & 1) ? 1.0f : -1.0f;
            parity[i] += (float)(i >> k & 1);
        }
    for (i = 0; i < ROWS; i++) parity[i] = (int)parity[i] % 2 ? 1.0f : -1.0f;
    x = mft_tensor_wrap(ctx, MFT_F32, 2, x_shape, bits);
    y = mft_tensor_wrap(ctx, MFT_F32, 2, y_shape, parity);
    params[0] = weight(ctx, HIDDEN, IN, &seed);                 /* gate */
    params[1] = weight(ctx, HIDDEN, IN, &seed);                 /* up   */
    params[2] = weight(ctx, 1, HIDDEN, &seed);                  /* down */
    memset(&od, 0, sizeof od);
    if (mft_optimizer_create(ctx, &od, params, NULL, 3, &opt) != MFT_OK) goto failed;

    for (step = 0; step < STEPS; step++) {
        mft_tensor *gate = mft_linear(ctx, x, params[0], NULL);
        mft_tensor *up   = mft_linear(ctx, x, params[1], NULL);
        mft_tensor *loss = mft_mse_loss(ctx, mft_linear(ctx, mft_swiglu(ctx, gate, up), params[2], NULL), y);
        if (mft_backward(ctx, loss) != MFT_OK) goto failed;     /* reports whatever failed above as well */
        loss_value = mft_tensor_item(loss);
        if (mft_optimizer_step(opt, 0.02, NULL) != MFT_OK) goto failed;
        mft_step_reset(ctx);                                    /* the step's tensors end here */
        if (step % 100 == 0) printf("step %d  loss %.5f\n", step, (double)loss_value);
    }
    printf("after %d steps  loss %.5f\n", STEPS, (double)loss_value);
    mft_context_destroy(ctx);
    return !(loss_value < 0.01f);
failed:
    fprintf(stderr, "%s\n", mft_error_message(ctx));
    mft_context_destroy(ctx);
    return 1;
}
