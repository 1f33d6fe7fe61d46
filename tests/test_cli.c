/* test_cli.c - the program as its users meet it: exit statuses, sentences, JSON, logs, interruption.
 * Runs $BUILD/mft (default build/mft) through sh, with $RUN before it; not on systems without them. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* mkdtemp, fork, kill */
#endif
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"
#include "room.h"

#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char         mft[700];
static mft_context *ctx;
static char        *out, *err;              /* of the last run */

/* `mft ARGUMENTS`, where @ stands for the room: its exit status; 128 + n if a signal ended it. */
static int run(const char *arguments)
{
    char        command[4000], *p = command, *end = command + sizeof command - 1500;
    const char *a;
    int         status;
    p += snprintf(p, 1500, "%s ", mft);
    for (a = arguments; *a && p < end; a++) {
        if (*a == '@') p += snprintf(p, 400, "%s", room); else *p++ = *a;
    }
    snprintf(p, 1000, " >%s/.out 2>%s/.err", room, room);
    free(out); free(err);
    status = system(command);
    out = test_read_file(in_room(".out"), NULL);
    err = test_read_file(in_room(".err"), NULL);
    if (!out || !err) { printf("no output of %s\n", command); exit(1); }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Status, and a word of what is on stderr (NULL: anything). */
static void expect(const char *arguments, int status, const char *word)
{
    int got = run(arguments);
    CHECK_MSG(got == status, "mft %s: exit status %d, not %d: %s", arguments, got, status, err);
    CHECK_MSG(!word || strstr(err, word), "mft %s: does not say \"%s\": %s", arguments, word, err);
    if (status == 1 || status == 2) {
        CHECK_MSG(strlen(err) > 10 && !*out, "mft %s: a sentence on stderr, nothing on stdout: %s", arguments, out);
        CHECK_MSG(!strstr(err, "Sanitizer"), "mft %s: %s", arguments, err);
    }
}

/* stdout is one JSON object and a newline, with exactly these keys (in any order); NULL otherwise. The caller's. */
static mft_json *one_object(const char *text, const char *keys)
{
    mft_json   *root = NULL;
    size_t      bytes = strlen(text), i, n = 0;
    const char *at = keys, *key;
    CHECK_MSG(bytes > 2 && text[bytes - 1] == '\n' && !strchr(text, '\n')[1], "one line: %s", text);
    CHECK_MSG(mft_json_parse(ctx, text, bytes, &root) == MFT_OK, "%s: %s", text, mft_error_message(ctx));
    CHECK_MSG(mft_json_type(root) == MFT_JSON_OBJECT, "%s", text);
    while (*at) {
        char word[64];
        int  length = (int)strcspn(at, " ");
        snprintf(word, sizeof word, "%.*s", length, at);
        CHECK_MSG(mft_json_get(root, word) != NULL, "no \"%s\" in %s", word, text);
        n++;
        at += length + (at[length] == ' ');
    }
    for (i = 0; mft_json_at(root, i, &key) != NULL; i++) {}
    CHECK_MSG(i == n, "%d keys, not %d: %s", (int)i, (int)n, text);
    return root;
}

static double number(const mft_json *root, const char *key) { return mft_json_number(mft_json_get(root, key), NAN); }

/* Model directories of the room: q (a small qwen2 with tokenizer), t (qwen2 of tests/golden, tokens only). */
static void set_up(void)
{
    static const char config[] = "{\"model_type\": \"qwen2\", \"vocab_size\": 430, \"hidden_size\": 16, \"intermediate_size\": 24, \"num_hidden_layers\": 2, "
                                 "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"max_position_embeddings\": 64, \"tie_word_embeddings\": true, \"eos_token_id\": 2}";
    static const char *const files[] = { "tokenizer.json", "tokenizer_config.json" };
    static const char rows[] = "{\"input_ids\": [3, 1, 4, 1, 5]}\n{\"input_ids\": [9, 2, 6, 5], \"labels\": [-100, 2, 6, 5]}\n{\"input_ids\": [3, 5, 8]}\n";
    int32_t ids[96];
    char    path[300];
    size_t  i, bytes;
    char   *text;
    write_file(in_room("config.json"), config, sizeof config - 1);
    expect("init --config @/config.json --seed 3 --output @/q", 0, NULL);
    for (i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "tests/golden/assets/tokenizers/qwen-tiny/%s", files[i]);
        text = test_read_file(path, &bytes);
        CHECK_MSG(text != NULL, "%s", path);
        snprintf(path, sizeof path, "q/%s", files[i]);
        if (text) write_file(in_room(path), text, bytes);
        free(text);
    }
    for (i = 0; i < 96; i++) ids[i] = (int32_t)(i * 7 % 50);
    write_file(in_room("ids.bin"), ids, sizeof ids);
    ids[50] = 1000;
    write_file(in_room("bad-ids.bin"), ids, sizeof ids);
    write_file(in_room("odd.bin"), ids, 30);
    write_file(in_room("rows.jsonl"), rows, sizeof rows - 1);
    write_file(in_room("text.txt"), "The cat sat on the mat. The dog sat on the log.\nThe end of it all is near, and the sun is up.\n", 94);
    write_file(in_room("empty"), "", 0);
    write_file(in_room("a-file"), "precious", 8);
}

