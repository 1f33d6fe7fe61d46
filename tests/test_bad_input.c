/* test_bad_input.c - broken configs, weights, adapters, batches, settings and places to write to: each gives its
 * status and a sentence that names the file, tensor, field or value; nothing is half-written or half-attached.
 * Files of their own kinds are test_safetensors.c's, test_json.c's, test_tokenizer.c's and test_dataset.c's. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* mkdtemp, setrlimit; the headers alone need no such thing */
#endif
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "room.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static mft_context *ctx;

/* Copies the files of tests/golden/FIXTURE to a directory of the room, new each time. */
static void copy_fixture(const char *fixture, const char *to)
{
    char           from[300], path[900];
    DIR           *d;
    struct dirent *e;
    snprintf(from, sizeof from, "tests/golden/%s", fixture);
    remove_dir(in_room(to));
    mkdir(in_room(to), 0777);
    d = opendir(from);
    while (d && (e = readdir(d)) != NULL) {
        size_t bytes = 0;
        char  *text;
        if (!strstr(e->d_name, "config.json") && strncmp(e->d_name, "model", 5) && strncmp(e->d_name, "adapter", 7)) continue;
        snprintf(path, sizeof path, "%s/%s", from, e->d_name);
        text = test_read_file(path, &bytes);
        snprintf(path, sizeof path, "%s/%s", in_room(to), e->d_name);
        if (text) write_file(path, text, bytes);
        free(text);
    }
    if (d) closedir(d);
}

/* "key": VALUE of a JSON file becomes `value`; NULL: the key goes. A key that is not there is put first. */
static void edit_json(const char *path, const char *key, const char *value)
{
    size_t bytes = 0, used;
    char  *text = test_read_file(path, &bytes), *at, *end, quoted[100], *out;
    int    depth = 0, in_string = 0;
    CHECK_MSG(text != NULL, "%s", path);
    if (!text) return;
    out = (char *)malloc(bytes + 4096);
    snprintf(quoted, sizeof quoted, "\n  \"%s\":", key);
    at = strstr(text, quoted);
    if (!at) { snprintf(quoted, sizeof quoted, "\n \"%s\":", key); at = strstr(text, quoted); }
    if (at) {
        for (end = at + strlen(quoted); *end; end++) {          /* to the comma or brace that ends the value */
            if (*end == '"' && end[-1] != '\\') in_string = !in_string;
            if (in_string) continue;
            if (*end == '{' || *end == '[') depth++;
            if (depth == 0 && (*end == ',' || *end == '}')) break;
            if (*end == '}' || *end == ']') depth--;
        }
        if (value) used = (size_t)sprintf(out, "%.*s%s %s%s", (int)(at - text), text, quoted, value, end);
        else if (*end == ',') used = (size_t)sprintf(out, "%.*s%s", (int)(at - text), text, end + 1);
        else { while (at[-1] != ',') at--; used = (size_t)sprintf(out, "%.*s%s", (int)(at - 1 - text), text, end); }
    } else used = (size_t)sprintf(out, "{\n  \"%s\": %s,%s", key, value ? value : "null", strchr(text, '{') + 1);
    write_file(path, out, used);
    free(text); free(out);
}

static void words_in_message(const char *what, mft_status s, mft_status want, const char *const *words, int n)
{
    const char *m = mft_error_message(ctx);
    int         i;
    CHECK_MSG(s == want, "%s: status %d, not %d: %s", what, (int)s, (int)want, s == MFT_OK ? "" : m);
    for (i = 0; i < n && words[i] && s != MFT_OK; i++) CHECK_MSG(strstr(m, words[i]), "%s: \"%s\" does not say %s", what, m, words[i]);
}

static void expect_(const char *what, mft_status s, mft_status want, const char *a, const char *b, const char *c)
{
    const char *words[3];
    words[0] = a; words[1] = b; words[2] = c;
    words_in_message(what, s, want, words, 3);
}
#define EXPECT(call, want, a, b, c) expect_(#call, (call), want, a, b, c)

static mft_status load_dir(const char *dir, int train_all, mft_model **out)
{
    mft_model_desc d;
    memset(&d, 0, sizeof d);
    d.train_all = train_all;
    *out = NULL;
    return mft_model_load(ctx, dir, &d, out);
}

/* The fixture, to be broken where no file can do it. */
static mft_model *good(const char *fixture, int train_all)
{
    mft_model *m;
    char       dir[200];
    snprintf(dir, sizeof dir, "tests/golden/%s", fixture);
    CHECK_MSG(load_dir(dir, train_all, &m) == MFT_OK, "%s", mft_error_message(ctx));
    if (!m) exit(1);
    return m;
}

