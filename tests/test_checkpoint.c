/* test_checkpoint.c - what a run does between its steps. Stopping and going on: resumed against straight through, bit
 * for bit; what is refused, by name; kills at any moment, disks that fill up, directories that cannot be written.
 * Evaluations: the best kept and loaded, early stopping; windows that are not finite.
 * $MFT_KILLS: how many times a run is killed (default 8); tests/kill9.sh asks for 200. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* mkdtemp, fork, kill, setrlimit */
#endif
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "room.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

static void copy_file(const char *from, const char *to)
{
    size_t bytes = 0;
    char  *text = test_read_file(from, &bytes);
    CHECK_MSG(text != NULL, "%s", from);
    if (text) write_file(to, text, bytes);
    free(text);
}

/* A base of our own: qwen2 of tests/golden with a file that passes for a tokenizer. */
static void make_base(const char *name, const char *tokenizer)
{
    char path[900];
    snprintf(path, sizeof path, "mkdir -p %s", in_room(name));
    CHECK(system(path) == 0);
    snprintf(path, sizeof path, "%s/config.json", in_room(name));       copy_file("tests/golden/qwen2/config.json", path);
    snprintf(path, sizeof path, "%s/model.safetensors", in_room(name)); copy_file("tests/golden/qwen2/model.safetensors", path);
    snprintf(path, sizeof path, "%s/tokenizer.json", in_room(name));    write_file(path, tokenizer, strlen(tokenizer));
}

/* How a run is made. Zero: the usual one. */
typedef struct recipe {
    const char *base;                       /* in the room ["base"]; a path with '/' is one */
    int         threads, full, rank, rows, accum, momentum, optim, bf16, micro;
    const char *targets, *weights;
    float       alpha, dropout;
    double      lr;
    uint64_t    seed, data_seed;
    size_t      budget;
    mft_precision precision;
    const char *save_dir;
    int         save_steps, save_total_limit;
    int         eval_steps, patience, load_best, max_nonfinite, eval_rows;
    void      (*on_eval)(void *user, int64_t step, const mft_eval *e, int is_best);
    void       *user;
    mft_allocator allocator;
    void      (*log)(void *user, mft_log_level level, const char *text);
} recipe;

typedef struct run { mft_context *ctx; mft_model *m; mft_dataset *data, *held; mft_trainer *tr; } run;

static void close_run(run *r) { mft_context_destroy(r->ctx); memset(r, 0, sizeof *r); }

static mft_status try_open(const recipe *k, run *r)
{
    mft_context_desc cd;
    mft_model_desc   md;
    mft_lora_desc    ld;
    mft_dataset_desc dd;
    mft_trainer_desc td;
    const char      *base = k->base ? k->base : "base";
    uint32_t         seed = 7;
    int              i, j, rows = k->rows ? k->rows : 11;
    mft_status       s;
    memset(r, 0, sizeof *r); memset(&cd, 0, sizeof cd); memset(&md, 0, sizeof md); memset(&ld, 0, sizeof ld); memset(&dd, 0, sizeof dd); memset(&td, 0, sizeof td);
    cd.n_threads = k->threads ? k->threads : 1; cd.seed = k->seed ? k->seed : 5; cd.allocator = k->allocator; cd.log = k->log; cd.precision = k->precision; cd.memory_budget = k->budget;
    md.train_all = k->full; md.weights = k->weights; md.master_dtype = k->bf16 ? "bf16" : NULL;
    ld.rank = k->rank ? k->rank : 3; ld.alpha = k->alpha; ld.dropout = k->dropout ? k->dropout : 0.2f; ld.targets = k->targets ? k->targets : "all-linear";
    dd.max_seq_len = 12; dd.seed = k->data_seed ? k->data_seed : 3;
    td.micro_batch = k->micro ? k->micro : 2; td.grad_accum = k->accum ? k->accum : 2; td.learning_rate = k->lr ? k->lr : 1e-2;
    td.schedule = MFT_SCHEDULE_COSINE; td.total_steps = 20; td.warmup_steps = 3; td.optimizer.weight_decay = 0.01;
    td.optimizer.kind = k->momentum ? MFT_SGD : (mft_optimizer_kind)k->optim; td.optimizer.momentum = k->momentum ? 0.9 : 0;
    td.save_dir = k->save_dir; td.save_steps = k->save_steps; td.save_total_limit = k->save_total_limit;
    if ((s = mft_context_create(&cd, &r->ctx)) != MFT_OK) return s;
    if ((s = mft_model_load(r->ctx, strchr(base, '/') ? base : in_room(base), &md, &r->m)) != MFT_OK) return s;
    if (!k->full && (s = mft_lora_attach(r->m, &ld)) != MFT_OK) return s;
    if ((s = mft_dataset_create(r->ctx, NULL, &dd, &r->data)) != MFT_OK) return s;
    for (i = 0; i < rows; i++) {
        int32_t ids[12];
        for (j = 0; j < 12; j++) ids[j] = (int32_t)((test_random(&seed) + 1) * 26);
        if ((s = mft_dataset_add_tokens(r->data, ids, NULL, 5 + i * 5 % 8)) != MFT_OK) return s;
    }
    if (k->eval_rows) {                                         /* of other ids: what is learnt does not help for long */
        if ((s = mft_dataset_create(r->ctx, NULL, &dd, &r->held)) != MFT_OK) return s;
        for (i = 0; i < k->eval_rows; i++) {
            int32_t ids[12];
            for (j = 0; j < 12; j++) ids[j] = (int32_t)((test_random(&seed) + 1) * 26);
            if ((s = mft_dataset_add_tokens(r->held, ids, NULL, 12)) != MFT_OK) return s;
        }
        td.eval_data = r->held; td.eval_steps = k->eval_steps; td.early_stopping_patience = k->patience; td.load_best = k->load_best;
        td.on_eval = k->on_eval;
    }
    td.max_nonfinite = k->max_nonfinite; td.user = k->user;
    return mft_trainer_create(r->m, r->data, &td, &r->tr);
}

