/* test_memory_trace.c - the thread that records resident memory, with the step and the phase */
#define _GNU_SOURCE 1
#include <sys/resource.h>
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "test.h"
#include "room.h"

typedef struct seen { int lines, bad, phases[MFT__N_PHASES], last_step; double last_ms; unsigned long long most; } seen;

static const char *const phase_names[MFT__N_PHASES] = { "load", "forward", "backward", "optimizer", "eval", "save", "other" };

/* Reads a trace as what its format promises: JSON by the library's reader, CSV by its header. */
static seen read_trace(mft_context *ctx, const char *path)
{
    FILE *f = fopen(path, "rb");
    char  line[256], phase[32];
    seen  r;
    int   csv = strstr(path, ".csv") != NULL, k;
    memset(&r, 0, sizeof r);
    if (f && csv) r.bad += !fgets(line, sizeof line, f) || strcmp(line, "t_ms,rss_bytes,step,phase\n");
    while (f && fgets(line, sizeof line, f)) {
        double ms = -1; unsigned long long rss = 0; int step = -1;
        r.lines++;
        phase[0] = '\0';
        if (csv) { if (sscanf(line, "%lf,%llu,%d,%31[a-z]\n", &ms, &rss, &step, phase) != 4) r.bad++; }
        else {
            mft_json *j = NULL;
            if (mft_json_parse(ctx, line, strlen(line), &j) != MFT_OK) { r.bad++; continue; }
            ms = mft_json_number(mft_json_get(j, "t_ms"), -1);
            rss = (unsigned long long)mft_json_number(mft_json_get(j, "rss_bytes"), 0);
            step = (int)mft_json_number(mft_json_get(j, "step"), -1);
            if (mft_json_string(mft_json_get(j, "phase"), NULL)) snprintf(phase, sizeof phase, "%s", mft_json_string(mft_json_get(j, "phase"), NULL));
            mft_json_destroy(j);
        }
        for (k = 0; k < MFT__N_PHASES && strcmp(phase, phase_names[k]); k++) {}
        if (k == MFT__N_PHASES || ms < r.last_ms || step < r.last_step || rss < 1 << 20) r.bad++; else r.phases[k]++;
        r.last_ms = ms; r.last_step = step;
        if (rss > r.most) r.most = rss;
    }
    if (f) fclose(f);
    return r;
}