/* ==== config.json ==== */
static const struct broken_config { const char *fixture, *key, *value; mft_status status; const char *words[3]; } configs[] = {
    { "qwen2", "model_type", NULL,                    MFT_ERR_FORMAT,      { "config.json", "model_type", "missing" } },
    { "qwen2", "model_type", "\"mamba2\"",            MFT_ERR_UNSUPPORTED, { "config.json", "mamba2", NULL } },
    { "qwen2", "model_type", "7",                     MFT_ERR_FORMAT,      { "config.json", "model_type", NULL } },
    { "qwen2", "hidden_size", NULL,                   MFT_ERR_FORMAT,      { "config.json", "hidden_size", "missing" } },
    { "qwen2", "intermediate_size", NULL,             MFT_ERR_FORMAT,      { "config.json", "intermediate_size", "missing" } },
    { "qwen2", "num_hidden_layers", NULL,             MFT_ERR_FORMAT,      { "config.json", "num_hidden_layers", "missing" } },
    { "qwen2", "num_attention_heads", NULL,           MFT_ERR_FORMAT,      { "config.json", "num_attention_heads", "missing" } },
    { "qwen2", "vocab_size", NULL,                    MFT_ERR_FORMAT,      { "config.json", "vocab_size", "missing" } },
    { "gpt2",  "n_embd", NULL,                        MFT_ERR_FORMAT,      { "config.json", "n_embd", "missing" } },
    { "gpt2",  "n_layer", NULL,                       MFT_ERR_FORMAT,      { "config.json", "n_layer", "missing" } },
    { "qwen2", "num_attention_heads", "0",            MFT_ERR_FORMAT,      { "config.json", "num_attention_heads", "0" } },
    { "qwen2", "num_key_value_heads", "0",            MFT_ERR_FORMAT,      { "config.json", "num_key_value_heads", "0" } },
    { "qwen2", "num_attention_heads", "-2",           MFT_ERR_FORMAT,      { "config.json", "num_attention_heads", "-2" } },
    { "qwen2", "hidden_size", "0",                    MFT_ERR_FORMAT,      { "config.json", "hidden_size", NULL } },
    { "qwen2", "hidden_size", "-12",                  MFT_ERR_FORMAT,      { "config.json", "hidden_size", "-12" } },
    { "qwen2", "hidden_size", "9223372036854775807",  MFT_ERR_FORMAT,      { "config.json", "hidden_size", NULL } },
    { "qwen2", "hidden_size", "1e300",                MFT_ERR_FORMAT,      { "config.json", "hidden_size", NULL } },
    { "qwen2", "hidden_size", "\"12\"",               MFT_ERR_FORMAT,      { "config.json", "hidden_size", "not an integer" } },
    { "qwen2", "hidden_size", "12.5",                 MFT_ERR_FORMAT,      { "config.json", "hidden_size", "not an integer" } },
    { "qwen2", "vocab_size", "99999999999",           MFT_ERR_FORMAT,      { "config.json", "vocab_size", "99999999999" } },
    { "qwen2", "vocab_size", "[53]",                  MFT_ERR_FORMAT,      { "config.json", "vocab_size", NULL } },
    { "gpt2",  "n_head", "4",                         MFT_ERR_FORMAT,      { "config.json", "n_embd 15", "n_head 4" } },
    { "gpt2",  "n_positions", "\"many\"",             MFT_ERR_FORMAT,      { "config.json", "n_positions", NULL } },
    { "gpt2",  "scale_attn_by_inverse_layer_idx", "true", MFT_ERR_UNSUPPORTED, { "config.json", "scale_attn_by_inverse_layer_idx", NULL } },
    { "gpt2",  "scale_attn_weights", "\"false\"",     MFT_ERR_FORMAT,      { "config.json", "scale_attn_weights", NULL } },
    { "gpt2",  "activation_function", "\"gelu_13\"",  MFT_ERR_UNSUPPORTED, { "config.json", "activation_function", "gelu_13" } },
    { "mistral", "num_key_value_heads", "3",          MFT_ERR_FORMAT,      { "config.json", "num_attention_heads 4", "num_key_value_heads 3" } },
    { "mistral", "sliding_window", "-4",              MFT_ERR_FORMAT,      { "config.json", "sliding_window", "-4" } },
    { "mistral", "sliding_window", "\"4\"",           MFT_ERR_FORMAT,      { "config.json", "sliding_window", NULL } },
    { "llama", "head_dim", "0",                       MFT_ERR_FORMAT,      { "config.json", "head_dim", NULL } },
    { "llama", "head_dim", "7",                       MFT_ERR_UNSUPPORTED, { "config.json", "head_dim", "7" } },
    { "llama", "head_dim", "100000",                  MFT_ERR_FORMAT,      { "config.json", "head_dim", "100000" } },
    { "llama", "hidden_act", "\"mish\"",              MFT_ERR_UNSUPPORTED, { "config.json", "hidden_act", "mish" } },
    { "llama", "attention_bias", "\"no\"",            MFT_ERR_FORMAT,      { "config.json", "attention_bias", NULL } },
    { "llama", "rope_parameters", "{\"rope_type\": \"yarn\", \"rope_theta\": 1e4, \"factor\": 4}", MFT_ERR_UNSUPPORTED, { "config.json", "yarn", NULL } },
    { "llama", "rope_parameters", "{\"rope_type\": \"linear\", \"rope_theta\": 1e4, \"factor\": 0}", MFT_ERR_FORMAT, { "config.json", "factor", NULL } },
    { "llama", "rope_parameters", "{\"rope_type\": \"linear\", \"rope_theta\": 1e4, \"factor\": \"8\"}", MFT_ERR_FORMAT, { "config.json", "factor", NULL } },
    { "llama", "rope_parameters", "{\"rope_type\": \"llama3\", \"rope_theta\": 1e4, \"factor\": 8}", MFT_ERR_FORMAT, { "config.json", "llama3", NULL } },
    { "llama", "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": -1}", MFT_ERR_FORMAT, { "config.json", "rope_theta", NULL } },
    { "llama", "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": \"big\"}", MFT_ERR_FORMAT, { "config.json", "rope_theta", NULL } },
    { "qwen2", "rms_norm_eps", "\"tiny\"",            MFT_ERR_FORMAT,      { "config.json", "rms_norm_eps", NULL } },
    { "qwen2", "rms_norm_eps", "-1",                  MFT_ERR_FORMAT,      { "config.json", "epsilon", NULL } },
    { "qwen2", "tie_word_embeddings", "\"yes\"",      MFT_ERR_FORMAT,      { "config.json", "tie_word_embeddings", NULL } },
    { "gemma3", "layer_types", "[\"full_attention\"]", MFT_ERR_FORMAT,     { "config.json", "layer_types", "2 layers" } },
    { "gemma3", "layer_types", "[\"full_attention\", \"chunked_attention\"]", MFT_ERR_UNSUPPORTED, { "config.json", "layer_types", "chunked_attention" } },
    { "gemma3", "layer_types", "[1, 2]",              MFT_ERR_UNSUPPORTED, { "config.json", "layer_types", NULL } },
    { "gemma3", "query_pre_attn_scalar", "0",         MFT_ERR_FORMAT,      { "config.json", "query_pre_attn_scalar", NULL } },
    { "gemma3", "query_pre_attn_scalar", "\"a\"",     MFT_ERR_FORMAT,      { "config.json", "query_pre_attn_scalar", NULL } },
    { "gemma3", "use_bidirectional_attention", "true", MFT_ERR_UNSUPPORTED, { "config.json", "use_bidirectional_attention", NULL } },
    { "gemma3", "model_type", "\"gemma3\"",           MFT_ERR_FORMAT,      { "config.json", "text_config", NULL } },
    /* right in itself, but not what the tensors are */
    { "qwen2", "num_hidden_layers", "3",              MFT_ERR_FORMAT,      { "model.layers.2.", NULL, NULL } },
    { "qwen2", "num_hidden_layers", "1",              MFT_ERR_FORMAT,      { "model.safetensors", "model.layers.1.", "1 layers" } },
    { "qwen2", "num_hidden_layers", "65536",          MFT_ERR_FORMAT,      { "layers", NULL, NULL } },
    { "qwen2", "num_attention_heads", "3",            MFT_ERR_FORMAT,      { "model.safetensors", "proj", "the config wants" } },
    { "qwen2", "hidden_size", "24",                   MFT_ERR_FORMAT,      { "model.safetensors", "embed_tokens", "[53, 24]" } },
    { "qwen2", "intermediate_size", "22",             MFT_ERR_FORMAT,      { "model.safetensors", "mlp.", "the config wants [22, 12]" } },
    { "qwen2", "vocab_size", "54",                    MFT_ERR_FORMAT,      { "model.safetensors", "embed_tokens", "[54, 12]" } },
    { "qwen2", "tie_word_embeddings", "false",        MFT_ERR_FORMAT,      { "lm_head.weight", NULL, NULL } },
    { "qwen2_untied", "tie_word_embeddings", "true",  MFT_OK,              { NULL, NULL, NULL } },      /* the head in the file is ignored, as there */
    { "qwen2", "model_type", "\"llama\"",             MFT_ERR_FORMAT,      { "model.safetensors", "bias", NULL } },
    { "gpt2",  "n_positions", "40",                   MFT_ERR_FORMAT,      { "wpe", "[40, 15]", NULL } },
    { "gpt2",  "n_inner", "61",                       MFT_ERR_FORMAT,      { "mlp", "61", NULL } },
    { "gpt2",  "model_type", "\"qwen2\"",             MFT_ERR_FORMAT,      { "missing", NULL, NULL } }
};

