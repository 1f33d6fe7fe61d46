/* test_tape.c - what a step remembers: no-grad scopes, checkpoints, memory from two ends, planning, cancelling,
 * failures, lifetimes, two contexts at once */
#include "test.h"
#define MFT_ASSERT(x) do { if (!(x)) { printf("%s:%d: MFT_ASSERT(%s)\n", __FILE__, __LINE__, #x); test__bad++; } } while (0)
#define MFT_IMPLEMENTATION
#include "mft.h"
#include <pthread.h>

/* ---- a small network: L blocks of norm, attention, gated mlp, with dropout ---- */
enum { LAYERS = 3, B = 2, T = 9, HEADS = 2, DIM = 6, H = HEADS * DIM, F = 29, V = 43, N_PARAMS = 2 + 6 * LAYERS };

typedef struct net {
    mft_context *ctx;
    mft_tensor  *p[N_PARAMS];               /* embedding, head, then per layer norm, qkv, o, norm, gate-up, down */
    int32_t      ids[B * T], labels[B * T];
    int          checkpoint;                /* 0 none, 1 each block, 2 each block in a checkpoint of all, 3 two within one */
    float        dropout;
    int          cancel_in_block, fail_in_block, calls;
} net;

typedef struct block_args { net *n; int layer; } block_args;

static mft_tensor *block(mft_context *ctx, mft_tensor *x, void *user)
{
    net        *n = ((block_args *)user)->n;
    mft_tensor **p = n->p + 2 + 6 * ((block_args *)user)->layer, *h, *qkv, *g;
    int64_t     heads[4] = { B, T, 3 * HEADS, DIM }, flat[3] = { B, T, H };
    n->calls++;
    h   = mft_rms_norm(ctx, x, p[0], 0, 1e-6f);
    qkv = mft_reshape(ctx, mft_linear(ctx, h, p[1], NULL), 4, heads);
    h   = mft_attention(ctx, mft_slice(ctx, qkv, 2, 0, HEADS), mft_slice(ctx, qkv, 2, HEADS, 2 * HEADS), mft_slice(ctx, qkv, 2, 2 * HEADS, 3 * HEADS), NULL);
    h   = mft_dropout(ctx, mft_linear(ctx, mft_reshape(ctx, h, 3, flat), p[2], NULL), n->dropout);
    x   = mft_add(ctx, x, h);
    if (n->cancel_in_block && n->calls == n->cancel_in_block) mft_cancel(ctx, 1);
    if (n->fail_in_block && n->calls == n->fail_in_block) return mft_add(ctx, x, p[1]);
    g   = mft_linear(ctx, mft_rms_norm(ctx, x, p[3], 0, 1e-6f), p[4], NULL);
    h   = mft_linear(ctx, mft_swiglu(ctx, mft_slice(ctx, g, 2, 0, F), mft_slice(ctx, g, 2, F, 2 * F)), p[5], NULL);
    return mft_add(ctx, x, mft_dropout(ctx, h, n->dropout));
}

static block_args all_args[8][LAYERS];      /* must outlive the backward pass; a set for each net of a test */

static mft_tensor *all_blocks(mft_context *ctx, mft_tensor *x, void *user)
{
    block_args *a = (block_args *)user;
    int i;
    for (i = 0; i < LAYERS; i++) x = mft_checkpoint(ctx, block, x, &a[i]);
    return x;
}

static mft_tensor *net_loss(net *n, int set)
{
    mft_context *ctx = n->ctx;
    mft_tensor  *x = mft_embedding(ctx, n->p[0], n->ids, B, T, -1);
    int i;
    n->calls = 0;
    for (i = 0; i < LAYERS; i++) { all_args[set][i].n = n; all_args[set][i].layer = i; }
    if (n->checkpoint == 2) x = mft_checkpoint(ctx, all_blocks, x, all_args[set]);
    else for (i = 0; i < LAYERS; i++) x = n->checkpoint ? mft_checkpoint(ctx, block, x, &all_args[set][i]) : block(ctx, x, &all_args[set][i]);
    return mft_linear_cross_entropy(ctx, x, n->p[1], n->labels, 0, 0);
}

static void net_create(net *n, mft_context *ctx, int trainable_from)
{
    static const int64_t shapes[8][2] = { { V, H }, { V, H }, { H, 0 }, { 3 * H, H }, { H, H }, { H, 0 }, { 2 * F, H }, { H, F } };
    uint32_t seed = 1;
    int      i;
    int64_t  j;
    memset(n, 0, sizeof *n);
    n->ctx = ctx;
    for (i = 0; i < N_PARAMS; i++) {
        const int64_t *s = shapes[i < 2 ? i : 2 + (i - 2) % 6];
        n->p[i] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, s[1] ? 2 : 1, s);
        for (j = 0; n->p[i] && j < mft_tensor_numel(n->p[i]); j++) ((float *)n->p[i]->data)[j] = s[1] ? test_random(&seed) * 0.4f : 1;
        if (n->p[i]) n->p[i]->trainable = i >= trainable_from;
    }
    for (i = 0; i < B * T; i++) { n->ids[i] = (i * 7 + 3) % V; n->labels[i] = i % 5 == 4 ? -100 : (i * 11 + 1) % V; }
}