static run open_run(const recipe *k)
{
    run r;
    mft_status s = try_open(k, &r);
    CHECK_MSG(s == MFT_OK, "%s", r.ctx ? mft_error_message(r.ctx) : "no context");
    if (s != MFT_OK) exit(1);
    return r;
}

static void steps(run *r, int64_t n) { CHECK_MSG(mft_trainer_run(r->tr, n) == MFT_OK, "%s", mft_error_message(r->ctx)); }

static int64_t done(const run *r)
{
    mft_trainer_info info;
    mft_trainer_report(r->tr, &info);
    return info.step;
}

/* All that a run is: weights and moments, as one number. */
static uint64_t bits(run *r)
{
    mft_tensor *t[512];
    uint64_t    h = 14695981039346656037u;
    int         i, set, n;
    for (set = 0; set < 2; set++) {
        n = set ? mft_optimizer_state(r->tr->opt, t, 512) : mft_model_params(r->m, 1, t, 512);
        CHECK(n > 0 && n <= 512);
        for (i = 0; i < n; i++) {
            const unsigned char *p = (const unsigned char *)t[i]->data;
            size_t               k, bytes = mft_dtype_bytes(t[i]->dtype, mft_tensor_numel(t[i]));
            for (k = 0; k < bytes; k++) h = (h ^ p[k]) * 1099511628211u;
        }
    }
    return h;
}

/* 20 steps in one, and with a stop at several places: before and behind the border of epochs, each after a save that
 * replaces the one before, with other threads after it. 11 rows in windows of 2 x 2 end in the middle of a window. */
static void test_same_bits(void)
{
    recipe ways[10];
    int    w, stop;
    memset(ways, 0, sizeof ways);
    ways[1].full = 1;
    ways[2].full = 1; ways[2].momentum = 1;
    ways[3].accum = 1; ways[3].micro = 3; ways[3].rows = 7;
    ways[4].base = "tests/golden/gpt2"; ways[4].full = 1;         /* Conv1D: matrices that lie the other way */
    ways[5].base = "tests/golden/qwen2_bf16"; ways[5].full = 1;   /* weights that the snapshot has in bf16 */
    ways[6].full = 1; ways[6].optim = MFT_ADAMW8BIT;
    ways[7].full = 1; ways[7].bf16 = 1;                           /* masters that are rounded by chance */
    ways[8].full = 1; ways[8].bf16 = 1; ways[8].optim = MFT_ADAMW8BIT; ways[8].base = "tests/golden/gpt2";
    ways[9].full = 1; ways[9].bf16 = 1; ways[9].optim = MFT_APOLLO_MINI; ways[9].base = "tests/golden/gpt2";
    for (w = 0; w < (int)(sizeof ways / sizeof *ways); w++) {
        run      r = open_run(&ways[w]);
        uint64_t straight;
        steps(&r, 20);
        straight = bits(&r);
        close_run(&r);
        remove_dir(in_room("saved"));
        for (stop = 1; stop < 20; stop += 6) {
            recipe other = ways[w];
            other.threads = 1 + stop % 3; other.seed = 99;      /* the checkpoint's seed counts */
            r = open_run(&ways[w]);
            steps(&r, stop);
            CHECK_MSG(mft_trainer_save(r.tr, in_room("saved")) == MFT_OK, "%s", mft_error_message(r.ctx));
            close_run(&r);
            r = open_run(&other);
            CHECK_MSG(mft_trainer_resume(r.tr, in_room("saved")) == MFT_OK && done(&r) == stop, "%s", mft_error_message(r.ctx));
            steps(&r, 20 - stop);
            CHECK_MSG(bits(&r) == straight, "way %d, stopped after %d", w, stop);
            close_run(&r);
        }
        CHECK(count_files(room, "saved") == 1 && count_files(in_room("saved"), "") == (ways[w].full ? ways[w].base ? 4 : 5 : 4));
    }
}

/* Saving does not disturb the run that goes on, the adapter is one that others read, and a resumed run can be saved again. */
static void test_goes_on(void)
{
    recipe   k;
    run      r;
    uint64_t straight;
    size_t   a = 0, b = 0;
    char    *x, *y, path[900];
    memset(&k, 0, sizeof k);
    r = open_run(&k);
    steps(&r, 8);
    straight = bits(&r);
    close_run(&r);
    r = open_run(&k);
    steps(&r, 5);
    CHECK(mft_trainer_save(r.tr, in_room("saved")) == MFT_OK && mft_lora_save(r.m, in_room("adapter")) == MFT_OK);
    steps(&r, 3);
    CHECK(bits(&r) == straight);
    close_run(&r);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", in_room("saved"));
    x = test_read_file(path, &a);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", in_room("adapter"));
    y = test_read_file(path, &b);
    CHECK(x && y && a == b && !memcmp(x, y, a));
    free(x); free(y);
    r = open_run(&k);
    CHECK(mft_trainer_resume(r.tr, in_room("saved")) == MFT_OK && mft_trainer_save(r.tr, in_room("again")) == MFT_OK);
    close_run(&r);
    snprintf(path, sizeof path, "%s/trainer_state.json", in_room("saved"));
    x = test_read_file(path, &a);
    snprintf(path, sizeof path, "%s/trainer_state.json", in_room("again"));
    y = test_read_file(path, &b);
    CHECK(x && y && a == b && !memcmp(x, y, a));
    free(x); free(y);
}