static void test_configs(void)
{
    size_t i;
    for (i = 0; i < sizeof configs / sizeof *configs; i++) {
        const struct broken_config *c = &configs[i];
        char              what[300];
        mft_model        *m;
        mft_memory_report before, after;
        copy_fixture(c->fixture, "m");
        edit_json(in_room("m/config.json"), c->key, c->value);
        snprintf(what, sizeof what, "%s with %s %s", c->fixture, c->key, c->value ? c->value : "left out");
        mft_memory(ctx, &before);
        words_in_message(what, load_dir(in_room("m"), (int)(i & 1), &m), c->status, c->words, 3);
        CHECK((m != NULL) == (c->status == MFT_OK));
        mft_model_destroy(m);
        mft_memory(ctx, &after);
        CHECK_MSG(after.now == before.now, "%s: %lld bytes are kept", what, (long long)(after.now - before.now));
    }
    CHECK(count_files(room, "") == 1);
}

static void test_config_files(void)
{
    mft_model       *m;
    mft_model_config c;
    char             deep[2001];
    copy_fixture("qwen2", "m");
    edit_json(in_room("m/config.json"), "hidden_size", "1048576");
    edit_json(in_room("m/config.json"), "intermediate_size", "16777216");
    edit_json(in_room("m/config.json"), "num_hidden_layers", "65536");
    edit_json(in_room("m/config.json"), "num_attention_heads", "65536");
    edit_json(in_room("m/config.json"), "num_key_value_heads", "65536");
    edit_json(in_room("m/config.json"), "head_dim", "512");
    edit_json(in_room("m/config.json"), "vocab_size", "2147483647");
    EXPECT(mft_model_inspect(ctx, in_room("m"), &c), MFT_ERR_FORMAT, "config.json", "parameters", NULL);      /* no product wraps */
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, NULL, NULL, NULL);
    write_file(in_room("m/config.json"), "", 0);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "config.json", NULL, NULL);
    write_file(in_room("m/config.json"), "{\"model_type\": \"qwen2\", \"hidden_si", 35);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "config.json", NULL, NULL);
    write_file(in_room("m/config.json"), "[1, 2]", 6);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "config.json", "model_type", NULL);
    write_file(in_room("m/config.json"), "{\"model_type\": \"\xff\xfe\"}", 20);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "config.json", "UTF-8", NULL);
    memset(deep, '[', sizeof deep - 1);
    write_file(in_room("m/config.json"), deep, sizeof deep - 1);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_UNSUPPORTED, "config.json", "nested", NULL);
    unlink(in_room("m/config.json"));
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_IO, "config.json", NULL, NULL);
    mkdir(in_room("m/config.json"), 0777);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_IO, "config.json", NULL, NULL);
    EXPECT(load_dir(in_room("nowhere"), 0, &m), MFT_ERR_IO, "nowhere", NULL, NULL);
    EXPECT(load_dir("", 0, &m), MFT_ERR_IO, "config.json", NULL, NULL);
    EXPECT(mft_model_inspect(ctx, in_room("nowhere"), &c), MFT_ERR_IO, "nowhere", NULL, NULL);
}

/* ==== weights ==== */

enum { MOST = 256 };
/* The tensors of a safetensors file as f32, held; the names stay the file's. */
static mft_safetensors *read_all(const char *path, mft_tensor **out, int *n)
{
    mft_safetensors *st = NULL;
    size_t           i, count = 0;
    const mft_safetensors_entry *e;
    CHECK_MSG(mft_safetensors_open(ctx, path, &st) == MFT_OK, "%s", mft_error_message(ctx));
    e = mft_safetensors_entries(st, &count);
    for (i = 0; i < count && i < MOST; i++) {
        out[i] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, e[i].ndim, e[i].shape);
        CHECK(out[i] && mft_safetensors_read(st, &e[i], out[i]) == MFT_OK);
        out[i]->name = e[i].name;
    }
    *n = (int)count;
    return st;
}

static int find(mft_tensor **t, int n, const char *part)
{
    int i;
    for (i = 0; i < n && !strstr(t[i]->name, part); i++) {}
    CHECK(i < n);
    return i;
}

static mft_batch batch_of(const int32_t *ids, int rows, int seq)
{
    mft_batch b;
    memset(&b, 0, sizeof b);
    b.input_ids = ids; b.batch = rows; b.seq = seq;
    return b;
}

static const int32_t some_ids[12] = { 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8 };

static mft_status step_on(mft_model *m, const mft_batch *b)
{
    mft_trainer *tr = NULL;
    mft_status   s = mft_trainer_create(m, NULL, NULL, &tr);
    if (s == MFT_OK) s = mft_trainer_step_batch(tr, b, 1, NULL);
    mft_trainer_destroy(tr);
    return s;
}

