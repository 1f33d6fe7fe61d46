/* test_memory.c - every byte asked for is given back, with its size; the report agrees with the allocator;
 * refusals at every call are clean; the budget holds; steps after the first ask for nothing */
#include "test.h"
#define MFT_ASSERT(x) do { if (!(x)) { printf("%s:%d: MFT_ASSERT(%s)\n", __FILE__, __LINE__, #x); test__bad++; } } while (0)
#define MFT_IMPLEMENTATION
#include "mft.h"

/* ---- an allocator that knows what it gave ---- */
enum { MOST_BLOCKS = 4096 };
typedef struct ledger {
    struct { void *p; size_t bytes; } block[MOST_BLOCKS];
    int    n_blocks, wrong;
    size_t now, peak, calls;
    size_t fail_at;                         /* this call is refused [never]       */
    int    and_after;                       /* and all that come after it         */
} ledger;

static void *ledger_alloc(void *user, size_t bytes, size_t align)
{
    ledger *l = (ledger *)user;
    char   *raw, *p;
    l->calls++;
    if (l->fail_at && (l->calls == l->fail_at || (l->and_after && l->calls > l->fail_at))) return NULL;
    if (bytes == 0 || align == 0 || (align & (align - 1)) || l->n_blocks == MOST_BLOCKS) l->wrong++;
    raw = bytes < (size_t)-1 / 4 ? (char *)malloc(bytes + align + sizeof raw) : NULL;
    if (!raw || l->n_blocks == MOST_BLOCKS) return NULL;
    p = raw + sizeof raw;
    p += (align - (uintptr_t)p % align) % align;
    memcpy(p - sizeof raw, &raw, sizeof raw);
    memset(p, 0xa5, bytes);                                     /* nothing may count on zeros; as a float -2.9e-16 */
    l->block[l->n_blocks].p = p; l->block[l->n_blocks++].bytes = bytes;
    l->now += bytes;
    if (l->now > l->peak) l->peak = l->now;
    return p;
}

static void ledger_free(void *user, void *p, size_t bytes)
{
    ledger *l = (ledger *)user;
    char   *raw;
    int     i;
    for (i = 0; i < l->n_blocks && l->block[i].p != p; i++) { }
    if (i == l->n_blocks || l->block[i].bytes != bytes) { l->wrong++; return; }
    l->block[i] = l->block[--l->n_blocks];
    l->now -= bytes;
    memcpy(&raw, (char *)p - sizeof raw, sizeof raw);
    memset(p, 0x5a, bytes);
    free(raw);
}

static mft_status create(ledger *l, size_t budget, mft_context **ctx)
{
    mft_context_desc d;
    memset(&d, 0, sizeof d);
    d.allocator.alloc = ledger_alloc; d.allocator.free = ledger_free; d.allocator.user = l;
    d.memory_budget = budget; d.n_threads = 2; d.seed = 3;
    return mft_context_create(&d, ctx);
}

/* ---- a whole small training: every kind of op, a checkpoint, a plan, an optimizer ---- */
enum { B = 2, T = 21, NH = 2, D = 12, H = NH * D, V = 401, NP = 8 };

typedef struct training {
    mft_context   *ctx;
    mft_tensor    *p[NP];                   /* table [V,H], norm w, norm b, qkv, lora a, lora b, magnitude, frozen w */
    mft_optimizer *opt;
    int32_t        ids[B * T], labels[B * T];
    double         loss[4];
} training;

