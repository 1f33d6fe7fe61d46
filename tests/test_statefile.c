/* test_statefile.c - full fine-tuning whose weights, gradients and moments lie in a state file: the numbers of the run in
 * memory bit for bit, no more resident than planned, resumed in either mode, and a disk without room for it */
#define _GNU_SOURCE
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "room.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

enum { SEQ = 32, BATCH = 2, STEPS = 4, MAX_PARAMS = 128 };

/* 1.2 million weights each: matrices of more than one piece of 2^18 elements, a head apart from the embedding in the second */
static const char *const configs[] = {
    "{\"model_type\":\"gpt2\",\"n_embd\":128,\"n_layer\":3,\"n_head\":4,\"n_positions\":64,\"vocab_size\":4001,\"layer_norm_epsilon\":1e-5,"
    "\"activation_function\":\"gelu_new\",\"initializer_range\":0.02}",
    "{\"model_type\":\"qwen2\",\"hidden_size\":96,\"intermediate_size\":300,\"num_hidden_layers\":3,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
    "\"vocab_size\":4003,\"max_position_embeddings\":64,\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"hidden_act\":\"silu\",\"tie_word_embeddings\":false,"
    "\"initializer_range\":0.02}"
};

static const char *model_dir(int k) { return in_room(k ? "qwen2" : "gpt2"); }

static void make_model(int k)
{
    mft_context *ctx = NULL;
    write_file(in_room("config.json"), configs[k], strlen(configs[k]));
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    CHECK_MSG(mft_model_init(ctx, in_room("config.json"), 3, MFT_F32, model_dir(k)) == MFT_OK, "%s", mft_error_message(ctx));
    mft_context_destroy(ctx);
}

typedef struct run {
    mft_context *ctx;
    mft_model   *m;
    mft_trainer *tr;
    mft_plan     plan;
    double       loss[STEPS], norm[STEPS];
    uint64_t     weights;                   /* hash of them all */
} run;

typedef struct way { int model; mft_optimizer_kind kind; int early; size_t budget; const char *state_dir, *master_dtype; } way;

static mft_status begin(way w, run *r)
{
    mft_context_desc cd;
    mft_model_desc   md;
    mft_trainer_desc td;
    mft_status       s;
    memset(r, 0, sizeof *r);
    memset(&cd, 0, sizeof cd); memset(&md, 0, sizeof md); memset(&td, 0, sizeof td);
    cd.n_threads = 2; cd.memory_budget = w.budget;
    md.train_all = 1; md.grad_checkpointing = 1; md.state_dir = w.state_dir; md.master_dtype = w.master_dtype;
    td.learning_rate = 1e-3; td.grad_accum = 2; td.optimizer.weight_decay = 0.1;
    td.optimizer.kind = w.kind; td.update_in_backward = w.early;
    if (w.kind == MFT_SGD) td.optimizer.momentum = 0.9;
    if ((s = mft_context_create(&cd, &r->ctx)) != MFT_OK) return s;
    if ((s = mft_model_load(r->ctx, model_dir(w.model), &md, &r->m)) != MFT_OK) return s;
    if ((s = mft_trainer_create(r->m, NULL, &td, &r->tr)) != MFT_OK) return s;
    return mft_trainer_plan(r->tr, BATCH, SEQ, &r->plan);
}

/* Steps from .. to-1, of two micro-batches each, that differ from step to step. */
static mft_status steps(run *r, int from, int to)
{
    mft_status s = MFT_OK;
    int        step, i, k;
    for (step = from; step < to && s == MFT_OK; step++) {
        int32_t      ids[2][BATCH * SEQ];
        mft_batch    b[2];
        mft_progress p;
        uint32_t     seed = 7 + (uint32_t)step;
        memset(b, 0, sizeof b);
        for (k = 0; k < 2; k++) {
            for (i = 0; i < BATCH * SEQ; i++) ids[k][i] = (int32_t)((test_random(&seed) + 1) * 0.5f * 3999);
            b[k].input_ids = ids[k]; b[k].batch = BATCH; b[k].seq = SEQ;
        }
        s = mft_trainer_step_batch(r->tr, b, 2, &p);
        if (s == MFT_OK) { r->loss[step] = p.loss; r->norm[step] = p.grad_norm; }
    }
    return s;
}

static void hash_weights(run *r)
{
    mft_tensor *params[MAX_PARAMS];
    int         n = mft_model_params(r->m, 1, params, MAX_PARAMS), i;
    int64_t     k;
    r->weights = 1469598103934665603u;
    CHECK(n <= MAX_PARAMS);
    for (i = 0; i < n; i++)
        for (k = 0; k < (int64_t)mft_dtype_bytes(params[i]->dtype, mft_tensor_numel(params[i])); k++)
            r->weights = (r->weights ^ ((const unsigned char *)params[i]->data)[k]) * 1099511628211u;
}