static void test_weights(void)
{
    static const int ways = 8;
    int way;
    for (way = 0; way < ways; way++) {
        mft_tensor      *t[MOST + 1], *odd = NULL;
        int              n = 0, i;
        int64_t          shape[2] = { 3, 4 };
        mft_safetensors *st;
        mft_model       *m;
        mft_batch        b = batch_of(some_ids, 1, 12);
        copy_fixture("qwen2", "m");
        st = read_all(in_room("m/model.safetensors"), t, &n);
        if (way == 0) { t[find(t, n, "1.mlp.up_proj")] = t[n - 1]; n--; }     /* missing */
        if (way == 1) { odd = t[n++] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape); odd->name = "model.layers.0.self_attn.odd_proj.weight"; }
        if (way == 2) { i = find(t, n, "1.self_attn.k_proj.weight"); odd = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape); odd->name = t[i]->name; t[i] = odd; }
        if (way == 3) { i = find(t, n, "1.mlp.down_proj"); odd = mft_tensor_create(ctx, MFT_HELD, MFT_I32, 2, t[i]->shape); odd->name = t[i]->name; t[i] = odd; }
        if (way == 4) ((float *)t[find(t, n, "1.input_layernorm")]->data)[5] = NAN;
        if (way == 5) ((float *)t[find(t, n, "1.mlp.gate_proj")]->data)[17] = NAN;
        if (way == 6) ((float *)t[find(t, n, "0.self_attn.v_proj.weight")]->data)[17] = INFINITY;
        if (way == 7) { i = find(t, n, "model.norm"); shape[0] = 12; odd = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, shape); odd->name = "transformer.norm.weight"; t[n++] = odd; }  /* one parameter, two tensors */
        CHECK_MSG(mft_safetensors_save(ctx, in_room("m/model.safetensors"), t, n, NULL) == MFT_OK, "%s", mft_error_message(ctx));
        mft_safetensors_close(st);
        switch (way) {
        case 0: EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.layers.1.mlp.up_proj.weight", NULL, NULL); break;
        case 1: EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", "model.layers.0.self_attn.odd_proj.weight", "matches no parameter"); break;
        case 2: EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.layers.1.self_attn.k_proj.weight", "[3, 4]", "[6, 12]"); break;
        case 3: EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.layers.1.mlp.down_proj.weight", "I32", NULL); break;
        case 4: EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", "model.layers.1.input_layernorm.weight", "NaN"); break;
        case 5: case 6:                                         /* in place: found by the first loss, which names the weight */
            EXPECT(load_dir(in_room("m"), 0, &m), MFT_OK, NULL, NULL, NULL);
            if (m) {
                mft_eval e;
                int32_t  out[4];
                CHECK(mft_lora_attach(m, NULL) == MFT_OK);
                EXPECT(step_on(m, &b), MFT_ERR_NOT_FINITE, way == 5 ? "model.layers.1.mlp.gate_proj.weight" : "model.layers.0.self_attn.v_proj.weight", in_room("m"), NULL);
                EXPECT(mft_perplexity(m, some_ids, 12, 4, 0, &e), MFT_ERR_NOT_FINITE, "proj.weight", NULL, NULL);
                EXPECT((mft_status)mft_generate(m, some_ids, 4, NULL, out, 4), MFT_ERR_NOT_FINITE, "proj.weight", NULL, NULL);
                mft_model_destroy(m);
            }
            EXPECT(load_dir(in_room("m"), 1, &m), MFT_ERR_FORMAT, "proj.weight", "NaN", NULL);      /* copied ones are looked at */
            break;
        default: EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "norm.weight", "second", NULL);
        }
    }
}

static void cut_file(const char *path, long bytes)              /* negative: from the end */
{
    struct stat st;
    CHECK(stat(path, &st) == 0 && truncate(path, bytes < 0 ? (long)st.st_size + bytes : bytes) == 0);
}

static void test_weight_files(void)
{
    mft_model *m;
    size_t     bytes;
    char      *text;
    copy_fixture("qwen2", "m");
    cut_file(in_room("m/model.safetensors"), -10);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", NULL, NULL);
    cut_file(in_room("m/model.safetensors"), 100);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", NULL, NULL);
    cut_file(in_room("m/model.safetensors"), 4);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", NULL, NULL);
    cut_file(in_room("m/model.safetensors"), 0);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", NULL, NULL);
    write_file(in_room("m/model.safetensors"), "\0\0\0\0\0\0\0\020{\"a\":1}", 15);     /* a header of 2^60 bytes */
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", NULL, NULL);
    write_file(in_room("m/model.safetensors"), "\007\0\0\0\0\0\0\0not one", 15);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model.safetensors", NULL, NULL);
    unlink(in_room("m/model.safetensors"));
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_IO, in_room("m"), "safetensors", NULL);
    copy_fixture("qwen2_sharded", "m");
    cut_file(in_room("m/model-00002-of-00003.safetensors"), -1);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model-00002-of-00003.safetensors", NULL, NULL);
    unlink(in_room("m/model-00002-of-00003.safetensors"));
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_IO, "model-00002-of-00003.safetensors", "missing", NULL);
    copy_fixture("qwen2_sharded", "m");
    text = test_read_file(in_room("m/model-00001-of-00003.safetensors"), &bytes);
    write_file(in_room("m/model-00002-of-00003.safetensors"), text, bytes);             /* of another download */
    free(text);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "model", NULL, NULL);
    copy_fixture("qwen2_sharded", "m");
    write_file(in_room("m/model.safetensors.index.json"), "{\"weight_map\": {\"a\": \"../../etc/passwd\"}}", 41);
    EXPECT(load_dir(in_room("m"), 0, &m), MFT_ERR_FORMAT, "index.json", "../../etc/passwd", NULL);
}