static void test_usage(void)
{
    static const char *const commands[] = { "finetune", "perplexity", "mmlu", "eval", "generate", "chat", "tokenize", "logits", "inspect", "merge", "init" };
    char   line[200];
    size_t i;
    expect("", 2, "finetune");
    CHECK(run("--help") == 0 && strstr(out, "finetune") && strstr(out, "perplexity") && !*err);
    CHECK(run("--version") == 0 && !strncmp(out, "mft ", 4));
    expect("finetun", 2, "did you mean finetune?");
    expect("frobnicate", 2, "frobnicate");
    for (i = 0; i < sizeof commands / sizeof *commands; i++) {
        snprintf(line, sizeof line, "%s --help", commands[i]);
        CHECK_MSG(run(line) == 0 && strstr(out, commands[i]) && strstr(out, "--threads") && !*err, "%s: %s", line, err);
        snprintf(line, sizeof line, "  mft %s ", commands[i]);
        CHECK_MSG(strstr(out, line), "%s --help has no example", commands[i]);
        expect(commands[i], 2, "--help");                       /* nothing given: says what is needed and where to read */
        snprintf(line, sizeof line, "%s --thread 2", commands[i]);
        expect(line, 2, "--threads?");
        snprintf(line, sizeof line, "%s --wholly-unknown-thing", commands[i]);
        expect(line, 2, "--wholly-unknown-thing");
    }
    expect("finetune --lora_rnk 4", 2, "--lora-rank?");
    expect("finetune --temperature 1", 2, "--temperature");     /* another command's flag */
    expect("finetune stray", 2, "stray");
    expect("generate --model", 2, "--model needs a value");
    expect("finetune --full=1", 2, "--full");
    expect("finetune --batch-size 0", 2, "--batch-size 0");
    expect("finetune --batch-size 1.5", 2, "--batch-size 1.5");
    expect("finetune --batch_size x", 2, "--batch-size x");
    expect("finetune --batch-size 1e300", 2, "--batch-size 1e300");
    expect("finetune --batch-size inf", 2, "--batch-size inf");
    expect("finetune --lr nan", 2, "--lr nan");
    expect("finetune --lr -1", 2, "--lr -1");
    expect("finetune --lora-dropout 1", 2, "--lora-dropout 1");
    expect("finetune --lora-rank=-8", 2, "--lora-rank -8");
    expect("finetune --warmup-ratio 1.5", 2, "--warmup-ratio 1.5");
    expect("finetune --memory-budget lots", 2, "--memory-budget lots");
    expect("finetune --model @/q --data @/text.txt --output @/o --optim adam_8bit", 2, "did you mean adamw8bit?");
    expect("finetune --model @/q --data @/text.txt --output @/o --optim apollo-mini", 2, "did you mean apollo_mini?");
    expect("perplexity --model @/q --data @/text.txt --quantize q5_0", 2, "must be one of none, q8_0, q4_0");
    expect("finetune --model @/q --data @/text.txt --output @/x --full --quantize q8_0", 2, "frozen");
    expect("finetune --seed -1", 2, "--seed -1");
    expect("generate --top-p 2", 2, "--top-p 2");
    expect("finetune --model @/q --data @/text.txt --output @/x --format xml", 2, "xml");
    expect("finetune --model @/q --data @/text.txt --output @/x --lr-scheduler step", 2, "step");
    expect("finetune --model @/q --data @/text.txt --output @/x --optim lion", 2, "lion");
    expect("finetune --model @/q --data @/text.txt --output @/x --precision f64", 2, "f64");
    expect("finetune --model @/q --data @/text.txt --output @/x --full --lora-rank 4", 2, "--full");
    expect("finetune --model @/q --data @/text.txt --output @/x --master-dtype bf16", 2, "--full");
    expect("finetune --model @/q --data @/text.txt --output @/x --full --master-dtype f16", 2, "--master-dtype");
    expect("finetune --model @/q --data @/text.txt --output @/x --epochs 1 --max-steps 3", 2, "--max-steps");
    expect("finetune --model @/q --data @/text.txt --output @/x --kernels sse9", 2, "sse9");
    expect("init --config @/config.json --output @/x --dtype f8", 2, "f8");
    expect("tokenize --model @/q --text a --decode 1", 2, "one of");
    expect("tokenize --model @/q --decode '1 two'", 2, "two");
    CHECK(!test_file_exists(in_room("x")));
}

static void test_failures(void)
{
    expect("finetune --model @/nowhere --data @/text.txt --output @/x", 1, "nowhere");
    expect("finetune --model @/q --data @/nowhere.txt --output @/x", 1, "nowhere.txt");
    expect("finetune --model @/q --data @/empty --output @/x", 1, NULL);
    expect("finetune --model @/q --data @/text.txt --output @/x --adapter @/nowhere", 1, "nowhere");
    expect("finetune --model @/q --data @/text.txt --output @/x --lora-modules c_attn", 1, "c_attn");
    expect("finetune --model @/q --data @/text.txt --output @/x --memory-budget 10k", 1, "budget");
    expect("finetune --model @/q --data @/text.txt --output @/x --log @/no/log", 1, "no/log");
    expect("finetune --model @/q --data @/text.txt --output @/x --eval-data @/nowhere", 1, "nowhere");
    expect("finetune --model @/q --data @/text.txt --output @/x --chat-template @/nowhere", 1, "nowhere");
    expect("finetune --model tests/golden/qwen2 --data @/text.txt --output @/x", 1, NULL);         /* text without a tokenizer */
    expect("finetune --model @/q --data @/bad-ids.bin --format tokens --output @/x", 1, "1000");
    expect("finetune --model @/q --data @/odd.bin --format tokens --output @/x", 1, "odd.bin");
    expect("finetune --model @/q --data @/text.txt --output @/a-file", 1, "a-file");
    expect("finetune --model @/q --data @/text.txt --output @/a-file/below", 1, "a-file");
    expect("finetune --model @/q --data @/text.txt --output /proc/nowhere/x", 1, "/proc/nowhere");
    expect("perplexity --model @/q --data @/empty", 1, NULL);
    expect("perplexity --model @/q --data @/bad-ids.bin --format tokens", 1, "1000");
    expect("perplexity --model @/q --data @/ids.bin --format tokens --seq-len 8 --stride 9", 1, "9");
    expect("perplexity --model @/q --data @/text.txt --compare", 2, "--adapter");
    expect("eval --model @/q --data @/text.txt", 1, "text.txt");
    expect("mmlu --model @/q --data @/nowhere --split test", 1, "nowhere");
    expect("generate --model @/q --prompt ''", 1, "prompt");
    expect("generate --model tests/golden/qwen2 --prompt hello", 1, "tokenizer");
    expect("logits --model @/q --tokens @/ids.bin --seq-len 7 --output @/l.safetensors", 1, "96");
    expect("logits --model @/q --tokens @/bad-ids.bin --seq-len 8 --output @/l.safetensors", 1, "1000");
    expect("logits --model @/q --tokens @/ids.bin --seq-len 8 --output @/no/l.safetensors", 1, "no/l.safetensors");
    expect("inspect @/nowhere", 1, "nowhere");
    expect("inspect @/a-file", 1, "a-file");
    expect("merge --model @/q --adapter tests/golden/gpt2/lora_attn/init --output @/x", 1, "adapter_model.safetensors");
    expect("init --config @/nowhere --output @/x", 1, "nowhere");
    expect("tokenize --model @/q --file @/nowhere", 1, "nowhere");
    expect("tokenize --model @/q --decode 999999", 1, NULL);
    CHECK(access(in_room("x"), F_OK) != 0 && access(in_room("l.safetensors"), F_OK) != 0);     /* nothing half-done stays */
}

/* A number with at least so many digits, or one that needs fewer. */
static int digits(const char *line, const char *key)
{
    char        quoted[64];
    const char *p;
    int         n = 0;
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    p = strstr(line, quoted);
    if (!p) return 0;
    for (p += strlen(quoted); *p && !strchr(",}e", *p); p++) n += *p >= '0' && *p <= '9' && (n || *p != '0');
    return n;
}