/* The run saves by itself, keeps the latest, and goes on from the latest. */
static void test_numbered(void)
{
    recipe   k;
    run      r;
    uint64_t straight;
    char     dir[700], path[4000];
    snprintf(dir, sizeof dir, "%s", in_room("numbered"));
    memset(&k, 0, sizeof k);
    k.save_dir = dir; k.save_steps = 3; k.save_total_limit = 2;
    r = open_run(&k);
    steps(&r, 10);
    straight = bits(&r);
    CHECK(count_files(dir, "") == 2 && count_files(dir, "checkpoint-6") == 1 && count_files(dir, "checkpoint-9") == 1);
    CHECK(mft_trainer_save(r.tr, NULL) == MFT_OK && count_files(dir, "") == 2 && count_files(dir, "checkpoint-10") == 1);
    close_run(&r);
    /* what kills leave: a directory and a file half written, a removal half done; and what is none of ours */
    snprintf(path, sizeof path, "mkdir -p %s/checkpoint-12.tmp-99999-0 %s/checkpoint-3.tmp-1-0 %s/checkpoint-of-mine %s/checkpoint-77", dir, dir, dir, dir);
    CHECK(system(path) == 0);
    snprintf(path, sizeof path, "%s/checkpoint-12.tmp-99999-0/optimizer.safetensors", dir);
    write_file(path, "half", 4);
    snprintf(path, sizeof path, "%s/checkpoint-of-mine/notes", dir);
    write_file(path, "mine", 4);
    r = open_run(&k);
    CHECK_MSG(mft_trainer_resume(r.tr, dir) == MFT_OK && done(&r) == 10, "%s", mft_error_message(r.ctx));
    CHECK(bits(&r) == straight);
    steps(&r, 2);
    CHECK_MSG(count_files(dir, "tmp-") == 0 && count_files(dir, "of-mine") == 1 && count_files(dir, "checkpoint-12") == 1 && count_files(dir, "checkpoint-9") == 0, "%d %d", count_files(dir, "tmp-"), count_files(dir, ""));
    close_run(&r);
    /* a plain save to a path cleans up what was left beside that path */
    snprintf(path, sizeof path, "%s.tmp-4242-1", in_room("adapter/adapter_config.json"));
    write_file(path, "half", 4);
    r = open_run(&k);
    CHECK(mft_lora_save(r.m, in_room("adapter")) == MFT_OK && count_files(in_room("adapter"), "tmp-") == 0);
    close_run(&r);
}

/* A resumption that must fail: with this status and word. The trainer is as before. */
static void refused(const recipe *k, const char *dir, mft_status status, const char *word)
{
    run        r = open_run(k);
    uint64_t   before = bits(&r);
    mft_status s = mft_trainer_resume(r.tr, dir);
    CHECK_MSG(s == status && strstr(mft_error_message(r.ctx), word), "status %d, not %d: \"%s\" should say \"%s\"", (int)s, (int)status, mft_error_message(r.ctx), word);
    CHECK(bits(&r) == before && done(&r) == 0);
    close_run(&r);
}

static int n_warnings;
static char warned[300];
static void on_log(void *user, mft_log_level level, const char *text)
{
    (void)user;
    if (level == MFT_LOG_WARNING) { n_warnings++; snprintf(warned, sizeof warned, "%s", text); }
}