static mft_tensor *mixed_block(mft_context *ctx, mft_tensor *x, void *user)
{
    training   *t = (training *)user;
    mft_tensor **p = t->p, *h, *qkv;
    int64_t     heads[4] = { B, T, 3 * NH, D }, flat[3] = { B, T, H };
    static const float inv_freq[D / 2] = { 1, 0.5f, 0.25f, 0.1f, 0.05f, 0.01f };
    h   = mft_layer_norm(ctx, x, p[1], p[2], 1e-5f);
    qkv = mft_reshape(ctx, mft_linear(ctx, h, p[3], NULL), 4, heads);
    h   = mft_attention(ctx, mft_rope(ctx, mft_slice(ctx, qkv, 2, 0, NH), NULL, inv_freq, 0), mft_slice(ctx, qkv, 2, NH, 2 * NH), mft_slice(ctx, qkv, 2, 2 * NH, 3 * NH), NULL);
    h   = mft_dropout(ctx, mft_reshape(ctx, h, 3, flat), 0.1f);
    h   = mft_lora_linear(ctx, h, p[7], NULL, p[4], p[5], 2, 0.1f);
    h   = mft_add(ctx, x, mft_swiglu(ctx, h, mft_contiguous(ctx, mft_transpose(ctx, mft_transpose(ctx, h, 1, 2), 1, 2))));
    h   = mft_add(ctx, h, mft_dora_linear(ctx, mft_rms_norm(ctx, mft_gelu(ctx, h), p[1], 1, 1e-6f), p[7], p[2], p[4], p[5], p[6], 1, 0.1f));
    return mft_softcap(ctx, h, 20);
}

static mft_tensor *training_loss(training *t, int plain_head)
{
    mft_context *ctx = t->ctx;
    mft_tensor  *x = mft_embedding(ctx, t->p[0], t->ids, B, T, -1), *loss;
    int64_t      rows[2] = { B * T, H };
    x = mft_checkpoint(ctx, mixed_block, x, t);
    x = mixed_block(ctx, x, t);
    if (plain_head) loss = mft_cross_entropy(ctx, mft_matmul(ctx, mft_reshape(ctx, x, 2, rows), mft_transpose(ctx, t->p[0], 0, 1)), t->labels, 0);
    else loss = mft_linear_cross_entropy(ctx, x, t->p[0], t->labels, 0, 0);
    return mft_add(ctx, loss, mft_scale(ctx, mft_mean(ctx, mft_softmax(ctx, mft_mul(ctx, x, x))), 0.1f));
}

/* One step, tried again once when it failed. The first failure goes to *first. */
static void training_step(training *t, int i, mft_status *first)
{
    int attempt;
    for (attempt = 0; attempt < 2; attempt++) {
        mft_tensor *loss = training_loss(t, i & 1);
        mft_status  s = mft_backward(t->ctx, loss);
        t->loss[i] = mft_tensor_item(loss);
        if (s == MFT_OK) s = mft_optimizer_step(t->opt, 0.01, NULL);
        t->ctx->step_index--;                                   /* a failed try draws the same again */
        mft_step_reset(t->ctx);
        if (s == MFT_OK) { t->ctx->step_index++; return; }
        CHECK_MSG(s == MFT_ERR_OUT_OF_MEMORY, "status %d: %s", (int)s, mft_error_message(t->ctx));
        CHECK(strlen(mft_error_message(t->ctx)) > 5);
        if (*first == MFT_OK) *first = s;
        mft_optimizer_zero_grad(t->opt);
    }
}

static mft_status train(ledger *l, size_t budget, training *t, size_t *step_calls)
{
    static const int64_t shapes[NP][2] = { { V, H }, { H, 0 }, { H, 0 }, { 3 * H, H }, { 3, H }, { H, 3 }, { H, 0 }, { H, H } };
    mft_status s;
    uint32_t   seed = 1;
    size_t     bytes;
    int        i;
    int64_t    j;
    memset(t, 0, sizeof *t);
    if ((s = create(l, budget, &t->ctx)) != MFT_OK) { CHECK(t->ctx == NULL && s == MFT_ERR_OUT_OF_MEMORY); return s; }
    for (i = 0; i < NP; i++) {
        t->p[i] = mft_tensor_create(t->ctx, MFT_HELD, MFT_F32, shapes[i][1] ? 2 : 1, shapes[i]);
        if (!t->p[i]) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
        for (j = 0; j < mft_tensor_numel(t->p[i]); j++) ((float *)t->p[i]->data)[j] = test_random(&seed) * 0.3f + (i == 6 ? 1.0f : 0.0f);
        t->p[i]->trainable = i != 7;
    }
    for (i = 0; i < B * T; i++) { t->ids[i] = i * 29 % V; t->labels[i] = i % 6 == 5 ? -100 : i * 31 % V; }
    if ((s = mft_optimizer_create(t->ctx, NULL, t->p, NULL, 7, &t->opt)) != MFT_OK) goto done;
    mft_plan_begin(t->ctx);
    CHECK(MFT__RUNS(t->ctx) == (t->ctx->step_status != MFT_OK));
    mft_backward(t->ctx, training_loss(t, 0));
    if ((s = mft_plan_end(t->ctx, &bytes)) != MFT_OK) goto done;
    if ((s = mft_step_reserve(t->ctx, bytes)) != MFT_OK) goto done;
    for (i = 0; i < 4; i++) {
        size_t before = l->calls;
        training_step(t, i, &s);
        if (step_calls) step_calls[i] = l->calls - before;
    }
done:
    if (s != MFT_OK) CHECK(s == MFT_ERR_OUT_OF_MEMORY && strlen(mft_error_message(t->ctx)) > 5);
    return s;
}