static uint64_t net_gradients(const net *n)
{
    uint64_t h = 14695981039346656037u;
    int      i;
    int64_t  j;
    for (i = 0; i < N_PARAMS; i++)
        for (j = 0; n->p[i]->grad && j < mft_tensor_numel(n->p[i]); j++) h = (h ^ mft__float_to_bits(((float *)n->p[i]->grad->data)[j])) * 1099511628211u;
    return h;
}

static mft_context *context_of_row(int row)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    memset(&d, 0, sizeof d);
    d.kernels = mft_kernels_available(row);
    d.n_threads = 2; d.seed = 99;
    if (d.kernels && mft_context_create(&d, &ctx) != MFT_OK) { printf("no context for row %s\n", d.kernels); test__bad++; }
    return ctx;
}

/* ---- scopes ---- */
static void test_no_grad(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    mft_tensor  *loss;
    float        with, without;
    int          was;
    net_create(&n, ctx, 0);
    loss = net_loss(&n, 0);
    with = mft_tensor_item(loss);
    CHECK(ctx->tape != NULL && loss && loss->trainable);
    mft_step_reset(ctx);
    CHECK(ctx->tape == NULL);
    was = mft_grad_enable(ctx, 0);
    CHECK(was == 1 && mft_grad_enable(ctx, 0) == 0);
    loss = net_loss(&n, 0);
    without = mft_tensor_item(loss);
    CHECK(ctx->tape == NULL && loss && !loss->trainable && with == without);
    CHECK(mft_backward(ctx, loss) == MFT_OK && n.p[0]->grad == NULL);
    mft_step_reset(ctx);
    mft_grad_enable(ctx, was);
    loss = net_loss(&n, 0);
    CHECK(ctx->tape != NULL && mft_backward(ctx, loss) == MFT_OK && n.p[0]->grad != NULL);
    CHECK(mft_grad_enable(NULL, 1) == 0);
    mft_context_destroy(ctx);
}

/* Nothing is recorded or saved below the lowest trainable parameter. */
static void test_frozen_start(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    int          i, records = 0, all = 0;
    mft__record *r;
    net_create(&n, ctx, 0);
    net_loss(&n, 0);
    for (r = ctx->tape; r; r = r->before) all++;
    mft_step_reset(ctx);
    for (i = 0; i < N_PARAMS; i++) n.p[i]->trainable = i == 2 + 6 * (LAYERS - 1) + 5;           /* the last block's down projection */
    CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
    mft_step_reset(ctx);
    net_loss(&n, 0);
    for (r = ctx->tape; r; r = r->before) records++;
    CHECK_MSG(records == 3, "%d of %d records", records, all);  /* linear, add, loss */
    for (i = 0; i < N_PARAMS; i++) CHECK(!n.p[i]->grad == !n.p[i]->trainable);
    mft_context_destroy(ctx);
}

/* ---- checkpoints: the same bits as without, dropout included, nested, in and under frozen blocks ---- */
static void test_checkpoint_same_bits(void)
{
    mft_context *ctx;
    int          row, kind, from, drop;
    for (row = 0; (ctx = context_of_row(row)) != NULL; row++) {
        mft_context_destroy(ctx);
        for (drop = 0; drop < 2; drop++) for (from = 0; from < 15; from += 7) {
            uint64_t want = 0;
            float    loss_want = 0;
            size_t   peak_want = 0;
            for (kind = 0; kind < 3; kind++) {
                net         n;
                mft_tensor *loss;
                int         step;
                uint64_t    got = 0;
                ctx = context_of_row(row);
                net_create(&n, ctx, from);
                n.checkpoint = kind; n.dropout = drop ? 0.2f : 0;
                for (step = 0; step < 2; step++) {              /* the second adds, with other draws */
                    loss = net_loss(&n, 0);
                    CHECK(mft_backward(ctx, loss) == MFT_OK);
                    got = net_gradients(&n);
                    if (step == 0) mft_step_reset(ctx);
                }
                if (kind == 0) { want = got; loss_want = mft_tensor_item(loss); peak_want = ctx->arena.peak; }
                CHECK_MSG(got == want, "row %s, kind %d, from %d, dropout %d", mft_kernels_name(ctx), kind, from, drop);
                CHECK(mft_tensor_item(loss) == loss_want);
                if (kind == 1) CHECK_MSG(from || ctx->arena.peak < peak_want, "peak %llu, without %llu", (unsigned long long)ctx->arena.peak, (unsigned long long)peak_want);
                CHECK(n.calls == (kind == 0 ? LAYERS : kind == 1 ? (from >= 14 ? LAYERS + 1 : 2 * LAYERS) : n.calls));
                mft_context_destroy(ctx);
            }
        }
    }
}