static void test_finetune(void)
{
    static const char asked[] = "{\"prompt\": \"The cat\", \"completion\": \" sat\", \"choices\": [\"sat\", \"ran\"]}\n{\"prompt\": \"The sun\", \"completion\": \" is up\", \"choices\": [\"is up\", \"ran\"]}\n";
    static const char keys[] = "steps train_loss eval_loss eval_perplexity tokens_per_second peak_rss_bytes trainable_parameters output";
    char     *log, *line, *first_err;
    mft_json *j;
    double    sum = 0, evaluated;
    int       steps = 0, most_loss = 0, most_norm = 0;
    CHECK(run("finetune --model @/q --data @/text.txt --eval-data @/text.txt --output @/adapter --seq_len 16 --max-steps 7 --batch_size 2 --lora_rank=4 --lora-dropout 0.1 "
              "--log @/log --json --seed 5 --lr 1e-2 --warmup-steps 2 --lr-scheduler linear --threads 2") == 0);
    j = one_object(out, keys);
    CHECK_MSG(number(j, "steps") == 7 && number(j, "trainable_parameters") == 2 * 4 * ((16 + 16) + (16 + 8) + (16 + 8) + (16 + 16)), "%s", out);
    CHECK(fabs(number(j, "eval_perplexity") / exp(number(j, "eval_loss")) - 1) < 1e-6 && number(j, "tokens_per_second") > 0 && number(j, "peak_rss_bytes") > 1e5);
    CHECK(!strcmp(mft_json_string(mft_json_get(j, "output"), NULL), in_room("adapter")));
    evaluated = number(j, "eval_loss");
    log = test_read_file(in_room("log"), NULL);
    for (line = log; line && *line; steps++) {
        char     *end = strchr(line, '\n'), one[1000];
        mft_json *l;
        snprintf(one, sizeof one, "%.*s\n", (int)(end - line), line);
        l = one_object(one, steps < 6 ? "step loss lr grad_norm tokens tokens_per_second peak_rss_bytes elapsed_s"
                                      : "step loss lr grad_norm tokens tokens_per_second peak_rss_bytes elapsed_s eval_loss eval_perplexity");
        CHECK(number(l, "step") == steps + 1 && number(l, "loss") > 1 && number(l, "grad_norm") > 0 && number(l, "tokens") > 0);
        CHECK_MSG(fabs(number(l, "lr") - (steps < 2 ? 1e-2 * steps / 2 : 1e-2 * (7 - steps) / 5)) < 1e-15, "step %d: lr %.17g", steps + 1, number(l, "lr"));
        if (digits(one, "loss") > most_loss) most_loss = digits(one, "loss");
        if (digits(one, "grad_norm") > most_norm) most_norm = digits(one, "grad_norm");
        sum += number(l, "loss");
        mft_json_destroy(l);
        line = end + 1;
    }
    CHECK_MSG(steps == 7 && most_loss >= 9 && most_norm >= 9, "%d lines, %d and %d digits", steps, most_loss, most_norm);
    CHECK(fabs(sum / 7 / number(j, "train_loss") - 1) < 1e-8);
    mft_json_destroy(j);
    free(log);

    /* without --json: a sentence on stdout, progress on stderr; the same seed, the same adapter */
    CHECK(run("finetune --model @/q --data @/text.txt --output @/adapter2 --seq-len 16 --max-steps 7 --batch-size 2 --lora-rank 4 --lora-dropout 0.1 --seed 5 --lr 1e-2 "
              "--warmup-steps 2 --lr-scheduler linear --threads 1") == 0);
    first_err = strstr(err, "step 7/7");
    CHECK(first_err && strstr(err, "trains") && strstr(err, "q_proj") && strstr(out, "adapter2"));
    {
        size_t a = 0, b = 0;
        char  *x = test_read_file(in_room("adapter/adapter_model.safetensors"), &a), *y = test_read_file(in_room("adapter2/adapter_model.safetensors"), &b);
        CHECK(x && y && a == b && !memcmp(x, y, a));
        free(x); free(y);
    }
    /* the adapter makes the difference it was trained for, from the outside too */
    CHECK(run("perplexity --model @/q --adapter @/adapter --data @/text.txt --seq-len 16 --json") == 0);
    j = one_object(out, "tokens loss perplexity tokens_per_second peak_rss_bytes");
    CHECK_MSG(fabs(number(j, "loss") / evaluated - 1) < 0.2 && fabs(number(j, "perplexity") / exp(number(j, "loss")) - 1) < 1e-6, "%s", out);
    sum = number(j, "loss");
    mft_json_destroy(j);
    CHECK(run("merge --model @/q --adapter @/adapter --output @/merged --json") == 0);
    mft_json_destroy(one_object(out, "output"));
    CHECK(run("perplexity --model @/q --adapter @/adapter --data @/text.txt --seq-len 16 --compare --json") == 0);
    mft_json_destroy(one_object(out, "tokens loss perplexity base_perplexity compare tokens_per_second peak_rss_bytes"));
    write_file(in_room("asked.jsonl"), asked, sizeof asked - 1);
    CHECK(run("eval --model @/q --adapter @/adapter --data @/asked.jsonl --max-tokens 3 --compare --output @/answers.jsonl --json") == 0);
    mft_json_destroy(one_object(out, "questions accuracy exact_match log_likelihood_per_token log_likelihood_per_question cut fewer_examples compare"));
    CHECK(test_file_exists(in_room("answers.jsonl")));
    CHECK(run("eval --model @/q --data @/asked.jsonl") == 0 && strstr(out, "accuracy") && !strstr(out, "exact"));
    CHECK(run("perplexity --model @/merged --data @/text.txt --seq-len 16 --json") == 0);
    j = one_object(out, "tokens loss perplexity tokens_per_second peak_rss_bytes");
    CHECK(fabs(number(j, "loss") / sum - 1) < 1e-5);
    mft_json_destroy(j);
    CHECK(run("finetune --model @/q --adapter @/adapter --data @/rows.jsonl --format jsonl --no-pack --no-shuffle --output @/adapter3 --epochs 2 --json") == 0);
    j = one_object(out, keys);
    CHECK(number(j, "steps") == 6 && mft_json_type(mft_json_get(j, "eval_loss")) == MFT_JSON_NULL && mft_json_type(mft_json_get(j, "eval_perplexity")) == MFT_JSON_NULL);
    mft_json_destroy(j);
    CHECK(run("finetune --model tests/golden/qwen2 --data @/ids.bin --format tokens --no-shuffle --full --output @/full --seq-len 12 --batch-size 4 --json --grad-checkpointing") == 0);
    j = one_object(out, keys);
    CHECK(number(j, "steps") == 2 && test_file_exists(in_room("full/model.safetensors")) && test_file_exists(in_room("full/config.json")));
    mft_json_destroy(j);
    CHECK(run("finetune --model @/q --data @/text.txt --full --master-dtype bf16 --plan --json") == 0 && mft_json_parse(ctx, out, strlen(out), &j) == MFT_OK);
    CHECK(number(j, "trainable") < 0.55 * number(j, "gradients"));      /* matrices; vectors are f32 as all gradients are */
    mft_json_destroy(j);
    CHECK(run("finetune --model @/q --data @/text.txt --plan --json") == 0);
    j = one_object(out, "weights_mapped weights_resident weights_held trainable gradients optimizer activations workspaces step tokenizer data process total state_mapped state_resident micro_batch drops_pages blocks blocks_recomputed mlp_rows grad_checkpointing");
    CHECK(number(j, "gradients") == number(j, "trainable") && number(j, "trainable") > 0);
    CHECK(number(j, "state_mapped") == 0 && number(j, "total") == number(j, "weights_resident") + number(j, "state_resident") + number(j, "weights_held") + number(j, "trainable") + number(j, "gradients") + number(j, "optimizer") + number(j, "step") + number(j, "tokenizer") + number(j, "data") + number(j, "process"));
    mft_json_destroy(j);
}