/* ==== adapters ==== */
static const struct broken_adapter { const char *key, *value; mft_status status; const char *words[3]; } adapters[] = {
    { "r", NULL,                             MFT_ERR_FORMAT,      { "adapter_config.json", "\"r\"", NULL } },
    { "r", "0",                              MFT_ERR_FORMAT,      { "adapter_config.json", "\"r\"", NULL } },
    { "r", "-4",                             MFT_ERR_FORMAT,      { "adapter_config.json", "\"r\"", NULL } },
    { "r", "\"4\"",                          MFT_ERR_FORMAT,      { "adapter_config.json", "\"r\"", NULL } },
    { "r", "4294967300",                     MFT_ERR_FORMAT,      { "adapter_config.json", "\"r\"", NULL } },      /* 4 in 32 bits */
    { "r", "5",                              MFT_ERR_FORMAT,      { "adapter_model.safetensors", "lora_A", "[5, 12]" } },
    { "lora_alpha", "\"16\"",                MFT_ERR_FORMAT,      { "adapter_config.json", "lora_alpha", NULL } },
    { "lora_dropout", "1.5",                 MFT_ERR_FORMAT,      { "adapter_config.json", "lora_dropout", NULL } },
    { "lora_dropout", "\"0.1\"",             MFT_ERR_FORMAT,      { "adapter_config.json", "lora_dropout", NULL } },
    { "use_rslora", "\"true\"",              MFT_ERR_FORMAT,      { "adapter_config.json", "use_rslora", NULL } },
    { "peft_type", "\"IA3\"",                MFT_ERR_UNSUPPORTED, { "adapter_config.json", "IA3", NULL } },
    { "peft_type", NULL,                     MFT_ERR_UNSUPPORTED, { "adapter_config.json", "peft_type", NULL } },
    { "modules_to_save", "[\"lm_head\"]",    MFT_ERR_UNSUPPORTED, { "adapter_config.json", "modules_to_save", NULL } },
    { "bias", "\"all\"",                     MFT_ERR_UNSUPPORTED, { "adapter_config.json", "bias", "all" } },
    { "lora_bias", "true",                   MFT_ERR_UNSUPPORTED, { "adapter_config.json", "lora_bias", NULL } },
    { "layer_replication", "[[0, 2]]",       MFT_ERR_UNSUPPORTED, { "adapter_config.json", "layer_replication", NULL } },
    { "use_dora", "true",                    MFT_ERR_FORMAT,      { "adapter_model.safetensors", "lora_magnitude_vector", "missing" } },
    { "rank_pattern", "{\"v_proj\": 9}",     MFT_ERR_FORMAT,      { "adapter_model.safetensors", "v_proj.lora_A", "[9, 12]" } },
    { "rank_pattern", "{\"v_proj\": \"4\"}", MFT_ERR_FORMAT,      { "adapter_config.json", "rank_pattern", "v_proj" } },
    { "alpha_pattern", "{\"v_proj\": true}", MFT_ERR_FORMAT,      { "adapter_config.json", "alpha_pattern", "v_proj" } }
};

static void test_adapter_configs(void)
{
    mft_model *m = good("qwen2", 0);
    size_t     i;
    for (i = 0; i < sizeof adapters / sizeof *adapters; i++) {
        char              what[200];
        mft_memory_report before, after;
        copy_fixture("qwen2/lora_qkvo/init", "a");
        edit_json(in_room("a/adapter_config.json"), adapters[i].key, adapters[i].value);
        snprintf(what, sizeof what, "adapter with %s %s", adapters[i].key, adapters[i].value ? adapters[i].value : "left out");
        mft_memory(ctx, &before);
        words_in_message(what, mft_lora_load(m, in_room("a"), NULL), adapters[i].status, adapters[i].words, 3);
        mft_memory(ctx, &after);
        CHECK_MSG(mft_lora_active(m) == NULL && mft_model_params(m, 1, NULL, 0) == 0, "%s: something is attached", what);
        CHECK_MSG(after.now == before.now, "%s: %lld bytes are kept", what, (long long)(after.now - before.now));
        mft_lora_detach(m);
    }
    copy_fixture("qwen2/lora_qkvo/init", "a");
    EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_OK, NULL, NULL, NULL);     /* it was the edits */
    mft_model_destroy(m);
}

static void test_adapter_files(void)
{
    mft_model *m = good("qwen2", 0), *g = good("gpt2", 0), *full = good("qwen2", 1), *u = good("qwen2_untied", 0);
    int        way;
    copy_fixture("gpt2/lora_attn/init", "a");
    EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "another base", NULL);
    copy_fixture("qwen2/lora_qkvo/init", "a");
    EXPECT(mft_lora_load(g, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "another base", NULL);
    EXPECT(mft_lora_load(u, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "lora_A", "18]");
    EXPECT(mft_lora_load(full, in_room("a"), NULL), MFT_ERR_INVALID_ARGUMENT, "train_all", NULL, NULL);
    EXPECT(mft_lora_load(m, in_room("nowhere"), NULL), MFT_ERR_IO, "adapter_config.json", NULL, NULL);
    EXPECT(mft_lora_load(m, "tests/golden/qwen2", NULL), MFT_ERR_IO, "adapter_config.json", NULL, NULL);
    EXPECT(mft_lora_load(m, NULL, NULL), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    unlink(in_room("a/adapter_model.safetensors"));
    EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_IO, "adapter_model.safetensors", NULL, NULL);
    for (way = 0; way < 6; way++) {
        mft_tensor      *t[MOST + 1], *odd;
        int              n = 0, i;
        int64_t          shape[2] = { 12, 5 };
        mft_safetensors *st;
        copy_fixture("qwen2/lora_qkvo/init", "a");
        if (way == 0) { cut_file(in_room("a/adapter_model.safetensors"), -4); EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", NULL, NULL); continue; }
        st = read_all(in_room("a/adapter_model.safetensors"), t, &n);
        if (way == 1) { t[find(t, n, "1.self_attn.o_proj.lora_B")] = t[n - 1]; n--; }
        if (way == 2) ((float *)t[find(t, n, "1.self_attn.o_proj.lora_B")]->data)[3] = NAN;
        if (way == 3) { i = find(t, n, "1.self_attn.q_proj.lora_B"); odd = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape); odd->name = t[i]->name; t[i] = odd; }
        if (way == 4) { odd = t[n++] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 2, shape); odd->name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"; }
        if (way == 5) { t[find(t, n, "1.self_attn.o_proj.lora_A")] = t[n - 1]; n--; }       /* a B without its A */
        CHECK_MSG(mft_safetensors_save(ctx, in_room("a/adapter_model.safetensors"), t, n, NULL) == MFT_OK, "%s", mft_error_message(ctx));
        mft_safetensors_close(st);
        if (way == 1) EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "layers.1.self_attn.o_proj.lora_B.weight", "missing");
        if (way == 2) EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "layers.1.self_attn.o_proj.lora_B.weight", "NaN");
        if (way == 3) EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "layers.1.self_attn.q_proj.lora_B.weight", "[12, 5]");
        if (way == 4) EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "layers.7.self_attn.q_proj.lora_A.weight", "2 layers");
        if (way == 5) EXPECT(mft_lora_load(m, in_room("a"), NULL), MFT_ERR_FORMAT, "adapter_model.safetensors", "layers.1.self_attn.o_proj.lora_B.weight", NULL);
        CHECK(mft_lora_active(m) == NULL && mft_model_params(m, 1, NULL, 0) == 0);
    }
    mft_model_destroy(m); mft_model_destroy(g); mft_model_destroy(full); mft_model_destroy(u);
}