static int64_t resident_state(void) { return resident_of("mft-state", " rw-s "); }

enum { SMALL = 16 << 20 };                  /* below five times 4.3 MB; 16.9 MB with gradients and moments */

/* The state file changes no bit of losses, norms, weights and of what is saved; and memory holds what was planned. */
static void test_bits(void)
{
    static const struct { mft_optimizer_kind kind; int early; const char *master_dtype; int least, budget; } ways[] = {     /* MB: in the file, and to be had */
        { MFT_ADAMW, 0, NULL, 16, 16 }, { MFT_SGD, 0, NULL, 12, 14 }, { MFT_ADAMW8BIT, 0, NULL, 9, 13 }, { MFT_ADAMW, 1, NULL, 16, 16 },
        { MFT_ADAMW, 0, "bf16", 14, 15 }, { MFT_ADAMW8BIT, 0, "bf16", 7, 12 }, { MFT_APOLLO_MINI, 0, NULL, 8, 12 }
    };
    int model, kind;
    for (model = 0; model < 2; model++)
        for (kind = 0; kind < (int)(sizeof ways / sizeof *ways); kind++) {
            way     w;
            run     plain, r;
            mft_memory_report memory;
            int64_t resident;
            int     i;
            char    a[700], b[700];
            memset(&w, 0, sizeof w);
            w.model = model; w.kind = ways[kind].kind; w.early = ways[kind].early; w.master_dtype = ways[kind].master_dtype;
            CHECK_MSG(begin(w, &plain) == MFT_OK && steps(&plain, 0, STEPS) == MFT_OK, "%s", mft_error_message(plain.ctx));
            CHECK(plain.plan.state_mapped == 0 && plain.plan.trainable > (size_t)(w.master_dtype ? 2 : 4) << 20);
            w.budget = (size_t)ways[kind].budget << 20; w.state_dir = in_room("state");
            CHECK_MSG(begin(w, &r) == MFT_OK && steps(&r, 0, STEPS) == MFT_OK, "%s", mft_error_message(r.ctx));
            CHECK_MSG(r.plan.drops_pages && r.plan.state_mapped > (size_t)ways[kind].least << 20 && (!w.master_dtype || r.plan.state_mapped < (size_t)(ways[kind].least + 2) << 20) && r.plan.total <= w.budget && r.plan.trainable < (size_t)200 << 10,
                      "drops %d, mapped %llu, total %llu, held %llu", r.plan.drops_pages, (unsigned long long)r.plan.state_mapped, (unsigned long long)r.plan.total, (unsigned long long)r.plan.trainable);
            CHECK(count_files(room, "mft-state") + count_files(in_room("state"), "") == 0);     /* it has no name */
            resident = resident_state();
            CHECK_MSG(resident < (int64_t)1 << 20, "%lld bytes of the state are resident after a step", (long long)resident);
            mft_memory(r.ctx, &memory);
            CHECK_MSG(memory.peak + r.plan.state_resident + r.plan.process <= w.budget + (16 << 10), "peak %llu", (unsigned long long)memory.peak);
            for (i = 0; i < STEPS; i++)
                CHECK_MSG(plain.loss[i] == r.loss[i] && plain.norm[i] == r.norm[i], "model %d, method %d, step %d: loss %.17g, %.17g, norm %.17g, %.17g", model, kind, i, plain.loss[i], r.loss[i], plain.norm[i], r.norm[i]);
            CHECK_MSG(mft_model_save(r.m, in_room("saved")) == MFT_OK && mft_model_save(plain.m, in_room("plain")) == MFT_OK, "%s", mft_error_message(r.ctx));
            snprintf(a, sizeof a, "%s/model.safetensors", in_room("saved")); snprintf(b, sizeof b, "%s/model.safetensors", in_room("plain"));
            CHECK(same_file(a, b));
            resident = resident_state();
            CHECK_MSG(resident < (int64_t)1 << 20, "%lld bytes of the state are resident after saving", (long long)resident);
            hash_weights(&plain); hash_weights(&r);
            CHECK(plain.weights == r.weights);
            mft_context_destroy(plain.ctx); mft_context_destroy(r.ctx);
            CHECK(resident_state() <= 0 && count_files(in_room("state"), "") == 0);
        }
}