static double cpu(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* A trace over loading, steps, an evaluation and a checkpoint has each of them; what was held is among the samples. */
static void test_phases(void)
{
    static const char *const names[] = { "trace.jsonl", "trace.csv" };
    int k;
    for (k = 0; k < 2; k++) {
        mft_context      *ctx = NULL;
        mft_memory_trace *trace = NULL;
        mft_model        *m = NULL;
        mft_trainer      *tr = NULL;
        mft_dataset      *data = NULL;
        mft_dataset_desc  dd;
        mft_trainer_desc  td;
        int32_t           ids[4096];
        seen              r;
        int               i;
        memset(&dd, 0, sizeof dd); memset(&td, 0, sizeof td);
        for (i = 0; i < 4096; i++) ids[i] = i * 7 % 50;
        dd.max_seq_len = 64;
        CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
        if (mft_memory_trace_open(ctx, in_room(names[k]), 1, &trace) == MFT_ERR_UNSUPPORTED) { mft_context_destroy(ctx); SKIP("no memory trace on this system"); }
        CHECK_MSG(trace != NULL, "%s", mft_error_message(ctx));
        mft__sleep_ms(20);                                      /* loading is over sooner than a sample */
        CHECK(mft_model_load(ctx, "tests/golden/qwen2_bf16", NULL, &m) == MFT_OK && mft_lora_attach(m, NULL) == MFT_OK);
        CHECK_MSG(mft_dataset_create(ctx, NULL, &dd, &data) == MFT_OK && mft_dataset_add_tokens(data, ids, NULL, 4096) == MFT_OK, "%s", mft_error_message(ctx));
        td.micro_batch = 8; td.eval_data = data; td.save_dir = in_room(k ? "b" : "a"); td.eval_steps = 5;
        CHECK_MSG(mft_trainer_create(m, data, &td, &tr) == MFT_OK, "%s", mft_error_message(ctx));
        for (i = 1; i <= 20 && tr; i++) {                       /* often enough to meet each phase: some are short */
            CHECK_MSG(mft_trainer_run(tr, 5) == MFT_OK, "%s", mft_error_message(ctx));
            CHECK(mft_trainer_save(tr, NULL) == MFT_OK);
        }
        CHECK_MSG(mft_memory_trace_close(trace) == MFT_OK, "%s", mft_error_message(ctx));
        r = read_trace(ctx, in_room(names[k]));
        CHECK_MSG(r.bad == 0 && r.lines > 20 && r.last_step == 100, "%s: %d of %d lines, last step %d", names[k], r.bad, r.lines, r.last_step);
        CHECK_MSG(r.phases[MFT__LOAD] && r.phases[MFT__FORWARD] && r.phases[MFT__BACKWARD] && r.phases[MFT__EVAL] && r.phases[MFT__SAVE],
                  "%s: load %d forward %d backward %d eval %d save %d", names[k], r.phases[0], r.phases[1], r.phases[2], r.phases[4], r.phases[5]);
        CHECK(r.phases[MFT__FORWARD] > r.phases[MFT__UPDATE]);
        mft_context_destroy(ctx);
    }
}

/* Pages that are touched between two samples are in the second; the thread costs little. */
static void test_samples(void)
{
    enum { MB = 48 };
    mft_context      *ctx = NULL;
    mft_memory_trace *trace = NULL;
    char             *p;
    double            began;
    seen              r;
    size_t            before;
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    if (mft_memory_trace_open(ctx, in_room("s.jsonl"), 0, &trace) == MFT_ERR_UNSUPPORTED) { mft_context_destroy(ctx); SKIP("no memory trace on this system"); }
    mft_process_memory(&before, NULL);
    p = (char *)malloc((size_t)MB << 20);
    CHECK(p != NULL);
    if (p) memset(p, 1, (size_t)MB << 20);
    began = cpu();
    mft__sleep_ms(400);
    CHECK_MSG(cpu() - began < 0.04, "%.1f ms of 400", (cpu() - began) * 1e3);        /* seen: 1.5 */
    free(p);
    CHECK(mft_memory_trace_close(trace) == MFT_OK);
    r = read_trace(ctx, in_room("s.jsonl"));
    CHECK_MSG(r.bad == 0 && r.lines >= 4 && r.lines <= r.last_ms / 5 + 3, "%d lines in %.0f ms", r.lines, r.last_ms);
    CHECK_MSG(r.most >= before + ((size_t)(MB - 2) << 20), "%llu bytes at most, %llu before", r.most, (unsigned long long)before);     /* statm may lag by some pages a core */
    mft_context_destroy(ctx);
}

/* What cannot be: said at once, or at the end. A context's end ends the thread. */
static void test_failures(void)
{
    mft_context      *ctx = NULL;
    mft_memory_trace *trace = NULL;
    mft_memory_report before, after;
    CHECK(mft_context_create(NULL, &ctx) == MFT_OK);
    mft_memory(ctx, &before);
    CHECK(mft_memory_trace_open(ctx, in_room("no/such/dir/t.jsonl"), 0, &trace) != MFT_OK && !trace && strstr(mft_error_message(ctx), "no/such/dir"));
    CHECK(mft_memory_trace_open(ctx, in_room("t.jsonl"), -1, &trace) == MFT_ERR_INVALID_ARGUMENT && mft_memory_trace_open(ctx, in_room("t.jsonl"), 1001, &trace) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_memory_trace_open(ctx, NULL, 0, &trace) == MFT_ERR_INVALID_ARGUMENT && mft_memory_trace_close(NULL) == MFT_OK);
    if (test_file_exists("/dev/full") && mft_memory_trace_open(ctx, "/dev/full", 1, &trace) == MFT_OK) {
        mft__sleep_ms(30);
        CHECK(mft_memory_trace_close(trace) == MFT_ERR_IO && strstr(mft_error_message(ctx), "/dev/full: could not be written whole"));
    }
    mft_memory(ctx, &after);
    CHECK(after.now == before.now);
    if (mft_memory_trace_open(ctx, in_room("left.jsonl"), 1, &trace) == MFT_OK) mft__sleep_ms(10);
    mft_context_destroy(ctx);                                   /* joins */
}

int main(void)
{
    if (!room_make("memory_trace")) return 1;
    TEST(test_phases);
    TEST(test_samples);
    TEST(test_failures);
    remove_dir(room);
    return test_report("memory_trace");
}