static void test_attach(void)
{
    mft_model    *m = good("qwen2", 0), *full = good("qwen2", 1);
    mft_lora_desc d;
    memset(&d, 0, sizeof d);
    d.rank = -1;
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "rank", "-1", NULL);
    d.rank = 2147483647;
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_OUT_OF_MEMORY, NULL, NULL, NULL);
    d.rank = 4; d.dropout = 1;
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "dropout", "1", NULL);
    d.dropout = NAN;
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "dropout", NULL, NULL);
    d.dropout = 0; d.alpha = NAN;
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "alpha", NULL, NULL);
    d.alpha = 0; d.targets = "q_proj,c_attn";
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "\"c_attn\"", "q_proj", NULL);
    d.targets = "embed_tokens";
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "embed_tokens", NULL, NULL);
    d.targets = " , ,";
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    d.targets = "(((";
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "(((", NULL, NULL);
    d.targets = "(?=q)";
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "(?", NULL, NULL);
    d.targets = "(a{90}){90}{90}";
    EXPECT(mft_lora_attach(m, &d), MFT_ERR_INVALID_ARGUMENT, "too long", NULL, NULL);
    CHECK(mft_lora_active(m) == NULL && mft_model_params(m, 1, NULL, 0) == 0);
    EXPECT(mft_lora_attach(full, NULL), MFT_ERR_INVALID_ARGUMENT, "train_all", NULL, NULL);
    EXPECT(mft_lora_attach(NULL, NULL), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    EXPECT(mft_lora_save(m, in_room("none")), MFT_ERR_INVALID_ARGUMENT, "no adapter", NULL, NULL);
    EXPECT(mft_lora_merge(m), MFT_ERR_INVALID_ARGUMENT, "no adapter", NULL, NULL);
    CHECK(count_files(in_room("none"), "") == 0);
    mft_model_destroy(m); mft_model_destroy(full);
}

/* ==== batches, training, evaluation, generation ==== */
static mft_status forward(mft_model *m, const mft_batch *b, int with_loss)
{
    mft_status s = mft_backward(ctx, with_loss ? mft_model_loss(m, b, 0) : mft_sum(ctx, mft_model_forward(m, b)));
    mft_step_reset(ctx);
    return s;
}