static void empty(const ledger *l, const char *what, size_t n)
{
    CHECK_MSG(l->n_blocks == 0 && l->now == 0, "%s %llu: %d blocks, %llu bytes never given back", what, (unsigned long long)n, l->n_blocks, (unsigned long long)l->now);
    CHECK_MSG(l->wrong == 0, "%s %llu: %d calls with the wrong size or pointer", what, (unsigned long long)n, l->wrong);
}

static ledger   book;
static training tr, again;

static void test_everything_given_back(void)
{
    mft_memory_report m;
    size_t            calls[4];
    memset(&book, 0, sizeof book);
    CHECK(train(&book, 0, &tr, calls) == MFT_OK);
    mft_memory(tr.ctx, &m);
    CHECK_MSG(m.now == book.now && m.peak == book.peak, "%llu and %llu, %llu and %llu", (unsigned long long)m.now, (unsigned long long)book.now, (unsigned long long)m.peak, (unsigned long long)book.peak);
    CHECK(m.optimizer == 8 + 2 * 4 * (V * H + H + H + 3 * H * H + 3 * H + 3 * H + H));
    CHECK(m.gradients == 4 * (V * H + H + H + 3 * H * H + 3 * H + 3 * H + H));
    CHECK(tr.loss[0] > 1 && tr.loss[3] < 20);
    CHECK_MSG(calls[2] == 0 && calls[3] == 0, "%llu and %llu calls of the allocator in later steps", (unsigned long long)calls[2], (unsigned long long)calls[3]);
    mft_context_destroy(tr.ctx);                                /* everything is left to it */
    empty(&book, "whole run", 0);
}

static void test_destroyed_one_by_one(void)
{
    int    i;
    size_t before;
    memset(&book, 0, sizeof book);
    CHECK(train(&book, 0, &tr, NULL) == MFT_OK);
    before = book.now;
    mft_optimizer_destroy(tr.opt);
    for (i = 0; i < NP; i++) mft_tensor_destroy(tr.ctx, tr.p[i]);
    CHECK(book.now < before);
    CHECK(tr.ctx->used[MFT__GRADIENTS] == 0 && tr.ctx->used[MFT__OPTIMIZER] == 0);
    mft_context_destroy(tr.ctx);
    empty(&book, "one by one", 0);
    mft_tensor_destroy(NULL, NULL);
    mft_context_destroy(NULL);
}

/* Refuse call n, for every n of a run: once, and from then on. */
static void test_refusal_at_every_call(void)
{
    int and_after;
    for (and_after = 0; and_after < 2; and_after++) {
        size_t n;
        double want[4];
        memset(&book, 0, sizeof book);
        CHECK(train(&book, 0, &tr, NULL) == MFT_OK);
        memcpy(want, tr.loss, sizeof want);
        mft_context_destroy(tr.ctx);
        for (n = 1; ; n++) {
            mft_status s;
            int        reached, i;
            memset(&book, 0, sizeof book);
            book.fail_at = n; book.and_after = and_after;
            s = train(&book, 0, &again, NULL);
            reached = book.calls >= n;
            if (s == MFT_OK) for (i = 0; i < 4; i++) CHECK_MSG(again.loss[i] == want[i], "call %llu refused: loss %d is %.9g, not %.9g", (unsigned long long)n, i, again.loss[i], want[i]);
            /* once and tried again, the run may end well, and then as if nothing had been */
            else if (!and_after && again.opt && again.loss[3] != 0) for (i = 0; i < 4; i++)
                CHECK_MSG(again.loss[i] == want[i], "call %llu refused: loss %d is %.9g, not %.9g", (unsigned long long)n, i, again.loss[i], want[i]);
            mft_context_destroy(again.ctx);
            empty(&book, and_after ? "refused from call" : "refused call", n);
            if (!reached) break;
            CHECK_MSG(n < 1000, "still going");
            if (n >= 1000) break;
        }
        CHECK_MSG(n > 30, "only %llu calls", (unsigned long long)n);
    }
}