/* A function whose result is a transposed view, its argument, a view of it, a parameter, or made of nothing trainable. */
static mft_tensor *odd_block(mft_context *ctx, mft_tensor *x, void *user)
{
    mft_tensor **p = (mft_tensor **)user;
    int64_t      flat[1] = { 15 };
    switch (*(int *)(void *)p[2]) {
    case 0: return mft_transpose(ctx, mft_mul(ctx, x, p[0]), 0, 1);
    case 1: return x;
    case 2: return mft_reshape(ctx, x, 1, flat);
    case 3: return mft_transpose(ctx, x, 0, 1);
    case 4: return p[0];
    case 5: return p[1];
    case 6: return mft_sum(ctx, mft_mul(ctx, x, p[0]));
    default: return mft_silu(ctx, p[1]);
    }
}
static void test_checkpoint_odd_results(void)
{
    int64_t  s[2] = { 3, 5 };
    int      kind, on, x_trainable;
    for (kind = 0; kind < 8; kind++) for (x_trainable = 0; x_trainable < 2; x_trainable++) {
        uint64_t want = 0, got;
        for (on = 0; on < 2; on++) {
            mft_context *ctx = context_of_row(0);
            mft_tensor  *p[3], *x, *y, *w;
            uint32_t     seed = 4;
            int          i, pass;
            p[0] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s); p[1] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s);
            x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s);
            for (i = 0; i < 15; i++) { ((float *)p[0]->data)[i] = test_random(&seed); ((float *)p[1]->data)[i] = test_random(&seed); ((float *)x->data)[i] = test_random(&seed); }
            p[0]->trainable = 1; x->trainable = x_trainable;
            p[2] = (mft_tensor *)(void *)&kind;
            got = 0;
            for (pass = 0; pass < 2; pass++) {
                mft_tensor *in = mft_scale(ctx, x, 2);
                y = on ? mft_checkpoint(ctx, odd_block, in, p) : odd_block(ctx, in, p);
                CHECK(y != NULL);
                w = mft_tensor_create(ctx, MFT_STEP, MFT_F32, y->ndim, y->shape);
                for (i = 0; i < (int)mft_tensor_numel(w); i++) ((float *)w->data)[i] = (float)(i + 1);
                CHECK_MSG(mft_backward(ctx, mft_sum(ctx, mft_mul(ctx, y, w))) == MFT_OK, "%s", mft_error_message(ctx));
                mft_step_reset(ctx);
                memset(mft__high(ctx, 4096), 9, 4096);          /* gradients of held tensors must not lie in the step's memory */
                mft_step_reset(ctx);
            }
            for (i = 0; i < 15; i++) {
                got = got * 1099511628211u + (p[0]->grad ? mft__float_to_bits(((float *)p[0]->grad->data)[i]) : 1);
                got = got * 1099511628211u + (x->grad ? mft__float_to_bits(((float *)x->grad->data)[i]) : 1);
            }
            if (on) CHECK_MSG(got == want, "result %d, x trainable %d", kind, x_trainable);
            want = got;
            mft_context_destroy(ctx);
        }
    }
}

/* The backward pass may be called where recording is off; a checkpoint records all the same. */
static void test_backward_in_no_grad_scope(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    mft_tensor  *loss;
    uint64_t     want;
    net_create(&n, ctx, 0);
    n.checkpoint = 1;
    CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
    want = net_gradients(&n);
    mft_step_reset(ctx);
    { int i; for (i = 0; i < N_PARAMS; i++) { mft_tensor_destroy(ctx, n.p[i]); } }
    net_create(&n, ctx, 0);
    n.checkpoint = 1;
    loss = net_loss(&n, 0);
    mft_grad_enable(ctx, 0);
    CHECK(mft_backward(ctx, loss) == MFT_OK);
    CHECK(mft_grad_enable(ctx, 1) == 0);
    CHECK(net_gradients(&n) == want);
    mft_context_destroy(ctx);
}