static void test_refusals(void)
{
    static const char *const files[] = { "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json" };
    recipe k, other;
    run    r;
    size_t i, bytes = 0;
    char   path[900], dir[700];
    memset(&k, 0, sizeof k);
    snprintf(dir, sizeof dir, "%s", in_room("saved"));
    remove_dir(dir);
    r = open_run(&k);
    steps(&r, 4);
    CHECK(mft_trainer_save(r.tr, dir) == MFT_OK);
    write_file(in_room("adapter/precious"), "mine", 4);
    CHECK(mft_trainer_save(r.tr, in_room("adapter")) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(r.ctx), "something else"));
    CHECK(count_files(in_room("adapter"), "precious") == 1);
    CHECK(mft_trainer_save(r.tr, in_room("adapter/precious")) == MFT_ERR_IO && strstr(mft_error_message(r.ctx), "precious"));
    CHECK(mft_trainer_save(r.tr, NULL) == MFT_ERR_INVALID_ARGUMENT);
    /* another base of the same shapes; another tokenizer */
    CHECK(mft_model_init(r.ctx, "tests/golden/qwen2/config.json", 9, MFT_F32, in_room("stranger")) == MFT_OK);
    close_run(&r);
    copy_file(in_room("base/tokenizer.json"), in_room("stranger/tokenizer.json"));
    make_base("retokenized", "{\"version\": \"2\"}");
    other = k; other.base = "stranger";              refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "base is another");
    other = k; other.base = "tests/golden/gpt2";     refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "gpt2");
    other = k; other.weights = "f16";                refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "held as stored, here they are held f16");
    other = k; other.base = "retokenized";           refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "tokenizer");
    other = k; other.rank = 4;                       refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "rank is 3, this adapter's 4");
    other = k; other.alpha = 9;                      refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "lora_alpha is 6, this adapter's 9");
    other = k; other.dropout = 0.3f;                 refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "lora_dropout");
    other = k; other.targets = "q_proj";             refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "target_modules");
    other = k; other.full = 1;                       refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "trains all weights");
    k.full = 1; r = open_run(&k); CHECK(mft_trainer_save(r.tr, in_room("full")) == MFT_OK); close_run(&r); k.full = 0;
    refused(&k, in_room("full"), MFT_ERR_INVALID_ARGUMENT, "full fine-tuning");
    other = k; other.momentum = 1;                   refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "optimizer");
    other = k; other.rows = 12;                      refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "n_samples was 11, now it is 12");
    other = k; other.data_seed = 4;                  refused(&other, dir, MFT_ERR_INVALID_ARGUMENT, "seed");
    refused(&k, in_room("nowhere"), MFT_ERR_IO, "nowhere");
    refused(&k, in_room("adapter"), MFT_ERR_IO, "no checkpoint");
    /* what may differ is said */
    other = k; other.lr = 1e-3; other.log = on_log;
    r = open_run(&other);
    n_warnings = 0;
    CHECK(mft_trainer_resume(r.tr, dir) == MFT_OK && n_warnings == 1 && strstr(warned, "learning_rate was 0.01, now it is 0.001"));
    close_run(&r);
    other = k; other.precision = MFT_PRECISION_BF16; other.log = on_log;
    r = open_run(&other);
    n_warnings = 0;
    CHECK(mft_trainer_resume(r.tr, dir) == MFT_OK && n_warnings == 1 && strstr(warned, "with precision f32, now it is another"));
    close_run(&r);
    other = k; other.budget = (size_t)1 << 30; other.log = on_log;      /* enough not to split: no word of it */
    for (i = 0; i < 2; i++) {
        char *state = test_read_file(in_room("saved/trainer_state.json"), &bytes), *at = state ? strstr(state, "\"micro_batch_parts\": ") : NULL;
        CHECK(at != NULL);
        r = open_run(&other);
        n_warnings = 0;
        CHECK_MSG(mft_trainer_resume(r.tr, dir) == MFT_OK && n_warnings == (int)i && (!i || strstr(warned, "splits batches otherwise")), "%d: %s", n_warnings, warned);
        close_run(&r);
        if (at) { at[strlen("\"micro_batch_parts\": ")] = i ? '1' : '3'; write_file(in_room("saved/trainer_state.json"), state, bytes); }
        free(state);
    }
    /* each file missing, cut, altered */
    for (i = 0; i < 4; i++) {
        char *text;
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        text = test_read_file(path, &bytes);
        if (!text) { CHECK(text != NULL); continue; }
        CHECK(unlink(path) == 0);
        refused(&k, dir, MFT_ERR_IO, i < 2 ? files[i] : "no checkpoint");
        write_file(path, text, bytes / 2);
        refused(&k, dir, MFT_ERR_FORMAT, files[i]);
        if (i < 3) {
            text[bytes / 2] ^= 1;
            write_file(path, text, bytes);
            refused(&k, dir, MFT_ERR_FORMAT, files[i]);
            text[bytes / 2] ^= 1;
        }
        write_file(path, text, bytes);
        free(text);
    }
    write_file(in_room("saved/trainer_state.json"), "{\"global_step\": 3}", 18);           /* as Transformers has one */
    refused(&k, dir, MFT_ERR_UNSUPPORTED, "no checkpoint of this library");
}

/* ==== ends that nobody chose ==== */

/* A run in a process of its own, from the latest checkpoint if there is one; its result is an adapter, or 64 bits. */
static void child_run(const recipe *k, const char *result)
{
    run      r = open_run(k);
    uint64_t h;
    FILE    *f;
    if (count_files(k->save_dir, "checkpoint-") && count_files(k->save_dir, "checkpoint-") > count_files(k->save_dir, "tmp-") && mft_trainer_resume(r.tr, k->save_dir) != MFT_OK) {
        printf("%s\n", mft_error_message(r.ctx));
        fflush(stdout);
        _exit(2);
    }
    if (mft_trainer_run(r.tr, 20 - done(&r)) != MFT_OK) { printf("%s\n", mft_error_message(r.ctx)); fflush(stdout); _exit(3); }
    h = bits(&r);
    f = fopen(result, "wb");
    if (!f || fwrite(&h, sizeof h, 1, f) != 1 || fclose(f) != 0) _exit(4);
    _exit(0);
}

/* Kill -9 at random moments of runs that save each step. Every resumption works, and what comes out at the end is what
 * an uninterrupted run gives. */
static void test_kills(void)
{
    const char *wanted = getenv("MFT_KILLS");
    int         kills = 0, most = wanted && *wanted ? atoi(wanted) : 8, runs = 0, tries = 0;
    uint32_t    seed = (uint32_t)getpid();
    recipe      k;
    run         r;
    uint64_t    straight, h;
    char        dir[700], result[700];
    memset(&k, 0, sizeof k);
    r = open_run(&k);
    steps(&r, 20);
    straight = bits(&r);
    close_run(&r);
    snprintf(dir, sizeof dir, "%s", in_room("killed"));
    snprintf(result, sizeof result, "%s", in_room("result"));
    k.save_dir = dir; k.save_steps = 1; k.save_total_limit = 2;
    while ((kills < most || runs == 0) && tries++ < 100 * most) {
        struct timespec t;
        int             status = 0;
        pid_t           child;
        fflush(stdout);
        child = fork();
        if (child == 0) child_run(&k, result);
        if (kills < most) {
            t.tv_sec = 0; t.tv_nsec = (long)((test_random(&seed) + 1) * 0.5 * 60e6);
            nanosleep(&t, NULL);
            kill(child, SIGKILL);
        }
        CHECK(waitpid(child, &status, 0) == child);
        if (WIFSIGNALED(status)) { kills++; continue; }
        CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 0, "after %d kills: status %x", kills, (unsigned)status);
        {
            size_t bytes = 0;
            char  *text = test_read_file(result, &bytes);
            h = 0;
            if (text && bytes == sizeof h) memcpy(&h, text, sizeof h);
            free(text);
        }
        CHECK_MSG(h == straight, "run %d, after %d kills: other bits", runs, kills);
        CHECK_MSG(count_files(dir, "") <= 3, "%d names in the directory", count_files(dir, ""));
        runs++;
        remove_dir(dir);
    }
    CHECK_MSG(kills >= most && runs > 0, "%d kills, %d whole runs", kills, runs);
    if (wanted) printf("%d kills over %d runs of 20 steps\n", kills, runs);
}