/* The budget is never passed; what does not fit says so; what fits runs, and the same. */
static void test_budget(void)
{
    double want[4];
    size_t whole, budget, refused = 0;
    memset(&book, 0, sizeof book);
    CHECK(train(&book, 0, &tr, NULL) == MFT_OK);
    memcpy(want, tr.loss, sizeof want);
    whole = book.peak;
    mft_context_destroy(tr.ctx);
    for (budget = 20000; budget < whole + whole / 3; budget += whole / 23) {
        mft_status s;
        memset(&book, 0, sizeof book);
        s = train(&book, budget, &tr, NULL);
        CHECK_MSG(book.peak <= budget, "%llu of %llu", (unsigned long long)book.peak, (unsigned long long)budget);
        if (s == MFT_OK) CHECK(memcmp(want, tr.loss, sizeof want) == 0);
        else {
            refused++;
            CHECK(s == MFT_ERR_OUT_OF_MEMORY);
            if (tr.ctx) CHECK_MSG(strstr(mft_error_message(tr.ctx), "budget") != NULL, "%s", mft_error_message(tr.ctx));
        }
        CHECK(budget < whole || s == MFT_OK);
        mft_context_destroy(tr.ctx);
        empty(&book, "budget", budget);
    }
    CHECK(refused > 8);
}

/* ---- memory out inside an op: every request of every op, in both directions ----
 * The arena is filled up to r bytes and the allocator refuses; r grows until the op gets through. */
enum { N_PROGRAMS = 23 };

static mft_tensor *halves(mft_context *ctx, mft_tensor *x, void *user)
{
    (void)user;
    return mft_scale(ctx, mft_mul(ctx, mft_silu(ctx, x), mft_softmax(ctx, x)), 0.5f);
}

static mft_tensor *program(mft_context *ctx, int which, mft_tensor **p, const int32_t *ids)
{
    static const float inv_freq[2] = { 1, 0.1f };
    static const int64_t flat[1] = { 120 }, heads[4] = { 2, 5, 3, 4 };
    mft_tensor *x = p[0], *y = NULL;                            /* x [2, 5, 12], w [7, 12] */
    switch (which) {
    case 0:  y = mft_embedding(ctx, p[1], ids, 2, 5, -1); break;
    case 1:  y = mft_layer_norm(ctx, x, p[2], p[3], 1e-5f); break;
    case 2:  y = mft_rms_norm(ctx, mft_transpose(ctx, mft_contiguous(ctx, mft_transpose(ctx, x, 0, 1)), 0, 1), p[2], 1, 1e-5f); break;
    case 3:  y = mft_linear(ctx, x, p[1], p[4]); break;
    case 4:  y = mft_lora_linear(ctx, x, p[1], p[4], p[5], p[6], 2, 0.2f); break;
    case 5:  y = mft_dora_linear(ctx, x, p[1], p[4], p[5], p[6], p[4], 2, 0.2f); break;
    case 6:  y = mft_reshape(ctx, x, 4, heads); y = mft_attention(ctx, y, y, mft_silu(ctx, y), NULL); break;
    case 7:  y = mft_rope(ctx, mft_reshape(ctx, x, 4, heads), NULL, inv_freq, 0); break;
    case 8:  return mft_cross_entropy(ctx, x, ids, 0);
    case 9:  return mft_linear_cross_entropy(ctx, x, p[1], ids, 0, 0);
    case 10: y = mft_softmax(ctx, x); break;
    case 11: return mft_sum(ctx, x);
    case 12: y = mft_swiglu(ctx, mft_slice(ctx, x, 2, 0, 6), mft_slice(ctx, x, 2, 6, 12)); break;
    case 13: y = mft_matmul(ctx, x, mft_transpose(ctx, x, 1, 2)); break;
    case 14: y = mft_contiguous(ctx, mft_transpose(ctx, x, 0, 2)); break;
    case 15: y = mft_checkpoint(ctx, halves, x, NULL); break;
    case 16: y = mft_mul(ctx, x, p[2]); break;
    case 17: return mft_mse_loss(ctx, x, mft_tanh(ctx, x));
    case 18: y = mft_dropout(ctx, x, 0.5f); break;
    case 19: y = mft_softcap(ctx, x, 3); break;
    case 20: y = mft_add(ctx, mft_reshape(ctx, mft_transpose(ctx, mft_add(ctx, x, x), 0, 1), 1, flat), mft_reshape(ctx, x, 1, flat)); break;
    case 21: y = mft_sub(ctx, mft_gelu(ctx, x), p[3]); break;
    default: y = mft_tensor_create(ctx, MFT_STEP, MFT_F32, 3, x->shape); y = mft_mul(ctx, y, x); break;
    }
    return mft_mean(ctx, mft_mul(ctx, y, y));
}