/* Without grad a checkpoint gives its function's memory back. */
static void test_checkpoint_without_grad(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    size_t       held[2];
    float        loss[2];
    int          kind;
    for (kind = 0; kind < 2; kind++) {
        mft_context_destroy(ctx);
        ctx = context_of_row(0);
        net_create(&n, ctx, 0);
        n.checkpoint = kind;
        mft_grad_enable(ctx, 0);
        loss[kind] = mft_tensor_item(net_loss(&n, 0));
        held[kind] = ctx->arena.now;
        CHECK(n.calls == LAYERS);
    }
    CHECK(loss[0] == loss[1]);
    CHECK_MSG(held[1] * 2 < held[0], "%llu and %llu", (unsigned long long)held[1], (unsigned long long)held[0]);
    mft_context_destroy(ctx);
}

/* ---- memory ---- */
static void test_step_memory(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    mft_tensor  *loss;
    mft_memory_report m;
    float        item;
    size_t       now, gradients;
    int          i;
    net_create(&n, ctx, 0);
    mft_memory(ctx, &m);
    CHECK(m.step_now == 0 && m.gradients == 0 && m.now <= m.peak);
    loss = net_loss(&n, 0);
    mft_memory(ctx, &m);
    CHECK(m.step_now > 0 && m.step_peak >= m.step_now);
    item = mft_tensor_item(loss);
    CHECK(mft_backward(ctx, loss) == MFT_OK);
    mft_memory(ctx, &m);
    CHECK(m.step_now == 0);                                     /* both ends */
    CHECK(mft__low_mark(ctx).chunk == 0 && mft__low_mark(ctx).low == 0);
    CHECK(mft_tensor_item(loss) == item);                       /* the loss stays readable */
    for (gradients = 0, i = 0; i < N_PARAMS; i++) gradients += (size_t)mft_tensor_numel(n.p[i]) * 4;
    CHECK(m.gradients == gradients);
    mft_step_reset(ctx);
    CHECK(ctx->arena.n_chunks == 1);
    for (i = 0; i < N_PARAMS; i++) CHECK(n.p[i]->grad && n.p[i]->grad->data);
    mft_memory(ctx, &m);
    now = m.now;
    for (i = 0; i < 3; i++) {                                   /* steps of one size ask for nothing more */
        CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
        mft_step_reset(ctx);
        mft_memory(ctx, &m);
        CHECK_MSG(m.now == now, "%llu, then %llu", (unsigned long long)now, (unsigned long long)m.now);
    }
    mft_context_destroy(ctx);
}

/* Results of one number keep it, whatever their shape. */
static void test_scalars_stay(void)
{
    mft_context *ctx = context_of_row(0);
    int64_t      s[2] = { 1, 5 }, one[2] = { 1, 1 };
    mft_tensor  *x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s), *a, *b, *c;
    int          i;
    for (i = 0; i < 5; i++) ((float *)x->data)[i] = (float)i;
    x->trainable = 1;
    a = mft_linear(ctx, x, x, NULL);                            /* [1, 1]: 30 */
    b = mft_scale(ctx, a, 2);
    c = mft_reshape(ctx, mft_sum(ctx, b), 2, one);
    CHECK(mft_backward(ctx, c) == MFT_OK);
    CHECK(mft_tensor_item(c) == 60);
    CHECK(mft_tensor_item(a) == 30 && mft_tensor_item(b) == 60);
    for (i = 0; i < 5; i++) CHECK(((float *)x->grad->data)[i] == 4.0f * (float)i);
    mft_context_destroy(ctx);
}

/* The two-ended heap against a naive model of it: no overlap, alignment, all of it back at the end. */
static void test_arena_random(void)
{
    enum { MOST = 200 };
    mft_context *ctx = context_of_row(0);
    struct { char *p; size_t bytes; unsigned char fill; } high[MOST];
    struct { char *p; size_t bytes; mft__mark mark; unsigned char fill; } low[MOST];
    int      n_high = 0, n_low = 0, round, i, k;
    uint32_t seed = 77;
    for (round = 0; round < 6000; round++) {
        unsigned dice = (unsigned)((test_random(&seed) + 1) * 50);
        size_t   bytes = (size_t)((test_random(&seed) + 1) * (round % 97 == 0 ? 400000 : 3000));
        if (dice < 30 && n_high < MOST) {
            high[n_high].p = (char *)mft__high(ctx, bytes); high[n_high].bytes = bytes; high[n_high].fill = (unsigned char)round;
            CHECK(high[n_high].p && (uintptr_t)high[n_high].p % 64 == 0);
            memset(high[n_high].p, high[n_high].fill, bytes); n_high++;
        } else if (dice < 55 && n_high) {
            i = (int)(dice * 7919u % (unsigned)n_high);
            for (k = 0; k < (int)high[i].bytes; k++) if ((unsigned char)high[i].p[k] != high[i].fill) { CHECK(!"overwritten"); break; }
            mft__high_free(ctx, high[i].p, high[i].bytes);
            high[i] = high[--n_high];
        } else if (dice < 80 && n_low < MOST) {
            low[n_low].mark = mft__low_mark(ctx);
            low[n_low].p = (char *)mft__low(ctx, bytes); low[n_low].bytes = bytes; low[n_low].fill = (unsigned char)(round + 1);
            CHECK(low[n_low].p && (uintptr_t)low[n_low].p % 64 == 0);
            memset(low[n_low].p, low[n_low].fill, bytes); n_low++;
        } else if (n_low) {
            n_low--;
            for (k = 0; k < (int)low[n_low].bytes; k++) if ((unsigned char)low[n_low].p[k] != low[n_low].fill) { CHECK(!"overwritten"); break; }
            mft__low_pop(ctx, low[n_low].mark);
        }
    }
    while (n_low) { n_low--; mft__low_pop(ctx, low[n_low].mark); }
    while (n_high) { n_high--; mft__high_free(ctx, high[n_high].p, high[n_high].bytes); }
    CHECK(ctx->arena.now == 0);
    for (i = 0; i < ctx->arena.n_chunks; i++) CHECK(ctx->arena.chunks[i].low == 0 && ctx->arena.chunks[i].high == ctx->arena.chunks[i].size);
    CHECK(ctx->arena.n_holes == 0);
    mft_step_reset(ctx);
    CHECK(ctx->arena.n_chunks == 1);
    mft_context_destroy(ctx);
}