static void test_batches(void)
{
    static const char *const fixtures[] = { "gpt2", "gemma3" };
    int f, k;
    for (f = 0; f < 2; f++) {
        mft_model *m = good(fixtures[f], 1);
        int32_t    V = (int32_t)m->config.vocab_size, ids[80], other[80];
        mft_batch  b = batch_of(ids, 2, 6);
        for (k = 0; k < 2; k++) {
            memcpy(ids, some_ids, sizeof some_ids);
            ids[8] = k ? -1 : V;
            EXPECT(forward(m, &b, 0), MFT_ERR_INVALID_ARGUMENT, k ? "-1" : f ? "47" : "53", NULL, NULL);
            EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, k ? "-1" : f ? "47" : "53", NULL, NULL);
            EXPECT(step_on(m, &b), MFT_ERR_INVALID_ARGUMENT, k ? "-1" : f ? "47" : "53", NULL, NULL);
        }
        memcpy(ids, some_ids, sizeof some_ids);
        memcpy(other, some_ids, sizeof some_ids);
        b.labels = other;
        other[3] = V;
        EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, f ? "47" : "53", "label", NULL);
        other[3] = -7;
        EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, "-7", "label", NULL);
        for (k = 0; k < 12; k++) other[k] = -100;
        EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, "label", NULL, NULL);
        EXPECT(step_on(m, &b), MFT_ERR_INVALID_ARGUMENT, "label", NULL, NULL);
        b.labels = NULL;
        for (k = 0; k < 12; k++) other[k] = 1;
        other[9] = 0;
        b.attention_mask = other;
        EXPECT(forward(m, &b, 0), MFT_ERR_UNSUPPORTED, "attention_mask", "hole", "sequence 1");
        EXPECT(step_on(m, &b), MFT_ERR_UNSUPPORTED, "hole", NULL, NULL);
        b.attention_mask = NULL;
        b.batch = 0;
        EXPECT(forward(m, &b, 0), MFT_ERR_INVALID_ARGUMENT, "batch", NULL, NULL);
        EXPECT(step_on(m, &b), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
        b.batch = -3;
        EXPECT(step_on(m, &b), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
        b.batch = 2; b.seq = 0;
        EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
        EXPECT(step_on(m, &b), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
        b.seq = 6; b.input_ids = NULL;
        EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, "input_ids", NULL, NULL);
        EXPECT(step_on(m, &b), MFT_ERR_INVALID_ARGUMENT, "input_ids", NULL, NULL);
        EXPECT(forward(m, NULL, 1), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
        b = batch_of(some_ids, 12, 1);                          /* rows of one token: nothing to predict */
        EXPECT(forward(m, &b, 1), MFT_ERR_INVALID_ARGUMENT, "label", NULL, NULL);
        if (!f) {
            for (k = 0; k < 80; k++) { ids[k] = k % V; other[k] = k == 5 ? 37 : k % 37; }
            b = batch_of(ids, 2, 38);
            EXPECT(forward(m, &b, 0), MFT_ERR_INVALID_ARGUMENT, "38 tokens", "37 positions", NULL);
            b = batch_of(ids, 1, 20);
            b.position_ids = other;
            EXPECT(forward(m, &b, 0), MFT_ERR_INVALID_ARGUMENT, "37", NULL, NULL);
        }
        b = batch_of(some_ids, 2, 6);
        CHECK(forward(m, &b, 1) == MFT_OK && step_on(m, &b) == MFT_OK);     /* the model is none the worse */
        mft_model_destroy(m);
    }
}

static void test_training(void)
{
    mft_model       *m = good("qwen2", 0);
    mft_trainer     *tr = NULL;
    mft_trainer_desc d;
    mft_dataset     *data = NULL, *other = NULL;
    mft_dataset_desc dd;
    mft_eval         e;
    int32_t          ids[4] = { 1, 2, 53, 4 };
    memset(&d, 0, sizeof d);
    memset(&dd, 0, sizeof dd);
    EXPECT(mft_trainer_create(m, NULL, NULL, &tr), MFT_ERR_INVALID_ARGUMENT, "nothing is trainable", NULL, NULL);
    CHECK(tr == NULL && mft_lora_attach(m, NULL) == MFT_OK);
    d.learning_rate = -1;
    EXPECT(mft_trainer_create(m, NULL, &d, &tr), MFT_ERR_INVALID_ARGUMENT, "learning rate", NULL, NULL);
    d.learning_rate = NAN;
    EXPECT(mft_trainer_create(m, NULL, &d, &tr), MFT_ERR_INVALID_ARGUMENT, "learning rate", NULL, NULL);
    d.learning_rate = 0; d.micro_batch = -1;
    EXPECT(mft_trainer_create(m, NULL, &d, &tr), MFT_ERR_INVALID_ARGUMENT, "batch", NULL, NULL);
    d.micro_batch = 0; d.schedule = MFT_SCHEDULE_COSINE;
    EXPECT(mft_trainer_create(m, NULL, &d, &tr), MFT_ERR_INVALID_ARGUMENT, "total_steps", NULL, NULL);
    d.schedule = MFT_SCHEDULE_CONSTANT; d.optimizer.beta1 = 1.5;
    EXPECT(mft_trainer_create(m, NULL, &d, &tr), MFT_ERR_INVALID_ARGUMENT, "beta", NULL, NULL);
    CHECK(tr == NULL);
    d.optimizer.beta1 = 0;
    CHECK(mft_trainer_create(m, NULL, &d, &tr) == MFT_OK);
    EXPECT(mft_trainer_step(tr, NULL), MFT_ERR_INVALID_ARGUMENT, "no dataset", NULL, NULL);
    EXPECT(mft_trainer_step_batch(tr, NULL, 1, NULL), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    mft_trainer_destroy(tr);
    CHECK(mft_dataset_create(ctx, NULL, &dd, &data) == MFT_OK && mft_dataset_create(ctx, NULL, &dd, &other) == MFT_OK);
    CHECK(mft_trainer_create(m, data, &d, &tr) == MFT_OK);
    EXPECT(mft_trainer_step(tr, NULL), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);             /* no data */
    EXPECT(mft_trainer_run(tr, 5), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    EXPECT(mft_trainer_evaluate(tr, data, 0, &e), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    CHECK(mft_dataset_add_tokens(data, ids, NULL, 1) == MFT_OK);
    EXPECT(mft_trainer_step(tr, NULL), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);             /* one token teaches nothing */
    mft_trainer_destroy(tr);
    CHECK(mft_dataset_add_tokens(other, ids, NULL, 4) == MFT_OK);
    EXPECT(mft_trainer_create(m, other, &d, &tr), MFT_ERR_INVALID_ARGUMENT, "53", NULL, NULL);  /* an id the model has not */
    CHECK(tr == NULL && mft_trainer_create(m, NULL, &d, &tr) == MFT_OK);
    EXPECT(mft_trainer_evaluate(tr, other, 0, &e), MFT_ERR_INVALID_ARGUMENT, "53", NULL, NULL);
    mft_trainer_destroy(tr);
    mft_dataset_destroy(data); mft_dataset_destroy(other);
    mft_model_destroy(m);
}

static void test_evaluation_and_generation(void)
{
    mft_model        *m = good("qwen2", 0);
    mft_eval          e;
    mft_generate_desc d;
    int32_t           ids[12], out[8];
    memset(&d, 0, sizeof d);
    memcpy(ids, some_ids, sizeof ids);
    EXPECT(mft_perplexity(m, ids, 0, 4, 0, &e), MFT_ERR_INVALID_ARGUMENT, "two tokens", "0", NULL);
    EXPECT(mft_perplexity(m, ids, 1, 4, 0, &e), MFT_ERR_INVALID_ARGUMENT, "two tokens", "1", NULL);
    EXPECT(mft_perplexity(m, ids, 12, 1, 0, &e), MFT_ERR_INVALID_ARGUMENT, "1 token", NULL, NULL);
    EXPECT(mft_perplexity(m, ids, 12, -4, 0, &e), MFT_ERR_INVALID_ARGUMENT, "-4", NULL, NULL);
    EXPECT(mft_perplexity(m, ids, 12, 4, 5, &e), MFT_ERR_INVALID_ARGUMENT, "stride of 5", NULL, NULL);
    EXPECT(mft_perplexity(m, ids, 12, 4, -1, &e), MFT_ERR_INVALID_ARGUMENT, "-1", NULL, NULL);
    EXPECT(mft_perplexity(NULL, ids, 12, 4, 0, &e), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    ids[10] = 53;
    EXPECT(mft_perplexity(m, ids, 12, 4, 0, &e), MFT_ERR_INVALID_ARGUMENT, "53", NULL, NULL);
    EXPECT((mft_status)mft_generate(m, ids, 12, NULL, out, 8), MFT_ERR_INVALID_ARGUMENT, "53", NULL, NULL);
    EXPECT((mft_status)mft_generate(m, ids, 0, NULL, out, 8), MFT_ERR_INVALID_ARGUMENT, "prompt", NULL, NULL);
    EXPECT((mft_status)mft_generate(m, NULL, 3, NULL, out, 8), MFT_ERR_INVALID_ARGUMENT, NULL, NULL, NULL);
    d.max_new_tokens = -1;     EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_INVALID_ARGUMENT, "max_new_tokens", NULL, NULL);
    d.max_new_tokens = 4; d.temperature = -1;  EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_INVALID_ARGUMENT, "temperature", NULL, NULL);
    d.temperature = NAN;       EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_INVALID_ARGUMENT, "temperature", NULL, NULL);
    d.temperature = 1; d.top_p = NAN;          EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_INVALID_ARGUMENT, "top_p", NULL, NULL);
    d.top_p = 0; d.top_k = -2; EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_INVALID_ARGUMENT, "top_k", NULL, NULL);
    d.top_k = 0; d.repetition_penalty = -2;    EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_INVALID_ARGUMENT, "repetition_penalty", NULL, NULL);
    d.repetition_penalty = 0; d.max_new_tokens = 2147483647;
    EXPECT((mft_status)mft_generate(m, ids, 4, &d, out, 8), MFT_ERR_OUT_OF_MEMORY, NULL, NULL, NULL);
    d.max_new_tokens = 4;
    CHECK(mft_generate(m, ids, 4, &d, out, 8) > 0);
    mft_model_destroy(m);
}