/* A limit on the length of files stands for a full disk; a directory without the right to write for one that has
 * turned read-only. What was saved before resumes. */
static void test_no_room(void)
{
    recipe k;
    run    r;
    int    way, status = 0;
    char   dir[700], command[1000];
    size_t largest = 0;
    pid_t  child;
    snprintf(dir, sizeof dir, "%s", in_room("full-disk"));
    memset(&k, 0, sizeof k);
    k.save_dir = dir; k.save_steps = 2;
    r = open_run(&k);
    steps(&r, 4);
    close_run(&r);
    free(test_read_file(in_room("full-disk/checkpoint-4/optimizer.safetensors"), &largest));
    for (way = 0; way < 3; way++) {
        fflush(stdout);
        child = fork();
        if (child == 0) {
            struct rlimit limit;
            r = open_run(&k);
            if (mft_trainer_resume(r.tr, dir) != MFT_OK) _exit(2);
            signal(SIGXFSZ, SIG_IGN);
            limit.rlim_cur = limit.rlim_max = way == 0 ? 100 : largest - 10;
            if (way < 2 && setrlimit(RLIMIT_FSIZE, &limit) != 0) _exit(3);
            if (way == 2) {
                if (chmod(dir, 0555) != 0) _exit(4);
                if (geteuid() == 0 && (chmod(room, 0755) != 0 || setgid(65534) != 0 || setuid(65534) != 0)) _exit(5);
            }
            if (mft_trainer_run(r.tr, 4) != MFT_ERR_IO || !strstr(mft_error_message(r.ctx), "checkpoint-6")) _exit(6);
            if (done(&r) != 6) _exit(7);                 /* the trainer is well: it could save elsewhere */
            _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child);
        CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 0, "way %d: status %x", way, (unsigned)status);
        snprintf(command, sizeof command, "chmod 755 %s", dir);
        CHECK(system(command) == 0);
        CHECK_MSG(count_files(dir, "") == 2 && count_files(dir, "checkpoint-4") == 1, "way %d: %d names", way, count_files(dir, ""));
        r = open_run(&k);
        CHECK_MSG(mft_trainer_resume(r.tr, dir) == MFT_OK && done(&r) == 4, "way %d: %s", way, mft_error_message(r.ctx));
        close_run(&r);
    }
}

/* A kill between the two renames of a replacement leaves the old one beside its place. */
static void test_between_renames(void)
{
    recipe k;
    run    r;
    char   command[1700];
    memset(&k, 0, sizeof k);
    r = open_run(&k);
    steps(&r, 2);
    CHECK(mft_trainer_save(r.tr, in_room("swap")) == MFT_OK);
    close_run(&r);
    snprintf(command, sizeof command, "mv %s %s.tmp-old", in_room("swap"), in_room("swap"));
    CHECK(system(command) == 0);
    r = open_run(&k);
    CHECK_MSG(mft_trainer_resume(r.tr, in_room("swap")) == MFT_OK && done(&r) == 2, "%s", mft_error_message(r.ctx));
    steps(&r, 1);
    CHECK(mft_trainer_save(r.tr, in_room("swap")) == MFT_OK && count_files(room, "swap") == 1);
    close_run(&r);
}

/* cancel 2 lets the step in hand finish: the run stops behind a whole step, from whatever layer it is asked. */
static int cancel_politely(void *user, mft_tensor **params, int n, int64_t *n_valid)
{
    (void)params; (void)n; (void)n_valid;
    mft_cancel((mft_context *)user, 2);
    return 0;
}

static void test_cancel_after_step(void)
{
    recipe k;
    run    r;
    memset(&k, 0, sizeof k);
    r = open_run(&k);
    r.tr->desc.on_gradients = cancel_politely; r.tr->desc.user = r.ctx;
    CHECK(mft_trainer_run(r.tr, 5) == MFT_ERR_CANCELLED && done(&r) == 1);
    CHECK(mft_trainer_run(r.tr, 5) == MFT_ERR_CANCELLED && done(&r) == 2);
    r.tr->desc.on_gradients = NULL;
    mft_cancel(r.ctx, 0);
    steps(&r, 3);
    CHECK(done(&r) == 5);
    close_run(&r);
}

/* ==== evaluations ==== */
typedef struct evals { int n, n_best; int64_t step[40]; double loss[40]; mft_context *ctx; int64_t stop; } evals;

static void on_eval(void *user, int64_t step, const mft_eval *e, int is_best)
{
    evals *v = (evals *)user;
    if (v->n == 40) return;
    v->step[v->n] = step; v->loss[v->n++] = e->loss;
    v->n_best += is_best;
}