/* Evaluations, the best kept, data with names of its own and bad lines, flags from files. */
static void test_loop(void)
{
    static const char data[] = "{\"q\": \"The cat\", \"a\": \" sat on the mat.\"}\nnot json\n{\"q\": \"The dog\", \"a\": \" sat on the log.\"}\n{\"q\": \"The end\", \"a\": \" is near.\"}\n"
                               "{\"q\": \"The sun and the cat and the dog and the mat and the log\", \"a\": \" is up.\"}\n";
    static const char yaml[] = "# how to train\nmodel: \"%s/q\"\ndata: %s/odd.jsonl   # ours\nprompt_key: q\ncompletion-key: 'a'\nskip-bad-lines: true\nlora_modules: [q_proj, v_proj]\n"
                               "lora-rank: 3\nseed: 3\nmax-steps: 9\nfull: false\nseq-len: 20\neval-split: 0.3\neval-steps: 2\nload-best: yes\noutput: %s/configured\n";
    char      text[3000], *a, *b;
    size_t    n = 0, m = 0;
    mft_json *j;
    write_file(in_room("odd.jsonl"), data, sizeof data - 1);
    expect("finetune --model @/q --data @/odd.jsonl --output @/x --prompt-key q --completion-key a", 1, "line 2, column 1");
    expect("finetune --model @/q --data @/odd.jsonl --output @/x --skip-bad-lines", 1, "not one good line");
    snprintf(text, sizeof text, yaml, room, room, room);
    write_file(in_room("run.yaml"), text, strlen(text));
    CHECK_MSG(run("finetune --config @/run.yaml --lora-rank 2 --log @/loop.log --lr 1e-2") == 0, "%s", err);
    CHECK_MSG(strstr(err, "1 bad lines skipped") && strstr(err, "[[ ") && strstr(err, "(best)") && strstr(err, "WARNING") && strstr(err, "nothing to learn from") && strstr(err, "--seq-len"), "%s", err);
    CHECK_MSG(strstr(out, "9 steps") && strstr(out, "held out"), "%s", out);
    a = test_read_file(in_room("loop.log"), NULL);
    for (b = a; b && (b = strstr(b, "\"eval_loss\":")) != NULL; b++) n++;
    CHECK_MSG(n == 5, "%d evaluations in the log", (int)n);
    free(a);
    a = test_read_file(in_room("configured/finetune.yaml"), NULL);
    CHECK_MSG(a && strstr(a, "lora-rank: 2\n") && strstr(a, "eval-split: 0.3\n") && strstr(a, "load-best: true\n") && strstr(a, "lora-modules: \"q_proj,v_proj\"\n") && strstr(a, "optim: \"adamw\"\n"), "%s", a);
    free(a);
    /* the written config repeats the run */
    a = test_read_file(in_room("configured/adapter_model.safetensors"), &n);
    snprintf(text, sizeof text, "finetune --config @/configured/finetune.yaml --output @/repeated --log @/loop2.log --json");
    CHECK_MSG(run(text) == 0, "%s", err);
    b = test_read_file(in_room("repeated/adapter_model.safetensors"), &m);
    CHECK(a && b && n == m && !memcmp(a, b, n));
    free(a); free(b);
    j = one_object(out, "steps train_loss eval_loss eval_perplexity tokens_per_second peak_rss_bytes trainable_parameters output");
    CHECK(number(j, "steps") == 9 && number(j, "eval_loss") > 0);
    mft_json_destroy(j);
    /* JSON does as well; what is wrong in a file is named */
    snprintf(text, sizeof text, "{\"model\": \"%s/q\", \"data\": \"%s/text.txt\", \"output\": \"%s/x2\", \"max_steps\": 50, \"lora_modules\": [\"q_proj\", \"v_proj\"], \"lr\": 0.001, \"full\": false}", room, room, room);
    write_file(in_room("run.json"), text, strlen(text));
    CHECK_MSG(run("finetune --config @/run.json --epochs 1 --seq-len 32 --json") == 0, "%s", err);
    write_file(in_room("bad.yaml"), "seed: 3\nlora-rnk: 4\n", strlen("seed: 3\nlora-rnk: 4\n"));
    expect("finetune --config @/bad.yaml", 2, "line 2: unknown key \"lora-rnk\", did you mean lora-rank?");
    write_file(in_room("bad.yaml"), "seed: 3\n\nbatch-size: many\n", strlen("seed: 3\n\nbatch-size: many\n"));
    expect("finetune --config @/bad.yaml", 2, "line 3");
    write_file(in_room("bad.yaml"), "full: perhaps\n", strlen("full: perhaps\n"));
    expect("finetune --config @/bad.yaml", 2, "true or false");
    write_file(in_room("bad.yaml"), "{\"seed\": {\"a\": 1}}", strlen("{\"seed\": {\"a\": 1}}"));
    expect("finetune --config @/bad.yaml", 2, "flat");
    expect("finetune --config @/nowhere.yaml", 2, "nowhere.yaml");
    expect("finetune --model @/q --data @/text.txt --output @/x --eval-split 0.1 --eval-data @/text.txt", 2, "--eval-split");
    expect("finetune --model @/q --data @/text.txt --output @/x --eval-steps 5", 1, "eval_data");
    /* a directory's validation split is found; CRLF and a byte order mark are no text */
    snprintf(text, sizeof text, "mkdir -p %s/dir && cp %s/rows.jsonl %s/dir/train.jsonl && cp %s/rows.jsonl %s/dir/validation.jsonl", room, room, room, room, room);
    CHECK(system(text) == 0 && run("finetune --model @/q --data @/dir --output @/x3 --max-steps 2 --json") == 0);
    CHECK(strstr(out, "\"eval_loss\":null") == NULL);
    CHECK(run("perplexity --model @/q --data @/text.txt --seq-len 16 --json") == 0);
    j = one_object(out, "tokens loss perplexity tokens_per_second peak_rss_bytes");
    write_file(in_room("crlf.txt"), "\xef\xbb\xbfThe cat sat on the mat. The dog sat on the log.\r\nThe end of it all is near, and the sun is up.\r\n", 3 + 94 + 2);
    CHECK(run("perplexity --model @/q --data @/crlf.txt --seq-len 16 --json") == 0);
    {
        mft_json *k = one_object(out, "tokens loss perplexity tokens_per_second peak_rss_bytes");
        CHECK(number(j, "loss") == number(k, "loss") && number(j, "tokens") == number(k, "tokens"));
        mft_json_destroy(k);
    }
    mft_json_destroy(j);
}