/* ---- planning ---- */

/* Large enough for the arena's least chunk not to matter. */
static mft_tensor *wide_loss(mft_context *ctx, mft_tensor **p, int layers, int frozen, int checkpoint_user)
{
    mft_tensor *x = p[0];
    int i;
    (void)frozen; (void)checkpoint_user;
    for (i = 0; i < layers; i++) x = mft_add(ctx, x, mft_gelu(ctx, mft_lora_linear(ctx, mft_rms_norm(ctx, x, p[1], 0, 1e-5f), p[2], NULL, p[3], p[4], 2, 0.1f)));
    return mft_mse_loss(ctx, x, p[5]);
}

static void test_plan(void)
{
    mft_context *ctx;
    int          row, from;
    for (row = 0; (ctx = context_of_row(row)) != NULL; row++) {
        mft_context_destroy(ctx);
        for (from = 0; from < 2; from++) {
            static const int64_t shapes[6][2] = { { 211, 301 }, { 301, 0 }, { 301, 301 }, { 5, 301 }, { 301, 5 }, { 211, 301 } };
            mft_tensor *p[6], *loss;
            mft_memory_report before, after;
            size_t      plan = 0, again = 0;
            float       item[2];
            int         i, k;
            uint64_t    h[2];
            ctx = context_of_row(row);
            for (i = 0; i < 6; i++) {
                uint32_t seed = (uint32_t)i + 1;
                p[i] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, shapes[i][1] ? 2 : 1, shapes[i]);
                for (k = 0; k < (int)mft_tensor_numel(p[i]); k++) ((float *)p[i]->data)[k] = test_random(&seed) * 0.1f;
                p[i]->trainable = from ? i == 3 || i == 4 : i < 5;
            }
            for (k = 0; k < 2; k++) {                           /* a plan between two equal steps changes nothing of the second's numbers */
                if (k) {
                    mft_plan_begin(ctx);
                    loss = wide_loss(ctx, p, 4, 0, 0);
                    CHECK(loss != NULL && mft_backward(ctx, loss) == MFT_OK);
                    CHECK(mft_plan_end(ctx, &plan) == MFT_OK);
                    CHECK(ctx->real_arena == NULL && ctx->arena.now == 0);
                }
                loss = wide_loss(ctx, p, 4, 0, 0);
                item[k] = mft_tensor_item(loss);
                CHECK(mft_backward(ctx, loss) == MFT_OK);
                for (h[k] = 0, i = 0; i < (int)mft_tensor_numel(p[3]); i++) h[k] = h[k] * 1099511628211u + mft__float_to_bits(((float *)p[3]->grad->data)[i]);
                CHECK(ctx->arena.reach > 0);
                mft_context_destroy(ctx);
                ctx = context_of_row(row);
                for (i = 0; i < 6; i++) {
                    uint32_t seed = (uint32_t)i + 1;
                    int      t = from ? i == 3 || i == 4 : i < 5, q;
                    p[i] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, shapes[i][1] ? 2 : 1, shapes[i]);
                    for (q = 0; q < (int)mft_tensor_numel(p[i]); q++) ((float *)p[i]->data)[q] = test_random(&seed) * 0.1f;
                    p[i]->trainable = t;
                }
            }
            CHECK(item[0] == item[1] && h[0] == h[1]);

            mft_plan_begin(ctx);
            CHECK(mft_backward(ctx, wide_loss(ctx, p, 4, 0, 0)) == MFT_OK);
            mft_memory(ctx, &before);
            CHECK_MSG(before.gradients == 0, "planning took %llu bytes of gradients", (unsigned long long)before.gradients);
            CHECK(mft_plan_end(ctx, &plan) == MFT_OK);
            CHECK_MSG(plan > (size_t)1 << 20, "%llu", (unsigned long long)plan);
            CHECK(mft_step_reserve(ctx, plan) == MFT_OK);
            CHECK(ctx->arena.n_chunks == 1 && ctx->arena.chunks[0].size == plan);
            for (k = 0; k < 2; k++) {
                loss = wide_loss(ctx, p, 4, 0, 0);
                CHECK(mft_backward(ctx, loss) == MFT_OK);
                CHECK(ctx->arena.n_chunks == 1 && ctx->arena.chunks[0].size == plan);
                CHECK_MSG(ctx->arena.reach == plan, "row %s: planned %llu, used %llu", mft_kernels_name(ctx), (unsigned long long)plan, (unsigned long long)ctx->arena.reach);
                mft_step_reset(ctx);
                if (k == 0) mft_memory(ctx, &before);
            }
            mft_memory(ctx, &after);
            CHECK(after.now == before.now && after.peak == before.peak);

            mft_plan_begin(ctx);                                /* forward only needs less; a second plan is as the first */
            wide_loss(ctx, p, 4, 0, 0);
            CHECK(mft_plan_end(ctx, &again) == MFT_OK && again < plan);
            mft_plan_begin(ctx);
            CHECK(mft_backward(ctx, wide_loss(ctx, p, 4, 0, 0)) == MFT_OK);
            CHECK(mft_plan_end(ctx, &again) == MFT_OK && again == plan);
            mft_context_destroy(ctx);
        }
    }
}