/* ==== places to write to ==== */
static void test_outputs(void)
{
    mft_model    *m = good("gpt2", 0), *base = good("gpt2", 0);
    struct rlimit old, small;
    char          config[] = "tests/golden/gpt2/config.json";
    size_t        bytes;
    char         *before, *after;
    CHECK(mft_lora_attach(m, NULL) == MFT_OK);
    EXPECT(mft_model_save(m, in_room("saved")), MFT_ERR_INVALID_ARGUMENT, "adapter", NULL, NULL);
    write_file(in_room("file"), "precious", 8);
    EXPECT(mft_lora_save(m, in_room("file")), MFT_ERR_IO, in_room("file"), NULL, NULL);
    EXPECT(mft_lora_save(m, in_room("file/below")), MFT_ERR_IO, in_room("file"), NULL, NULL);
    EXPECT(mft_model_save(base, in_room("file")), MFT_ERR_IO, in_room("file"), NULL, NULL);
    EXPECT(mft_model_init(ctx, config, 0, MFT_F32, in_room("file")), MFT_ERR_IO, in_room("file"), NULL, NULL);
    EXPECT(mft_lora_save(m, "/proc/nowhere/adapter"), MFT_ERR_IO, "/proc/nowhere", NULL, NULL);
    EXPECT(mft_lora_save(m, ""), MFT_ERR_IO, NULL, NULL, NULL);
    before = test_read_file(in_room("file"), &bytes);
    CHECK(before && !strcmp(before, "precious"));
    free(before);
    EXPECT(mft_model_init(ctx, config, 0, MFT_I32, in_room("fresh")), MFT_ERR_INVALID_ARGUMENT, "f32", NULL, NULL);
    EXPECT(mft_model_init(ctx, in_room("nothing.json"), 0, MFT_F32, in_room("fresh")), MFT_ERR_IO, "nothing.json", NULL, NULL);
    unlink(in_room("file"));
    remove_dir(in_room("m")); remove_dir(in_room("a"));
    CHECK(count_files(room, "") == 0);

    /* a full disk: what was there stays, nothing else appears */
    CHECK(mft_lora_save(m, in_room("old")) == MFT_OK);
    before = test_read_file(in_room("old/adapter_model.safetensors"), &bytes);
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    signal(SIGXFSZ, SIG_IGN);
    small = old;
    small.rlim_cur = 1000;
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    ((float *)m->adapters[0]->parts[MFT__QKV].a->data)[0] = 7;
    EXPECT(mft_lora_save(m, in_room("old")), MFT_ERR_IO, "adapter_model.safetensors", NULL, NULL);
    EXPECT(mft_lora_save(m, in_room("new")), MFT_ERR_IO, "adapter_model.safetensors", NULL, NULL);
    EXPECT(mft_model_save(base, in_room("new")), MFT_ERR_IO, "model.safetensors", NULL, NULL);
    EXPECT(mft_model_init(ctx, config, 0, MFT_F32, in_room("new")), MFT_ERR_IO, "model.safetensors", NULL, NULL);
    CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
    after = test_read_file(in_room("old/adapter_model.safetensors"), &bytes);
    CHECK(before && after && !memcmp(before, after, bytes));
    CHECK(count_files(room, "") == 1 && count_files(in_room("old"), "") == 2);
    free(before); free(after);
    remove_dir(in_room("old"));
    mft_model_destroy(m); mft_model_destroy(base);
}

static void test_nulls(void)
{
    mft_model   *m = good("qwen2", 0);
    mft_trainer *tr = NULL;
    mft_model_config c;
    mft_plan     plan;
    mft_batch    b = batch_of(some_ids, 1, 12);
    CHECK(mft_model_load(NULL, "x", NULL, &m) == MFT_ERR_INVALID_ARGUMENT && mft_model_load(ctx, "x", NULL, NULL) == MFT_ERR_INVALID_ARGUMENT);
    m = good("qwen2", 0);
    CHECK(mft_model_load(ctx, NULL, NULL, &m) == MFT_ERR_INVALID_ARGUMENT && m == NULL);
    m = good("qwen2", 0);
    CHECK(mft_model_inspect(ctx, NULL, &c) == MFT_ERR_INVALID_ARGUMENT && mft_model_inspect(NULL, "x", &c) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_model_save(NULL, "x") == MFT_ERR_INVALID_ARGUMENT && mft_model_save(m, NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_model_init(ctx, NULL, 0, MFT_F32, "x") == MFT_ERR_INVALID_ARGUMENT && mft_model_init(ctx, "x", 0, MFT_F32, NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_model_forward(NULL, &b) == NULL && mft_model_hidden(NULL, &b) == NULL && mft_model_loss(NULL, &b, 0) == NULL);
    CHECK(mft_model_params(NULL, 0, NULL, 0) == 0 && mft_batch_n_valid(NULL) == 0 && mft_model_get_config(NULL) == NULL && mft_lora_active(NULL) == NULL);
    CHECK(mft_lora_activate(NULL, NULL) == MFT_ERR_INVALID_ARGUMENT && mft_lora_save(NULL, "x") == MFT_ERR_INVALID_ARGUMENT && mft_lora_merge(NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_lora_load(NULL, "x", NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_trainer_create(NULL, NULL, NULL, &tr) == MFT_ERR_INVALID_ARGUMENT && mft_trainer_create(m, NULL, NULL, NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_trainer_step(NULL, NULL) == MFT_ERR_INVALID_ARGUMENT && mft_trainer_run(NULL, 1) == MFT_ERR_INVALID_ARGUMENT && mft_trainer_plan(NULL, 1, 1, &plan) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_generate(NULL, some_ids, 3, NULL, NULL, 0) == MFT_ERR_INVALID_ARGUMENT);
    mft_model_destroy(NULL); mft_lora_detach(NULL); mft_lora_report(NULL, NULL, NULL); mft_trainer_destroy(NULL);
    CHECK(!strcmp(mft_family_name((mft_family)99), "unknown") && !strcmp(mft_family_lora_targets((mft_family)-1), ""));
    {
        mft_model_desc d;
        memset(&d, 0, sizeof d);
        d.weights = "f64";
        EXPECT(mft_model_load(ctx, "tests/golden/qwen2", &d, &m), MFT_ERR_INVALID_ARGUMENT, "f64", NULL, NULL);
    }
}

int main(void)
{
    mft_context_desc d;
    memset(&d, 0, sizeof d);
    d.memory_budget = (size_t)64 << 20;                         /* what is broken must not cost much */
    if (!room_make("bad") || mft_context_create(&d, &ctx) != MFT_OK) return 1;
    TEST(test_configs);
    TEST(test_config_files);
    TEST(test_weights);
    TEST(test_weight_files);
    TEST(test_adapter_configs);
    TEST(test_adapter_files);
    TEST(test_attach);
    TEST(test_batches);
    TEST(test_training);
    TEST(test_evaluation_and_generation);
    TEST(test_outputs);
    TEST(test_nulls);
    mft_context_destroy(ctx);
    remove_dir(room);
    return test_report("bad_input");
}