static void test_refusal_inside_ops(void)
{
    static const int64_t shapes[7][3] = { { 2, 5, 12 }, { 7, 12, 0 }, { 12, 0, 0 }, { 12, 0, 0 }, { 7, 0, 0 }, { 3, 12, 0 }, { 7, 3, 0 } };
    static const int32_t ids[10] = { 1, 6, 0, -100, 3, 3, 2, -100, 5, 4 }, tokens[10] = { 1, 6, 0, 0, 3, 3, 2, 2, 5, 4 };
    int which;
    for (which = 0; which < N_PROGRAMS; which++) {
        mft_context   *ctx;
        mft_optimizer *opt;
        mft_tensor    *p[7];
        size_t         left, size, refused = 0;
        float          want, got = 0;
        mft_status     s = MFT_OK;
        int            i, k;
        uint32_t       seed = 3;
        memset(&book, 0, sizeof book);
        CHECK(create(&book, 0, &ctx) == MFT_OK);
        for (i = 0; i < 7; i++) {
            p[i] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, shapes[i][1] ? shapes[i][2] ? 3 : 2 : 1, shapes[i]);
            for (k = 0; k < (int)mft_tensor_numel(p[i]); k++) ((float *)p[i]->data)[k] = test_random(&seed);
            p[i]->trainable = 1;
        }
        CHECK(mft_optimizer_create(ctx, NULL, p, NULL, 7, &opt) == MFT_OK);
        CHECK(mft_step_reserve(ctx, 8 << 20) == MFT_OK);
        want = mft_tensor_item(program(ctx, which, p, which == 0 ? tokens : ids));
        CHECK(mft_backward(ctx, program(ctx, which, p, which == 0 ? tokens : ids)) == MFT_OK);      /* gradients exist from here on */
        ctx->step_index--;
        mft_step_reset(ctx);
        mft_optimizer_zero_grad(opt);
        size = ctx->arena.chunks[0].size;
        for (left = 0; left < size; left += 64) {
            book.fail_at = book.calls + 1; book.and_after = 1;
            CHECK(mft__high(ctx, size - left) != NULL);
            { mft_tensor *loss = program(ctx, which, p, which == 0 ? tokens : ids); s = mft_backward(ctx, loss); got = mft_tensor_item(loss); }
            if (s == MFT_OK) s = mft_optimizer_step(opt, 0, NULL);
            book.fail_at = 0;
            ctx->step_index--;
            mft_step_reset(ctx);
            mft_optimizer_zero_grad(opt);
            if (s == MFT_OK) break;
            refused++;
            CHECK_MSG(s == MFT_ERR_OUT_OF_MEMORY && strstr(mft_error_message(ctx), "allocator"), "program %d, %llu bytes left: status %d, %s", which, (unsigned long long)left, (int)s, mft_error_message(ctx));
        }
        CHECK_MSG(s == MFT_OK && got == want && refused > 0, "program %d: %d, %g and %g, refused %llu times", which, (int)s, (double)got, (double)want, (unsigned long long)refused);
        mft_context_destroy(ctx);
        empty(&book, "program", (size_t)which);
    }
}