static void stop_there(void *user, const mft_progress *p)
{
    const evals *v = (const evals *)user;
    if (p->step == v->stop) mft_cancel(v->ctx, 1);
}

/* Every second step and in the end; the best is kept past the limit and loaded; the run ends early. The same when it is
 * stopped on the way, at any step. */
static void test_evaluations(void)
{
    recipe   k;
    run      r;
    evals    v, w;
    mft_trainer_info info, other;
    mft_eval e;
    uint64_t straight;
    int      i, best = 0, stop;
    char     dir[700], path[900];
    snprintf(dir, sizeof dir, "%s", in_room("evals"));
    memset(&k, 0, sizeof k); memset(&v, 0, sizeof v);
    k.eval_rows = 5; k.eval_steps = 2; k.on_eval = on_eval; k.user = &v; k.lr = 0.05;
    r = open_run(&k);
    steps(&r, 19);
    for (i = 0; i < v.n; i++) if (v.loss[i] < v.loss[best]) best = i;
    mft_trainer_report(r.tr, &info);
    CHECK_MSG(v.n == 10 && v.step[0] == 2 && v.step[8] == 18 && v.step[9] == 19, "%d evaluations", v.n);
    CHECK_MSG(best > 0 && best < 6 && info.best_step == v.step[best] && info.best_loss == v.loss[best] && info.eval_step == 19 && info.eval.loss == v.loss[9] && !info.stopped_early,
              "best %lld, %g: an evaluation that rises is what this test needs", (long long)info.best_step, info.best_loss);
    close_run(&r);
    k.patience = 3; k.load_best = 1; k.save_dir = dir; k.save_steps = 1; k.save_total_limit = 2;
    memset(&v, 0, sizeof v);
    r = open_run(&k);
    steps(&r, 19);
    straight = bits(&r);
    mft_trainer_report(r.tr, &info);
    CHECK_MSG(info.stopped_early && info.step == v.step[best] + 6 && info.best_step == v.step[best] && info.eval.loss == v.loss[best], "stopped at %lld", (long long)info.step);
    snprintf(path, sizeof path, "checkpoint-%lld", (long long)info.best_step);
    CHECK_MSG(count_files(dir, "") == 2 && count_files(dir, path) == 1, "%d checkpoints", count_files(dir, ""));
    CHECK(mft_trainer_evaluate(r.tr, r.held, 0, &e) == MFT_OK && e.loss == info.best_loss && e.n_tokens == info.eval.n_tokens);
    close_run(&r);
    {   /* on other held-out data the old best is no measure: it is forgotten, with a word; on the same it is not */
        recipe           changed = k;
        mft_trainer_info of;
        changed.log = on_log;
        for (i = 5; i < 7; i++) {
            changed.eval_rows = i;
            r = open_run(&changed);
            n_warnings = 0;
            CHECK(mft_trainer_resume(r.tr, dir) == MFT_OK);
            mft_trainer_report(r.tr, &of);
            CHECK_MSG(i == 5 ? n_warnings == 0 && of.best_step == info.best_step && of.stopped_early : n_warnings == 1 && strstr(warned, "held-out data is another") && !of.best_step && !of.stopped_early,
                      "%d rows: %d warnings, %s; best %lld", i, n_warnings, warned, (long long)of.best_step);
            close_run(&r);
        }
    }
    for (stop = 1; stop < info.step; stop += 3) {
        remove_dir(dir);
        memset(&w, 0, sizeof w);
        k.user = &w;
        r = open_run(&k);
        w.ctx = r.ctx; w.stop = stop;
        r.tr->desc.on_step = stop_there;
        CHECK(mft_trainer_run(r.tr, 19) == MFT_ERR_CANCELLED && done(&r) == stop);     /* before what was due behind that step */
        mft_cancel(r.ctx, 0);
        CHECK(mft_trainer_save(r.tr, NULL) == MFT_OK);
        close_run(&r);
        r = open_run(&k);
        CHECK_MSG(mft_trainer_resume(r.tr, dir) == MFT_OK && done(&r) == stop, "%s", mft_error_message(r.ctx));
        steps(&r, 19 - done(&r));
        mft_trainer_report(r.tr, &other);
        CHECK_MSG(bits(&r) == straight && other.best_step == info.best_step && other.step == info.step && other.stopped_early, "stopped after %d: ends at %lld, best %lld", stop,
                  (long long)other.step, (long long)other.best_step);
        close_run(&r);
    }
    k.eval_rows = 0; k.eval_steps = 2;
    {
        mft_trainer_desc d;
        mft_trainer     *tr = NULL;
        r = open_run(&k);
        memset(&d, 0, sizeof d);
        d.eval_steps = 2;
        CHECK(mft_trainer_create(r.m, r.data, &d, &tr) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(r.ctx), "eval_data"));
        d.eval_data = r.data; d.load_best = 1;
        CHECK(mft_trainer_create(r.m, r.data, &d, &tr) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(r.ctx), "save_dir"));
        close_run(&r);
    }
}

/* An id beyond the vocabulary is found before the first step. */
static void test_greatest_id(void)
{
    int32_t      ids[4] = { 1, 2, 53, 3 };
    recipe       k;
    run          r;
    mft_trainer *tr = NULL;
    mft_trainer_desc d;
    memset(&k, 0, sizeof k); memset(&d, 0, sizeof d);
    r = open_run(&k);
    CHECK(mft_dataset_create(r.ctx, NULL, NULL, &r.held) == MFT_OK && mft_dataset_add_tokens(r.held, ids, NULL, 4) == MFT_OK);
    CHECK(mft_trainer_create(r.m, r.held, &d, &tr) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(r.ctx), "token id 53") && !tr);
    d.eval_data = r.held;
    CHECK(mft_trainer_create(r.m, r.data, &d, &tr) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(r.ctx), "vocabulary of 53"));
    close_run(&r);
}