/* Saved in one mode, resumed in either: the run goes on as if nothing had been. */
static void resume_with(const char *master_dtype)
{
    int from, to;
    way w;
    run whole, r;
    memset(&w, 0, sizeof w);
    w.master_dtype = master_dtype;
    CHECK(begin(w, &whole) == MFT_OK && steps(&whole, 0, STEPS) == MFT_OK);
    hash_weights(&whole);
    mft_context_destroy(whole.ctx);
    for (from = 0; from < 2; from++)
        for (to = 0; to < 2; to++) {
            w.budget = from ? SMALL : 0; w.state_dir = from ? in_room("state") : NULL;
            CHECK(begin(w, &r) == MFT_OK && steps(&r, 0, 2) == MFT_OK);
            CHECK_MSG(mft_trainer_save(r.tr, in_room("checkpoint")) == MFT_OK, "%s", mft_error_message(r.ctx));
            if (from) CHECK(resident_state() < (int64_t)1 << 20);
            mft_context_destroy(r.ctx);
            w.budget = to ? SMALL : 0; w.state_dir = to ? in_room("state") : NULL;
            CHECK(begin(w, &r) == MFT_OK);
            CHECK_MSG(mft_trainer_resume(r.tr, in_room("checkpoint")) == MFT_OK, "%s", mft_error_message(r.ctx));
            if (to) CHECK(resident_state() < (int64_t)1 << 20);
            CHECK_MSG(steps(&r, 2, STEPS) == MFT_OK, "%s", mft_error_message(r.ctx));
            hash_weights(&r);
            CHECK_MSG(r.loss[STEPS - 1] == whole.loss[STEPS - 1] && r.weights == whole.weights, "saved with state file %d, resumed with %d: loss %.17g, not %.17g", from, to, r.loss[STEPS - 1], whole.loss[STEPS - 1]);
            mft_context_destroy(r.ctx);
        }
    w.master_dtype = master_dtype ? NULL : "bf16";              /* no bit of it could be the same */
    CHECK(begin(w, &r) == MFT_OK && mft_trainer_resume(r.tr, in_room("checkpoint")) == MFT_ERR_INVALID_ARGUMENT);
    CHECK_MSG(strstr(mft_error_message(r.ctx), "for training in bf16") != NULL, "%s", mft_error_message(r.ctx));
    mft_context_destroy(r.ctx);
}

static void test_resume(void)
{
    resume_with(NULL);
    resume_with("bf16");
}

/* What the whole process takes is what was planned, in a process of its own that has loaded, trained, saved. */
static void test_peak(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    SKIP("sanitizers have memory of their own");
#else
    size_t peak = 0;
    int    pid, status = 0;
    mft_process_memory(NULL, &peak);
    if (!peak) SKIP("this system does not say what is resident");
    fflush(stdout);
    if ((pid = fork()) == 0) {
        FILE  *f = fopen("/proc/self/clear_refs", "w");         /* the peak until now is this file's other tests' */
        size_t before = 0;
        way    w;
        run    r;
        int    cleared = f && fputs("5", f) >= 0;
        if (f) cleared &= fclose(f) == 0;
        if (!cleared) _exit(2);
        mft_process_memory(&before, NULL);
        memset(&w, 0, sizeof w);
        w.budget = SMALL; w.state_dir = in_room("state");
        if (begin(w, &r) != MFT_OK || steps(&r, 0, 2) != MFT_OK || mft_model_save(r.m, in_room("peak")) != MFT_OK) _exit(1);
        mft_process_memory(NULL, &peak);
        printf("planned %.1f MB, peak %.1f MB of which %.1f were there before\n", (double)r.plan.total / 1048576, (double)peak / 1048576, (double)before / 1048576);
        _exit(peak <= before + (r.plan.total - r.plan.process) * 105 / 100 ? 0 : 1);     /* 11 MB: the state, never dropped, has 17 */
    }
    CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 2) SKIP("the peak cannot be cleared here");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
#endif
}

/* No room for the state file: a sentence at the start, in memory nothing is left, and no signal. Limits fall
 * into the weights and the gradients. */
static void test_full_disk(void)
{
    static const rlim_t limits[] = { 1 << 20, 6 << 20 };
    int i;
    for (i = 0; i < 2; i++) {
        int pid, status = 0;
        fflush(stdout);
        if ((pid = fork()) == 0) {
            struct rlimit limit;
            way           w;
            run           r;
            const char   *text;
            signal(SIGXFSZ, SIG_IGN);
            limit.rlim_cur = limit.rlim_max = limits[i];
            if (setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(3);
            memset(&w, 0, sizeof w);
            w.budget = SMALL; w.state_dir = in_room("state");
            if (begin(w, &r) == MFT_OK) _exit(4);
            text = mft_error_message(r.ctx);
            if (!strstr(text, "no room for") || !strstr(text, "state file") || !strstr(text, in_room("state"))) { printf("%s\n", text); fflush(stdout); _exit(5); }
            if (!r.m != (i == 0)) _exit(6);
            mft_context_destroy(r.ctx);
            _exit(count_files(in_room("state"), "") == 0 ? 0 : 7);
        }
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
        CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 0, "limit %d: status %x", i, (unsigned)status);
    }
}