/* Structs, too, are there from the step before: 2000 ops are more than a block of them. */
static void test_long_step(void)
{
    mft_context *ctx;
    mft_tensor  *x, *y;
    int64_t      n = 3;
    int          step, i;
    size_t       calls = 0;
    memset(&book, 0, sizeof book);
    CHECK(create(&book, 0, &ctx) == MFT_OK);
    x = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, &n);
    x->trainable = 1;
    for (step = 0; step < 3; step++) {
        calls = book.calls;
        for (y = x, i = 0; i < 2000; i++) y = mft_scale(ctx, y, 1);
        CHECK(mft_backward(ctx, mft_sum(ctx, y)) == MFT_OK);
        calls = book.calls - calls;
        mft_step_reset(ctx);
    }
    CHECK_MSG(calls == 0, "%llu calls in the third step", (unsigned long long)calls);
    mft_context_destroy(ctx);
    empty(&book, "long step", 0);
}

/* ---- growing arrays and the other helpers the later headers use ---- */
static void test_helpers(void)
{
    mft_context *ctx;
    int         *a = NULL, i;
    size_t       cap = 0, n = 0, out;
    char        *s;
    memset(&book, 0, sizeof book);
    CHECK(create(&book, 0, &ctx) == MFT_OK);
    for (i = 0; i < 1000; i++) {
        CHECK(mft__grow(ctx, (void **)(void *)&a, &cap, n + 1, sizeof *a));
        a[n++] = i;
    }
    for (i = 0; i < 1000; i++) CHECK(a[i] == i);
    CHECK(!mft__grow(ctx, (void **)(void *)&a, &cap, (size_t)-1 / 2, sizeof *a) && a[999] == 999);
    mft__free(ctx, a, cap * sizeof *a);
    s = mft__strdup(ctx, "two words");
    CHECK(s && strcmp(s, "two words") == 0);
    mft__strfree(ctx, s); mft__strfree(ctx, NULL);
    CHECK(!mft__mul_size((size_t)-1 / 2, 3, &out) && mft__mul_size(0, (size_t)-1, &out) && out == 0 && mft__mul_size((size_t)-1, 1, &out));
    CHECK(mft__alloc(ctx, (size_t)-1) == NULL);
    mft_context_destroy(ctx);
    empty(&book, "helpers", 0);
}

/* ---- the context's own arguments ---- */
static void test_context_arguments(void)
{
    mft_context_desc d;
    mft_context     *ctx = (mft_context *)(void *)&d;
    mft_memory_report m;
    mft_status       s;
    CHECK(mft_context_create(NULL, NULL) == MFT_ERR_INVALID_ARGUMENT);
    memset(&d, 0, sizeof d); d.allocator.alloc = ledger_alloc;
    CHECK(mft_context_create(&d, &ctx) == MFT_ERR_INVALID_ARGUMENT && ctx == NULL);
    memset(&d, 0, sizeof d); d.kernels = "no such row";
    CHECK(mft_context_create(&d, &ctx) == MFT_ERR_INVALID_ARGUMENT && ctx == NULL);
    memset(&d, 0, sizeof d); d.n_threads = -1;
    CHECK(mft_context_create(&d, &ctx) == MFT_ERR_INVALID_ARGUMENT && ctx == NULL);
    memset(&d, 0, sizeof d); d.step_arena = 3 << 20; d.memory_budget = 1 << 20;
    CHECK(mft_context_create(&d, &ctx) == MFT_ERR_OUT_OF_MEMORY && ctx == NULL);
    memset(&d, 0, sizeof d); d.step_arena = 3 << 20;
    CHECK(mft_context_create(&d, &ctx) == MFT_OK && ctx->arena.chunks[0].size == 3 << 20);
    mft_memory(ctx, &m);
    CHECK(m.now > 3 << 20 && m.step_now == 0);
    CHECK(strcmp(mft_error_message(ctx), "") == 0 && strlen(mft_kernels_name(ctx)) > 0);
    mft_context_destroy(ctx);
    mft_memory(NULL, &m);
    CHECK(m.now == 0 && strcmp(mft_error_message(NULL), "") == 0);
    for (s = MFT_OK; s >= MFT_ERR_CANCELLED; s = (mft_status)(s - 1)) CHECK(strlen(mft_status_string(s)) > 1);
    CHECK(strcmp(mft_status_string((mft_status)77), "unknown status") == 0);
}