/* ==== what is not finite ==== */
typedef struct poison { int calls, from, n; } poison;

static int on_poison(void *user, mft_tensor **params, int n, int64_t *n_valid)
{
    poison *p = (poison *)user;
    (void)n; (void)n_valid;
    if (p->calls >= p->from && p->calls < p->from + p->n) ((float *)params[0]->grad->data)[0] = NAN;
    p->calls++;
    return 0;
}

/* Two bad windows: passed over, as if they had not been in the data; a third in a row ends the run, nothing lost. */
static void test_not_finite(void)
{
    recipe   k;
    run      r;
    poison   p;
    uint64_t straight;
    mft_batch b;
    mft_trainer_info info;
    int      i;
    memset(&k, 0, sizeof k);
    k.log = on_log;
    r = open_run(&k);                                           /* steps 3 and 4 left out by hand */
    r.tr->desc.schedule = MFT_SCHEDULE_CONSTANT;
    steps(&r, 3);
    for (i = 0; i < 4; i++) CHECK(mft_dataset_next(r.data, 2, &b) == MFT_OK);
    steps(&r, 5);
    straight = bits(&r);
    close_run(&r);
    k.max_nonfinite = 2; k.user = &p;
    memset(&p, 0, sizeof p); p.from = 3; p.n = 2;
    n_warnings = 0;
    r = open_run(&k);
    r.tr->desc.schedule = MFT_SCHEDULE_CONSTANT; r.tr->desc.on_gradients = on_poison;
    steps(&r, 10);
    mft_trainer_report(r.tr, &info);
    CHECK_MSG(bits(&r) == straight && info.n_skipped == 2 && info.step == 10 && n_warnings == 2 && strstr(warned, "step 5 is skipped"), "%lld skipped, \"%s\"", (long long)info.n_skipped, warned);
    close_run(&r);
    memset(&p, 0, sizeof p); p.from = 3; p.n = 3;
    r = open_run(&k);
    r.tr->desc.on_gradients = on_poison;
    CHECK(mft_trainer_run(r.tr, 10) == MFT_ERR_NOT_FINITE && strstr(mft_error_message(r.ctx), "2 in a row") && done(&r) == 5);
    CHECK(mft_trainer_save(r.tr, in_room("nonfinite")) == MFT_OK);      /* weights are those of the last good step */
    close_run(&r);
    r = open_run(&k);
    CHECK(mft_trainer_resume(r.tr, in_room("nonfinite")) == MFT_OK && mft_trainer_run(r.tr, 2) == MFT_OK && done(&r) == 7);
    close_run(&r);
    k.full = 1;                                                 /* a weight that is NaN: no window is passed over, it is named */
    memset(&p, 0, sizeof p);
    r = open_run(&k);
    ((float *)r.m->params[2].t->data)[0] = NAN;
    CHECK(mft_trainer_run(r.tr, 10) == MFT_ERR_NOT_FINITE && strstr(mft_error_message(r.ctx), r.m->params[2].name) && done(&r) == 0);
    close_run(&r);
}

/* The time that is left, from times put in by hand: no clock is asked. */
static void test_eta(void)
{
    recipe k;
    run    r;
    mft__pace *p;
    double     save;
    memset(&k, 0, sizeof k);
    k.eval_rows = 4; k.eval_steps = 10;
    r = open_run(&k);
    p = &r.tr->pace;
    r.tr->target = 105; r.tr->step = 5;
    p->n[MFT__LAP_STEP] = 5; p->first_step = 9; p->seconds[MFT__LAP_STEP] = 9 + 4 * 2.0; r.tr->seconds = 17; r.tr->tokens = 170;
    /* 100 steps of 2 s; evaluations at 10, 20 .. 100 and 105: 48 tokens at 0.1 s each in training, a half of that each */
    CHECK_MSG(fabs(mft__eta(r.tr) - (200 + 11 * 2.4)) < 1e-9, "%g", mft__eta(r.tr));
    p->n[MFT__LAP_EVAL] = 2; p->seconds[MFT__LAP_EVAL] = 6;
    CHECK_MSG(fabs(mft__eta(r.tr) - (200 + 11 * 3)) < 1e-9, "%g", mft__eta(r.tr));
    r.tr->step = 106;
    CHECK(mft__eta(r.tr) < 0);                                  /* behind its target no run is going on */
    close_run(&r);

    k.save_dir = in_room("eta");                                /* checkpoints at 50 and 100, and of the best evaluations: a guess, then what was measured */
    r = open_run(&k);
    p = &r.tr->pace;
    r.tr->target = 105; r.tr->step = 5; r.tr->desc.save_steps = 50;
    p->n[MFT__LAP_STEP] = 1; p->first_step = p->seconds[MFT__LAP_STEP] = 2;
    p->n[MFT__LAP_EVAL] = 2; p->seconds[MFT__LAP_EVAL] = 6; p->n_best = 1;
    save = mft__eta(r.tr) - (200 + 11 * 3);
    CHECK_MSG(save > 0 && save < 0.1, "a few thousand weights: %g", save);
    p->n[MFT__LAP_SAVE] = 1; p->seconds[MFT__LAP_SAVE] = 4;
    CHECK_MSG(fabs(mft__eta(r.tr) - (200 + 11 * 3 + (2 + 11 * 2.0 / 4) * 4)) < 1e-9, "%g", mft__eta(r.tr));
    close_run(&r);
}