static void test_other_commands(void)
{
    mft_json        *j;
    mft_safetensors *st = NULL;
    const mft_safetensors_entry *e;
    char             first[2000], *lines;
    static const char three[] = "{\"text\": \"The cat\"}\n{\"text\": \"\"}\n{\"text\": \"a\\nb\", \"more\": 1}\n";
    CHECK(run("tokenize --model @/q --text 'The cat'") == 0 && out[0] >= '0' && out[0] <= '9');
    snprintf(first, sizeof first, "tokenize --model @/q --decode '%.*s'", (int)strcspn(out, "\n"), out);
    CHECK_MSG(run(first) == 0 && !strcmp(out, "The cat\n"), "%s", out);
    CHECK(run("tokenize --model @/q --text 'The cat' --json") == 0);
    j = one_object(out, "ids");
    CHECK(mft_json_count(mft_json_get(j, "ids")) > 0);
    mft_json_destroy(j);
    CHECK(run("tokenize --model @/q --decode '[35, 36]' --json") == 0);
    mft_json_destroy(one_object(out, "text"));
    CHECK(run("tokenize --model @/q --file @/text.txt") == 0 && strlen(out) > 20);
    write_file(in_room("texts.jsonl"), three, sizeof three - 1);
    CHECK(run("tokenize --model @/q --jsonl @/texts.jsonl --no-special") == 0);
    lines = out;
    CHECK_MSG(lines[0] == '[' && strstr(lines, "]\n[]\n["), "%s", out);
    write_file(in_room("texts.jsonl"), "{\"text\": \"The cat\"}\n{\"txt\": 1}\n", 31);
    CHECK(run("tokenize --model @/q --jsonl @/texts.jsonl") == 1 && strstr(err, "line 2") && strstr(err, "texts.jsonl"));

    CHECK(run("generate --model @/q --prompt 'The cat' --max-tokens 5 --ignore-eos --json --temperature 0.9 --top-k 40 --top-p 0.9 --seed 4") == 0);
    j = one_object(out, "prompt_tokens tokens text");
    CHECK(mft_json_count(mft_json_get(j, "tokens")) == 5 && mft_json_count(mft_json_get(j, "prompt_tokens")) > 0);
    snprintf(first, sizeof first, "%s", out);
    mft_json_destroy(j);
    CHECK(run("generate --model @/q --prompt 'The cat' --max-tokens 5 --ignore-eos --json --temperature 0.9 --top-k 40 --top-p 0.9 --seed 4") == 0 && !strcmp(first, out));
    CHECK(run("generate --model @/q --adapter @/adapter --prompt 'The cat' --max-tokens 5") == 0 && !*err);

    CHECK(run("logits --model tests/golden/qwen2 --tokens @/ids.bin --seq-len 12 --output @/l.safetensors --json") == 0);
    mft_json_destroy(one_object(out, "shape output"));
    CHECK(mft_safetensors_open(ctx, in_room("l.safetensors"), &st) == MFT_OK);
    e = st ? mft_safetensors_find(st, "logits") : NULL;
    CHECK(e && e->ndim == 3 && e->shape[0] == 8 && e->shape[1] == 12 && e->shape[2] == 53 && e->dtype == MFT_F32);
    mft_safetensors_close(st);

    CHECK(run("inspect @/q --json") == 0);
    CHECK(mft_json_parse(ctx, out, strlen(out), &j) == MFT_OK && !strcmp(mft_json_string(mft_json_get(j, "family"), NULL), "qwen2") && number(j, "vocab_size") == 430);
    CHECK(mft_json_count(mft_json_get(j, "layer_types")) == (size_t)number(j, "n_layer") && mft_json_count(mft_json_get(j, "files")) >= 3);
    CHECK(number(mft_json_get(mft_json_get(j, "plan"), "bytes"), "total") > number(mft_json_get(mft_json_get(j, "plan"), "bytes"), "weights_mapped"));
    mft_json_destroy(j);
    CHECK(run("inspect @/adapter --json") == 0);
    CHECK(mft_json_parse(ctx, out, strlen(out), &j) == MFT_OK && number(j, "r") == 4);
    mft_json_destroy(j);
    CHECK(run("inspect tests/golden/gpt2/model.safetensors --json") == 0);
    CHECK(mft_json_parse(ctx, out, strlen(out), &j) == MFT_OK && mft_json_count(mft_json_get(j, "tensors")) == 28);
    mft_json_destroy(j);
    CHECK(run("inspect @/q") == 0 && strstr(out, "qwen2") && strstr(out, "LoRA") && strstr(out, "memory plan"));
    CHECK(strstr(out, "model.layers.*.self_attn.q_proj.weight") && strstr(out, "tokenizer.json"));
    CHECK(run("inspect @/adapter") == 0 && strstr(out, "rank 4"));

    CHECK(run("bench --model tests/golden/qwen2 --seq-len 12 --max-steps 2 --threads 1 --json") == 0);
    j = one_object(out, "row threads precision peak_gflops bandwidth_gb_per_s results");
    CHECK(number(j, "peak_gflops") > 0 && mft_json_count(mft_json_get(j, "results")) == 1);
    CHECK(number(mft_json_at(mft_json_get(j, "results"), 0, NULL), "tokens_per_second") > 0);
    mft_json_destroy(j);
    CHECK(run("bench decode --model @/q --threads 1 --json") == 0);           /* as stored, q8_0, q4_0: only read, a prompt, a token each */
    j = one_object(out, "row threads precision peak_gflops bandwidth_gb_per_s results");
    CHECK(mft_json_count(mft_json_get(j, "results")) == 9 && number(mft_json_at(mft_json_get(j, "results"), 8, NULL), "gb_per_s") > 0);
    mft_json_destroy(j);
    CHECK(run("bench threads --model tests/golden/qwen2 --threads 1 --json") == 0);
    j = one_object(out, "row threads precision peak_gflops bandwidth_gb_per_s results");
    CHECK(number(mft_json_at(mft_json_get(j, "results"), 0, NULL), "speed_ratio") > 0);
    mft_json_destroy(j);
    CHECK(run("bench scaling --model tests/golden/qwen2 --max-steps 1 --threads 1 --json") == 0);       /* three lengths, and few learnt */
    j = one_object(out, "row threads precision peak_gflops bandwidth_gb_per_s results");
    CHECK(mft_json_count(mft_json_get(j, "results")) == 4 && number(mft_json_at(mft_json_get(j, "results"), 3, NULL), "time_ratio") > 0);
    mft_json_destroy(j);
    expect("bench everything", 2, "kernels, ops, steps");

    CHECK(run("init --config @/config.json --seed 3 --output @/q2 --json") == 0);
    mft_json_destroy(one_object(out, "output"));
    CHECK(run("init --config @/config.json --seed 3 --dtype bf16 --output @/q3") == 0);
    {
        size_t a = 0, b = 0;
        char  *x = test_read_file(in_room("q/model.safetensors"), &a), *y = test_read_file(in_room("q2/model.safetensors"), &b);
        CHECK(x && y && a == b && !memcmp(x, y, a));
        free(x); free(y);
    }
}