/* A plan leaves accumulated and zeroed gradients as they are. */
static void test_plan_leaves_gradients(void)
{
    mft_context   *ctx = context_of_row(0);
    int64_t        s[1] = { 5 };
    mft_tensor    *x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, s);
    mft_optimizer *opt;
    size_t         bytes;
    int            i;
    x->trainable = 1;
    CHECK(mft_optimizer_create(ctx, NULL, &x, NULL, 1, &opt) == MFT_OK);
    CHECK(mft_backward(ctx, mft_sum(ctx, mft_scale(ctx, x, 3))) == MFT_OK);
    mft_step_reset(ctx);
    mft_plan_begin(ctx);
    CHECK(mft_backward(ctx, mft_sum(ctx, mft_scale(ctx, x, 3))) == MFT_OK);
    CHECK(mft_plan_end(ctx, &bytes) == MFT_OK);
    CHECK(mft_backward(ctx, mft_sum(ctx, x)) == MFT_OK);
    for (i = 0; i < 5; i++) CHECK(((float *)x->grad->data)[i] == 4);
    mft_step_reset(ctx);
    mft_optimizer_zero_grad(opt);
    mft_plan_begin(ctx);
    CHECK(mft_backward(ctx, mft_sum(ctx, mft_scale(ctx, x, 3))) == MFT_OK);
    CHECK(mft_plan_end(ctx, &bytes) == MFT_OK);
    CHECK(mft_backward(ctx, mft_sum(ctx, x)) == MFT_OK);
    for (i = 0; i < 5; i++) CHECK_MSG(((float *)x->grad->data)[i] == 1, "%g", (double)((float *)x->grad->data)[i]);
    mft_context_destroy(ctx);
}

static void test_plan_edges(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    size_t       bytes = 1, reach;
    uint64_t     step;
    net_create(&n, ctx, 0);
    n.checkpoint = 2; n.dropout = 0.1f;
    step = ctx->step_index;
    CHECK(mft_plan_end(ctx, &bytes) == MFT_ERR_INVALID_ARGUMENT);       /* none begun */
    CHECK(ctx->step_index == step);
    mft_plan_begin(ctx);
    mft_plan_begin(ctx);                                        /* twice is once */
    CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
    CHECK(mft_plan_end(ctx, &bytes) == MFT_OK);
    CHECK_MSG(ctx->step_index == step, "a plan moves the draws on");
    reach = bytes;
    CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
    CHECK_MSG(ctx->arena.reach == reach, "planned %llu, used %llu", (unsigned long long)reach, (unsigned long long)ctx->arena.reach);
    mft_step_reset(ctx);
    mft_plan_begin(ctx);                                        /* failures come out */
    n.fail_in_block = 2;
    net_loss(&n, 0);
    CHECK(mft_plan_end(ctx, &bytes) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "mft_add"));
    mft_plan_begin(ctx);
    mft_context_destroy(ctx);                                   /* in the middle of one: nothing leaks (valgrind, address sanitizer) */
}