/* Shapes that are none, or that no memory could hold. */
static void test_tensor_arguments(void)
{
    mft_context *ctx;
    int64_t      big[4], zero[1] = { 0 }, minus[2] = { 3, -1 }, odd[2] = { 3, 33 }, ok[2] = { 3, 32 };
    float        numbers[3];
    mft_tensor  *t;
    int          life, d;
    memset(&book, 0, sizeof book);
    CHECK(create(&book, 0, &ctx) == MFT_OK);
    for (d = 0; d < 4; d++) big[d] = (int64_t)1 << 30;
    for (life = MFT_STEP; life <= MFT_HELD; life++) {
        mft_lifetime l = (mft_lifetime)life;
        CHECK(mft_tensor_create(ctx, l, MFT_F32, 4, big) == NULL && mft_tensor_create(ctx, l, MFT_F32, 2, big) == NULL);
        CHECK(strlen(mft_error_message(ctx)) > 5);
        CHECK(mft_tensor_create(ctx, l, MFT_F32, 1, zero) == NULL && mft_tensor_create(ctx, l, MFT_F32, 2, minus) == NULL);
        CHECK(mft_tensor_create(ctx, l, MFT_F32, 5, big) == NULL && mft_tensor_create(ctx, l, MFT_F32, -1, big) == NULL && mft_tensor_create(ctx, l, MFT_F32, 1, NULL) == NULL);
        CHECK(mft_tensor_create(ctx, l, (mft_dtype)99, 1, ok) == NULL && mft_tensor_create(ctx, l, MFT_Q8_0, 2, odd) == NULL && mft_tensor_create(ctx, l, MFT_Q4_0, 0, NULL) == NULL);
        if (life == MFT_STEP) {                                 /* a step that lacks one of its tensors has failed */
            CHECK(mft_backward(ctx, mft_tensor_create(ctx, MFT_STEP, MFT_F32, 0, NULL)) == MFT_ERR_INVALID_ARGUMENT);
            mft_step_reset(ctx);
        }
        t = mft_tensor_create(ctx, l, MFT_Q8_0, 2, ok);
        CHECK(t && mft_tensor_numel(t) == 96 && t->stride[0] == 32 && t->stride[1] == 1);
        t = mft_tensor_create(ctx, l, MFT_I64, 0, NULL);
        CHECK(t && mft_tensor_numel(t) == 1 && *(int64_t *)t->data == 0);
        CHECK(mft_tensor_create(NULL, l, MFT_F32, 0, NULL) == NULL);
    }
    CHECK(mft_tensor_wrap(ctx, MFT_F32, 1, ok, NULL) == NULL && mft_tensor_wrap(NULL, MFT_F32, 1, ok, numbers) == NULL);
    t = mft_tensor_wrap(ctx, MFT_F32, 1, ok, numbers);
    CHECK(t && t->data == numbers && t->shape[0] == 3);
    mft_tensor_destroy(ctx, t);
    CHECK(mft_tensor_numel(NULL) == 0 && mft_dtype_bytes(MFT_Q4_0, 64) == 36 && mft_dtype_bytes((mft_dtype)99, 1) == 0);
    mft_context_destroy(ctx);
    empty(&book, "tensors", 0);
}

int main(void)
{
    TEST(test_context_arguments); TEST(test_tensor_arguments); TEST(test_helpers);
    TEST(test_everything_given_back); TEST(test_destroyed_one_by_one);
    TEST(test_refusal_at_every_call); TEST(test_refusal_inside_ops); TEST(test_long_step); TEST(test_budget);
    return test_report("memory");
}