/* Stopped by a limit on steps that is then raised, or by its checkpoint, a run goes on as if it had not been. */
/* A conversation through a pipe; @/adapter is there from test_finetune. */
static void test_chat(void)
{
    static const char lines[] = "The cat\n\n/adapter none\n/reset\nThe cat\r\n/adapter nowhere\n/adapter adapter\n/reset\nThe cat\nand\n/frobnicate\n/exit\nnot this\n";
    char  *answers, *first, *second, *third;
    write_file(in_room("talk"), lines, sizeof lines - 1);
    write_file(in_room("plain.jinja"), "{% for m in messages %}{{ m.content }}{% endfor %}", 50);
    CHECK(run("generate --model @/q --prompt \"The cat\" --max-tokens 6 --no-special") == 0);
    answers = strdup(out);
    expect("chat --model @/q --adapter @/adapter --adapter second=@/adapter --chat-template @/plain.jinja --max-tokens 6 <@/talk", 0, "/frobnicate is no command");
    CHECK_MSG(strstr(err, "nowhere") && strstr(err, "second") && !strstr(err, "> "), "%s", err);
    first = out; second = strchr(first, '\n'); third = second ? strchr(++second, '\n') : NULL;
    CHECK_MSG(third != NULL, "%s", out);
    if (third) {
        third++;
        CHECK_MSG(!strncmp(second, answers, (size_t)(third - second)) && strlen(answers) == (size_t)(third - second), "the base answers as it generates: %s, %s", second, answers);
        CHECK_MSG(!strncmp(first, third, (size_t)(second - first)), "the adapter that is back answers as before: %s", out);
    }
    free(answers);
    expect("chat --model @/q --chat-template @/nowhere", 1, "nowhere");
    expect("chat --model @/q --adapter @/nowhere", 1, "nowhere");
    CHECK(run("chat --model @/q --chat-template chatml </dev/null") == 0 && !*out);

    /* 64 positions: old turns are forgotten, the system's words are not; one turn of more is left out, and the talk goes on */
    {
        char   many[2000] = "", *p;
        size_t i, lines_out = 0;
        for (i = 0; i < 8; i++) strcat(many, "The dog sat on the log.\n");
        for (i = 0; i < 30; i++) strcat(many, "The cat sat on the mat. ");
        strcat(many, "\nThe end\n");
        write_file(in_room("talk"), many, strlen(many));
        expect("chat --model @/q --chat-template @/plain.jinja --system 'The sun is up.' --max-tokens 500 <@/talk", 0, "oldest turns are forgotten: the model has 64 positions");
        CHECK_MSG(strstr(err, "the model has 64 positions: it is left out") != NULL, "%s", err);
        for (p = out; (p = strchr(p, '\n')) != NULL; p++) lines_out++;
        CHECK_MSG(lines_out >= 9, "9 of 10 turns are answered: %s", out);
    }
}

/* Bytes of a file, once they have not grown for a fifth of a second (`still`) or are more than `above`; 60 s at most. */
static off_t watch(const char *path, int still, off_t above)
{
    struct timespec t;
    struct stat     st;
    off_t           bytes = -1;
    int             tries, calm = 0;
    t.tv_sec = 0; t.tv_nsec = 20000000;
    for (tries = 0; tries < 3000; tries++) {
        off_t now = stat(path, &st) == 0 ? st.st_size : 0;
        calm = now == bytes ? calm + 1 : 0;
        bytes = now;
        if (still ? calm >= 10 : bytes > above) break;
        nanosleep(&t, NULL);
    }
    return bytes;
}

/* Ctrl-C in the middle of an answer ends the answer; the next line is answered; at the prompt it ends the program. */
static void test_chat_interrupt(void)
{
    char  command[3000], answers[700], *text;
    int   pipes[2], status = 0, i;
    pid_t child;
    off_t bytes = 0;
    CHECK(run("generate --model @/q --prompt \"The cat\" --max-tokens 60 --no-special --json") == 0);
    if ((text = test_read_file(in_room("config.json"), NULL)) != NULL) {        /* the same weights, and a million positions */
        char  longer[600], *at = strstr(text, "\"max_position_embeddings\": 64");
        snprintf(longer, sizeof longer, "%.*s\"max_position_embeddings\": 1000000%s", (int)(at - text), text, at + strlen("\"max_position_embeddings\": 64"));
        write_file(in_room("q/config.json"), longer, strlen(longer));
    }
    snprintf(answers, sizeof answers, "%s/answers", room);
    snprintf(command, sizeof command, "exec %s chat --model %s/q --chat-template %s/plain.jinja --max-tokens 900000 --seed 3 --temperature 1 --top-k 3 >%s 2>%s/.err", mft, room, room, answers, room);
    CHECK(pipe(pipes) == 0);
    child = fork();
    if (child == 0) { dup2(pipes[0], 0); close(pipes[0]); close(pipes[1]); execl("/bin/sh", "sh", "-c", command, (char *)NULL); _exit(127); }
    close(pipes[0]);
    for (i = 0; i < 2; i++) {
        CHECK(write(pipes[1], "The cat\n", 8) == 8);
        watch(answers, 0, bytes + 200);
        CHECK(kill(child, SIGINT) == 0);
        bytes = watch(answers, 1, 0);
    }
    CHECK(kill(child, SIGINT) == 0 && waitpid(child, &status, 0) == child);
    free(err);
    err = test_read_file(in_room(".err"), NULL);
    CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 130, "status %x: %s", (unsigned)status, err ? err : "");
    CHECK_MSG(bytes > 400, "%ld bytes", (long)bytes);
    close(pipes[1]);
    if (text) write_file(in_room("q/config.json"), text, strlen(text));
    free(text);
}

