#!/bin/sh
# bench_memory.sh - what training takes: mode x model x peak x tokens/s, as the Markdown table the README quotes
#
#   make bench-memory                                    all models, some minutes to half an hour
#   make bench-memory MODELS="gpt2 qwen2.5-0.5b"         some of them
#   make bench-memory STEPS=1 RUN="taskset -c 0,1"       shorter; with something before every run
#
# Each row is a process of its own: `mft finetune` on random tokens, batch 1 x 256, 2 threads, LoRA of rank 8 on q, k, v
# and o (GPT-2: its fused c_attn and c_proj). Models are random, made by `mft init` from tools/configs. Peak is the
# process's resident set (VmHWM), weights included; MB are 10^6 bytes.

MFT=${BUILD:-build}/mft
DIR=${BUILD:-build}/bench-memory
STEPS=${STEPS:-3}
MODELS=${MODELS:-gpt2 gemma-3-270m qwen2.5-0.5b gemma-3-1b-pt gpt2-medium}
SEQ=256

mkdir -p "$DIR" || exit 1
awk -v rows="$((STEPS + 1))" -v seq="$SEQ" 'BEGIN { srand(1); while (rows--) { printf "{\"input_ids\":["
    for (i = 0; i < seq; i++) printf "%s%d", i ? "," : "", int(rand() * 50000); print "]}" } }' > "$DIR/tokens.jsonl"

# model NAME DTYPE: makes it if it is not there yet
model() {
    [ -d "$DIR/$1-$2" ] || "$MFT" init --config "tools/configs/$1.json" --seed 1 --dtype "$2" --output "$DIR/$1-$2" >/dev/null
}

# row NAME DTYPE "WHAT IS DONE" FLAGS...
row() {
    name=$1 dtype=$2 mode=$3
    shift 3
    model "$name" "$dtype" || exit 1
    rm -rf "$DIR/out"
    result=$($RUN "$MFT" finetune --model "$DIR/$name-$dtype" --data "$DIR/tokens.jsonl" --format jsonl --no-pack --no-shuffle --seq-len "$SEQ" \
             --max-steps "$STEPS" --threads 2 --output "$DIR/out" --json "$@" 2>"$DIR/stderr")
    if [ $? -ne 0 ]; then printf '| %s | %s | %s | %s | |\n' "$name" "$dtype" "$mode" "$(tail -n 1 "$DIR/stderr")"; return; fi
    printf '%s\n' "$result" | tr -d '\n' | sed 's/.*"tokens_per_second":\([0-9.e+]*\).*"peak_rss_bytes":\([0-9]*\).*/\1 \2/' |
        awk -v name="$name" -v dtype="$dtype" -v mode="$mode" '{ printf "| %s | %s | %s | %.0f MB | %.0f |\n", name, dtype, mode, $2 / 1e6, $1 }'
    rm -rf "$DIR/out"
}

# lora NAME DTYPE BUDGET: a LoRA adapter, in every way its base can be held
lora() {
    case $1 in gpt2*) modules=c_attn,attn.c_proj ;; *) modules=q_proj,k_proj,v_proj,o_proj ;; esac
    row "$1" "$2" "LoRA, nothing recomputed"    --lora-modules "$modules" --no-grad-checkpointing
    row "$1" "$2" "LoRA"                        --lora-modules "$modules"
    row "$1" "$2" "LoRA, \`--memory-budget\` of $3 MB" --lora-modules "$modules" --memory-budget "${3}000000"
    row "$1" "$2" "LoRA on q8_0"                --lora-modules "$modules" --quantize q8_0
    row "$1" "$2" "LoRA on q4_0"                --lora-modules "$modules" --quantize q4_0
}

# whole NAME DTYPE BUDGET: all weights, in every way their state can be held
whole() {
    row "$1" "$2" "all weights, AdamW"          --full
    row "$1" "$2" "all weights, AdamW, \`--memory-budget\` of $3 MB" --full --memory-budget "${3}000000"
    row "$1" "$2" "all weights, 8-bit AdamW"    --full --optim adamw8bit
    row "$1" "$2" "all weights in bf16, APOLLO-mini, updated in backward" --full --master-dtype bf16 --optim apollo_mini --update-in-backward
    row "$1" "$2" "all weights, SGD"            --full --optim sgd
}

printf 'Batch 1 x %s, %s steps, 2 threads; %s.\n\n' "$SEQ" "$STEPS" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1), $(getconf _NPROCESSORS_ONLN) cores"
printf '| model | file | mode | peak | tokens/s |\n|---|---|---|---|---|\n'
for m in $MODELS; do
    case $m in
    gpt2)          lora gpt2 f32 100;        whole gpt2 f32 150 ;;
    gpt2-medium)   lora gpt2-medium f32 128; whole gpt2-medium f32 250 ;;
    gemma-3-270m)  lora gemma-3-270m bf16 100 ;;
    qwen2.5-0.5b)  lora qwen2.5-0.5b bf16 136 ;;
    gemma-3-1b-pt) lora gemma-3-1b-pt bf16 256 ;;
    *) echo "bench_memory.sh: no model $m" >&2; exit 2 ;;
    esac
done