/* Whole runs by a made-up clock: once a twentieth is done, what is told to be left is right within a tenth. */
static void test_eta_of_runs(void)
{
    static const struct { int steps, eval_steps, save_steps; double first, eval, save; } runs[] = {
        { 200, 0, 0, 9, 0, 0 }, { 400, 20, 0, 4, 6, 0 }, { 400, 0, 20, 4, 0, 3 }, { 1000, 50, 25, 30, 20, 8 }, { 2000, 100, 100, 1, 50, 10 }, { 300, 3, 3, 20, 1, 1 } };
    size_t k;
    for (k = 0; k < sizeof runs / sizeof *runs; k++) {
        mft__pace p;
        double    now = 1e6, told[2048], at[2048];
        uint32_t  seed = 7;
        int       step, n = runs[k].steps;
        memset(&p, 0, sizeof p);
        p.mark = now;
        for (step = 1; step <= n; step++) {
            int eval = runs[k].eval_steps && step % runs[k].eval_steps == 0, save = runs[k].save_steps && step % runs[k].save_steps == 0;
            now += step == 1 ? runs[k].first : 1 + 0.5 * test_random(&seed);                /* steps of half a second to one and a half */
            mft__lap(&p, MFT__LAP_STEP, now);
            told[step] = mft__pace_left(&p, n - step, mft__times(step - 1, n, runs[k].eval_steps), mft__times(step - 1, n, runs[k].save_steps));
            at[step] = now;
            if (eval) { now += runs[k].eval * (1 + 0.1 * test_random(&seed)); mft__lap(&p, MFT__LAP_EVAL, now); }
            if (save) { now += runs[k].save * (1 + 0.1 * test_random(&seed)); mft__lap(&p, MFT__LAP_SAVE, now); }
        }
        CHECK(p.n[MFT__LAP_STEP] == n && fabs(p.seconds[MFT__LAP_STEP] + p.seconds[MFT__LAP_EVAL] + p.seconds[MFT__LAP_SAVE] - (now - 1e6)) < 1e-6);
        for (step = n / 20 + 1; step <= n * 9 / 10; step++)     /* seen: up to 9.7 %; with the first step in the mean: 80 % */
            CHECK_MSG(fabs(told[step] / (now - at[step]) - 1) < 0.1, "run %d, step %d of %d: %g s told, %g s left", (int)k, step, n, told[step], now - at[step]);
    }
}

/* ==== every allocation fails once ==== */
typedef struct ledger { size_t calls, fail_at, now; } ledger;

static void *ledger_alloc(void *user, size_t bytes, size_t align)
{
    ledger *l = (ledger *)user;
    void   *p = NULL;
    if (++l->calls == l->fail_at || posix_memalign(&p, align < sizeof p ? sizeof p : align, bytes) != 0) return NULL;
    memset(p, 0xa5, bytes);
    l->now += bytes;
    return p;
}

static void ledger_free(void *user, void *p, size_t bytes) { ((ledger *)user)->now -= bytes; free(p); }

static void test_allocations(void)
{
    ledger   l;
    recipe   k;
    run      r;
    size_t   at, begins;
    int      way, failed, ok;
    char     dir[700];
    memset(&k, 0, sizeof k);
    snprintf(dir, sizeof dir, "%s", in_room("short"));
    k.save_dir = dir;
    r = open_run(&k);
    steps(&r, 1);
    CHECK(mft_trainer_save(r.tr, NULL) == MFT_OK);
    close_run(&r);
    k.allocator.alloc = ledger_alloc; k.allocator.free = ledger_free; k.allocator.user = &l;
    for (way = 0; way < 2; way++) {                             /* save, resume */
        for (at = 1, ok = 0, failed = 0; !ok && at < 2000; at++) {
            mft_status s;
            memset(&l, 0, sizeof l);
            r = open_run(&k);
            begins = l.calls;
            l.fail_at = begins + at;
            s = way ? mft_trainer_resume(r.tr, dir) : mft_trainer_save(r.tr, NULL);
            ok = l.calls < l.fail_at;
            l.fail_at = 0;
            if (s != MFT_OK) {
                failed++;
                CHECK_MSG(s == MFT_ERR_OUT_OF_MEMORY && strlen(mft_error_message(r.ctx)) > 5, "way %d, allocation %d: status %d: %s", way, (int)at, (int)s, mft_error_message(r.ctx));
            }
            CHECK_MSG(count_files(dir, "tmp-") == 0, "way %d, allocation %d: something is left", way, (int)at);
            close_run(&r);
            CHECK_MSG(l.now == 0, "way %d, allocation %d: %d bytes left", way, (int)at, (int)l.now);
            if (test__bad > 20) return;
        }
        CHECK_MSG(ok && failed > 20, "%d allocations failed", failed);
    }
}

int main(void)
{
    if (!room_make("checkpoint")) return 1;
    make_base("base", "{\"version\": \"1\"}");
    TEST(test_same_bits);
    TEST(test_goes_on);
    TEST(test_numbered);
    TEST(test_refusals);
    TEST(test_kills);
    TEST(test_no_room);
    TEST(test_between_renames);
    TEST(test_cancel_after_step);
    TEST(test_evaluations);
    TEST(test_greatest_id);
    TEST(test_not_finite);
    TEST(test_eta);
    TEST(test_eta_of_runs);
    TEST(test_allocations);
    remove_dir(room);
    return test_report("checkpoint");
}