static void test_resume(void)
{
    static const char flags[] = "finetune --model @/q --data @/text.txt --seq-len 8 --batch-size 2 --lora-dropout 0.1 --lr 1e-2 --max-steps 12 --lr-scheduler constant --json ";
    char     line[600];
    size_t   a = 0, b = 0;
    char    *x, *y, *log;
    mft_json *j;
    snprintf(line, sizeof line, "%s --output @/whole", flags);
    CHECK(run(line) == 0);
    snprintf(line, sizeof line, "%s --output @/parts --checkpoint-save-steps 5 --checkpoint_save_dir @/saved --save-total-limit 1 --log @/parts.log", flags);
    CHECK(run(line) == 0 && test_file_exists(in_room("saved/checkpoint-10/trainer_state.json")) && !test_file_exists(in_room("saved/checkpoint-5/trainer_state.json")));
    log = test_read_file(in_room("parts.log"), &a);
    write_file(in_room("parts.log"), log, a - 20);              /* cut, as a kill may leave it */
    free(log);
    CHECK(unlink(in_room("parts/adapter_model.safetensors")) == 0);
    snprintf(line, sizeof line, "%s --output @/parts --checkpoint-save-dir @/saved --resume-from latest --threads 1 --log @/parts.log", flags);
    CHECK_MSG(run(line) == 0, "%s", err);
    j = one_object(out, "steps train_loss eval_loss eval_perplexity tokens_per_second peak_rss_bytes trainable_parameters output");
    CHECK(number(j, "steps") == 12);
    mft_json_destroy(j);
    x = test_read_file(in_room("whole/adapter_model.safetensors"), &a); y = test_read_file(in_room("parts/adapter_model.safetensors"), &b);
    CHECK(x && y && a == b && !memcmp(x, y, a));
    free(x); free(y);
    log = test_read_file(in_room("parts.log"), NULL);
    for (x = log, a = 0; x && (y = strchr(x, '\n')) != NULL; x = y + 1) CHECK(strtol(x + 8, NULL, 10) == (long)++a);
    CHECK_MSG(a == 12 && x && !*x, "%s", log);
    free(log);
    snprintf(line, sizeof line, "%s --output @/parts --resume-from @/saved/checkpoint-10 --lora-rank 5", flags);
    expect(line, 1, "rank is 8, this adapter's 5");
    snprintf(line, sizeof line, "%s --output @/fresh --resume-from latest", flags);
    expect(line, 1, "fresh: no checkpoint");
}

/* Does a file hold the text? */
static int holds(const char *name, const char *text)
{
    char *all = test_read_file(in_room(name), NULL);
    int   found = all && strstr(all, text) != NULL;
    free(all);
    return found;
}

static void write_line(FILE *f, long step, double loss, double elapsed)
{
    fprintf(f, "{\"step\":%ld,\"loss\":%.10g,\"lr\":0.001,\"grad_norm\":1.5,\"tokens\":64,\"tokens_per_second\":1000,\"peak_rss_bytes\":41943040,\"elapsed_s\":%g}\n", step, loss, elapsed);
}