/* A place where no file can be made, and budgets that are too small, with and without one. */
static void test_refusals(void)
{
    way w;
    run r;
    memset(&w, 0, sizeof w);
    write_file(in_room("file"), "x", 1);
    w.budget = SMALL; w.state_dir = in_room("file");
    CHECK(begin(w, &r) == MFT_ERR_IO);
    CHECK_MSG(strstr(mft_error_message(r.ctx), in_room("file")) != NULL, "%s", mft_error_message(r.ctx));
    mft_context_destroy(r.ctx);
    w.state_dir = NULL; w.budget = (size_t)21 << 20;            /* 17.8 MB and the step */
    CHECK(begin(w, &r) == MFT_ERR_OUT_OF_MEMORY);
    CHECK_MSG(strstr(mft_error_message(r.ctx), "too small") && strstr(mft_error_message(r.ctx), "state_dir") && strstr(mft_error_message(r.ctx), "bf16") && strstr(mft_error_message(r.ctx), "APOLLO-mini or SGD"), "%s", mft_error_message(r.ctx));
    mft_context_destroy(r.ctx);
    w.state_dir = in_room("state"); w.budget = (size_t)6 << 20;
    CHECK(begin(w, &r) == MFT_ERR_OUT_OF_MEMORY);
    CHECK_MSG(strstr(mft_error_message(r.ctx), "too small") && strstr(mft_error_message(r.ctx), "would save"), "%s", mft_error_message(r.ctx));
    mft_context_destroy(r.ctx);
    w.budget = (size_t)200 << 20;                               /* plenty: no file is made */
    CHECK(begin(w, &r) == MFT_OK && r.plan.state_mapped == 0);
    mft_context_destroy(r.ctx);
}

typedef struct ledger { size_t calls, fail_at, now; } ledger;
static void *ledger_alloc(void *user, size_t bytes, size_t align)
{
    ledger *l = (ledger *)user;
    void   *p = NULL;
    if (++l->calls == l->fail_at || posix_memalign(&p, align < sizeof p ? sizeof p : align, bytes) != 0) return NULL;
    l->now += bytes;
    return p;
}
static void ledger_free(void *user, void *p, size_t bytes) { ((ledger *)user)->now -= bytes; free(p); }

/* Every allocation fails once while model and trainer are made: a status, and all is given back. */
static void test_allocations(void)
{
    ledger l;
    int    done = 0;
    memset(&l, 0, sizeof l);
    while (!done) {
        mft_context_desc cd;
        mft_model_desc   md;
        mft_context     *ctx = NULL;
        mft_model       *m = NULL;
        mft_trainer     *tr = NULL;
        mft_status       s;
        memset(&cd, 0, sizeof cd); memset(&md, 0, sizeof md);
        cd.allocator.alloc = ledger_alloc; cd.allocator.free = ledger_free; cd.allocator.user = &l;
        cd.n_threads = 1; cd.memory_budget = SMALL;
        md.train_all = 1; md.state_dir = in_room("state");
        l.calls = 0; l.fail_at += l.fail_at < 40 ? 1 : 7;       /* loading repeats itself, tensor by tensor */
        s = mft_context_create(&cd, &ctx);
        if (s == MFT_OK) s = mft_model_load(ctx, model_dir(0), &md, &m);
        if (s == MFT_OK) s = mft_trainer_create(m, NULL, NULL, &tr);
        done = l.calls < l.fail_at;
        CHECK_MSG(done ? s == MFT_OK : s == MFT_ERR_OUT_OF_MEMORY, "allocation %llu: status %d, %s", (unsigned long long)l.fail_at, (int)s, ctx ? mft_error_message(ctx) : "");
        mft_context_destroy(ctx);
        CHECK(l.now == 0);
    }
    CHECK_MSG(l.fail_at > 100 && resident_state() <= 0, "%llu allocations", (unsigned long long)l.fail_at);
}

int main(void)
{
    if (!room_make("statefile")) return 1;
    make_model(0);
    make_model(1);
    TEST(test_bits);
    TEST(test_resume);
    TEST(test_peak);
    TEST(test_full_disk);
    TEST(test_refusals);
    TEST(test_allocations);
    remove_dir(room);
    return test_report("statefile");
}