static void test_reserve(void)
{
    mft_context *ctx = context_of_row(0);
    int64_t      s[1] = { 100 };
    CHECK(mft_step_reserve(NULL, 1) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_step_reserve(ctx, 3 << 20) == MFT_OK && ctx->arena.n_chunks == 1 && ctx->arena.chunks[0].size == 3 << 20);
    CHECK(mft_step_reserve(ctx, 2 << 20) == MFT_OK && ctx->arena.chunks[0].size == 3 << 20);
    CHECK(mft_step_reserve(ctx, (size_t)-1) == MFT_ERR_OUT_OF_MEMORY);
    CHECK(mft_tensor_create(ctx, MFT_STEP, MFT_F32, 1, s) != NULL);
    CHECK(mft_step_reserve(ctx, 5 << 20) == MFT_ERR_INVALID_ARGUMENT);  /* a step is under way */
    mft_step_reset(ctx);
    CHECK(mft_step_reserve(ctx, 5 << 20) == MFT_OK);
    mft_context_destroy(ctx);
}

/* ---- failures ---- */
static void test_first_failure_kept(void)
{
    mft_context *ctx = context_of_row(0);
    int64_t      s[2] = { 3, 5 }, t[2] = { 5, 3 };
    mft_tensor  *a = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s), *b = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, t), *y;
    a->trainable = 1;
    CHECK(strcmp(mft_error_message(ctx), "") == 0);
    y = mft_add(ctx, a, b);
    CHECK(y == NULL);
    y = mft_matmul(ctx, mft_silu(ctx, y), a);
    CHECK(y == NULL);
    CHECK(mft_matmul(ctx, a, a) == NULL);                       /* a second failure of its own */
    CHECK(mft_backward(ctx, mft_sum(ctx, a)) == MFT_ERR_INVALID_ARGUMENT);      /* also for a loss that would do */
    CHECK_MSG(strstr(mft_error_message(ctx), "mft_add: [3, 5] and [5, 3]") != NULL, "%s", mft_error_message(ctx));
    CHECK(a->grad == NULL);
    CHECK(mft_backward(ctx, NULL) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "mft_add"));
    mft_step_reset(ctx);
    CHECK(mft_backward(ctx, mft_sum(ctx, a)) == MFT_OK && a->grad);
    mft_step_reset(ctx);
    CHECK(mft_backward(ctx, NULL) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "NULL"));
    CHECK(mft_backward(NULL, NULL) == MFT_ERR_INVALID_ARGUMENT);
    mft_step_reset(NULL);
    mft_context_destroy(ctx);
}

/* A failure inside a checkpoint's second run is returned, too. */
static void test_failure_in_recomputation(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    mft_tensor  *loss;
    net_create(&n, ctx, 0);
    n.checkpoint = 1;
    loss = net_loss(&n, 0);
    n.calls = 0; n.fail_in_block = 2;
    CHECK(mft_backward(ctx, loss) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "mft_add"));
    CHECK(ctx->tape == NULL);
    mft_step_reset(ctx);
    n.fail_in_block = 0;
    CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
    mft_context_destroy(ctx);
}

/* What a backward pass has consumed is refused, not read. */
static void test_consumed_tensors(void)
{
    mft_context *ctx = context_of_row(0);
    int64_t      s[2] = { 3, 5 }, flat[1] = { 15 };
    mft_tensor  *x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, s), *y, *v, *loss, *other;
    x->trainable = 1;
    y = mft_scale(ctx, x, 2);
    v = mft_reshape(ctx, y, 1, flat);
    loss = mft_sum(ctx, v);
    other = mft_mean(ctx, y);
    CHECK(mft_backward(ctx, loss) == MFT_OK);
    CHECK(y->data == NULL);
    CHECK(mft_add(ctx, y, x) == NULL);
    CHECK(mft_backward(ctx, NULL) == MFT_ERR_INVALID_ARGUMENT);
    mft_step_reset(ctx);
    y = mft_scale(ctx, x, 2);
    v = mft_reshape(ctx, y, 1, flat);
    loss = mft_sum(ctx, v);
    other = mft_mean(ctx, y);
    CHECK(mft_backward(ctx, loss) == MFT_OK);
    CHECK(mft_backward(ctx, other) == MFT_ERR_INVALID_ARGUMENT);        /* its records are gone: not silently nothing */
    mft_step_reset(ctx);
    y = mft_scale(ctx, x, 2);
    v = mft_reshape(ctx, y, 1, flat);
    loss = mft_sum(ctx, v);
    CHECK(mft_backward(ctx, loss) == MFT_OK);
    CHECK(mft_sum(ctx, v) == NULL);
    mft_context_destroy(ctx);
}