/* Logs as a page: what stands in it and beside the log, what is wrong with a log, what fails. */
static void test_report_page(void)
{
    static const char flags[] = "finetune --model @/q --data @/text.txt --eval-data @/text.txt --eval-steps 2 --seq-len 16 --max-steps 5 --batch-size 2 --seed 5 --lr 1e-2 --lora-dropout 0.1 --json";
    char        line[700], *page, *again;
    const char *at;
    size_t      a = 0, b = 0;
    mft_json   *j;
    FILE       *f;
    long        i, n;
    /* samples change nothing of what is trained; they and the settings stand beside the log */
    snprintf(line, sizeof line, "%s --output @/plain", flags);
    CHECK(run(line) == 0);
    snprintf(line, sizeof line, "%s --output @/said --log @/said.jsonl --samples 1 --sample-prompt '</script><b>The & cat'", flags);
    CHECK_MSG(run(line) == 0, "%s", err);
    page = test_read_file(in_room("plain/adapter_model.safetensors"), &a); again = test_read_file(in_room("said/adapter_model.safetensors"), &b);
    CHECK(page && again && a == b && !memcmp(page, again, a));
    free(page); free(again);
    CHECK(mft_json_load(ctx, in_room("said.jsonl.about.json"), &j) == MFT_OK);
    CHECK(mft_json_count(mft_json_get(j, "samples")) == 2 && number(mft_json_get(j, "config"), "max-steps") == 5 && number(mft_json_get(j, "run"), "steps") == 5);
    for (i = 0; i < 2; i++) {
        const mft_json *sample = mft_json_at(mft_json_get(j, "samples"), (size_t)i, NULL);
        CHECK(mft_json_string(mft_json_get(sample, "before"), NULL) && mft_json_string(mft_json_get(sample, "after"), NULL));
        if (i) CHECK_MSG(!strncmp(mft_json_string(mft_json_get(sample, "prompt"), NULL), "The cat sat", 11), "%s", mft_json_string(mft_json_get(sample, "prompt"), NULL));
    }
    mft_json_destroy(j);
    CHECK(holds("said/finetune.yaml", "sample-prompt: \"</script>") && holds("said/finetune.yaml", "samples: 1\n"));
    CHECK(run("report @/said.jsonl --output @/page.html --json") == 0);
    mft_json_destroy(one_object(out, "output runs bytes"));
    page = test_read_file(in_room("page.html"), NULL);
    CHECK(page && !strncmp(page, "<!doctype html>", 15) && strstr(page, "&lt;/script&gt;&lt;b&gt;The &amp; cat") && strstr(page, ">max-steps<") && strstr(page, "held out"));
    for (n = 0, at = page; at && (at = strstr(at, "</script>")) != NULL; at++) n++;
    CHECK_MSG(n == 1, "%ld ends of scripts", n);
    CHECK(page && !strstr(page, "http://") && !strstr(page, "https://") && !strstr(page, "nan") && !strstr(page, "inf<"));
    free(page);

    /* broken lines, losses that are none, steps that go back, a last line that is cut */
    f = fopen(in_room("odd.jsonl"), "w");
    for (i = 1; i <= 40; i++) write_line(f, i, 4.0, (double)i);
    fprintf(f, "not json\n\n{\"step\":\"x\"}\n");
    for (i = 31; i <= 60; i++) write_line(f, i, 2.0, (double)(i - 30));
    fprintf(f, "{\"step\":61,\"loss\":null}\n{\"step\":62,\"loss\":NaN,\"lr\":Infinity,\"grad_norm\":-Infinity}\n{\"step\":62,\"eval_loss\":1.5}\n{\"step\":63,\"lo");
    fclose(f);
    CHECK_MSG(run("report @/odd.jsonl @/said.jsonl --name '<i>odd</i>' --output @/page.html") == 0, "%s", err);
    CHECK(holds("page.html", "&lt;i&gt;odd&lt;/i&gt;: the run was stopped and went on once; the last time behind step 30. Steps that were done again are drawn as they went last (10 lines are left out)"));
    CHECK(holds("page.html", ": 2 steps have no finite loss") && holds("page.html", ": 2 lines of the log could not be read; the first is line 41."));
    CHECK(holds("page.html", "the last line is cut in the middle") && holds("page.html", "said</span>") && holds("page.html", "1m10s") && !holds("page.html", "<i>odd"));
    CHECK_MSG(holds("page.html", ">odd</i>") == 0 && holds("page.html", "1.500"), "an evaluation on a line of its own");

    /* long logs stay small, and lose no spike */
    f = fopen(in_room("long.jsonl"), "w");
    for (i = 1; i <= 100000; i++) write_line(f, i, i == 54321 ? 9.0 : i == 65432 ? 1.0 : 2.0 + (double)(i % 7) / 10, (double)i);
    fclose(f);
    CHECK(run("report @/long.jsonl --output @/page.html") == 0);
    page = test_read_file(in_room("page.html"), &a);
    CHECK_MSG(a < 150000, "%d bytes", (int)a);
    at = page ? strstr(page, "id=loss-0-raw") : NULL;
    CHECK_MSG(at && strstr(at, "543.205,100 ") && strstr(at, "654.317,900 "), "the highest of 100000 at step 54321, the lowest at 65432: %.60s", at ? at : "no such path");
    free(page);

    /* a memory trace, as JSONL and as CSV */
    write_file(in_room("trace.jsonl"), "{\"t_ms\":0,\"rss_bytes\":1048576,\"step\":0,\"phase\":\"load\"}\n{\"t_ms\":5,\"rss_bytes\":3145728,\"step\":1,\"phase\":\"back<ward\"}\n{\"t_ms\":9,", strlen("{\"t_ms\":0,\"rss_bytes\":1048576,\"step\":0,\"phase\":\"load\"}\n{\"t_ms\":5,\"rss_bytes\":3145728,\"step\":1,\"phase\":\"back<ward\"}\n{\"t_ms\":9,"));
    write_file(in_room("trace.csv"), "t_ms,rss_bytes,step,phase\n0,1048576,0,load\n5,2097152,1,forward\n", strlen("t_ms,rss_bytes,step,phase\n0,1048576,0,load\n5,2097152,1,forward\n"));
    CHECK(run("report @/said.jsonl @/odd.jsonl --memory-trace @/trace.jsonl --memory-trace @/trace.csv --output @/page.html") == 0);
    CHECK(holds("page.html", "back&lt;ward") && holds("page.html", ">forward<") && holds("page.html", "id=trace-1"));

    /* a damaged companion is said, and done without */
    write_file(in_room("odd.jsonl.about.json"), "{\"config\": {\"model\"", 20);
    expect("report @/odd.jsonl --output @/page.html", 0, "odd.jsonl.about.json");
    expect("report", 2, "which logs?");
    expect("report @/odd.jsonl", 2, "--output");
    expect("report @/odd.jsonl --name a --name b --output @/no.html", 2, "--name");
    expect("report @/nowhere.jsonl --output @/no.html", 1, "nowhere.jsonl");
    expect("report @/empty --output @/no.html", 1, "is empty");
    expect("report @/text.txt --output @/no.html", 1, "no step in 2 lines");
    expect("report @/odd.jsonl --memory-trace @/text.txt --output @/no.html", 1, "no sample of memory");
    expect("report @/odd.jsonl --output @/no/where.html", 1, "where.html");
    expect("finetune --model tests/golden/qwen2 --data @/ids.bin --format tokens --output @/no --samples 1", 1, "tokenizer");
    CHECK(!test_file_exists(in_room("no.html")) && access(in_room("no"), F_OK) != 0);
}

/* SIGINT in the middle: 130, a word on stderr, no adapter; a checkpoint if the flags ask for one. */
static void interrupt(const char *flags)
{
    char   command[4000], log[700];
    pid_t  child;
    int    status = 0, tries;
    snprintf(log, sizeof log, "%s/live", room);
    unlink(log);
    snprintf(command, sizeof command, "exec %s finetune --model %s/q --data %s/text.txt --output %s/stopped --seq-len 16 --max-steps 100000000 --json --log %s %s >%s/.out 2>%s/.err", mft, room, room, room, log,
             flags, room, room);
    child = fork();
    if (child == 0) { execl("/bin/sh", "sh", "-c", command, (char *)NULL); _exit(127); }
    for (tries = 0; tries < 600; tries++) {                     /* until it is at work */
        struct stat     st;
        struct timespec t;
        t.tv_sec = 0; t.tv_nsec = 50000000;
        if (stat(log, &st) == 0 && st.st_size > 1000) break;
        nanosleep(&t, NULL);
    }
    CHECK(kill(child, SIGINT) == 0 && waitpid(child, &status, 0) == child);
    CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 130, "status %x", (unsigned)status);
    free(out); free(err);
    out = test_read_file(in_room(".out"), NULL); err = test_read_file(in_room(".err"), NULL);
    CHECK(out && err && !*out && strstr(err, "interrupted"));
    CHECK(!test_file_exists(in_room("stopped/adapter_model.safetensors")));
    CHECK_MSG((strstr(err, "--resume-from latest") != NULL) == (*flags != '\0'), "%s", err);
}

static void test_interrupt(void)
{
    interrupt("");
    interrupt("--checkpoint-save-steps 1000000");
    interrupt("--resume-from latest");                          /* who resumes has checkpoints, and wants more */
    CHECK(count_files(in_room("stopped"), "checkpoint-") == 2);
    expect("finetune --model @/q --data @/text.txt --output @/stopped --seq-len 16 --max-steps 1 --resume-from latest", 0, "goes on behind step");
}

int main(void)
{
    const char *build = getenv("BUILD"), *prefix = getenv("RUN");
    snprintf(mft, sizeof mft, "%.300s %.300s/mft", prefix ? prefix : "", build && *build ? build : "build");
    if (!room_make("cli") || mft_context_create(NULL, &ctx) != MFT_OK) return 1;
    TEST(set_up);
    TEST(test_usage);
    TEST(test_failures);
    TEST(test_finetune);
    TEST(test_chat);
    TEST(test_resume);
    TEST(test_loop);
    TEST(test_other_commands);
    TEST(test_report_page);
    TEST(test_interrupt);
    TEST(test_chat_interrupt);
    mft_context_destroy(ctx);
    free(out); free(err);
    remove_dir(room);
    return test_report("cli");
}