/* ---- cancelling ---- */
static void test_cancel(void)
{
    mft_context *ctx = context_of_row(0);
    net          n;
    mft_tensor  *loss;
    uint64_t     want;
    int          when, i;
    net_create(&n, ctx, 0);
    CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
    want = net_gradients(&n);
    mft_step_reset(ctx);
    for (when = 0; when < 3; when++) {                          /* before the backward pass; in the forward pass; in a recomputation */
        for (i = 0; i < N_PARAMS; i++) if (n.p[i]->grad) { memset(n.p[i]->grad->data, 0, (size_t)mft_tensor_numel(n.p[i]) * 4); mft__of(n.p[i])->grad_written = 0; }
        n.checkpoint = when == 2; n.cancel_in_block = when == 1 ? 2 : 0;
        loss = net_loss(&n, 0);
        if (when == 0) mft_cancel(ctx, 1);
        if (when == 2) { n.calls = 0; n.cancel_in_block = 2; }
        CHECK_MSG(mft_backward(ctx, loss) == MFT_ERR_CANCELLED, "%d", when);
        CHECK(strstr(mft_error_message(ctx), "cancelled") != NULL);
        mft_step_reset(ctx);
        CHECK(ctx->arena.now == 0);
        CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_ERR_CANCELLED);  /* stays on */
        mft_step_reset(ctx);
        mft_cancel(ctx, 0);
        for (i = 0; i < N_PARAMS; i++) mft__of(n.p[i])->grad_written = 0;        /* as mft_optimizer_zero_grad */
        n.cancel_in_block = n.checkpoint = 0;
        CHECK(mft_backward(ctx, net_loss(&n, 0)) == MFT_OK);
        CHECK(net_gradients(&n) == want);
        mft_step_reset(ctx);
    }
    mft_cancel(NULL, 1);
    mft_context_destroy(ctx);
}

/* ---- two contexts in two threads ---- */
typedef struct job { int set; uint64_t gradients; int failed; mft_context *ctx; volatile int started; } job;
static void *train(void *arg)
{
    job *j = (job *)arg;
    net  n;
    int  i;
    mft_context *ctx = context_of_row(0);
    net_create(&n, ctx, 0);
    n.checkpoint = j->set % 3; n.dropout = 0.1f;
    for (i = 0; i < 40; i++) {
        if (mft_backward(ctx, net_loss(&n, j->set)) != MFT_OK) j->failed = 1;
        mft_step_reset(ctx);
    }
    j->gradients = net_gradients(&n);
    mft_context_destroy(ctx);
    return NULL;
}
static void test_two_contexts(void)
{
    pthread_t t[4];
    job       j[5];
    int       i;
    memset(j, 0, sizeof j);
    j[4].set = 4;
    train(&j[4]);
    for (i = 0; i < 4; i++) { j[i].set = i; pthread_create(&t[i], NULL, train, &j[i]); }
    for (i = 0; i < 4; i++) { pthread_join(t[i], NULL); CHECK(!j[i].failed && j[i].gradients == j[4].gradients); }
}

/* mft_cancel from another thread ends a long backward pass. */
static void *cancel_soon(void *arg)
{
    job *j = (job *)arg;
    while (!__atomic_load_n(&j->started, __ATOMIC_ACQUIRE)) { }
    mft_cancel(j->ctx, 1);
    return NULL;
}
static void test_cancel_from_thread(void)
{
    job       j;
    pthread_t t;
    net       n;
    int       i;
    mft_status s = MFT_OK;
    memset(&j, 0, sizeof j);
    j.ctx = context_of_row(0);
    net_create(&n, j.ctx, 0);
    pthread_create(&t, NULL, cancel_soon, &j);
    __atomic_store_n(&j.started, 1, __ATOMIC_RELEASE);
    for (i = 0; i < 100000 && s == MFT_OK; i++) { s = mft_backward(j.ctx, net_loss(&n, 0)); mft_step_reset(j.ctx); }
    CHECK(s == MFT_ERR_CANCELLED);
    pthread_join(t, NULL);
    mft_context_destroy(j.ctx);
}

int main(void)
{
    TEST(test_no_grad); TEST(test_frozen_start);
    TEST(test_checkpoint_same_bits); TEST(test_checkpoint_odd_results); TEST(test_checkpoint_without_grad); TEST(test_backward_in_no_grad_scope);
    TEST(test_step_memory); TEST(test_scalars_stay); TEST(test_arena_random);
    TEST(test_plan); TEST(test_plan_leaves_gradients); TEST(test_plan_edges); TEST(test_reserve);
    TEST(test_first_failure_kept); TEST(test_failure_in_recomputation); TEST(test_consumed_tensors);
    TEST(test_cancel); TEST(test_two_contexts); TEST(test_cancel_from_thread);
    return test_report("tape");
}
